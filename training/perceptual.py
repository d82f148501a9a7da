"""A frozen AlexNet with LPIPS's linear layers (Zhang et al. 2018, v0.1): features and a perceptual distance.

Written out in plain torch because a training machine may have nothing else; a test holds it against the ``lpips``
package. Weights: a complete LPIPS file in safetensors, keys as in that package.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn


class AlexFeatures(nn.Module):
    """``forward(images float [B, 3, S, S] in [-1, 1])`` -> the five ReLU feature maps of AlexNet."""

    channels: ClassVar[tuple[int, ...]] = (64, 192, 384, 256, 256)
    shift: Tensor
    scale: Tensor

    def __init__(self, weights: str | Path) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(
            [
                nn.Conv2d(3, 64, 11, stride=4, padding=2),
                nn.Conv2d(64, 192, 5, padding=2),
                nn.Conv2d(192, 384, 3, padding=1),
                nn.Conv2d(384, 256, 3, padding=1),
                nn.Conv2d(256, 256, 3, padding=1),
            ]
        )
        self.linear = nn.ParameterList(torch.zeros(1, c, 1, 1) for c in self.channels)
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188])[None, :, None, None])
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450])[None, :, None, None])
        state = load_file(str(weights))
        names = ("slice1.0", "slice2.3", "slice3.6", "slice4.8", "slice5.10")
        with torch.no_grad():
            for layer, name in zip(self.convolutions, names, strict=True):
                layer.weight.copy_(state[f"net.{name}.weight"])  # type: ignore[operator]
                layer.bias.copy_(state[f"net.{name}.bias"])  # type: ignore[operator]
            for i, linear in enumerate(self.linear):
                linear.copy_(state[f"lin{i}.model.1.weight"])
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor) -> list[Tensor]:
        x = (images - self.shift) / self.scale
        out: list[Tensor] = []
        for i, convolution in enumerate(self.convolutions):
            if i in (1, 2):
                x = F.max_pool2d(x, 3, stride=2)
            x = F.relu(convolution(x))
            out.append(x)
        return out

    def distance(self, first: list[Tensor], second: list[Tensor]) -> Tensor:
        """LPIPS of two images from their features; float ``[B]``, 0 for equal images."""
        total: Tensor | None = None
        for a, b, weight in zip(first, second, self.linear, strict=True):
            a = a * torch.rsqrt(a.square().sum(dim=1, keepdim=True) + 1e-10)
            b = b * torch.rsqrt(b.square().sum(dim=1, keepdim=True) + 1e-10)
            term = ((a - b).square() * weight).sum(dim=1).mean(dim=(1, 2))
            total = term if total is None else total + term
        assert total is not None  # noqa: S101 - AlexNet has five feature maps
        return total
