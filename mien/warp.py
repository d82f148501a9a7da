"""Differentiable similarity warps of image batches.

Float images ``[B, C, H, W]`` in, float images out; see :mod:`mien.geometry` for the coordinate convention.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from mien import geometry


def warp(
    images: Tensor,
    matrix: NDArray[np.float64] | Tensor,
    size: tuple[int, int],
    *,
    padding: str = "zeros",
    mode: str = "bilinear",
    supersample: int = 1,
) -> Tensor:
    """Warp images by affine transforms, differentiable in the images.

    Args:
        images: float ``[B, C, H, W]``.
        matrix: ``[2, 3]`` or ``[B, 2, 3]``, from input pixels to output pixels (the forward direction).
        size: (height, width) of the output.
        padding: ``zeros``, ``border`` or ``reflection``: what lies outside the input.
        mode: ``bilinear`` or ``bicubic`` sampling.
        supersample: samples per output pixel and axis, averaged. Use the shrink factor, rounded up, to avoid aliasing
            when the output is smaller than the region it shows.

    Returns:
        float ``[B, C, height, width]``, dtype and device of ``images``.
    """
    height, width = size
    batch = images.shape[0]
    forward = np.asarray(matrix.detach().cpu() if isinstance(matrix, Tensor) else matrix, dtype=np.float64)
    forward = np.broadcast_to(forward, (batch, 2, 3)) if forward.ndim == 2 else forward
    k = supersample
    if k > 1:  # positions of a k times finer output grid
        finer = np.array([[k, 0.0, (k - 1) / 2], [0.0, k, (k - 1) / 2]])
        forward = np.stack([geometry.compose(finer, m) for m in forward])
    backward = np.stack([geometry.invert(m) for m in forward])
    theta = torch.as_tensor(backward, dtype=torch.float64)
    ys, xs = torch.meshgrid(
        torch.arange(height * k, dtype=torch.float64), torch.arange(width * k, dtype=torch.float64), indexing="ij"
    )
    grid = torch.stack([xs, ys, torch.ones_like(xs)], dim=-1)  # [h, w, 3]
    source = torch.einsum("hwk,bjk->bhwj", grid, theta)  # pixels of the input
    in_h, in_w = images.shape[-2:]
    normalised = (2 * source + 1) / torch.tensor([in_w, in_h], dtype=torch.float64) - 1
    out = F.grid_sample(
        images,
        normalised.to(images),
        mode=mode,
        padding_mode=padding,
        align_corners=False,
    )
    return F.avg_pool2d(out, k) if k > 1 else out


def supersampling_for(matrix: NDArray[np.float64], limit: int = 8) -> int:
    """How many samples per axis a warp by ``matrix`` needs so that shrinking does not alias (1 where it enlarges)."""
    return max(1, min(limit, math.ceil(1.0 / geometry.scale_of(matrix) - 1e-6)))
