"""A reversible transformer: recovery holds by construction, so training is spent on the anonymized face alone.

Let h_p be an invertible network conditioned on the code p, built from additive couplings (Dinh et al. 2014): split the
channels in two, add to each half a function of the other half and the code. Then

    T_p = h_{-p}^{-1} o h_p      so that      T_{-p} = h_p^{-1} o h_{-p} = (T_p)^{-1}

which is the paper's T_{-p} T_p I = I (eq. 4) for *any* weights: the same single network, called with the inverse
code. What is left to lose is the rounding of the saved file. A wrong code runs another chain of changes and gives
another face. A fresh network is the identity.

The halves are the low band of a two-level wavelet (a quarter of the resolution, 3 channels) and all its details (45
channels on the same grid). What is added to the low band changes the image smoothly, and the details answer to it; an
earlier design that mixed folded pixels freely found colour lattices that deceive a recogniser and no eye. Everything
added is multiplied by a fixed head mask: outside it the picture stays what it was.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Final, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, PositiveFloat, PositiveInt
from torch import Tensor, nn

from mien.networks.blocks import CodeEmbedding, ModulatedNorm, ModulatedResidual, head_mask
from mien.networks.wavelet import analyse, synthesise

# A fresh network changes a face a little under each code: a start at exactly nothing leaves Q nothing to read.
_HEAD_GAIN: Final = 0.5

# Updates are added to atanh(0.9 x), where black and white are at +-1.47: the same update moves a pixel near the ends of
# the range less, so that little is clipped when the picture is saved. An 8-bit step grows at most 4.7-fold on its way
# through the stretched scale.
_SQUEEZE: Final = 0.9
_LIMIT: Final = 0.9999


class CouplingConfig(BaseModel):
    """Options of the reversible transformer."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Literal["coupling"] = "coupling"
    steps: PositiveInt = 2
    widths: tuple[PositiveInt, ...] = (32, 64, 96)
    blocks: PositiveInt = 1
    condition: PositiveInt = 128
    # How strongly an update of unit size moves the coarse and the fine details; the low band moves by 1.
    detail_gain: tuple[PositiveFloat, PositiveFloat] = (0.3, 0.1)


class _Update(nn.Module):
    """What one half adds to the other: a small U-Net over the quarter-size grid, modulated by the code."""

    def __init__(self, inputs: int, outputs: int, config: CouplingConfig) -> None:
        super().__init__()
        widths, c = config.widths, config.condition
        self.stem = nn.Conv2d(inputs, widths[0], 3, padding=1)
        self.down = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in pairwise(widths))
        self.blocks = nn.ModuleList(
            nn.ModuleList(ModulatedResidual(w, c) for _ in range(config.blocks)) for w in widths[1:]
        )
        self.up = nn.ModuleList(nn.Conv2d(b, a, 1) for a, b in pairwise(widths))
        self.norm = ModulatedNorm(widths[0], c)
        self.head = nn.Conv2d(widths[0], outputs, 3, padding=1)
        nn.init.normal_(self.head.weight, std=_HEAD_GAIN * (9 * widths[0]) ** -0.5)
        if self.head.bias is not None:
            nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        levels = [self.stem(x)]
        for down, blocks in zip(self.down, self.blocks, strict=True):
            h = down(F.silu(levels[-1]))
            for block in blocks:  # type: ignore[attr-defined]
                h = block(h, condition)
            levels.append(h)
        h = levels.pop()
        for up in reversed(self.up):
            h = F.interpolate(up(h), scale_factor=2.0, mode="bilinear", align_corners=False) + levels.pop()
        out: Tensor = self.head(F.silu(self.norm(h, condition)))
        return out


class _Step(nn.Module):
    """Low band from details, then details from low band; exactly invertible."""

    def __init__(self, config: CouplingConfig) -> None:
        super().__init__()
        self.low = _Update(45, 3, config)
        self.details = _Update(3, 45, config)

    def forward(
        self, low: Tensor, details: Tensor, condition: Tensor, gains: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        low = low + gains[0] * self.low(details, condition)
        return low, details + gains[1] * self.details(low, condition)

    def inverse(
        self, low: Tensor, details: Tensor, condition: Tensor, gains: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        details = details - gains[1] * self.details(low, condition)
        return low - gains[0] * self.low(details, condition), details


class CouplingTransformer(nn.Module):
    """See the module's docstring; called as :mod:`mien.networks` says."""

    low_gain: Tensor
    detail_gain: Tensor

    def __init__(self, config: CouplingConfig, *, bits: int, size: int) -> None:
        super().__init__()
        if size % (4 * 2 ** (len(config.widths) - 1)):
            raise ValueError(f"a crop of {size} px cannot be halved {len(config.widths) + 1} times")
        self.embed = CodeEmbedding(bits, config.condition)
        self.steps = nn.ModuleList(_Step(config) for _ in range(config.steps))
        mask = F.avg_pool2d(head_mask(size), 4)
        # The least of the neighbours: one coefficient of the low band reaches four pixels to every side.
        mask = -F.max_pool2d(-mask, 3, stride=1, padding=1)
        mask = torch.where(mask < 1e-2, torch.zeros_like(mask), mask)
        coarse, fine = config.detail_gain
        gains = torch.tensor([coarse] * 9 + [fine] * 36)[None, :, None, None]
        self.register_buffer("low_gain", mask, persistent=False)
        self.register_buffer("detail_gain", mask * gains, persistent=False)

    def forward(self, images: Tensor, codes: Tensor) -> Tensor:
        # In float32 even where the updates run in bf16: what the chain rounds, recovery could not undo.
        with torch.autocast(images.device.type, enabled=False):
            images = images.float() if images.dtype in (torch.float16, torch.bfloat16) else images
            stretched = torch.atanh((_SQUEEZE * images).clamp(-_LIMIT, _LIMIT))
        return torch.tanh(self._couple(stretched, codes)) / _SQUEEZE

    def _couple(self, images: Tensor, codes: Tensor) -> Tensor:
        there, back = self.embed(codes), self.embed(-codes)
        gains = (self.low_gain, self.detail_gain)
        middle, fine = analyse(images)
        low, coarse = analyse(middle)
        details = torch.cat([coarse, F.pixel_unshuffle(fine, 2)], dim=1)
        for step in self.steps:
            low, details = step(low, details, there, gains)
        for step in reversed(self.steps):
            low, details = step.inverse(low, details, back, gains)  # type: ignore[operator]
        coarse, fine = details[:, :9], F.pixel_shuffle(details[:, 9:], 2)
        return synthesise(synthesise(low, coarse), fine)
