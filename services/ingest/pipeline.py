"""Photos in, shards and a manifest out.

What can be used, who is in it and where it belongs is only known once every photo was read. So crops are kept in parts
(:mod:`services.ingest.site`) until then, and memory holds a line per photo, never the pictures.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Final

import storage
from mien import manifest as manifests
from mien.manifest import MANIFEST, SPLITS, Manifest, SourceRecord, Split
from services.ingest import crops, reading, shards, splits
from services.ingest.config import IngestConfig, IngestError, Source
from services.ingest.crops import Crop, Decoded, DetectedFace, Limits, Reason, Rejection
from services.ingest.likeness import resembling
from services.ingest.site import PART, Sample, Site, fingerprint
from services.ingest.sources import Landmarks, Photo, photos, read_landmarks

REJECTED: Final = "rejected.jsonl"

_CHUNK: Final = 64
# What a detector is given at once: enough to be worth it, and little enough to be held decoded.
_BATCH: Final = 16
_BATCH_PIXELS: Final = 8_000_000

Advance = Callable[[str, int, int], None]
"""Told of progress: (stage, done, total). The first call of a stage says what an earlier run has done."""


class WorkerDied(IngestError):
    """A process that decodes was killed; the same command goes on."""


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
        storage.StorageError: one is in S3, which does not answer or refuses.
    """
    return [
        Work(source, photos(source), read_landmarks(source.landmarks) if source.landmarks else None)
        for source in config.sources
    ]


def run(
    config: IngestConfig,
    out: str | os.PathLike[str],
    *,
    work: list[Work] | None = None,
    workers: int = 1,
    overwrite: bool = False,
    advance: Advance = lambda stage, done, total: None,
) -> Manifest:
    """Write ``out/{train,val,test}-*.tar``, ``out/rejected.jsonl`` and, last, ``out/manifest.json``.

    The same sources, config and library versions give the same bytes, whatever the number of workers, and however
    often the run was cut off and started again: what it had done lies in ``out/.ingest``. In a folder nothing but that
    changes before every shard is written; in S3, which cannot rename, shards appear one by one, and the manifest last.

    Args:
        config: sources and thresholds.
        out: folder, created where missing, or ``s3://`` prefix.
        work: what :func:`plan` listed, where that was done already.
        workers: processes that decode and crop.
        overwrite: replace shards that are there.
        advance: told of progress.

    Raises:
        IngestError: a source is unusable, or no photo could be used.
        WorkerDied: a process was killed.
        ShardError: ``exclude_like`` is not a sound folder of shards.
        FileExistsError: there are shards already and ``overwrite`` is off.
        storage.StorageError: S3 does not answer or refuses.
    """
    out = os.fspath(out)
    target = storage.open_prefix(out)
    target.check()
    work = plan(config) if work is None else work
    site = Site(out, fingerprint(_facts(config, work)))
    if target.exists(MANIFEST):
        there = target.read(MANIFEST)
        if site.finished(there):
            site.remove()
            return Manifest.model_validate_json(there)
        if not overwrite:
            raise FileExistsError(f"{out} holds shards already")
    done = site.begin()
    try:
        samples, rejected = _collect(config, work, site, done, workers, advance)
        if config.exclude_like is not None and config.judge_weights is not None:
            ordered = sorted(samples, key=lambda sample: (sample.part, sample.offset))
            alike = resembling(
                ordered,
                shards.pictures(site, ordered),
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
        manifest = _write(config, work, samples, rejected, site, target, advance)
    except (IngestError, manifests.ShardError) as error:
        if not isinstance(error, WorkerDied):  # starting again would change nothing
            site.remove()
        raise
    site.remove()
    return manifest


def verify(out: str | os.PathLike[str]) -> Manifest:
    """:func:`mien.manifest.verify` for a folder or an ``s3://`` prefix, of which it holds one shard at a time.

    Raises:
        ShardError: naming the first disagreement.
        storage.StorageError: S3 does not answer or refuses.
    """
    if not storage.is_s3(out):
        return manifests.verify(out)
    import tempfile

    place = storage.open_prefix(out)
    place.check()
    with tempfile.TemporaryDirectory(prefix="mien-verify-") as folder:

        def fetched(name: str) -> Path:
            for old in Path(folder).iterdir():
                old.unlink()
            try:
                place.download(name, Path(folder, name))
            except (storage.NotFound, storage.ChecksumMismatch) as error:
                raise manifests.ShardError(str(error)) from error
            return Path(folder, name)

        return manifests.verify(out, local=fetched)


def _facts(config: IngestConfig, work: list[Work]) -> dict[str, object]:
    """What decides about the crops and their order."""
    listed = hashlib.sha256()
    for item in work:
        for p in item.photos:
            listed.update(f"{p.name}\0{p.object}\0{p.version}\0{p.offset}\0{p.size}\n".encode())
        for name, marks in (item.landmarks or {}).items():
            said = None if marks is None else (marks.points.tolist(), marks.size, marks.confidence)
            listed.update(f"{name}\0{said}\n".encode())
    # How samples are divided and packed is decided afterwards.
    later = {"split", "shard_size", "exclude_like", "judge_weights", "max_cosine"}
    settings = config.model_dump(mode="json", exclude=later | {"sources"})
    sources = [item.source.model_dump(mode="json", exclude={"split", "licence"}) for item in work]
    return {"format": 1, "part": PART, "settings": settings, "sources": sources, "listed": listed.hexdigest(),
            "versions": _versions()}  # fmt: skip


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("mien", "numpy", "pillow", "torch")}


