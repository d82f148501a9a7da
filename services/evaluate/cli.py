"""The command line of evaluate."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.console import Console
from rich.table import Table

from mien import manifest
from mien.errors import MienError
from services.evaluate import paper, parts

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

_HEADLINES = ("I-A", "I-R", "I-WR", "I-WR-1bit", "A-WR", "A1-A2", "WR1-WR2", "I-I2", "A-I2")


@app.callback(invoke_without_command=True)
def evaluate(
    command: typer.Context,
    model: Annotated[str, typer.Option(help="Model folder.")] = "models/mien-128",
    data: Annotated[str, typer.Option("--data", "--shards", help="Folder or s3:// prefix of shards.")] = "shards/lfw",
    out: Annotated[Path, typer.Option(help="Folder of the report; what is there is gone on with.")] = Path("report"),
    split: Annotated[str, typer.Option(help="train, val or test.")] = "test",
    judges: Annotated[str, typer.Option(help="Comma-separated; the first that is no trainer is the headline.")] = (
        "dlib,mobilefacenet-ms1m,mobilefacenet-casia,inception-vggface2,inception-casia"
    ),
    weights: Annotated[
        Path | None, typer.Option(help="Folder with the recognisers' and LPIPS's safetensors. [../shared/weights]")
    ] = None,
    limit: Annotated[int, typer.Option(min=2, help="Faces, a seeded sample of one a person as far as it goes.")] = 600,
    only: Annotated[
        str, typer.Option("--parts", help=f"Comma-separated, of {', '.join((*parts.NAMES, *parts.GROUPS))}. [all]")
    ] = "",
    seed: Annotated[int, typer.Option(help="Of the sample and of the codes.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="A few of everything: to see that it runs.")] = False,
    train_data: Annotated[
        str | None, typer.Option(help="Shards that attackers learn from. [shards/faces, else the rest of --data]")
    ] = None,
    pairs: Annotated[Path | None, typer.Option(help="LFW's pairs.txt. [../shared/data/lfw-pairs-folds1-5.txt]")] = None,
    photos: Annotated[
        Path | None, typer.Option(help="Folder or tar of whole pictures. [../shared/data/lfw-folds1-5.tar]")
    ] = None,
    baselines: Annotated[Path, typer.Option(help="What train-baselines wrote.")] = Path("runs/baselines"),
    ablations: Annotated[Path, typer.Option(help="What train-ablations wrote.")] = Path("runs/ablations"),
    clips: Annotated[Path | None, typer.Option(help="Folder of videos. [made of the faces]")] = None,
    sweep_codes: Annotated[
        int | None, typer.Option(min=2, help="Codes the sweep tries a face; 65536 are all of 16 bits. [1024]")
    ] = None,
    gates_file: Annotated[
        Path | None, typer.Option("--gates", help="Conditions for promotion. [services/promote/gates.yaml]")
    ] = None,
    asked: Annotated[Path | None, typer.Option("--study", help="What study-score wrote, for the report.")] = None,
    mlflow: Annotated[str | None, typer.Option(help="Tracking URI; the report goes there too.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be measured, and stop.")] = False,
) -> None:
    """Judge a model on faces it never saw, through saved files, and write report.html and report.json."""
    if command.invoked_subcommand is not None:
        return
    names = parts.select(only)
    if split not in manifest.SPLITS:
        raise typer.BadParameter(f"--split is one of {', '.join(manifest.SPLITS)}")
    if dry_run:
        typer.echo(f"would judge {model} on {limit} faces of {data} ({split}) with {judges}: {', '.join(names)}")
        return
    from mien.store import write_atomically
    from services import gates
    from services.evaluate import report, setup, tracking
    from services.evaluate import run as runs
    from services.evaluate import study as studies

    console = Console(stderr=True)
    ready = setup.prepare(
        setup.Request(
            model=model,
            data=data,
            split=cast(manifest.Split, split),
            judges=tuple(filter(None, judges.split(","))),
            weights=weights,
            limit=limit,
            seed=seed,
            quick=quick,
            out=out,
            pairs=pairs,
            photos=photos,
            train_data=train_data,
            baselines=baselines,
            ablations=ablations,
            clips=clips,
            sweep_codes=sweep_codes,
        ),
        console,
    )
    rules = gates.load(gates_file or gates.DEFAULT)
    people = studies.scores(asked, ready.context.subject.digest) if asked else {}
    with ready.context.progress.run():
        results = runs.run(ready.context, names, out, ready.fingerprint)
    flat = runs.flatten(results, ready.meta)
    flat |= people
    verdicts = gates.check(rules, flat)
    flat["gates.passed"], flat["gates.count"] = sum(v.passed for v in verdicts), len(verdicts)
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "report.json", (json.dumps(flat, indent=1) + "\n").encode())
    report.write(out / "report.html", flat, results, verdicts)
    terminal = Console()
    terminal.print(_summary(flat, list(ready.context.judges)))
    for verdict in verdicts:
        terminal.print(str(verdict), markup=False, highlight=False)
    if mlflow is not None:
        try:
            terminal.print(f"MLflow run {tracking.log(mlflow, flat, out)}", markup=False, highlight=False)
        except ConnectionError as error:
            console.print(f"not in MLflow: {error}", style="yellow", markup=False, highlight=False)
    typer.echo(out / "report.html")


@app.command()
def document(
    page: Annotated[Path, typer.Argument(help="The page with the places for them.")] = Path("docs/evaluation.md"),
) -> None:
    """Write the tables of parts and keys into the docs; after a part or a key was added."""
    from services.evaluate import documentation

    page.write_text(documentation.refreshed(page.read_text()))
    typer.echo(page)


@app.command()
def train_baselines(
    data: Annotated[str, typer.Option("--data", "--shards", help="Shards whose train split they learn from.")] = (
        "shards/faces"
    ),
    out: Annotated[Path, typer.Option(help="A folder for each.")] = Path("runs/baselines"),
    weights: Annotated[Path | None, typer.Option(help="For the learned one. [../shared/weights]")] = None,
    only: Annotated[str, typer.Option("--only", help="Comma-separated names. [all]")] = "",
    images: Annotated[int, typer.Option(min=1, help="Each network learns from so many.")] = 1200,
    minutes: Annotated[float, typer.Option(min=0, help="Stop after so long; the same command goes on.")] = 30,
) -> None:
    """Train the deanonymizer of every baseline of table 2, and the learned anonymizer; two minutes each on a CPU."""
    from services.evaluate import baselines, setup, training_runs
    from services.evaluate.deanonymizer import Budget
    from services.evaluate.progress import Progress

    names = _chosen(only, baselines.NAMES)
    progress = Progress(Console(stderr=True))
    with progress.run():
        problems = training_runs.train_baselines(
            data,
            out,
            weights=weights or setup.default("../shared/weights"),
            names=names,
            budget=Budget(images=images),
            progress=progress,
            seconds=60 * minutes,
        )
    for problem in problems:
        typer.echo(f"not trained: {problem}", err=True)
    typer.echo(out)
    raise typer.Exit(1 if problems else 0)


@app.command()
def train_ablations(
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value for every run, as training takes it.")
    ] = None,
    data: Annotated[str, typer.Option("--data", "--shards", help="Shards they learn from.")] = "shards/faces",
    out: Annotated[Path, typer.Option(help="A model folder for each.")] = Path("runs/ablations"),
    only: Annotated[str, typer.Option("--only", help="Comma-separated names. [all]")] = "",
    images: Annotated[int | None, typer.Option(min=1, help="Length of each run. [the configs']")] = None,
) -> None:
    """Train the ablations of section 5.6 and appendix D from training/configs/ablations; goes on where it stopped."""
    from services.evaluate import training_runs
    from services.evaluate.parts import ablations

    names = _chosen(only, ablations.NAMES)
    status = training_runs.train_ablations(data, out, images=images, names=names, overrides=overrides or [])
    typer.echo(out)
    raise typer.Exit(status)


@app.command()
def study(
    model: Annotated[str, typer.Option(help="Model folder.")] = "models/mien-128",
    data: Annotated[str, typer.Option("--data", "--shards", help="Folder of shards.")] = "shards/lfw",
    split: Annotated[str, typer.Option(help="train, val or test.")] = "test",
    out: Annotated[Path, typer.Option(help="Folder for study.html and study-key.json.")] = Path("study"),
    same: Annotated[int, typer.Option(min=0, help="Pairs asked whether they are one person, over six kinds.")] = 600,
    real_anonymized: Annotated[int, typer.Option(min=0, help="Pairs of A and a photo: which is real?")] = 200,
    real_wrong: Annotated[int, typer.Option(min=0, help="Pairs of WR and a photo.")] = 300,
    faces: Annotated[int, typer.Option(min=2, help="Faces the pairs are made of.")] = 200,
    seed: Annotated[int, typer.Option(help="Of the faces, the codes and the order.")] = 0,
) -> None:
    """Make the page of the paper's human study. It needs no server: send it, and collect the saved answers."""
    import mien
    from services.evaluate import faces as shards
    from services.evaluate import study as studies
    from services.evaluate.chain import Chain, Subject
    from services.evaluate.progress import Progress

    if split not in manifest.SPLITS:
        raise typer.BadParameter(f"--split is one of {', '.join(manifest.SPLITS)}")
    loaded = mien.load(model)
    sample = shards.draw(shards.read_shards(data, cast(manifest.Split, split)), faces, seed)
    progress = Progress(Console(stderr=True))
    chain = Chain(
        Subject(loaded.transform, loaded.bits, loaded.digest), sample.faces.images, seed=seed, progress=progress
    )
    counts = studies.Counts(same=same, real_anonymized=real_anonymized, real_wrong=real_wrong)
    with progress.run():
        html, key = studies.build(chain, sample.rest.images, counts, seed=seed, folder=out)
    typer.echo(f"the key, which participants must not see: {key}")
    typer.echo(html)


