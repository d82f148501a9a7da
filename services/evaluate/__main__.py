"""``python -m services.evaluate --model M --shards S --out report.json``; see ``--help``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from rich.table import Table

from mien import manifest

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

# What people said of the paper's pictures (its section 5.3), in percent: the nearest it has to these shares.
PAPER = {"I-A": 4.7, "I-R": 100.0, "I-WR": 0.7, "A-WR": 1.3, "A1-A2": 12.2, "WR1-WR2": 2.7}
PAPER_RECOVERY = {"lpips": 0.04, "dssim": 0.03, "l1": 0.04}


@app.command()
def main(
    model: Annotated[Path, typer.Option(help="model folder")],
    shards: Annotated[Path, typer.Option(help="folder of shards with its manifest")],
    out: Annotated[Path, typer.Option(help="where the figures go, JSON")] = Path("report.json"),
    split: Annotated[manifest.Split, typer.Option(help="train, val or test")] = "test",
    weights: Annotated[
        Path | None, typer.Option(help="folder with mobilefacenet_ms1m.safetensors and lpips_alex.safetensors")
    ] = None,
    limit: Annotated[int, typer.Option(help="faces, a seeded sample")] = 600,
    seed: Annotated[int, typer.Option(help="of the sample and of the codes")] = 0,
    dry_run: Annotated[bool, typer.Option(help="say what would be measured, and stop")] = False,
) -> None:
    """Judge a model on aligned faces, through 8-bit files. dlib always; MobileFaceNet (MS1M), LPIPS with --weights."""
    import mien
    from mien import recognisers
    from services.evaluate import measure

    console = Console()
    judge_names = ["dlib"] + (["mobilefacenet-ms1m"] if weights else [])
    if dry_run:
        console.print(f"would judge {model} on {limit} faces of {shards} ({split}) with {', '.join(judge_names)}")
        return
    loaded = mien.load(model)
    faces = measure.read_shards(shards, split, limit, seed)
    distances: dict[str, measure.Distance] = {"l1": measure.l1, "psnr": measure.psnr, "dssim": measure.dssim}
    if weights:
        distances["lpips"] = measure.lpips_distance(weights / "lpips_alex.safetensors")
    with Progress("faces", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task("faces", total=len(faces.images))
        figures = measure.report(
            loaded.transform,
            faces,
            bits=loaded.bits,
            judges={name: recognisers.load(name, weights) for name in judge_names},
            distances=distances,
            seed=seed,
            progress=lambda done: progress.update(task, completed=done),
        )
    record = {"model": loaded.digest, "shards": str(shards), "split": split, "seed": seed, **figures}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n")
    console.print(_tables(figures, judge_names))
    typer.echo(out)


def _tables(figures: dict[str, float | int], judges: list[str]) -> Table:
    table = Table("measure", *(f"{j}" for j in judges), "the paper", title="share taken for one person at FPR 1e-3, %")
    pairs = [k.split("/")[2] for k in figures if k.startswith(f"verification/{judges[0]}/") and k.endswith("/same")]
    for pair in pairs:
        cells = []
        for judge in judges:
            key = f"verification/{judge}/{pair}"
            low, high = figures[f"{key}/same/low"] * 100, figures[f"{key}/same/high"] * 100
            cells.append(
                f"{figures[f'{key}/same'] * 100:.1f} [{low:.1f}, {high:.1f}], cos {figures[f'{key}/cosine']:.2f}"
            )
        table.add_row(pair, *cells, f"{PAPER[pair]:.1f} (people)" if pair in PAPER else "")
    table.add_section()
    for name in ("lpips", "dssim", "l1", "psnr"):
        if f"recovery/{name}" in figures:
            value = f"{figures[f'recovery/{name}']:.4f}"
            blanks = [""] * (len(judges) - 1)
            table.add_row(f"recovery {name}", value, *blanks, str(PAPER_RECOVERY.get(name, "")))
    return table


if __name__ == "__main__":
    app()
