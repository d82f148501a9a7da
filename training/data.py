"""Shards to batches, in one canonical order that any number of processes can take their part of.

The order of the samples is a function of (seed, epoch) alone and the position in it is a function of ``nimg``, the
images seen: sample number i of a run is ``permutation(seed, i // N)[i % N]``. So resuming needs no state but ``nimg``,
and a run that goes on with another world size still uses every sample of an epoch exactly once.

Crops are kept as the JPEG bytes of the shards (half a million are about 3 GB) and decoded when they are due.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image


class ShardError(Exception):
    """The manifest and the shards disagree, or one cannot be read."""


@dataclass(frozen=True)
class Sample:
    """One crop as it lies in a shard."""

    key: str
    jpeg: bytes
    identity: int  # -1: unlabelled


@dataclass(frozen=True)
class Batch:
    """Decoded crops.

    Attributes:
        images: uint8 ``[B, S, S, 3]``.
        identities: int64 ``[B]``, -1 where unlabelled.
    """

    images: NDArray[np.uint8]
    identities: NDArray[np.int64]


class FaceShards:
    """All samples of one split, checked against the manifest when opened.

    Args:
        folder: holds ``manifest.json`` and the shards it lists.
        split: ``train``, ``val`` or ``test``.
        limit: only the first so many samples.

    Raises:
        ShardError: no manifest, a shard missing or with another sha256, no sample in the split.
    """

    def __init__(self, folder: str | Path, split: str, *, limit: int | None = None) -> None:
        folder = Path(folder)
        try:
            manifest_bytes = (folder / "manifest.json").read_bytes()
        except OSError as error:
            raise ShardError(f"no manifest.json in {folder} ({error.strerror}); services.ingest writes it") from error
        manifest = json.loads(manifest_bytes)
        self.digest = hashlib.sha256(manifest_bytes).hexdigest()
        self.crop_size = int(manifest["crop_size"])
        samples: list[Sample] = []
        for shard in manifest["shards"]:
            if shard["split"] == split:
                samples += _read_shard(folder / shard["name"], shard["sha256"], shard["samples"])
                if limit is not None and len(samples) >= limit:
                    break
        self.samples = samples[:limit]
        if not self.samples:
            raise ShardError(f"{folder} has no sample in split {split!r}")
        self.identities = max((s.identity for s in self.samples), default=-1) + 1

    def __len__(self) -> int:
        return len(self.samples)

    def decode(self, indices: NDArray[np.int64], pool: ThreadPoolExecutor | None = None) -> Batch:
        """The samples at ``indices``, in that order."""
        chosen = [self.samples[i] for i in indices]
        decoded = map(_decode, chosen) if pool is None else pool.map(_decode, chosen)
        return Batch(np.stack(list(decoded)), np.array([s.identity for s in chosen], dtype=np.int64))


def _decode(sample: Sample) -> NDArray[np.uint8]:
    with Image.open(io.BytesIO(sample.jpeg)) as image:
        return np.asarray(image.convert("RGB"))


def _read_shard(path: Path, sha256: str, expected: int) -> list[Sample]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ShardError(f"the manifest lists {path.name}, which cannot be read ({error.strerror})") from error
    if hashlib.sha256(data).hexdigest() != sha256:
        raise ShardError(f"{path} does not have the sha256 its manifest gives; write the shards again")
    images: dict[str, bytes] = {}
    labels: dict[str, int] = {}
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        for member in tar:
            file = tar.extractfile(member)
            if file is None:
                continue
            key, _, extension = member.name.partition(".")
            if extension == "json":
                identity = json.load(file)["identity"]
                labels[key] = -1 if identity is None else int(identity)
            else:
                images[key] = file.read()
    if images.keys() != labels.keys() or len(images) != expected:
        raise ShardError(f"{path} holds {len(images)} pictures and {len(labels)} labels; its manifest says {expected}")
    return [Sample(key, jpeg, labels[key]) for key, jpeg in images.items()]


class Order:
    """The canonical order of samples: which sample is number i of the run."""

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed = count, seed
        self._epoch = -1
        self._permutation: NDArray[np.int64] = np.empty(0, dtype=np.int64)

    def take(self, start: int, stop: int) -> NDArray[np.int64]:
        """Sample indices number ``start`` (inclusive) to ``stop`` (exclusive), int64."""
        out = np.empty(stop - start, dtype=np.int64)
        position = start
        while position < stop:
            epoch, offset = divmod(position, self.count)
            if epoch != self._epoch:
                self._epoch = epoch
                self._permutation = np.random.default_rng([self.seed, epoch]).permutation(self.count)
            taken = min(stop - position, self.count - offset)
            out[position - start : position - start + taken] = self._permutation[offset : offset + taken]
            position += taken
        return out
