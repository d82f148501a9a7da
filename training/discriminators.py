"""D: what tells real faces from made ones (paper, section 3.3, eq. 14-15).

PatchGANs at two scales, in the paper's arrangement: the coarse one (input at half size) is shared by A, R and WR, the
fine ones are three separate networks. Optionally heads on a frozen ImageNet network's features (Projected GANs, Sauer
et al. 2021, arXiv 2111.01007), which learn to judge from far fewer images.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.config import DiscriminatorConfig
from training.perceptual import AlexFeatures

KINDS = ("anonymized", "recovered", "wrong")


class PatchGAN(nn.Module):
    """Isola et al. 2017: 4x4 stride-2 convolutions, a map of scores. No batch statistics.

    ``forward(images float [B, 3, H, W] in [-1, 1]) -> scores float [B, 1, h, w]``.
    """

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        modules: list[nn.Module] = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        channels = width
        for i in range(1, layers + 1):
            wider = min(width * 2**i, width * 8)
            stride = 2 if i < layers else 1
            modules += [
                nn.Conv2d(channels, wider, 4, stride=stride, padding=1, bias=False),
                nn.GroupNorm(max(1, wider // 16), wider),
                nn.LeakyReLU(0.2),
            ]
            channels = wider
        modules.append(nn.Conv2d(channels, 1, 4, padding=1))
        self.layers = nn.Sequential(*modules)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.layers(images)
        return out


class _Head(nn.Module):
    """A small patch discriminator on one feature map."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, width, 1, bias=False),
            nn.GroupNorm(max(1, width // 16), width),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.GroupNorm(max(1, width // 16), width),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, 1, 1),
        )

    def forward(self, features: Tensor) -> Tensor:
        out: Tensor = self.layers(features)
        return out


class Discriminators(nn.Module):
    """All discriminators of a run.

    ``forward(images float [B, 3, S, S] in [-1, 1], kind) -> list of score maps``, where ``kind`` (one of
    :data:`KINDS`) chooses the fine network. Real images are shown to every fine network.
    """

    def __init__(self, config: DiscriminatorConfig, features: AlexFeatures | None) -> None:
        super().__init__()
        self.augment = config.augment
        self.coarse = PatchGAN(config.width, config.layers - 1 or 1)
        self.fine = nn.ModuleDict({kind: PatchGAN(config.width, config.layers) for kind in KINDS})
        self.heads = nn.ModuleList(_Head(c, 64) for c in AlexFeatures.channels) if features is not None else None
        # Held in a tuple so that the frozen network is not part of this module's state.
        self._features = (features,)

    def forward(self, images: Tensor, kind: str, generator: torch.Generator | None = None) -> list[Tensor]:
        if self.augment and generator is not None:
            images = diff_augment(images, generator)
        scores = [self.coarse(F.avg_pool2d(images, 2)), self.fine[kind](images)]
        if self.heads is not None and self._features[0] is not None:
            features = self._features[0](images)
            scores += [head(f) for head, f in zip(self.heads, features, strict=True)]
        return scores


def diff_augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Differentiable augmentation (Zhao et al. 2020): brightness, saturation, contrast, translation by up to 1/8.

    Args:
        images: float ``[B, 3, S, S]`` in [-1, 1].
        generator: on the CPU; the draws are the same on every device.
    """
    b, _, size, _ = images.shape
    draw = torch.rand(b, 5, generator=generator).to(images)
    scalar = draw[:, :, None, None, None]
    images = images + (scalar[:, 0] - 0.5) * 0.4
    mean = images.mean(dim=1, keepdim=True)
    images = (images - mean) * (scalar[:, 1] + 0.5) + mean
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    images = (images - mean) * (scalar[:, 2] * 0.5 + 0.75) + mean
    reach = size // 8
    shift = (draw[:, 3:] * (2 * reach + 1)).long().clamp(max=2 * reach)  # 0..2 reach
    padded = F.pad(images, (reach, reach, reach, reach))
    rows = shift[:, 0, None] + torch.arange(size, device=images.device)  # [B, S]
    cols = shift[:, 1, None] + torch.arange(size, device=images.device)
    padded = padded.gather(2, rows[:, None, :, None].expand(-1, 3, -1, padded.shape[3]))
    return padded.gather(3, cols[:, None, None, :].expand(-1, 3, size, -1))