def _collect(
    config: IngestConfig, work: list[Work], site: Site, done: int, workers: int, advance: Advance
) -> tuple[list[Sample], list[Rejection]]:
    """Every usable photo once, and what is wrong with the others; works on the parts that are not done yet."""
    everything = [(item, photo) for item in work for photo in item.photos]
    parts = [everything[i : i + PART] for i in range(0, len(everything), PART)]
    advance("crop", min(done * PART, len(everything)), len(everything))
    made = _parts(config, parts[done:], workers)
    samples: list[Sample] = []
    rejected: list[Rejection] = []
    for item in work:
        names = {photo.name for photo in item.photos}
        for name in sorted((item.landmarks or {}).keys() - names):
            rejected.append(Rejection(item.source.name, name, Reason.MISSING, "the landmarks file has a line for it"))
    first_with: dict[str, str] = {}
    for number, part in enumerate(parts):
        if number >= done:
            _make_part(config, site, number, part, made, lambda n: advance("crop", n, len(everything)))
        found, refused = site.part(number)
        rejected += refused
        for sample in found:
            before = first_with.setdefault(sample.digest, f"{sample.source}/{sample.file}")
            if before != f"{sample.source}/{sample.file}":
                rejected.append(Rejection(sample.source, sample.file, Reason.DUPLICATE, f"the bytes of {before}"))
            else:
                samples.append(sample)
    site.merge(len(parts))
    return samples, rejected


def _make_part(
    config: IngestConfig,
    site: Site,
    number: int,
    part: list[tuple[Work, Photo]],
    results: Iterator[Crop | Rejection],
    advance: Callable[[int], None],
) -> None:
    samples: list[tuple[Sample, bytes, bytes]] = []
    rejected: list[Rejection] = []
    for n, _ in enumerate(part, start=1):
        result = next(results)
        if isinstance(result, Crop):
            samples.append((_sample(result, number), shards.record_of(result), result.image))
        else:
            rejected.append(result)
        advance(number * PART + n)
    by_key = {sample.key: i for i, (sample, _, _) in enumerate(samples)}
    site.write_part(number, samples, rejected, [by_key[key] for key in splits.shuffled(by_key, config.seed)])


def _sample(crop: Crop, part: int) -> Sample:
    photo = crop.photo
    return Sample(
        key=shards.key_of(photo.source, photo.name),
        source=photo.source,
        file=photo.name,
        unit=photo.identity or f"{photo.source}/{photo.name}",
        identity=photo.identity,
        digest=crop.digest,
        part=part,
        offset=0,
        record=0,
        picture=0,
    )


@dataclass(frozen=True)
class _Job:
    """Photos of one source for one call of a worker."""

    photos: list[Photo]
    landmarks: list[Landmarks | None]
    limits: Limits
    labelled: bool
    detect: bool
    aligned: bool


def _jobs(config: IngestConfig, parts: Iterable[list[tuple[Work, Photo]]]) -> Iterator[_Job]:
    """Jobs never reach over a part or a source: what a detector sees together must not depend on where a run began."""
    for part in parts:
        start = 0
        while start < len(part):
            item = part[start][0]
            chunk = [photo for of, photo in part[start : start + _CHUNK] if of is item]
            start += len(chunk)
            limits = Limits(
                size=config.crop_size,
                image=config.image,
                min_confidence=config.min_confidence,
                min_eyes=config.min_eyes,
                max_residual=config.max_residual,
                min_inside=config.min_inside if item.source.min_inside is None else item.source.min_inside,
                fill=item.source.fill,
            )
            aligned = item.source.aligned is not None
            known = item.landmarks or {}
            marks = [known.get(photo.name) for photo in chunk]
            detect = item.landmarks is None and not aligned
            yield _Job(chunk, marks, limits, item.source.labelled, detect, aligned)


