"""A reversible transformer: recovery holds by construction, so training is spent on the anonymized face alone.

Let h_p be an invertible network conditioned on the code p, built from additive couplings (Dinh et al. 2014): split the
channels in two, add to each half a function of the other half and the code. Then

    T_p = h_{-p}^{-1} o h_p      so that      T_{-p} = h_p^{-1} o h_{-p} = (T_p)^{-1}

which is the paper's T_{-p} T_p I = I (eq. 4) for *any* weights: the same single network, called with the inverse
code. What is left to lose is the rounding of the saved file. A wrong code runs another chain of changes and gives
another face. A fresh network is the identity.

The image is folded 4x4 into channels (48 at 32x32), each coupling sees a learned orthonormal mix of them, and what a
coupling adds is multiplied by a fixed head mask: outside it the picture stays the same to the bit.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, PositiveInt
from torch import Tensor, nn

from mien.networks.blocks import CodeEmbedding, ModulatedNorm, ModulatedResidual, head_mask


class CouplingConfig(BaseModel):
    """Options of the reversible transformer."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Literal["coupling"] = "coupling"
    fold: Literal[2, 4, 8] = 4
    steps: PositiveInt = 2
    widths: tuple[PositiveInt, ...] = (32, 64, 96)
    blocks: PositiveInt = 1
    condition: PositiveInt = 128


class _Update(nn.Module):
    """What one half adds to the other: a small U-Net over the folded grid, modulated by the code."""

    def __init__(self, channels: int, config: CouplingConfig) -> None:
        super().__init__()
        widths, c = config.widths, config.condition
        self.stem = nn.Conv2d(channels, widths[0], 3, padding=1)
        self.down = nn.ModuleList(
            nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in zip(widths, widths[1:], strict=False)
        )
        self.blocks = nn.ModuleList(
            nn.ModuleList(ModulatedResidual(w, c) for _ in range(config.blocks)) for w in widths[1:]
        )
        self.up = nn.ModuleList(nn.Conv2d(b, a, 1) for a, b in zip(widths, widths[1:], strict=False))
        self.norm = ModulatedNorm(widths[0], c)
        self.head = nn.Conv2d(widths[0], channels, 3, padding=1)
        nn.init.zeros_(self.head.weight)
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
            h = F.interpolate(up(h), scale_factor=2.0, mode="nearest") + levels.pop()
        out: Tensor = self.head(F.silu(self.norm(h, condition)))
        return out


class _Step(nn.Module):
    """Orthonormal mix of the channels, then both halves updated in turn; exactly invertible."""

    def __init__(self, channels: int, config: CouplingConfig) -> None:
        super().__init__()
        # skew-symmetric part of a free matrix -> orthonormal by the matrix exponential, invertible by transposition.
        self.free = nn.Parameter(torch.randn(channels, channels) * 0.5)
        self.first = _Update(channels // 2, config)
        self.second = _Update(channels // 2, config)

    def mix(self) -> Tensor:
        free = self.free.float()
        return torch.linalg.matrix_exp(free - free.T)

    def forward(self, x: Tensor, condition: Tensor, mask: Tensor) -> Tensor:
        x = torch.einsum("oc,bchw->bohw", self.mix().to(x.dtype), x)
        a, b = x.chunk(2, dim=1)
        a = a + mask * self.first(b, condition)
        b = b + mask * self.second(a, condition)
        return torch.cat([a, b], dim=1)

    def inverse(self, x: Tensor, condition: Tensor, mask: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=1)
        b = b - mask * self.second(a, condition)
        a = a - mask * self.first(b, condition)
        return torch.einsum("co,bchw->bohw", self.mix().to(x.dtype), torch.cat([a, b], dim=1))


class CouplingTransformer(nn.Module):
    """See the module's docstring; called as :mod:`mien.networks` says."""

    mask: Tensor

    def __init__(self, config: CouplingConfig, *, bits: int, size: int) -> None:
        super().__init__()
        if size % (config.fold * 2 ** (len(config.widths) - 1)):
            raise ValueError(f"a crop of {size} px cannot be folded and halved {len(config.widths) - 1} times")
        self.fold = config.fold
        self.embed = CodeEmbedding(bits, config.condition)
        self.steps = nn.ModuleList(_Step(3 * config.fold**2, config) for _ in range(config.steps))
        mask = F.avg_pool2d(head_mask(size), config.fold)
        mask = torch.where(mask < 1e-3, torch.zeros_like(mask), mask)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, images: Tensor, codes: Tensor) -> Tensor:
        there, back = self.embed(codes), self.embed(-codes)
        x = F.pixel_unshuffle(images, self.fold)
        for step in self.steps:
            x = step(x, there, self.mask)
        for step in reversed(self.steps):
            x = step.inverse(x, back, self.mask)  # type: ignore[operator]
        return F.pixel_shuffle(x, self.fold)
