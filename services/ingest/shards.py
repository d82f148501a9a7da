"""WebDataset tars that are the same bytes for the same samples."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from mien.manifest import Shard, Split


@dataclass(frozen=True)
class Sample:
    """A crop on its way into a shard; its picture lies in a spool file."""

    key: str
    source: str
    file: str
    unit: str  # what decides its split: the identity, or the photo itself
    identity: str | None
    landmarks: tuple[tuple[float, float], ...]
    outline: tuple[tuple[float, float], ...]
    inside: float
    offset: int
    length: int

    def image(self, spool: IO[bytes]) -> bytes:
        """The encoded crop."""
        spool.seek(self.offset)
        return spool.read(self.length)

    def record(self, identity: int | None) -> dict[str, Any]:
        """What ``KEY.json`` says."""
        return {
            "identity": identity,
            "landmarks": self.landmarks,
            "source": f"{self.source}/{self.file}",
            # Beyond DESIGN.md: where the photo ends and the fill begins, for whoever must not learn from the fill.
            "inside": round(self.inside, 3),
            "outline": self.outline,
        }


def key_of(source: str, file: str) -> str:
    """A sample's key: 16 hex digits that stay the same between runs and hold no dot, which WebDataset would cut at."""
    return hashlib.sha256(f"{source}/{file}".encode()).hexdigest()[:16]


def write(
    folder: Path,
    split: Split,
    samples: Sequence[Sample],
    spool: IO[bytes],
    numbers: dict[str, int],
    *,
    shard_size: int,
    image: str,
    progress: Callable[[int], None] = lambda n: None,
) -> list[Shard]:
    """Write a split's shards, in the order of ``samples``; sizes of shards differ by at most one sample."""
    count = -(-len(samples) // shard_size)
    shards: list[Shard] = []
    for index in range(count):
        part = samples[index * len(samples) // count : (index + 1) * len(samples) // count]
        path = folder / f"{split}-{index:06d}.tar"
        _write_tar(path, _members(part, spool, numbers, image))
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        shards.append(Shard(name=path.name, split=split, samples=len(part), bytes=path.stat().st_size, sha256=digest))
        progress(len(part))
    return shards


def _members(
    samples: Iterable[Sample], spool: IO[bytes], numbers: dict[str, int], image: str
) -> Iterable[tuple[str, bytes]]:
    for sample in samples:
        record = sample.record(None if sample.identity is None else numbers[sample.identity])
        yield f"{sample.key}.{image}", sample.image(spool)
        yield f"{sample.key}.json", json.dumps(record, ensure_ascii=False).encode()


def _write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)  # time, owner and mode stay at their constants
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
