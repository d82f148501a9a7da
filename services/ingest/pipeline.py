"""Photos in, shards and a manifest out.

Crops go through a spool file beside the shards: what can be used is only known once every photo was read, and only then
can samples be divided and shuffled. So memory holds a line per photo, never the pictures.
"""

from __future__ import annotations

import json
import multiprocessing
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import IO

from mien import manifest as manifests
from mien.geometry import Points
from mien.manifest import MANIFEST, SPLITS, Manifest, SourceRecord, Split
from services.ingest import crops, shards, splits
from services.ingest.config import IngestConfig, IngestError, Source
from services.ingest.crops import Crop, DetectedFace, Limits, Reason, Rejection
from services.ingest.likeness import resembling
from services.ingest.shards import Sample
from services.ingest.sources import Landmarks, Photo, photos, read_landmarks

REJECTED = "rejected.jsonl"

_CHUNK = 32

Advance = Callable[[str, int, int], None]
"""Told of progress: (stage, done, total)."""


@dataclass(frozen=True)
class Work:
    """A source, listed."""

    source: Source
    photos: list[Photo]
    landmarks: dict[str, Landmarks | None] | None


def plan(config: IngestConfig) -> list[Work]:
    """List every source and read the landmarks files, without opening a photo.

    Raises:
        IngestError: a source or a landmarks file is missing or malformed.
    """
    return [
        Work(source, photos(source), read_landmarks(source.landmarks) if source.landmarks else None)
        for source in config.sources
    ]


def run(
    config: IngestConfig,
    out: Path,
    *,
    work: list[Work] | None = None,
    workers: int = 1,
    overwrite: bool = False,
    advance: Advance = lambda stage, done, total: None,
) -> Manifest:
    """Write ``out/{train,val,test}-*.tar``, ``out/rejected.jsonl`` and, last, ``out/manifest.json``.

    The same sources, config and library versions give the same bytes, whatever the number of workers. Nothing at
    ``out`` changes before every shard is written beside it.

    Args:
        config: sources and thresholds.
        out: folder, created where missing.
        work: what :func:`plan` listed, where that was done already.
        workers: processes that decode and crop.
        overwrite: replace shards that are there.
        advance: told of progress.

    Raises:
        IngestError: a source is unusable, or no photo could be used.
        ShardError: ``exclude_like`` is not a sound folder of shards.
        FileExistsError: there are shards already and ``overwrite`` is off.
    """
    if (out / MANIFEST).exists() and not overwrite:
        raise FileExistsError(f"{out} holds shards already")
    work = plan(config) if work is None else work
    out.mkdir(parents=True, exist_ok=True)
    with _building_site(out) as site, open(site / "spool", "w+b") as spool:
        samples, rejected = _collect(config, work, spool, workers, advance)
        if config.exclude_like is not None and config.judge_weights is not None:
            alike = resembling(
                samples,
                spool,
                config.exclude_like,
                config.judge_weights,
                config.max_cosine,
                lambda done, total: advance("compare", done, total),
            )
            rejected += [
                Rejection(s.source, s.file, Reason.LIKE_TEST_SET, alike[s.key]) for s in samples if s.key in alike
            ]
            samples = [sample for sample in samples if sample.key not in alike]
        if not samples:
            reasons = ", ".join(f"{reason} ({n})" for reason, n in Counter(r.reason for r in rejected).most_common(3))
            raise IngestError(f"no photo could be used: {reasons}")
        manifest = _write(config, work, samples, rejected, spool, site, advance)
        (site / "spool").unlink()
        _publish(site, out, manifest)
    return manifest


def _collect(
    config: IngestConfig, work: list[Work], spool: IO[bytes], workers: int, advance: Advance
) -> tuple[list[Sample], list[Rejection]]:
    samples: list[Sample] = []
    rejected: list[Rejection] = []
    first_with: dict[str, str] = {}
    total, done = sum(len(item.photos) for item in work), 0
    offset = 0
    for item in work:
        names = {photo.name for photo in item.photos}
        for name in sorted((item.landmarks or {}).keys() - names):
            rejected.append(Rejection(item.source.name, name, Reason.MISSING, "the landmarks file has a line for it"))
        for result in _crops(config, item, workers):
            done += 1
            advance("crop", done, total)
            if isinstance(result, Crop):
                photo = result.photo
                before = first_with.setdefault(result.digest, f"{photo.source}/{photo.name}")
                if before != f"{photo.source}/{photo.name}":
                    rejected.append(Rejection(photo.source, photo.name, Reason.DUPLICATE, f"the bytes of {before}"))
                    continue
                spool.write(result.image)
                samples.append(_sample(result, offset))
                offset += len(result.image)
            else:
                rejected.append(result)
    return samples, rejected


def _sample(crop: Crop, offset: int) -> Sample:
    photo = crop.photo
    return Sample(
        key=shards.key_of(photo.source, photo.name),
        source=photo.source,
        file=photo.name,
        unit=photo.identity or f"{photo.source}/{photo.name}",
        identity=photo.identity,
        landmarks=_rounded(crop.landmarks),
        outline=_rounded(crop.outline),
        inside=crop.inside,
        offset=offset,
        length=len(crop.image),
    )


def _rounded(points: Points) -> tuple[tuple[float, float], ...]:
    return tuple((round(float(x), 2), round(float(y), 2)) for x, y in points)


