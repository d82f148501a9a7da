"""The command line of ingest: options to a config, a run, a table of what became of every file."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import storage
from mien.errors import MienError
from mien.manifest import MANIFEST, SPLITS, Manifest
from services.ingest import config as configs
from services.ingest import pipeline
from services.ingest.config import IngestConfig, IngestError

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

_STAGES = {"crop": "cropping faces", "compare": "comparing with the test set", "shards": "writing shards"}


@app.command()
def ingest(
    out: Annotated[str, typer.Option(help="Folder or s3://bucket/prefix for the shards; with --verify, to check.")],
    config: Annotated[Path | None, typer.Option(help="YAML with sources and settings; options override it.")] = None,
    source: Annotated[
        list[str] | None,
        typer.Option(help="Photos: a folder, uncompressed .tar, RecordIO .rec, or s3://... of one; repeatable."),
    ] = None,
    landmarks: Annotated[
        list[str] | None,
        typer.Option(help="Landmarks (jsonl) of each --source, in the same order; detected where not given."),
    ] = None,
    aligned: Annotated[
        str | None,
        typer.Option(help="insightface: the photos are crops aligned to its template, as in .rec files usually."),
    ] = None,
    layout: Annotated[str | None, typer.Option(help="people, unlabelled, lfw, casia-webface or ffhq. [people]")] = None,
    licence: Annotated[str | None, typer.Option(help="Terms of use of the --source photos, for the manifest.")] = None,
    split: Annotated[str | None, typer.Option(help="train/val/test shares, by person. [80/10/10]")] = None,
    test_only: Annotated[bool, typer.Option("--test-only", help="Everything into the test split.")] = False,
    seed: Annotated[int | None, typer.Option(help="Of the division and the order. [0]")] = None,
    crop_size: Annotated[int | None, typer.Option(help="Side of the square crops, pixels. [128]")] = None,
    shard_size: Annotated[int | None, typer.Option(help="Samples in a shard, at most. [1000]")] = None,
    image: Annotated[str | None, typer.Option(help="jpg (quality 95, 4:4:4) or png. [jpg]")] = None,
    min_confidence: Annotated[float | None, typer.Option(help="Of the detector, at least. [0.95]")] = None,
    min_eyes: Annotated[float | None, typer.Option(help="Pixels between the eyes, at least. [16]")] = None,
    max_residual: Annotated[
        float | None, typer.Option(help="RMS distance of landmarks from the template, at most. [8]")
    ] = None,
    min_inside: Annotated[float | None, typer.Option(help="Part of the crop inside the photo, at least. [0.3]")] = None,
    exclude_like: Annotated[
        Path | None, typer.Option(help="Shards of a test set; who resembles somebody in it is set aside.")
    ] = None,
    judge_weights: Annotated[
        Path | None, typer.Option(help="mobilefacenet_casia.safetensors, which compares for --exclude-like.")
    ] = None,
    max_cosine: Annotated[float | None, typer.Option(help="Similarity that sets somebody aside. [0.5]")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes. The shards do not depend on their number.")] = 1,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace shards that are there.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")] = False,
    verify_only: Annotated[
        bool, typer.Option("--verify", help="Check the shards at --out against their manifest.")
    ] = False,
) -> None:
    """Turn photos into aligned square face crops in WebDataset shards, with a manifest.

    Every file that cannot be used is listed with its reason in rejected.jsonl beside the manifest. A run that was cut
    off goes on where it stopped when the same command is given again. Exit codes: 0 done, 2 something to be mended, 75
    something that may pass (a store that does not answer, a killed process): give the command again.
    """
    console = Console(stderr=True)
    where = storage.base.join(storage.open_prefix(out).url, MANIFEST)
    if verify_only:
        _report(console, pipeline.verify(out))
        typer.echo(f"sound: {where}")
        return
    overrides = {
        "split": (0.0, 0.0, 1.0) if test_only else configs.parse_split(split) if split else None,
        "seed": seed,
        "crop_size": crop_size,
        "shard_size": shard_size,
        "image": image,
        "min_confidence": min_confidence,
        "min_eyes": min_eyes,
        "max_residual": max_residual,
        "min_inside": min_inside,
        "exclude_like": exclude_like,
        "judge_weights": judge_weights,
        "max_cosine": max_cosine,
    }
    settings = _settings(config, source or [], landmarks or [], layout, licence, aligned, overrides)
    if test_only:  # also over a split that the YAML gives a source of its own
        sources = tuple(item.model_copy(update={"split": None}) for item in settings.sources)
        settings = settings.model_copy(update={"sources": sources})
    if dry_run:
        _announce(settings, out)
        return
    work = pipeline.plan(settings)  # what is wrong with a source is said before any bar is drawn
    with _progress(console) as advance:
        manifest = pipeline.run(settings, out, work=work, workers=workers, overwrite=overwrite, advance=advance)
    _report(console, manifest)
    typer.echo(f"{sum(manifest.samples.values())} crops in {len(manifest.shards)} shards: {where}")


@contextmanager
def _progress(console: Console) -> Iterator[pipeline.Advance]:
    """Bars on a terminal; elsewhere, as in a cluster's logs, a line now and then."""
    if not console.is_terminal:
        yield _Lines(console)
        return
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        console=console,
    ) as progress:
        tasks: dict[str, Any] = {}

        def advance(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(_STAGES[stage], total=total, completed=done, rate="")
            speed = progress.tasks[tasks[stage]].speed
            progress.update(tasks[stage], completed=done, rate=f"{speed:.0f}/s" if speed else "")

        yield advance


class _Lines:
    """Progress as lines: how many, how fast, how long still."""

    def __init__(self, console: Console, every: float = 10.0) -> None:
        self._console, self._every = console, every
        self._stage, self._begun, self._first, self._said = "", 0.0, 0, 0.0

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        if stage != self._stage:
            self._stage, self._begun, self._first, self._said = stage, now, done, now
            self._console.print(f"{_STAGES[stage]}: {done}/{total}{' done before' if done else ''}", highlight=False)
        elif done == total or now - self._said >= self._every:
            self._said = now
            rate = (done - self._first) / max(now - self._begun, 1e-9)
            left = timedelta(seconds=round((total - done) / rate)) if rate else "?"
            self._console.print(f"{_STAGES[stage]}: {done}/{total}, {rate:.0f}/s, {left} left", highlight=False)


def _settings(
    config: Path | None,
    sources: list[str],
    landmarks: list[str],
    layout: str | None,
    licence: str | None,
    aligned: str | None,
    overrides: dict[str, Any],
) -> IngestConfig:
    """The config of the YAML, or of ``--source``, with what other options say."""
    given = {name: value for name, value in overrides.items() if value is not None}
    if (config is None) == (not sources):
        raise IngestError("give either --config or --source")
    if config is not None and (landmarks or layout or licence or aligned):
        raise IngestError(
            "--landmarks, --layout, --licence and --aligned go with --source; in a --config each source has its own"
        )
    if landmarks and len(landmarks) != len(sources):
        raise IngestError(f"{len(sources)} times --source needs as many --landmarks or none, not {len(landmarks)}")
    try:
        if config is not None:
            base = configs.load(config).model_dump(exclude_unset=True)
            return IngestConfig.model_validate({**base, **given})
        items = [
            {
                "name": _name(path),
                "path": path,
                "aligned": aligned,
                "landmarks": landmarks[i] if landmarks else None,
                "layout": layout or "people",
                "licence": licence or "not stated",
            }
            for i, path in enumerate(sources)
        ]
        return IngestConfig.model_validate({"sources": items, **given})
    except ValidationError as error:
        details = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'options'}: {e['msg']}" for e in error.errors())
        raise IngestError(details) from error


