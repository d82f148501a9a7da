"""A small U-Net that fits a likeness into the picture that it is shown in: pose, outlines, light, expression.

It sees what a reversible transformer never changes, so that it paints the same again when the face is to come back.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, PositiveInt
from torch import Tensor, nn


class PainterConfig(BaseModel):
    """Options of the painter."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    widths: tuple[PositiveInt, ...] = (48, 96, 160, 160)
    """Channels at 1/2, 1/4, ... of the crop's resolution, multiples of 8."""


class _Residual(nn.Module):
    """norm -> SiLU -> 3x3, twice, added to the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(8, channels), nn.GroupNorm(8, channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        out: Tensor = x + self.conv2(F.silu(self.norm2(h)))
        return out


class Painter(nn.Module):
    """``forward(float [B, given, S / 2, S / 2])`` -> float ``[B, made, S / 2, S / 2]``; 0 from a fresh one."""

    def __init__(self, config: PainterConfig, *, given: int, made: int) -> None:
        super().__init__()
        widths = config.widths
        self.stem = nn.Conv2d(given, widths[0], 3, padding=1)
        self.encoder = nn.ModuleList(_Residual(w) for w in widths)
        self.down = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in pairwise(widths))
        self.up = nn.ModuleList(nn.Conv2d(b, a, 1) for a, b in pairwise(widths))
        self.merge = nn.ModuleList(nn.Conv2d(2 * a, a, 1) for a in widths[:-1])
        self.decoder = nn.ModuleList(_Residual(w) for w in widths)
        self.norm = nn.GroupNorm(8, widths[0])
        self.head = nn.Conv2d(widths[0], made, 3, padding=1)
        nn.init.zeros_(self.head.weight)
        if self.head.bias is not None:
            nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        skips: list[Tensor] = []
        last = len(self.encoder) - 1
        for level, block in enumerate(self.encoder):
            x = block(x)
            if level < last:
                skips.append(x)
                x = self.down[level](x)
        for level in range(last, -1, -1):
            if level < last:
                x = F.interpolate(self.up[level](x), scale_factor=2.0, mode="nearest")
                x = self.merge[level](torch.cat([x, skips[level]], dim=1))
            x = self.decoder[level](x)
        out: Tensor = self.head(F.silu(self.norm(x)))
        return out
