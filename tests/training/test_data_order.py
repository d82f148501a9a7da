"""The canonical order of samples, and its partition over any number of ranks."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.order import Canonical, Order

COUNTS = st.lists(st.integers(1, 30), min_size=1, max_size=12)
ORDERS = st.builds(
    lambda counts, seed, lanes, window: Canonical(counts, seed=seed, lanes=lanes, window=window),
    COUNTS,
    st.integers(0, 9),
    st.integers(1, 12),
    st.integers(1, 40),
)


def ids(order: Canonical, positions: np.ndarray) -> list[tuple[int, int]]:
    return list(zip(*(part.tolist() for part in order.at(positions)), strict=True))


@given(ORDERS, st.integers(0, 3))
def test_every_epoch_uses_every_sample_exactly_once(order: Canonical, epoch: int) -> None:
    shards, insides = order.take(epoch * order.samples, (epoch + 1) * order.samples)
    everything = [(shard, i) for shard, count in enumerate(order.counts) for i in range(count)]
    assert sorted(zip(shards.tolist(), insides.tolist(), strict=True)) == everything


@given(ORDERS, st.lists(st.integers(1, 50), min_size=1, max_size=10), st.integers(0, 300))
def test_any_sequence_of_batches_walks_the_same_order(order: Canonical, cuts: list[int], start: int) -> None:
    edges = start + np.cumsum([0, *cuts])
    parts = [ids(order, np.arange(a, b)) for a, b in itertools.pairwise(edges)]
    fresh = Canonical(order.counts.tolist(), seed=order.seed, lanes=order.lanes, window=order.window)
    assert list(itertools.chain(*parts)) == ids(fresh, np.arange(start, edges[-1]))


@given(ORDERS, st.lists(st.tuples(st.integers(1, 7), st.integers(1, 5)), min_size=1, max_size=8), st.integers(1, 40))
def test_every_sample_is_used_once_however_the_world_changes(
    order: Canonical, phases: list[tuple[int, int]], batch: int
) -> None:
    nimg, used = 0, []
    for world, steps in phases:
        for _ in range(steps):
            size = max(batch, world)
            for rank in range(world):
                used += order.part(nimg, size, rank, world).tolist()
            nimg += size
    assert sorted(used) == list(range(nimg))


@given(ORDERS, st.integers(0, 200), st.integers(1, 30), st.integers(1, 30))
def test_ranks_together_have_the_batch_of_one_rank_in_the_same_order(
    order: Canonical, nimg: int, size: int, world: int
) -> None:
    size = max(size, world)
    parts = order.parts(nimg, size, world)
    assert np.array_equal(np.concatenate(parts), order.part(nimg, size, 0, 1))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert all(np.array_equal(part, order.part(nimg, size, rank, world)) for rank, part in enumerate(parts))


def test_epochs_and_seeds_differ_and_samples_are_mixed() -> None:
    order = Canonical([100] * 20, seed=0, lanes=4, window=300)
    first = ids(order, np.arange(2000))
    assert first != ids(order, np.arange(2000, 4000))
    assert first != ids(Canonical([100] * 20, seed=1, lanes=4, window=300), np.arange(2000))
    shards = order.at(np.arange(64))[0]
    assert len(np.unique(shards)) >= 6  # a batch of 64 mixes several shards of each lane
    assert np.mean(np.diff(order.at(np.arange(2000))[1]) == 1) < 0.05  # neighbours in a shard are not neighbours here


def test_a_rank_reads_its_lanes_alone_and_few_shards_at_a_time() -> None:
    order = Canonical([1000] * 64, seed=3, lanes=16, window=3000)
    world, batch = 8, 64
    assert order.spread(0, world, batch) == 2
    touched = set()
    for step in range(200):
        part = order.part(step * batch, batch, 5, world)
        assert set(order.lane(part).tolist()) <= {10, 11}
        touched.update(order.at(part)[0].tolist())
    # 1,600 samples of two lanes' first blocks, which lie in at most 4 + 1 shards each.
    assert len(touched) <= 10
    epoch = np.concatenate([order.part(n, batch, 5, world) for n in range(0, 64_000, batch)])
    assert len(np.unique(order.at(epoch)[0])) == 8  # an eighth of the shards


def test_shards_are_due_at_a_steady_rate() -> None:
    order = Canonical([500] * 80, seed=0, lanes=8, window=1000)
    seen: set[int] = set()
    new = []
    for start in range(0, 40_000, 1000):
        shards = set(order.at(np.arange(start, start + 1000))[0].tolist())
        new.append(len(shards - seen))
        seen |= shards
    assert max(new[1:]) <= 10  # and not 8 lanes x 3 shards at once


def test_a_batch_that_leaves_a_rank_without_a_sample_is_refused() -> None:
    with pytest.raises(ValueError, match="batch of 3 over 4 ranks"):
        Canonical([10], seed=0).part(0, 3, 0, 4)
    for counts, lanes, window in (([], 1, 1), ([0], 1, 1), ([5], 0, 1), ([5], 1, 0)):
        with pytest.raises(ValueError, match="at least one"):
            Canonical(counts, seed=0, lanes=lanes, window=window)


def test_three_shards_feed_sixteen_ranks() -> None:
    order = Canonical([7, 5, 9], seed=0, lanes=8)
    used = [p for n in range(0, 63, 21) for rank in range(16) for p in order.part(n, 21, rank, 16).tolist()]
    assert sorted(used) == list(range(63))


def test_4096_ranks_lose_and_repeat_nothing_in_seconds() -> None:
    """An epoch of the paper's data at 4,096 ranks that become 3,000 and then 4,096 again on the way."""
    began = time.perf_counter()
    order = Canonical([1000] * 454 + [590], seed=0, lanes=4096, window=4096)
    batch, nimg, used = 4096 * 2, 0, np.zeros(order.samples + 4096 * 2, dtype=np.int64)
    step = 0
    while nimg < order.samples:
        world = 3000 if 20 <= step < 40 else 4096
        for part in order.parts(nimg, batch, world):
            used[part] += 1
        nimg, step = nimg + batch, step + 1
    assert (used[: order.samples] == 1).all()
    shards, insides = order.take(0, order.samples)
    starts = np.concatenate([[0], np.cumsum(order.counts)[:-1]])
    assert np.array_equal(np.sort(starts[shards] + insides), np.arange(order.samples))
    # A rank that joins late begins anywhere without walking there.
    one = Canonical([1000] * 454 + [590], seed=0, lanes=4096, window=4096)
    assert np.array_equal(one.at(np.arange(300_000, 300_100))[0], shards[300_000:300_100])
    assert time.perf_counter() - began < 20


def test_the_order_in_memory_walks_each_epoch_once() -> None:
    order = Order(10, 1)
    whole = order.take(0, 25)
    assert sorted(whole[:10].tolist()) == sorted(whole[10:20].tolist()) == list(range(10))
    assert np.array_equal(Order(10, 1).take(13, 25), whole[13:])
