"""Who in the training data looks like somebody in the test set.

Two collections of public figures share people under different names or numbers, and a test set is unseen only after
those are set aside.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mien import manifest as manifests
from services.ingest.site import Sample

_BATCH = 64

Embeddings = NDArray[np.float32]


def resembling(
    samples: Sequence[Sample],
    pictures: Iterable[bytes],
    test_set: Path,
    weights: Path,
    max_cosine: float,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, str]:
    """Find the samples that must be set aside.

    A person is compared by the mean of his normalised embeddings and set aside whole; a photo that nobody named, by
    its own embedding. Either is set aside where the cosine with any one picture of the test set reaches the limit.

    Args:
        samples: the candidates.
        pictures: their encoded crops.
        test_set: a folder of shards, all of whose splits count.
        weights: those of MobileFaceNet (casia), or the folder they lie in.
        max_cosine: the limit. The recogniser's same-person threshold (0.297) would also set aside many strangers: each
            candidate is compared with thousands.
        advance: told of (done, total) pictures.

    Returns:
        Key to what it matched, for the samples to set aside.

    Raises:
        ShardError: the test set is not a sound folder of shards.
        ModelError: the weights are not those of the recogniser.
    """
    known = manifests.verify(test_set)
    total = len(samples) + sum(known.samples.values())
    embed = _embedder(weights)
    done = 0

    def embedded(pictures: Iterable[bytes]) -> Embeddings:
        nonlocal done
        rows = []
        for batch in _batched(pictures, _BATCH):
            rows.append(embed(batch))
            done += len(batch)
            advance(done, total)
        return np.concatenate(rows)

    names: list[str] = []
    gallery = embedded(_pictures(test_set, known, names))
    probes = embedded(pictures)
    of_unit: dict[str, list[int]] = defaultdict(list)
    for index, sample in enumerate(samples):
        of_unit[sample.unit].append(index)
    found: dict[str, str] = {}
    for unit, members in of_unit.items():
        mean = probes[members].mean(axis=0)
        cosines = gallery @ (mean / np.linalg.norm(mean))
        nearest = int(cosines.argmax())
        if cosines[nearest] >= max_cosine:
            whose = unit if samples[members[0]].identity is not None else "the picture"
            for index in members:
                found[samples[index].key] = f"{whose} has cosine {cosines[nearest]:.2f} with {names[nearest]}"
    return found


def _embedder(weights: Path) -> Callable[[list[bytes]], Embeddings]:
    import torch

    from mien import recognisers

    judge = recognisers.load("mobilefacenet-casia", os.fspath(weights)).frozen()
    judge.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # a third faster on CPUs

    def embed(batch: list[bytes]) -> Embeddings:
        pixels = np.stack([np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data in batch])
        with torch.inference_mode():
            rows = judge(torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1)
            return torch.nn.functional.normalize(rows, dim=1).numpy()

    return embed


def _pictures(prefix: Path, manifest: manifests.Manifest, names: list[str]) -> Iterator[bytes]:
    """Every picture of a folder of shards; what each is called where it came from is appended to ``names``."""
    for shard in manifest.shards:
        with tarfile.open(prefix / shard.name, "r:") as tar:
            files = {member.name: member for member in tar}
            for name, member in files.items():
                record = files.get(name.removesuffix(manifest.image) + "json")
                if name.endswith(f".{manifest.image}") and record is not None:
                    picture, text = tar.extractfile(member), tar.extractfile(record)
                    if picture is not None and text is not None:
                        names.append(json.load(text)["source"])
                        yield picture.read()


def _batched(pictures: Iterable[bytes], size: int) -> Iterator[list[bytes]]:
    batch: list[bytes] = []
    for picture in pictures:
        batch.append(picture)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