@app.command()
def study_score(
    answers: Annotated[list[Path], typer.Argument(help="Saved answers of one participant or several.")],
    key: Annotated[Path, typer.Option(help="study-key.json of that study.")] = Path("study/study-key.json"),
    out: Annotated[Path, typer.Option(help="The shares as flat JSON.")] = Path("study/study.json"),
) -> None:
    """Score what people answered, beside what the paper's people said."""
    from services.evaluate import study as studies

    result = studies.score(studies.merge(answers), json.loads(key.read_text()))
    table = Table("asked", "share", "answers", "the paper", title="people")
    for name in sorted(n for n in result.figures if n.endswith((".same", ".more-real"))):
        kind = name.split(".")[1]
        asked = (paper.SAME_PERSON if name.endswith(".same") else paper.MORE_REAL).get(kind)
        share, low, high = (100 * result.figures[f"{name}{end}"] for end in ("", ".low", ".high"))
        question = f"{kind}: one person" if name.endswith(".same") else f"{kind}: more real than a photo"
        theirs = "" if asked is None else f"{100 * asked:.1f} %"
        count = f"{result.figures[f'{name}.n']:.0f}"
        table.add_row(question, f"{share:.1f} % [{low:.1f}, {high:.1f}]", count, theirs)
    Console().print(table)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"study.id": json.loads(key.read_text())["study"], **result.figures}, indent=1) + "\n")
    typer.echo(out)


