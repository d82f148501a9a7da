"""Q: reads the code back from (I, T_p I), so that the transformer cannot ignore it (paper, eq. 18)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class CodePredictor(nn.Module):
    """A PatchGAN whose last convolution is average pooling and N/4 parallel 16-way classifiers.

    ``forward(before, after: float [B, 3, S, S] in [-1, 1]) -> logits float [B, N/4, 16]``.
    """

    def __init__(self, bits: int, *, width: int = 64, layers: int = 3) -> None:
        super().__init__()
        modules: list[nn.Module] = [nn.Conv2d(6, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        channels = width
        for _ in range(layers):
            wider = min(channels * 2, width * 8)
            modules += [
                nn.Conv2d(channels, wider, 4, stride=2, padding=1, bias=False),
                nn.GroupNorm(max(1, wider // 16), wider),
                nn.LeakyReLU(0.2),
            ]
            channels = wider
        self.features = nn.Sequential(*modules)
        self.heads = nn.Linear(channels, bits // 4 * 16)

    def forward(self, before: Tensor, after: Tensor) -> Tensor:
        # The pair as its first image and its change: the same information, and a small change is not lost in a face.
        pooled = self.features(torch.cat([before, 4 * (after - before)], dim=1)).mean(dim=(2, 3))
        out: Tensor = self.heads(pooled)
        return out.unflatten(1, (-1, 16))


def code_classes(codes: Tensor) -> Tensor:
    """Codes {-0.5, +0.5} ``[B, N]`` to class labels int64 ``[B, N/4]``: four bits a class, first bit highest."""
    nibbles = (codes > 0).long().unflatten(1, (-1, 4))
    return (nibbles * torch.tensor([8, 4, 2, 1], device=codes.device)).sum(dim=-1)
