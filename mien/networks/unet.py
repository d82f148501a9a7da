"""A faster transformer: a pixel-unshuffle U-Net whose every block is modulated by the code.

The stem folds 2x2 pixels into channels, so that nothing convolves at full resolution; the output is added to the image
under a soft head mask, so that the background is kept by construction.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Final, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, PositiveInt
from torch import Tensor, nn

from mien.networks.blocks import CodeEmbedding, ModulatedNorm, ModulatedResidual, head_mask

# See mien.networks.coupling.
_HEAD_GAIN: Final = 0.2


class UNetConfig(BaseModel):
    """Options of the U-Net."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Literal["unet"] = "unet"
    fold: Literal[2, 4] = 2
    widths: tuple[PositiveInt, ...] = (48, 96, 160, 192)
    blocks: PositiveInt = 1
    condition: PositiveInt = 128


class UNetTransformer(nn.Module):
    """See the module's docstring; called as :mod:`mien.networks` says."""

    mask: Tensor

    def __init__(self, config: UNetConfig, *, bits: int, size: int) -> None:
        super().__init__()
        if size % (config.fold * 2 ** (len(config.widths) - 1)):
            raise ValueError(f"a crop of {size} px cannot be folded and halved {len(config.widths) - 1} times")
        widths, c = config.widths, config.condition
        self.fold = config.fold
        self.embed = CodeEmbedding(bits, c)
        self.stem = nn.Conv2d(3 * config.fold**2, widths[0], 3, padding=1)
        self.encoder = nn.ModuleList(
            nn.ModuleList(ModulatedResidual(w, c) for _ in range(config.blocks)) for w in widths
        )
        self.down = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in pairwise(widths))
        self.up = nn.ModuleList(nn.Conv2d(b, a, 1) for a, b in pairwise(widths))
        self.merge = nn.ModuleList(nn.Conv2d(2 * a, a, 1) for a in widths[:-1])
        self.decoder = nn.ModuleList(
            nn.ModuleList(ModulatedResidual(w, c) for _ in range(config.blocks)) for w in widths
        )
        self.norm = ModulatedNorm(widths[0], c)
        self.head = nn.Conv2d(widths[0], 3 * config.fold**2, 3, padding=1)
        nn.init.normal_(self.head.weight, std=_HEAD_GAIN * (9 * widths[0]) ** -0.5)
        if self.head.bias is not None:
            nn.init.zeros_(self.head.bias)
        self.register_buffer("mask", head_mask(size), persistent=False)

    def forward(self, images: Tensor, codes: Tensor) -> Tensor:
        condition = self.embed(codes)
        x = self.stem(F.pixel_unshuffle(images, self.fold))
        skips: list[Tensor] = []
        last = len(self.encoder) - 1
        for level, blocks in enumerate(self.encoder):
            for block in blocks:  # type: ignore[attr-defined]
                x = block(x, condition)
            if level < last:
                skips.append(x)
                x = self.down[level](x)
        for level in range(last, -1, -1):
            if level < last:
                x = F.interpolate(self.up[level](x), scale_factor=2.0, mode="nearest")
                x = self.merge[level](torch.cat([x, skips[level]], dim=1))
            for block in self.decoder[level]:  # type: ignore[attr-defined]
                x = block(x, condition)
        change = F.pixel_shuffle(self.head(F.silu(self.norm(x, condition))), self.fold)
        return images + self.mask * change