def _parts(config: IngestConfig, parts: Sequence[list[tuple[Work, Photo]]], workers: int) -> Iterator[Crop | Rejection]:
    """Every photo's crop or rejection, in the order of the photos."""
    jobs = _jobs(config, parts)
    if workers <= 1 or not parts:
        for job in jobs:
            yield from _work(job)
        return
    # spawn: forking a process in which torch has started threads can hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_prepare) as pool:
        running: deque[Future[list[Crop | Rejection]]] = deque()
        try:
            for job in jobs:
                running.append(pool.submit(_work, job))
                if len(running) > 2 * workers:  # no more than is needed to keep them busy: results are pictures
                    yield from running.popleft().result()
            while running:
                yield from running.popleft().result()
        except BrokenProcessPool as error:
            raise WorkerDied(
                "a process that decodes pictures was killed, perhaps for want of memory; give fewer --workers."
                " The same command goes on where this one stopped"
            ) from error
        finally:
            for future in running:
                future.cancel()


def _prepare() -> None:
    """In every worker, first."""
    import torch

    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    if parent is not None:
        # A worker of a pool waits for work forever, also when whoever gives it was killed.
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _work(job: _Job) -> list[Crop | Rejection]:
    outcomes: list[Decoded | Crop | Rejection] = []
    wanted = [photo for photo in job.photos if not photo.refused and not (job.labelled and photo.identity is None)]
    data = dict(zip((photo.name for photo in wanted), reading.read(wanted), strict=True))
    waiting: list[int] = []

    def settle() -> None:
        of = [(i, outcome) for i in waiting if isinstance(outcome := outcomes[i], Decoded)]
        marks = _finder()([d.pixels for _, d in of]) if job.detect and of else [d.landmarks for _, d in of]
        for (i, decoded), landmarks in zip(of, marks, strict=True):
            outcomes[i] = crops.crop(decoded, landmarks, job.limits)
        waiting.clear()

    pixels = 0
    for photo, landmarks in zip(job.photos, job.landmarks, strict=True):
        if job.labelled and photo.identity is None and not photo.refused:
            detail = "the layout says one folder per person"
            outcomes.append(Rejection(photo.source, photo.name, Reason.NO_IDENTITY, detail))
            continue
        found = crops.open_photo(photo, data.get(photo.name, b""), landmarks, detect=job.detect, aligned=job.aligned)
        outcomes.append(found)
        if isinstance(found, Decoded):
            waiting.append(len(outcomes) - 1)
            pixels += found.pixels.shape[0] * found.pixels.shape[1]
            if not job.detect or len(waiting) >= _BATCH or pixels >= _BATCH_PIXELS:
                settle()
                pixels = 0
    settle()
    return [outcome for outcome in outcomes if not isinstance(outcome, Decoded)]


_detector: DetectedFace | None = None


def _finder() -> DetectedFace:
    """One detector a process: it takes seconds to load."""
    global _detector
    _detector = _detector or DetectedFace()
    return _detector


def _write(
    config: IngestConfig,
    work: list[Work],
    samples: list[Sample],
    rejected: list[Rejection],
    site: Site,
    target: storage.Prefix,
    advance: Advance,
) -> Manifest:
    """Divide, shuffle, write; the manifest as written."""
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
    written = 0
    advance("shards", 0, len(order))

    def count(n: int) -> None:
        nonlocal written
        written += n
        advance("shards", written, len(order))

    folder = isinstance(target, storage.Folder)
    # A folder is filled by renaming at the end; object storage has no renaming, so shards go where they belong.
    staging = storage.Folder(Path(site.place.url) / "shards") if folder else target
    if not folder:
        target.delete(MANIFEST)  # from here on these shards are unfinished
    records = shards.write(
        site, staging, order, lambda sample: place[sample.unit], numbers,
        shard_size=config.shard_size, image=config.image, progress=count,
    )  # fmt: skip
    lines = [
        json.dumps({**asdict(r), "reason": r.reason.value}, ensure_ascii=False) for r in sorted(rejected, key=_place)
    ]
    per_split = Counter(place[sample.unit] for sample in samples)
    nameless = Counter(place[sample.unit] for sample in samples if sample.identity is None)
    manifest = Manifest(
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
        versions=_versions(),
        samples={split: per_split[split] for split in SPLITS},
        unlabelled={split: nameless[split] for split in SPLITS},
        identities=identities,
        sources=tuple(_source_record(item, config.min_inside, samples, rejected) for item in work),
        shards=tuple(records),
    )
    text = (manifest.model_dump_json(indent=1) + "\n").encode()
    site.finish(text)
    _publish(staging, target, manifest, "".join(line + "\n" for line in lines).encode(), text)
    return manifest


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


def _publish(staging: storage.Prefix, target: storage.Prefix, manifest: Manifest, rejected: bytes, text: bytes) -> None:
    """Everything to its place, the manifest last: without one shards are unfinished, and readers say so."""
    target.delete(MANIFEST)
    names = {shard.name for shard in manifest.shards}
    for entry in list(target.list("")):
        if "/" not in entry.name and entry.name.endswith(".tar") and entry.name not in names:
            target.delete(entry.name)
    if isinstance(staging, storage.Folder) and isinstance(target, storage.Folder):
        for name in sorted(names):
            (staging.path / name).replace(target.path / name)
    target.write(REJECTED, rejected)
    target.write(MANIFEST, text)