def _chosen(only: str, names: tuple[str, ...]) -> list[str]:
    wanted = [n.strip() for n in only.split(",") if n.strip()] or list(names)
    for name in wanted:
        if name not in names:
            raise typer.BadParameter(f"there is no {name!r}; there are {', '.join(names)}")
    return wanted


def _summary(flat: dict[str, Any], judges: list[str]) -> Table:
    """The first look, on the terminal."""
    table = Table("measure", *judges, "the paper", title=f"taken for one person at FPR {flat['fpr']:g}, %")
    for pair in _HEADLINES:
        cells = []
        for judge in judges:
            key = f"verification.{judge}.{pair}"
            if f"{key}.same" not in flat:
                cells.append("-")
                continue
            share, low, high = (100 * flat[f"{key}.same{end}"] for end in ("", ".low", ".high"))
            cells.append(f"{share:.1f} [{low:.1f}, {high:.1f}] cos {flat[f'{key}.cosine']:.2f}")
        asked = paper.SAME_PERSON.get(pair)
        table.add_row(pair, *cells, "" if asked is None else f"{100 * asked:.1f} (people)")
    table.add_section()
    for kind in ("I", "A", "R", "WR"):
        keys = [f"reidentification.{judge}.{kind}.rank1" for judge in judges]
        if any(k in flat for k in keys):
            table.add_row(f"rank-1 of {kind}", *(f"{100 * flat[k]:.1f}" if k in flat else "-" for k in keys), "")
    table.add_section()
    blanks = [""] * (len(judges) - 1)
    for name in ("lpips", "dssim", "l1", "l2", "psnr"):
        if f"recovery.{name}" in flat:
            asked = paper.RECOVERY.get(name)
            table.add_row(f"recovery {name}", f"{flat[f'recovery.{name}']:.4f}", *blanks, str(asked or ""))
    for name in ("box", "landmarks"):
        if f"detection.mtcnn.{name}" in flat:
            shift = f"{flat[f'detection.mtcnn.{name}']:.2f} px"
            table.add_row(f"MTCNN {name} shift", shift, *blanks, f"{paper.DETECTION[name]} px")
    return table


def main() -> None:
    """Run the command line; what the user can act on is one line on stderr and exit status 2."""
    try:
        app()
    except (MienError, OSError, ValueError) as error:
        typer.echo(f"evaluate: {error}", err=True)
        sys.exit(2)
