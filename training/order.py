"""Which sample is number i of a run, and who takes it: index arithmetic, no files and no network.

The order of samples is a function of (seed, epoch) alone, and the place in it is a function of ``nimg``, the images
seen. So ``nimg`` is the whole state of the data, and a run goes on at any world size with every sample of every epoch
used exactly once. How many ranks and workers there are only decides who reads what:

1. *Order.* Each epoch shuffles the shards and lays their samples end to end. That sequence is cut into ``lanes`` parts
   of the same length (give or take one sample), which are read side by side: position i of the epoch is the next sample
   of lane ``i % lanes``. Within a lane samples are shuffled in blocks of ``window``, so that reading it needs the few
   shards of one block at a time, and never random access to all. The number of lanes is part of the order, so it is
   part of a run's config and not derived from the world size.
2. *Partition.* A step takes the global batch ``[nimg, nimg + size)``; its positions are sorted by lane and cut into one
   slice a rank. Where the batch is a multiple of the lanes, a rank always has the same lanes and reads
   ``1/world`` of the shards; elsewhere ranks share shards, which costs traffic and nothing else.

Nothing here can hang or run dry: a rank without a shard of its own takes samples of another's. The one thing refused is
a batch with fewer samples than ranks.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]

LANES: Final = 8
WINDOW: Final = 4096

# Blocks whose permutations are kept; a block is 4 bytes a sample.
_KEPT_SAMPLES: Final = 1 << 25


class Canonical:
    """The canonical order over shards.

    Args:
        counts: samples of each shard, in the order of the manifest.
        seed: the run's.
        lanes: parts of an epoch that are read side by side; fewer where there are fewer samples.
        window: samples that are shuffled among one another.

    Raises:
        ValueError: no sample, or a count, ``lanes`` or ``window`` below 1.
    """

    def __init__(self, counts: Sequence[int], *, seed: int, lanes: int = LANES, window: int = WINDOW) -> None:
        self.counts = np.asarray(counts, dtype=np.int64)
        if not len(self.counts) or self.counts.min() < 1 or lanes < 1 or window < 1:
            raise ValueError("an order needs shards of at least one sample, and at least one lane and a window of one")
        self.seed, self.window = seed, window
        self.samples = int(self.counts.sum())
        self.lanes = min(lanes, self.samples)
        edges = np.arange(self.lanes + 1, dtype=np.int64) * self.samples // self.lanes
        self._starts, self._lengths = edges[:-1], np.diff(edges)
        self._rows = self.samples // self.lanes
        self._longer = np.flatnonzero(self._lengths > self._rows)  # lanes with one sample more
        # Lanes reach the end of a block one after another, so that shards are fetched at a steady rate.
        self._shift = np.arange(self.lanes, dtype=np.int64) * window // self.lanes
        self._epochs: OrderedDict[int, tuple[Indices, Indices]] = OrderedDict()
        self._blocks: OrderedDict[tuple[int, int, int], NDArray[np.int32]] = OrderedDict()

    def take(self, start: int, stop: int) -> tuple[Indices, Indices]:
        """Samples number ``start`` (inclusive) to ``stop`` (exclusive) of the run, as :meth:`at` gives them."""
        return self.at(np.arange(start, stop, dtype=np.int64))

    def at(self, positions: Indices) -> tuple[Indices, Indices]:
        """The samples at some positions of the run.

        Args:
            positions: int64 ``[n]``, each at least 0; epoch is ``position // samples``.

        Returns:
            Shard (its place in ``counts``) and sample inside it, int64 ``[n]`` each.
        """
        positions = np.asarray(positions, dtype=np.int64)
        epochs, lanes, rows = self._places(positions)
        shifted = rows + self._shift[lanes]
        blocks = shifted // self.window
        sequence = np.empty_like(positions)
        # One pass a block: a batch touches one a lane.
        keys = (epochs * self.lanes + lanes) * (self._rows // self.window + 3) + blocks
        order = np.argsort(keys, kind="stable")
        cuts = np.flatnonzero(np.diff(keys[order])) + 1
        for group in np.split(order, cuts) if len(order) else []:
            epoch, lane, block = int(epochs[group[0]]), int(lanes[group[0]]), int(blocks[group[0]])
            first = max(0, block * self.window - int(self._shift[lane]))
            within = self._permutation(epoch, lane, block)[rows[group] - first]
            sequence[group] = self._starts[lane] + first + within
        shards, insides = np.empty_like(positions), np.empty_like(positions)
        for epoch in np.unique(epochs):
            of = epochs == epoch
            shuffled, ends = self._epoch(int(epoch))
            slot = np.searchsorted(ends, sequence[of], side="right")
            shards[of] = shuffled[slot]
            insides[of] = sequence[of] - (ends[slot] - self.counts[shuffled[slot]])
        return shards, insides

    def lane(self, positions: Indices) -> Indices:
        """The lane of each position, int64 ``[n]``."""
        return self._places(np.asarray(positions, dtype=np.int64))[1]

    def parts(self, nimg: int, size: int, world: int) -> list[Indices]:
        """The positions of a global batch, one slice a rank.

        Args:
            nimg: images seen before it.
            size: samples in it, over all ranks; slices differ by at most one where ``world`` does not divide it.
            world: ranks.

        Raises:
            ValueError: fewer samples than ranks: somebody would have no batch, and the others would wait for him.
        """
        positions = self._shared(nimg, size, world)
        return [self._slice(positions, rank, world) for rank in range(world)]

    def part(self, nimg: int, size: int, rank: int, world: int) -> Indices:
        """Rank's slice of :meth:`parts`."""
        return self._slice(self._shared(nimg, size, world), rank, world)

    def spread(self, rank: int, world: int, batch: int) -> int:
        """Lanes that a rank reads in turn, at most: ``lanes / world`` where batches are multiples of the lanes."""
        if batch % self.lanes or self.samples % self.lanes:
            return self.lanes
        return len(np.unique(self.lane(self.part(0, batch, rank, world))))

    def _shared(self, nimg: int, size: int, world: int) -> Indices:
        if size < world:
            raise ValueError(f"a batch of {size} over {world} ranks leaves ranks without a sample; raise `batch`")
        return self.sorted(nimg, size)

    def sorted(self, nimg: int, size: int) -> Indices:
        """The positions of a global batch by lane: what :meth:`parts` cuts into slices, int64 ``[size]``."""
        positions = np.arange(nimg, nimg + size, dtype=np.int64)
        return positions[np.argsort(self.lane(positions), kind="stable")]

    @staticmethod
    def _slice(positions: Indices, rank: int, world: int) -> Indices:
        return positions[rank * len(positions) // world : (rank + 1) * len(positions) // world]

    def _places(self, positions: Indices) -> tuple[Indices, Indices, Indices]:
        """Epoch, lane, and place in the lane."""
        epochs, places = np.divmod(positions, self.samples)
        rows, lanes = np.divmod(places, self.lanes)
        last = rows == self._rows  # the longer lanes' additional samples end the epoch
        if last.any():
            lanes[last] = self._longer[lanes[last]]
        return epochs, lanes, rows

    def _epoch(self, epoch: int) -> tuple[Indices, Indices]:
        """Shards in the order of an epoch, and where each ends in its sequence."""
        if epoch not in self._epochs:
            shuffled = np.random.default_rng([self.seed, epoch]).permutation(len(self.counts))
            self._epochs[epoch] = (shuffled, np.cumsum(self.counts[shuffled]))
            while len(self._epochs) > 2:  # a batch can reach over an epoch's end
                self._epochs.popitem(last=False)
        return self._epochs[epoch]

    def _permutation(self, epoch: int, lane: int, block: int) -> NDArray[np.int32]:
        key = (epoch, lane, block)
        if key not in self._blocks:
            start = max(0, block * self.window - int(self._shift[lane]))
            stop = min(int(self._lengths[lane]), (block + 1) * self.window - int(self._shift[lane]))
            generator = np.random.default_rng([self.seed, epoch, lane, block])
            self._blocks[key] = generator.permutation(stop - start).astype(np.int32)
            while len(self._blocks) > max(2 * self.lanes, _KEPT_SAMPLES // self.window):
                self._blocks.popitem(last=False)
        self._blocks.move_to_end(key)
        return self._blocks[key]


class Order:
    """The order of samples that are all in memory: sample i of a run is ``permutation(seed, i // N)[i % N]``."""

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed = count, seed
        self._epoch = -1
        self._permutation: Indices = np.empty(0, dtype=np.int64)

    def take(self, start: int, stop: int) -> Indices:
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
