"""4,096 processes over half a million samples, without files and network: seconds, and nothing lost."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from bench import scale
from training.order import Canonical

ROOT = Path(__file__).resolve().parents[2]
COUNTS = [1000] * 454 + [590]  # CASIA-WebFace
WORLD = 4096


def order() -> Canonical:
    return Canonical(COUNTS, seed=7, lanes=WORLD)


def test_an_epoch_at_4096_processes_uses_every_sample_once_in_seconds() -> None:
    began = time.process_time()
    of, batch = order(), 4 * WORLD
    used = np.zeros(of.samples, dtype=np.int64)
    starts = np.concatenate([[0], np.cumsum(of.counts)[:-1]])
    for nimg in range(5 * of.samples, 6 * of.samples, batch):
        positions = of.sorted(nimg, min(batch, 6 * of.samples - nimg))
        shards, insides = of.at(positions)
        used += np.bincount(starts[shards] + insides, minlength=of.samples)
    assert (used == 1).all()
    assert time.process_time() - began < 30


def test_a_run_that_loses_and_gains_processes_again_and_again_uses_every_position_once() -> None:
    rng = np.random.default_rng(0)
    of, nimg, used = order(), 0, []
    while nimg < of.samples:
        world = int(rng.integers(1, WORLD + 1))
        batch = world * int(rng.integers(1, 9))
        # Each life begins anew and knows nothing but nimg; of some processes the part is taken on their own.
        fresh = Canonical(COUNTS, seed=7, lanes=WORLD)
        parts = fresh.parts(nimg, batch, world)
        for rank in rng.integers(0, world, 3).tolist():
            assert np.array_equal(fresh.part(nimg, batch, rank, world), parts[rank])
        used.append(np.concatenate(parts))
        nimg += batch
    assert np.array_equal(np.sort(np.concatenate(used)), np.arange(nimg))


def test_a_process_that_joins_begins_anywhere_at_once() -> None:
    for nimg in (0, 123_456, 10**9):
        began = time.process_time()
        fresh = order()
        shards, _ = fresh.at(fresh.part(nimg, 4 * WORLD, WORLD - 1, WORLD))
        assert len(shards) == 4
        assert time.process_time() - began < 3


def test_nodes_fetch_what_the_document_says() -> None:
    """The arithmetic of bench.scale, counted: which shards the eight processes of each node touch in an epoch."""
    gpus, nodes = 512, 64
    counts = [scale.SHARD] * (scale.IMAGES // scale.SHARD) + [scale.IMAGES % scale.SHARD]
    of = Canonical(counts, seed=0, lanes=gpus)
    positions = np.arange(of.samples)
    shards, _ = of.at(positions[: of.samples])
    node = of.lane(positions) // (gpus // nodes)
    fetched = len(np.unique(node * len(counts) + shards))
    # The last, shorter shard lies somewhere else in every epoch, so the counts may differ by a few.
    assert abs(fetched - scale.touched(nodes, gpus)) <= 8


def test_the_document_has_the_tables_that_the_figures_give() -> None:
    document = (ROOT / "docs" / "scale.md").read_text()
    assert document == scale.replaced(document, scale.tables(scale.MEASURED, 500.0))


@pytest.mark.parametrize("gpus", scale.GPUS)
def test_what_the_document_asks_for_divides_evenly(gpus: int) -> None:
    row = scale.needs(scale.MEASURED, gpus, 500.0)
    assert row["lanes"] % gpus == 0 and row["batch"] % row["lanes"] == 0