def _name(path: str) -> str:
    name = path.rstrip("/").rpartition("/")[2] if storage.is_s3(path) else Path(path).name or Path(path).resolve().name
    return name.removesuffix(".tar").removesuffix(".rec")


def _announce(settings: IngestConfig, out: str) -> None:
    """What a run would do, from the lists alone."""
    for work in pipeline.plan(settings):
        where = "landmarks given" if work.landmarks is not None else "faces detected"
        where = "crops already aligned" if work.source.aligned else where
        people = len({photo.identity for photo in work.photos if photo.identity})
        shares = "/".join(f"{100 * share:g}" for share in work.source.split or settings.split)
        files = f"{work.source.name}: {len(work.photos)} files, {people or 'no'} people"
        typer.echo(f"{files}, {where}, {'/'.join(SPLITS)} {shares}")
    typer.echo(
        f"would write {settings.crop_size} px crops as {settings.image} to {out}, seed {settings.seed}; nothing done"
    )


def _report(console: Console, manifest: Manifest) -> None:
    """Files of each source and what became of them; samples and people of each split."""
    table = Table(title="files")
    for column in ("source", "files", "samples", "not used, and why"):
        table.add_column(column, justify="right" if column in ("files", "samples") else "left")
    for source in manifest.sources:
        why = ", ".join(f"{reason} {n}" for reason, n in source.rejected.items()) or "-"
        table.add_row(source.name, str(source.files), str(source.samples), why)
    console.print(table)
    table = Table(title="splits")
    for column in ("split", "samples", "people", "nobody named", "shards"):
        table.add_column(column, justify="left" if column == "split" else "right")
    for split in SPLITS:
        people = len(manifest.identities[split].names)
        counts = (manifest.samples[split], people, manifest.unlabelled[split], len(manifest.of(split)))
        table.add_row(split, *map(str, counts))
    console.print(table)


def main() -> None:
    """Run the command line; what the user can act on is one line on stderr and exit status 2, or 75 if it may pass."""
    try:
        app()
    except (storage.Unreachable, pipeline.WorkerDied) as error:
        typer.echo(f"ingest: {error}", err=True)
        sys.exit(os.EX_TEMPFAIL)
    except (MienError, OSError) as error:
        hint = "; give another --out, or --overwrite" if isinstance(error, FileExistsError) else ""
        typer.echo(f"ingest: {error}{hint}", err=True)
        sys.exit(2)
