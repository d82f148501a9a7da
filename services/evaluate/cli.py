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
    data: Annotated[str, typer.Option("--data", "--shards", help="Folder of shards with its manifest.")] = "shards/lfw",
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
    from services.evaluate import run as runs
    from services.evaluate import setup

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
        ),
        console,
    )
    with ready.context.progress.run():
        results = runs.run(ready.context, names, out, ready.fingerprint)
    flat = runs.flatten(results, ready.meta)
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.json").write_text(json.dumps(flat, indent=1) + "\n")
    Console().print(_summary(flat, list(ready.context.judges)))
    typer.echo(out / "report.json")


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
