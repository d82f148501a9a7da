"""The paper's transformer: a 9-block ResNet generator (paper, section 4.1; Johnson et al. 2016).

Reflection pad, 7x7 to 64, two stride-2 convolutions to 256, nine residual blocks, two resize-convolutions (nearest x2
then 3x3), 7x7, tanh. The code is replicated over every pixel and concatenated to the image. With N = 16 it has 11.43 M
parameters and 15.0 GMAC at 128x128.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, PositiveInt
from torch import Tensor, nn


class ResNetConfig(BaseModel):
    """Options of the paper's architecture; the defaults are the paper's but for the norm."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Literal["resnet"] = "resnet"
    width: PositiveInt = 64
    blocks: PositiveInt = 9
    # "batch" is the paper's. In evaluation it uses running statistics; the authors' code used the batch's own, which
    # makes a face depend on its batch-mates. "group" has no batch statistics at all. Instance norm is not offered:
    # a code enters as constant planes, whose contribution the first instance norm would subtract again.
    norm: Literal["group", "batch"] = "group"


def _norm(kind: str, channels: int) -> nn.Module:
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    return nn.GroupNorm(min(32, channels // 4) or 1, channels)


class _Residual(nn.Module):
    def __init__(self, channels: int, norm: str) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.ReflectionPad2d(1),
            nn.Conv2d(channels, channels, 3, bias=False),
            _norm(norm, channels),
            nn.ReLU(inplace=True),
            nn.ReflectionPad2d(1),
            nn.Conv2d(channels, channels, 3, bias=False),
            _norm(norm, channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.layers(x)
        return out


class ResNetTransformer(nn.Module):
    """See the module's docstring; called as :mod:`mien.networks` says."""

    def __init__(self, config: ResNetConfig, *, bits: int) -> None:
        super().__init__()
        w, norm = config.width, config.norm
        layers: list[nn.Module] = [
            nn.ReflectionPad2d(3),
            nn.Conv2d(3 + bits, w, 7, bias=False),
            _norm(norm, w),
            nn.ReLU(inplace=True),
        ]
        for channels in (w, 2 * w):
            layers += [
                nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1, bias=False),
                _norm(norm, 2 * channels),
                nn.ReLU(inplace=True),
            ]
        layers += [_Residual(4 * w, norm) for _ in range(config.blocks)]
        for channels in (4 * w, 2 * w):
            layers += [
                nn.Upsample(scale_factor=2, mode="nearest"),
                nn.ReflectionPad2d(1),
                nn.Conv2d(channels, channels // 2, 3, bias=False),
                _norm(norm, channels // 2),
                nn.ReLU(inplace=True),
            ]
        layers += [nn.ReflectionPad2d(3), nn.Conv2d(w, 3, 7), nn.Tanh()]
        self.layers = nn.Sequential(*layers)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, images: Tensor, codes: Tensor) -> Tensor:
        plane = codes[:, :, None, None].expand(-1, -1, *images.shape[-2:])
        out: Tensor = self.layers(torch.cat([images, plane], dim=1))
        return out