def _crops(config: IngestConfig, item: Work, workers: int) -> Iterator[Crop | Rejection]:
    """Every photo's crop or rejection, in the order of the photos."""
    limits = Limits(
        size=config.crop_size,
        image=config.image,
        min_confidence=config.min_confidence,
        min_eyes=config.min_eyes,
        max_residual=config.max_residual,
        min_inside=config.min_inside if item.source.min_inside is None else item.source.min_inside,
        fill=item.source.fill,
    )
    detect = item.landmarks is None
    known = item.landmarks or {}
    jobs = (
        (item.source.labelled, [(photo, known.get(photo.name)) for photo in chunk], limits, detect)
        for chunk in (item.photos[i : i + _CHUNK] for i in range(0, len(item.photos), _CHUNK))
    )
    if workers <= 1:
        for job in jobs:
            yield from _chunk(*job)
        return
    # spawn: forking a process in which torch has started threads can hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_one_thread) as pool:
        for results in pool.map(_unpacked, jobs):
            yield from results


def _unpacked(job: tuple[bool, list[tuple[Photo, Landmarks | None]], Limits, bool]) -> list[Crop | Rejection]:
    return _chunk(*job)


def _chunk(
    labelled: bool, chunk: list[tuple[Photo, Landmarks | None]], limits: Limits, detect: bool
) -> list[Crop | Rejection]:
    results: list[Crop | Rejection] = []
    for photo, landmarks in chunk:
        if labelled and photo.identity is None and photo.regular:
            detail = "the layout says one folder per person"
            results.append(Rejection(photo.source, photo.name, Reason.NO_IDENTITY, detail))
        else:
            results.append(crops.crop(photo, landmarks, _finder() if detect else None, limits))
    return results


_detector: DetectedFace | None = None


def _finder() -> DetectedFace:
    """One detector a process: it takes seconds to load."""
    global _detector
    _detector = _detector or DetectedFace()
    return _detector


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def _write(
    config: IngestConfig,
    work: list[Work],
    samples: list[Sample],
    rejected: list[Rejection],
    spool: IO[bytes],
    site: Path,
    advance: Advance,
) -> Manifest:
    shares = {item.source.name: item.source.split or config.split for item in work}
    # A namespace that spans sources has one division, that of the first source that a person appears in.
    place: dict[str, Split] = {}
    for sample in samples:
        if sample.unit not in place:
            place[sample.unit] = splits.split_of(sample.unit, shares[sample.source], config.seed)
    people: dict[Split, set[str]] = {split: set() for split in SPLITS}
    for sample in samples:
        if sample.identity is not None:
            people[place[sample.unit]].add(sample.identity)
    identities = splits.number(people)
    numbers = {name: of.first + i for of in identities.values() for i, name in enumerate(of.names)}
    by_key = {sample.key: sample for sample in samples}
    order = [by_key[key] for key in splits.shuffled(by_key, config.seed)]
    written = []
    done = 0

    def count(n: int) -> None:
        nonlocal done
        done += n
        advance("shards", done, len(order))

    for split in SPLITS:
        part = [sample for sample in order if place[sample.unit] == split]
        written += shards.write(
            site, split, part, spool, numbers, shard_size=config.shard_size, image=config.image, progress=count
        )
    lines = [
        json.dumps({**asdict(r), "reason": r.reason.value}, ensure_ascii=False) for r in sorted(rejected, key=_place)
    ]
    (site / REJECTED).write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    per_split = Counter(place[sample.unit] for sample in samples)
    nameless = Counter(place[sample.unit] for sample in samples if sample.identity is None)
    return Manifest(
        crop_size=config.crop_size,
        image=config.image,
        seed=config.seed,
        settings={
            "min_confidence": config.min_confidence,
            "min_eyes": config.min_eyes,
            "max_residual": config.max_residual,
            "min_inside": config.min_inside,
            "shard_size": config.shard_size,
            "max_cosine": config.max_cosine if config.exclude_like else None,
            "excluded_like": manifests.digest(config.exclude_like) if config.exclude_like else None,
        },
        versions={name: version(name) for name in ("mien", "numpy", "pillow", "torch")},
        samples={split: per_split[split] for split in SPLITS},
        unlabelled={split: nameless[split] for split in SPLITS},
        identities=identities,
        sources=tuple(_source_record(item, config.min_inside, samples, rejected) for item in work),
        shards=tuple(written),
    )


def _place(rejection: Rejection) -> tuple[str, str]:
    return rejection.source, rejection.file


def _source_record(
    item: Work, min_inside: float, samples: Iterable[Sample], rejected: Iterable[Rejection]
) -> SourceRecord:
    name = item.source.name
    reasons = Counter(r.reason.value for r in rejected if r.source == name)
    return SourceRecord(
        name=name,
        layout=item.source.layout,
        fill=item.source.fill,
        min_inside=min_inside if item.source.min_inside is None else item.source.min_inside,
        licence=item.source.licence,
        files=len(item.photos),
        samples=sum(sample.source == name for sample in samples),
        rejected=dict(sorted(reasons.items())),
    )


@contextmanager
def _building_site(out: Path) -> Iterator[Path]:
    """A folder beside the shards, so that moving them in is a rename; removed whatever happens."""
    site = Path(tempfile.mkdtemp(prefix=".ingest-", dir=out))
    try:
        yield site
    finally:
        shutil.rmtree(site, ignore_errors=True)


def _publish(site: Path, out: Path, manifest: Manifest) -> None:
    """Move everything in, the manifest last: without one a folder is unfinished, and readers say so."""
    from mien.store import write_atomically  # brings torch, which looking and verifying do without

    (out / MANIFEST).unlink(missing_ok=True)
    for old in out.glob("*.tar"):
        old.unlink()
    for new in sorted(site.iterdir()):
        new.replace(out / new.name)
    write_atomically(out / MANIFEST, (manifest.model_dump_json(indent=1) + "\n").encode())
