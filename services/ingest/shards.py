"""WebDataset tars that are the same bytes for the same samples."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from mien.manifest import SPLITS, Shard, Split
from services.ingest.crops import Crop
from services.ingest.site import Sample, Site
from storage import Prefix

# Finished shards that may wait for their upload; they lie in files.
_WAITING: Final = 2


def key_of(source: str, file: str) -> str:
    """A sample's key: 16 hex digits that stay the same between runs and hold no dot, which WebDataset would cut at."""
    return hashlib.sha256(f"{source}/{file}".encode()).hexdigest()[:16]


def record_of(crop: Crop) -> bytes:
    """What ``KEY.json`` says, but the identity, whose number is only known once all people are."""
    rest: dict[str, Any] = {
        "landmarks": [[round(float(x), 2), round(float(y), 2)] for x, y in crop.landmarks],
        "source": f"{crop.photo.source}/{crop.photo.name}",
        # Beyond DESIGN.md: where the photo ends and the fill begins, for whoever must not learn from the fill.
        "inside": round(crop.inside, 3),
        "outline": [[round(float(x), 2), round(float(y), 2)] for x, y in crop.outline],
    }
    return json.dumps(rest, ensure_ascii=False).encode()


def with_identity(record: bytes, identity: int | None) -> bytes:
    """``KEY.json``."""
    return b'{"identity": ' + json.dumps(identity).encode() + b", " + record[1:]


def names(split: Split, samples: int, shard_size: int) -> list[tuple[str, int]]:
    """The shards of a split and how many samples each has; they differ by at most one."""
    count = -(-samples // shard_size)
    return [(f"{split}-{i:06d}.tar", (i + 1) * samples // count - i * samples // count) for i in range(count)]


@dataclass
class _Tar:
    """A shard that is being written."""

    name: str
    left: int
    file: Any
    tar: tarfile.TarFile


def write(
    site: Site,
    target: Prefix,
    order: Sequence[Sample],
    split_of: Callable[[Sample], Split],
    numbers: dict[str, int],
    *,
    shard_size: int,
    image: str,
    progress: Callable[[int], None] = lambda n: None,
) -> list[Shard]:
    """Write the shards of all splits to ``target``, each sample into the next free place of its split.

    All splits grow side by side, so that the crops, which lie sorted in the site, are read once from front to back.
    A shard that an earlier run wrote is left as it is.

    Args:
        site: holds the crops.
        target: takes the shards, each whole.
        order: all samples, in the order in which the crops are sorted.
        split_of: a sample's split.
        numbers: of the people.
        shard_size: samples in a shard, at most.
        image: extension of the crops.
        progress: told of samples done.
    """
    counts = dict.fromkeys(SPLITS, 0)
    for sample in order:
        counts[split_of(sample)] += 1
    plan = {split: iter(names(split, counts[split], shard_size)) for split in SPLITS}
    known = site.shards(target)
    open_tars: dict[Split, _Tar | None] = dict.fromkeys(SPLITS)
    skipping = dict.fromkeys(SPLITS, 0)
    done: dict[str, Shard] = {}
    sending: list[Future[Shard]] = []
    with tempfile.TemporaryDirectory(prefix="mien-ingest-", dir=site.scratch) as folder, ThreadPoolExecutor(1) as pool:

        def settle(most: int) -> None:
            while len(sending) > most:
                shard = sending.pop(0).result()
                done[shard.name] = shard

        try:
            for sample in order:
                split = split_of(sample)
                current = open_tars[split]
                if current is None and not skipping[split]:
                    name, size = next(plan[split])
                    if name in known and known[name].samples == size:
                        done[name], skipping[split] = known[name], size
                    else:
                        path = Path(folder, name)
                        file = open(path, "w+b")  # noqa: SIM115 - closed when it is full
                        tar = tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
                        current = open_tars[split] = _Tar(name, size, file, tar)
                if current is None:
                    skipping[split] -= 1
                else:
                    record, picture = site.read(sample)
                    identity = None if sample.identity is None else numbers[sample.identity]
                    _add(current.tar, f"{sample.key}.{image}", picture)
                    _add(current.tar, f"{sample.key}.json", with_identity(record, identity))
                    current.left -= 1
                    if not current.left:
                        current.tar.close()
                        current.file.close()
                        open_tars[split] = None
                        settle(_WAITING)
                        size = next(n for name, n in names(split, counts[split], shard_size) if name == current.name)
                        sending.append(pool.submit(_send, site, target, split, Path(folder, current.name), size))
                progress(1)
            settle(0)
        finally:
            for current in open_tars.values():
                if current is not None:
                    current.file.close()
    return [done[name] for split in SPLITS for name, _ in names(split, counts[split], shard_size)]


def _send(site: Site, target: Prefix, split: Split, path: Path, samples: int) -> Shard:
    written = target.write(path.name, path)
    path.unlink()
    shard = Shard(name=path.name, split=split, samples=samples, bytes=written.size, sha256=written.sha256)
    site.note_shard(shard)
    return shard


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)  # time, owner and mode stay at their constants
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))
    tar.members = []  # or it would keep a kilobyte for each


def pictures(site: Site, samples: Sequence[Sample]) -> Iterator[bytes]:
    """The encoded crops of some samples; quick where they are in the order in which they lie."""
    for sample in samples:
        yield site.read(sample)[1]
