"""Shards, and the canonical order of samples."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mien import store
from tests.training.conftest import write_shards
from training.config import RunConfig
from training.data import FaceShards, Order, Reduced, ShardError
from training.loop import train


def test_a_split_is_read_with_its_labels(shards: Path) -> None:
    train = FaceShards(shards, "train")
    assert len(train) == 24 and train.identities == 4
    batch = train.decode(np.array([0, 1, 2]))
    assert batch.images.shape == (3, 64, 64, 3) and batch.images.dtype == np.uint8
    assert batch.identities.tolist() == [-1, 1, 2]


def test_one_flipped_byte_in_a_shard_is_refused_at_the_start(tmp_path: Path) -> None:
    write_shards(tmp_path, {"train": 3})
    path = tmp_path / "train-000000.tar"
    data = bytearray(path.read_bytes())
    data[700] ^= 1
    path.write_bytes(data)
    with pytest.raises(ShardError, match="sha256"):
        FaceShards(tmp_path, "train")


def test_a_missing_shard_and_a_missing_manifest_are_named(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="manifest"):
        FaceShards(tmp_path, "train")
    write_shards(tmp_path, {"train": 3})
    (tmp_path / "train-000000.tar").unlink()
    with pytest.raises(ShardError, match="train-000000"):
        FaceShards(tmp_path, "train")


def test_a_manifest_that_counts_other_samples_is_refused(tmp_path: Path) -> None:
    write_shards(tmp_path, {"train": 3})
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest["shards"][0]["samples"] = 4
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ShardError, match="says 4"):
        FaceShards(tmp_path, "train")


def test_an_empty_split_is_refused(shards: Path) -> None:
    with pytest.raises(ShardError, match="'test'"):
        FaceShards(shards, "test")


def test_crops_are_made_smaller_by_means_and_nothing_else_changes(shards: Path) -> None:
    whole = FaceShards(shards, "train")
    half = Reduced(whole, 32)
    assert (len(half), half.crop_size, half.identities, half.digest) == (24, 32, whole.identities, whole.digest)
    chosen = np.array([5, 0])
    one, other = whole.decode(chosen), half.decode(chosen)
    assert other.images.shape == (2, 32, 32, 3) and other.images.dtype == np.uint8
    for y, x in ((0, 0), (7, 31), (31, 16)):
        cell = one.images[1, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2].reshape(4, 3)
        assert np.array_equal(other.images[1, y, x], np.rint(cell.astype(float).mean(axis=0)))
    assert other.identities.tolist() == one.identities.tolist()
    assert np.array_equal(half.indices(3, 8, 4, slice(0, 4)), whole.indices(3, 8, 4, slice(0, 4)))
    labels = [np.concatenate([b.identities for b in faces.labelled(lambda n: slice(n))]) for faces in (half, whole)]
    assert np.array_equal(*labels)
    with pytest.raises(ValueError, match=r"crop_size 48 does not divide the 64 pixels"):
        Reduced(whole, 48)


def test_a_run_on_smaller_crops_than_the_shards_have_trains_and_one_that_does_not_divide_them_is_refused(
    bare: RunConfig,
) -> None:
    outcome = train(bare.model_copy(update={"crop_size": 32, "total_images": 2}))
    assert outcome.model is not None and store.load(outcome.model)[1].crop_size == 32
    with pytest.raises(ValueError, match="does not divide"):
        train(bare.model_copy(update={"crop_size": 48, "name": "another"}))


@given(
    count=st.integers(1, 40),
    seed=st.integers(0, 9),
    cuts=st.lists(st.integers(1, 30), min_size=1, max_size=12),
)
def test_any_sequence_of_batch_sizes_walks_the_same_order(count: int, seed: int, cuts: list[int]) -> None:
    whole = Order(count, seed).take(0, sum(cuts))
    order, position, parts = Order(count, seed), 0, []
    for cut in cuts:
        parts.append(order.take(position, position + cut))
        position += cut
    assert np.array_equal(np.concatenate(parts), whole)


@given(count=st.integers(1, 50), seed=st.integers(0, 9), epoch=st.integers(0, 5))
def test_every_epoch_uses_every_sample_exactly_once(count: int, seed: int, epoch: int) -> None:
    taken = Order(count, seed).take(epoch * count, (epoch + 1) * count)
    assert sorted(taken.tolist()) == list(range(count))


def test_epochs_and_seeds_differ_in_order() -> None:
    order = Order(100, 0)
    assert order.take(0, 100).tolist() != order.take(100, 200).tolist()
    assert order.take(0, 100).tolist() != Order(100, 1).take(0, 100).tolist()
