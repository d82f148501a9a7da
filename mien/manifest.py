"""``manifest.json`` of a folder of shards: what ingest writes, and training and evaluation trust.

A prefix without a manifest is unfinished: the manifest is written last, after every shard it lists.
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mien.errors import MienError

MANIFEST: Final = "manifest.json"
Split = Literal["train", "val", "test"]
SPLITS: Final[tuple[Split, ...]] = ("train", "val", "test")


class ShardError(MienError):
    """Shards are missing, unfinished, or not those their manifest lists."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Shard(_Record):
    """One WebDataset tar."""

    name: str = Field(pattern=r"^(train|val|test)-[0-9]{6}\.tar$")
    split: Split
    samples: int = Field(gt=0)
    bytes: int = Field(gt=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Identities(_Record):
    """The people of one split, numbered ``first``, ``first + 1``, ... in the order of ``names``.

    Numbers are contiguous over the splits, train first, so the train split's are 0..K-1 and serve as classes.
    """

    first: int = Field(ge=0)
    names: tuple[str, ...] = Field(description="source or namespace, slash, the person's folder")


class SourceRecord(_Record):
    """Where samples came from, and what became of every file there."""

    name: str
    layout: str
    fill: str = Field(description="what lies beyond the photo's edge in a crop: mirror or smooth")
    min_inside: float
    licence: str
    files: int = Field(ge=0, description="files found")
    samples: int = Field(ge=0, description="files that became samples")
    rejected: dict[str, int] = Field(description="reason to number of files; each is listed in rejected.jsonl")


class Manifest(_Record):
    """Everything about a prefix of shards but the pictures."""

    format: Literal[1] = 1
    crop_size: int = Field(gt=0)
    template: Literal["mien-v1"] = "mien-v1"
    image: Literal["jpg", "png"] = "jpg"
    seed: int
    settings: dict[str, float | int | str | None] = Field(description="the thresholds of ingest")
    versions: dict[str, str] = Field(description="what wrote it; same input, seed and versions give the same bytes")
    samples: dict[Split, int] = Field(description="per split")
    unlabelled: dict[Split, int] = Field(description="how many of them have no identity")
    identities: dict[Split, Identities]
    sources: tuple[SourceRecord, ...]
    shards: tuple[Shard, ...]

    def of(self, split: Split) -> tuple[Shard, ...]:
        """The shards of one split, in order."""
        return tuple(shard for shard in self.shards if shard.split == split)


def read(prefix: str | os.PathLike[str]) -> Manifest:
    """The manifest of a folder of shards.

    Raises:
        ShardError: there is none, or it is malformed.
    """
    path = Path(prefix, MANIFEST)
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ShardError(
            f"no {MANIFEST} in {prefix} ({error.strerror}); ingest writes it last, so these shards are unfinished"
        ) from error
    except ValidationError as error:
        raise ShardError(f"{path} is not a shard manifest this version knows: {error}") from error


def digest(prefix: str | os.PathLike[str]) -> str:
    """Sha256 of the manifest's bytes, which names the data: hex; raises OSError."""
    return hashlib.sha256(Path(prefix, MANIFEST).read_bytes()).hexdigest()


def verify(prefix: str | os.PathLike[str], local: Callable[[str], Path] | None = None) -> Manifest:
    """Read shards whole and compare them with their manifest.

    Checks each shard's bytes, sha256 and number of samples, that every sample has a picture and its json, that
    identities are those of the shard's split, and the totals.

    Args:
        prefix: the folder they lie in; with ``local`` any name for the place.
        local: gives a file or shard of the place as a local file, which is read before the next is asked for.

    Returns:
        The manifest, if all agrees.

    Raises:
        ShardError: naming the first disagreement.
    """
    local = local or (lambda name: Path(prefix, name))
    manifest = read(local(MANIFEST).parent)
    seen: dict[Split, int] = dict.fromkeys(SPLITS, 0)
    unlabelled: dict[Split, int] = dict.fromkeys(SPLITS, 0)
    keys: set[str] = set()
    for shard in manifest.shards:
        path = local(shard.name)
        _check_bytes(path, shard)
        people = manifest.identities[shard.split]
        allowed = range(people.first, people.first + len(people.names))
        count = 0
        with tarfile.open(path, "r:") as tar:
            members = {member.name: member for member in tar}
            for name, member in members.items():
                key, _, extension = name.partition(".")
                if extension != "json":
                    continue
                if f"{key}.{manifest.image}" not in members or key in keys:
                    raise ShardError(f"{path}: sample {key} has no picture or appears twice")
                keys.add(key)
                file = tar.extractfile(member)
                identity = json.load(file)["identity"] if file else None
                if identity is not None and identity not in allowed:
                    raise ShardError(f"{path}: sample {key} shows identity {identity}, which is not of {shard.split}")
                unlabelled[shard.split] += identity is None
                count += 1
        if count != shard.samples or len(members) != 2 * count:
            raise ShardError(f"{path} holds {count} samples in {len(members)} files; its manifest says {shard.samples}")
        seen[shard.split] += count
    if seen != manifest.samples or unlabelled != manifest.unlabelled:
        raise ShardError(f"{prefix} holds {seen} samples, {unlabelled} unlabelled, other than its manifest says")
    return manifest


def _check_bytes(path: Path, shard: Shard) -> None:
    try:
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            size = file.tell()
    except OSError as error:
        raise ShardError(f"cannot read {path}: {error.strerror}") from error
    if size != shard.bytes or digest != shard.sha256:
        raise ShardError(
            f"{path} has {size} bytes and sha256 {digest[:12]}...; its manifest says {shard.bytes} and"
            f" {shard.sha256[:12]}.... Copy or ingest it again."
        )
