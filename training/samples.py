"""Pictures to look at while training: I, A1, A2, R, WR1, WR2 of fixed faces under fixed codes."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from training.saving import round_8bit

COLUMNS = ("I", "A1", "A2", "R", "WR1", "WR2")


@torch.no_grad()
def chain(
    network: nn.Module, images: Tensor, codes: Tensor, others: Tensor, wrong: Tensor, other_wrong: Tensor
) -> dict[str, Tensor]:
    """The six images of :data:`COLUMNS`, each through 8 bits.

    Args:
        images: float ``[B, 3, S, S]`` in [-1, 1].
        codes, others: for A1 and A2, float ``[B, N]`` in {-0.5, +0.5}.
        wrong, other_wrong: the codes that WR1 and WR2 are recovered with.
    """
    a1 = round_8bit(network(images, codes).float())
    outputs = {
        "I": images,
        "A1": a1,
        "A2": network(images, others),
        "R": network(a1, -codes),
        "WR1": network(a1, wrong),
        "WR2": network(a1, other_wrong),
    }
    return {k: round_8bit(v.float()) for k, v in outputs.items()}


def to_uint8(images: Tensor) -> NDArray[np.uint8]:
    """Float ``[B, 3, H, W]`` in [-1, 1] to uint8 ``[B, H, W, 3]``."""
    levels = torch.round((images.float().clamp(-1, 1) + 1) * 127.5).to(torch.uint8)
    return levels.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def from_uint8(images: NDArray[np.uint8], device: torch.device | str = "cpu") -> Tensor:
    """The inverse of :func:`to_uint8`."""
    return torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def grid(outputs: dict[str, Tensor]) -> NDArray[np.uint8]:
    """One row a face, one column of :data:`COLUMNS` each: uint8 ``[B*S, 6*S, 3]``."""
    columns = [to_uint8(outputs[name]) for name in COLUMNS]
    return np.concatenate([np.concatenate(list(c), axis=0) for c in columns], axis=1)
