"""The random draws of a step, each a function of (seed, number of the sample in the run) and of nothing else.

How a batch is divided over processes, micro-batches and devices then changes no draw, resuming needs no generator's
state, and a run may go on with another world size. The generator is counter-based (SplitMix64: Steele, Lea and Flood
2014): draw number ``c`` of sample ``i`` is a hash of (seed, i, c), so that a whole batch of draws is one vector
operation.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_BATCH = 1 << 62  # the "sample number" under which a step draws what its whole batch shares; nimg stays far below


class Draws:
    """Uniform draws for samples ``start`` (inclusive) to ``stop`` (exclusive) of a run.

    Two objects with the same arguments give the same draws in the same order of calls.

    Args:
        seed: of the run.
        start, stop: numbers of samples; number i is the i-th image the run sees.
        step: number of the first sample of the whole batch, which decides the draws that the batch shares.
        stream: parts that must not share draws (augmenting the data, stepping) have different ones.
    """

    def __init__(self, seed: int, start: int, stop: int, *, step: int | None = None, stream: int = 0) -> None:
        keys = np.array([seed, stream], dtype=np.uint64)
        root = _mix(_mix(keys[:1]) + keys[1:] * np.uint64(_GOLDEN))
        self._rows = _mix(root + np.arange(start, stop, dtype=np.uint64) * np.uint64(_GOLDEN))
        self._shared = _mix(root + np.array([_BATCH + (start if step is None else step)], dtype=np.uint64))
        self._drawn = 0
        self._drawn_shared = 0

    def __len__(self) -> int:
        return len(self._rows)

    def rows(self, count: int, columns: int) -> Tensor:
        """Float64 ``[count, columns]`` in [0, 1), on the CPU.

        Args:
            count: a multiple of the number of samples: several blocks, each with one row a sample, in order.
            columns: draws a row.
        """
        n = len(self._rows)
        if n == 0 or count % n:
            raise ValueError(f"{count} rows are no whole blocks of {n} samples")
        blocks = count // n
        counters = np.arange(self._drawn, self._drawn + blocks * columns, dtype=np.uint64).reshape(blocks, 1, columns)
        self._drawn += blocks * columns
        return torch.from_numpy(_uniform(self._rows[None, :, None], counters).reshape(count, columns))

    def shared(self, columns: int) -> Tensor:
        """Float64 ``[columns]`` in [0, 1): the same for every part of the batch."""
        counters = np.arange(self._drawn_shared, self._drawn_shared + columns, dtype=np.uint64)
        self._drawn_shared += columns
        return torch.from_numpy(_uniform(self._shared, counters))

    def generator(self) -> torch.Generator:
        """A torch generator that every part of the batch seeds alike, for what draws once a batch."""
        seed = int(self.shared(1).item() * 2**53) & 0xFFFF_FFFF
        return torch.Generator().manual_seed(seed)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's output function; wraps around modulo 2^64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _uniform(keys: NDArray[np.uint64], counters: NDArray[np.uint64]) -> NDArray[np.float64]:
    bits = _mix(keys + (counters + np.uint64(1)) * np.uint64(_GOLDEN))
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53
