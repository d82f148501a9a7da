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
from training.draws import Draws
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

    Scores of an image are a list of maps, one a network: the coarse one, the fine one of its kind, then the heads.
    What is shared runs once over everything given.
    """

    def __init__(self, config: DiscriminatorConfig, features: AlexFeatures | None) -> None:
        super().__init__()
        self.augment, self.colour_pool = config.augment, config.colour_pool
        self.coarse = PatchGAN(config.width, config.layers - 1 or 1)
        self.fine = nn.ModuleDict({kind: PatchGAN(config.width, config.layers) for kind in KINDS})
        self.heads = nn.ModuleList(_Head(c, 64) for c in AlexFeatures.channels) if features is not None else None
        # Held in a tuple so that the frozen network is not part of this module's state.
        self._features = (features,)

    def forward(
        self, made: dict[str, Tensor], real: Tensor | None = None, draws: Draws | None = None
    ) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
        """Scores of made images and, where given, of real ones as every kind's networks see them.

        Args:
            made: images of each kind (of :data:`KINDS`), float ``[B, 3, S, S]`` in [-1, 1].
            real: float ``[B, 3, S, S]``.
            draws: for the augmentation, where that is configured.

        Returns:
            For the made and for the real images: for each kind its list of score maps, float ``[B, 1, h, w]``.
        """
        images = torch.cat([*([real] if real is not None else []), *made.values()])
        if self.colour_pool > 1:
            images = pool_colour(images, self.colour_pool)
        if self.augment and draws is not None:
            images = diff_augment(images, draws)
        parts = len(made) + (real is not None)
        shared = [self.coarse(F.avg_pool2d(images, 2))]
        if self.heads is not None and self._features[0] is not None:
            shared += [h(f) for h, f in zip(self.heads, self._features[0](images), strict=True)]
        pieces = [s.chunk(parts) for s in shared]
        chunks = images.chunk(parts)
        made_scores, real_scores = [], []
        for i, kind in enumerate(made, start=parts - len(made)):
            fine = self.fine[kind]
            if real is None:
                made_scores.append([pieces[0][i], fine(chunks[i]), *(p[i] for p in pieces[1:])])
                continue
            of_real, of_made = fine(torch.cat([chunks[0], chunks[i]])).chunk(2)
            made_scores.append([pieces[0][i], of_made, *(p[i] for p in pieces[1:])])
            real_scores.append([pieces[0][0], of_real, *(p[0] for p in pieces[1:])])
        return made_scores, real_scores


def pool_colour(images: Tensor, size: int) -> Tensor:
    """The same luma with colour averaged over squares of ``size`` pixels, float ``[B, 3, S, S]``."""
    luma = torch.einsum("bchw,c->bhw", images, images.new_tensor((0.299, 0.587, 0.114)))[:, None]
    colour = F.avg_pool2d(images - luma, size)
    return luma + F.interpolate(colour, scale_factor=float(size), mode="bilinear", align_corners=False)


def diff_augment(images: Tensor, draws: Draws) -> Tensor:
    """Differentiable augmentation (Zhao et al. 2020): brightness, saturation, contrast, translation by up to 1/8.

    Args:
        images: float ``[B, 3, S, S]`` in [-1, 1].
        draws: whose samples these images are of, one block of the batch a kind.
    """
    b, _, size, _ = images.shape
    draw = draws.rows(b, 5).to(images)
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
