"""The LeGall 5/3 wavelet by lifting (ISO 15444-1, annex F, without its rounding): exactly invertible.

Changing the low band changes the image smoothly: its synthesis function is linear interpolation.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _shift(x: Tensor, dim: int, by: int) -> Tensor:
    """Neighbours along ``dim``, the edge repeated (symmetric extension of an even-length signal)."""
    n = x.shape[dim]
    if by > 0:
        return torch.cat([x.narrow(dim, 1, n - 1), x.narrow(dim, n - 1, 1)], dim=dim)
    return torch.cat([x.narrow(dim, 0, 1), x.narrow(dim, 0, n - 1)], dim=dim)


def _split(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    pairs = x.reshape(*x.shape[:dim], -1, 2, *x.shape[dim + 1 :])
    even, odd = pairs.select(dim + 1, 0), pairs.select(dim + 1, 1)
    high = odd - (even + _shift(even, dim, 1)) / 2
    return even + (high + _shift(high, dim, -1)) / 4, high


def _join(low: Tensor, high: Tensor, dim: int) -> Tensor:
    even = low - (high + _shift(high, dim, -1)) / 4
    odd = high + (even + _shift(even, dim, 1)) / 2
    return torch.stack([even, odd], dim=dim + 1).flatten(dim, dim + 1)


def analyse(x: Tensor) -> tuple[Tensor, Tensor]:
    """One level: float ``[B, C, H, W]``, even sides, to low band ``[B, C, H/2, W/2]`` and details ``[B, 3C, ...]``."""
    low, high = _split(x, 3)
    (ll, lh), (hl, hh) = _split(low, 2), _split(high, 2)
    return ll, torch.cat([lh, hl, hh], dim=1)


def synthesise(low: Tensor, details: Tensor) -> Tensor:
    """The inverse of :func:`analyse`."""
    lh, hl, hh = details.chunk(3, dim=1)
    return _join(_join(low, lh, 2), _join(hl, hh, 2), 3)
