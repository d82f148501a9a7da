"""Parts that more than one architecture uses."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class CodeEmbedding(nn.Module):
    """Codes float ``[B, N]`` in {-0.5, +0.5} to a conditioning vector float ``[B, features]``.

    A linear path beside the perceptron carries every bit from the first step on.
    """

    def __init__(self, bits: int, features: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(bits, features), nn.SiLU(), nn.Linear(features, features))
        self.direct = nn.Linear(bits, features, bias=False)
        nn.init.normal_(self.direct.weight, std=bits**-0.5)

    def forward(self, codes: Tensor) -> Tensor:
        codes = codes * 2  # unit variance
        out: Tensor = self.layers(codes) + self.direct(codes)
        return out


class ModulatedNorm(nn.Module):
    """Group norm whose gain and bias are predicted from the code: per sample, no batch statistics.

    The code is felt from the start: were the prediction zero, no loss could tell two codes apart and Q (paper, eq. 18)
    would find nothing to read.
    """

    def __init__(self, channels: int, condition: int) -> None:
        super().__init__()
        groups = max(g for g in (1, 2, 4, 8, 16) if channels % g == 0 and channels // g >= 4)
        self.norm = nn.GroupNorm(groups, channels, affine=False)
        self.affine = nn.Linear(condition, 2 * channels)
        nn.init.normal_(self.affine.weight, std=0.5 * condition**-0.5)
        nn.init.zeros_(self.affine.bias)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        gain, bias = self.affine(condition)[:, :, None, None].chunk(2, dim=1)
        out: Tensor = self.norm(x) * (1 + gain) + bias
        return out


class ModulatedResidual(nn.Module):
    """norm -> SiLU -> 3x3, twice, added to the input; both norms modulated by the code."""

    def __init__(self, channels: int, condition: int) -> None:
        super().__init__()
        self.norm1 = ModulatedNorm(channels, condition)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2 = ModulatedNorm(channels, condition)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        h = self.conv1(torch.nn.functional.silu(self.norm1(x, condition)))
        out: Tensor = x + self.conv2(torch.nn.functional.silu(self.norm2(h, condition)))
        return out


def head_radius(x: Tensor, y: Tensor) -> Tensor:
    """1 on a superellipse around the head of :data:`mien.geometry.MIEN_128`, less inside; x, y in crop sides [0, 1]."""
    return (((x - 0.5) / 0.46).abs() ** 3 + ((y - 0.52) / 0.46).abs() ** 3) ** (1 / 3)


def head_mask(size: int) -> Tensor:
    """Where a network that edits in place may change pixels: 1 over the head, smoothly 0 towards the crop's border.

    Float ``[1, 1, size, size]`` in [0, 1], falling to 0 where :func:`head_radius` reaches 1 and exactly 0 in the outer
    ring, so that a transformed crop meets the picture around it without a seam.
    """
    position = (torch.arange(size, dtype=torch.float64) + 0.5) / size
    y, x = torch.meshgrid(position, position, indexing="ij")
    ramp = ((1.0 - head_radius(x, y)) / 0.25).clamp(0, 1)
    smooth = ramp * ramp * (3 - 2 * ramp)
    return smooth.to(torch.float32)[None, None]
