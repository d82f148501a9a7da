"""Aligned faces out of shards, and which of them are judged, searched and compared with."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

import storage
from mien import manifest
from services.evaluate.distances import Pixels


@dataclass(frozen=True)
class Faces:
    """Aligned crops uint8 ``[M, S, S, 3]`` with their identities (None: unlabelled) and where they came from."""

    images: Pixels
    identities: list[int | None]
    sources: list[str]

    def __len__(self) -> int:
        return len(self.images)

    def take(self, indices: Sequence[int]) -> Faces:
        """The faces at ``indices``, in that order."""
        chosen = np.asarray(indices, dtype=np.int64)
        return Faces(self.images[chosen], [self.identities[i] for i in chosen], [self.sources[i] for i in chosen])


@dataclass(frozen=True)
class Sample:
    """A seeded sample: as far as there are enough, one photo a person, and another photo of the same people aside.

    Attributes:
        faces: what is judged.
        mates: another photo of the people of ``faces`` who have one; ``mate_of[i]`` is the index in ``faces``.
        rest: faces of nobody in ``faces``: what "real" looks like, distractors in galleries, material for attackers.
    """

    faces: Faces
    mates: Faces
    mate_of: list[int]
    rest: Faces


def read_manifest(prefix: str | Path) -> tuple[manifest.Manifest, str]:
    """The manifest of a folder or an ``s3://`` prefix, and its digest.

    Raises:
        mien.manifest.ShardError: there is none, or it is malformed.
        storage.StorageError: the store cannot be reached or refuses.
    """
    if not storage.is_s3(prefix):
        return manifest.read(prefix), manifest.digest(prefix)
    try:
        data = storage.open_prefix(prefix).read(manifest.MANIFEST)
        return manifest.Manifest.model_validate_json(data), hashlib.sha256(data).hexdigest()
    except storage.NotFound as error:
        raise manifest.ShardError(f"no {manifest.MANIFEST} at {prefix}; ingest writes it last") from error
    except ValueError as error:
        raise manifest.ShardError(f"{prefix} has no shard manifest this version knows: {error}") from error


def read_shards(prefix: str | Path, split: manifest.Split, limit: int | None = None) -> Faces:
    """Crops of a split in the order of their keys; ``limit`` stops after so many (for training material).

    Raises:
        mien.manifest.ShardError: there is no manifest at ``prefix``, or it is not one.
        storage.StorageError: a shard is missing, is not the one the manifest lists, or the store does not answer.
        ValueError: the split is empty.
    """
    place = storage.open_prefix(prefix)
    images: list[Pixels] = []
    identities: list[int | None] = []
    sources: list[str] = []
    for shard in read_manifest(prefix)[0].of(split):
        if limit is not None and len(images) >= limit:
            break
        pending: dict[str, bytes] = {}
        labels: dict[str, dict[str, object]] = {}
        with tarfile.open(fileobj=io.BytesIO(place.read(shard.name, sha256=shard.sha256))) as tar:
            for member in tar:
                file = tar.extractfile(member)
                key, _, extension = member.name.partition(".")
                if file is not None and extension == "json":
                    labels[key] = json.load(file)
                elif file is not None:
                    pending[key] = file.read()
        for key in sorted(pending):
            if limit is not None and len(images) >= limit:
                break
            images.append(np.asarray(Image.open(io.BytesIO(pending[key])).convert("RGB")))
            identities.append(labels[key]["identity"])  # type: ignore[arg-type]
            sources.append(str(labels[key].get("source", key)))
    if not images:
        raise ValueError(f"{prefix} has no sample in split {split!r}")
    return Faces(np.stack(images), identities, sources)


def draw(faces: Faces, limit: int, seed: int) -> Sample:
    """People who have another photo come first, then everybody else; then second photos, until ``limit`` is reached.

    One photo a person makes the faces independent. The last photo of who has several is kept as the mate, never judged.
    """
    rng = np.random.default_rng([seed, 0])
    people: dict[object, list[int]] = defaultdict(list)
    for i in rng.permutation(len(faces)):
        identity = faces.identities[i]
        people[("nobody", int(i)) if identity is None else identity].append(int(i))
    keys = list(people)
    several = [k for k in keys if len(people[k]) > 1]
    order = several + [k for k in keys if len(people[k]) == 1]
    mates = {k: people[k].pop() for k in several}
    chosen: list[int] = []
    depth = 0
    while len(chosen) < limit and any(len(people[k]) > depth for k in order):
        chosen += [people[k][depth] for k in order if len(people[k]) > depth][: limit - len(chosen)]
        depth += 1
    owner = {i: k for k, members in people.items() for i in members}
    first: dict[object, int] = {}
    for position, i in enumerate(chosen):
        first.setdefault(owner[i], position)
    mated = [k for k in several if k in first]
    used = set(first)
    rest = [i for k in order if k not in used for i in (*people[k], *([mates[k]] if k in mates else []))]
    return Sample(
        faces=faces.take(chosen),
        mates=faces.take([mates[k] for k in mated]),
        mate_of=[first[k] for k in mated],
        rest=faces.take(rest),
    )
