"""Faces are read from object storage as from a folder, and only those that the manifest lists."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import storage
from mien.manifest import ShardError
from services.evaluate import faces
from tests.s3 import BUCKET, S3Server, s3_server
from tests.services.stand_ins import astronaut_shards

__all__ = ["s3_server"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return astronaut_shards(tmp_path_factory.mktemp("astronaut"), people=3)


def test_faces_of_a_bucket_are_those_of_the_folder(shards: Path, s3_server: S3Server) -> None:
    url = f"s3://{BUCKET}/astronaut"
    for path in sorted(shards.iterdir()):
        storage.open_prefix(url).write(path.name, path)
    here, there = faces.read_shards(shards, "test"), faces.read_shards(url, "test")
    assert np.array_equal(here.images, there.images) and len(there) == 6
    assert (here.identities, here.sources) == (there.identities, there.sources)
    assert faces.read_manifest(shards) == faces.read_manifest(url)
    assert len(faces.read_shards(url, "test", limit=4)) == 4
    with pytest.raises(ShardError, match=r"no manifest\.json at s3://mien/nothing"):
        faces.read_shards(f"s3://{BUCKET}/nothing", "test")
    with pytest.raises(ValueError, match="no sample in split 'train'"):
        faces.read_shards(url, "train")


def test_a_shard_that_is_not_the_one_listed_is_refused(shards: Path, s3_server: S3Server) -> None:
    place = storage.open_prefix(f"s3://{BUCKET}/changed")
    for path in sorted(shards.iterdir()):
        data = path.read_bytes()
        place.write(path.name, data[:5000] + b"x" + data[5001:] if path.suffix == ".tar" else data)
    with pytest.raises(storage.ChecksumMismatch):
        faces.read_shards(f"s3://{BUCKET}/changed", "test")
