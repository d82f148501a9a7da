"""Where a face's box, eyes, nose and mouth are, differentiably: MTCNN's last network (Zhang et al. 2016).

What is made of a face should look the same way and keep its place, or the picture around it no longer fits it.
"""

from __future__ import annotations

from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.draws import Draws

_SIDE: Final = 48
# Where MTCNN finds the box of an aligned crop, as shares of its side: left, top, right, bottom (medians over the
# validation faces), made square as MTCNN does before its last network.
_BOX: Final = (0.22, 0.19, 0.77, 0.94)


class Pose(nn.Module):
    """``forward(images float [B, 3, S, S] in [-1, 1], draws)`` -> box, landmarks, and whether it is a face.

    float ``[B, 4]`` and ``[B, 10]`` in sides of the box, float ``[B]`` log-probability.
    """

    def __init__(self) -> None:
        super().__init__()
        from facenet_pytorch.models.mtcnn import ONet  # a training machine may not have it; only this term needs it

        self.network = ONet().requires_grad_(False).eval()

    def forward(self, images: Tensor, draws: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See the class.

        Args:
            draws: float ``[B, 3]`` in [0, 1): how the box is moved and scaled, the same for images to be compared.
        """
        left, top, right, bottom = _BOX
        half = max(right - left, bottom - top)  # of [-1, 1]
        jitter = (draws * 2 - 1).to(images)
        scale = half * (1 + 0.1 * jitter[:, 0])
        zero = torch.zeros_like(scale)
        theta = torch.stack(
            [
                torch.stack([scale, zero, left + right - 1 + 0.08 * jitter[:, 1]], 1),
                torch.stack([zero, scale, top + bottom - 1 + 0.08 * jitter[:, 2]], 1),
            ],
            1,
        )
        grid = F.affine_grid(theta, [len(images), 3, 2 * _SIDE, 2 * _SIDE], align_corners=False)
        seen = F.avg_pool2d(F.grid_sample(images, grid, padding_mode="zeros", align_corners=False), 2)
        box, landmarks, sure = self.network(seen * (127.5 / 128))
        return box, landmarks, sure[:, 1].clamp_min(1e-6).log()


def pose_distance(real: tuple[Tensor, Tensor, Tensor], made: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Mean distance of boxes and landmarks, in hundredths of the box's side, and doubt whether it is a face at all."""
    box, landmarks, sure = made
    moved = (box - real[0]).abs().mean() + (landmarks - real[1]).abs().mean()
    return 100 * moved - sure.mean()


def jitter(draws: Draws, count: int) -> Tensor:
    """One placing of the box a sample, float ``[count, 3]`` on the CPU."""
    return draws.rows(count, 3).float()
