"""Differentiable similarity warps of image batches.

Float images ``[B, C, H, W]`` in, float images out; see :mod:`mien.geometry` for the coordinate convention.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

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
    matrices = np.asarray(matrix.detach().cpu() if isinstance(matrix, Tensor) else matrix, dtype=np.float64)
    matrices = np.broadcast_to(matrices, (images.shape[0], 2, 3))
    grid = sampling_grid(matrices, size, (images.shape[-2], images.shape[-1]), supersample).to(images)
    return sample(images, grid, padding=padding, mode=mode, supersample=supersample)


def sampling_grid(
    matrices: NDArray[np.float64], size: tuple[int, int], source: tuple[int, int], supersample: int = 1
) -> Tensor:
    """Where :func:`warp` looks: who warps by one matrix again and again asks once, and calls :func:`sample`.

    Args:
        matrices: ``[B, 2, 3]``, from input pixels to output pixels.
        size, source: (height, width) of the output and of the input.
        supersample: as for :func:`warp`.

    Returns:
        float64 ``[B, k height, k width, 2]`` as ``grid_sample`` takes it, k being ``supersample``.
    """
    k = supersample
    forward = np.asarray(matrices)
    if k > 1:  # positions of a k times finer output grid
        finer = np.array([[k, 0.0, (k - 1) / 2], [0.0, k, (k - 1) / 2]])
        forward = np.stack([geometry.compose(finer, m) for m in forward])
    backward = np.stack([geometry.invert(m) for m in forward])
    # From pixels to [-1, 1] over the input. An affine map is a sum of one number a row and one a column.
    backward[:, :, 2] += 0.5
    backward *= 2 / np.array(source[::-1], dtype=np.float64)[:, None]
    grid = np.empty((len(forward), size[0] * k, size[1] * k, 2))
    xs, ys = np.arange(size[1] * k, dtype=np.float64), np.arange(size[0] * k, dtype=np.float64)
    for of, theta in zip(grid, backward, strict=True):
        for axis in (0, 1):
            row = theta[axis, 0] * xs + (theta[axis, 2] - 1)
            np.add(row, (theta[axis, 1] * ys)[:, None], out=of[..., axis])
    return torch.from_numpy(grid)


def sample(images: Tensor, grid: Tensor, *, padding: str = "zeros", mode: str = "bilinear", supersample: int) -> Tensor:
    """Images where a grid of :func:`sampling_grid` says, in the images' dtype; differentiable in the images."""
    out = F.grid_sample(images, grid, mode=mode, padding_mode=padding, align_corners=False)
    return F.avg_pool2d(out, supersample) if supersample > 1 else out


def supersampling_for(matrix: NDArray[np.float64], limit: int = 8) -> int:
    """How many samples per axis a warp by ``matrix`` needs so that shrinking does not alias (1 where it enlarges)."""
    return max(1, min(limit, math.ceil(1.0 / geometry.scale_of(matrix) - 1e-6)))


class FixedWarp(nn.Module):
    """A warp by one constant scale and translation, for the inner loop of training.

    Without rotation a bilinear warp is separable: two small matrix products, faster than sampling on a grid (forward
    and backward on a CPU) and, unlike ``grid_sample``, with a backward pass that is deterministic on GPUs too, which
    an exact resume needs. Equals :func:`warp` with zero padding.

    Args:
        matrix: ``[2, 3]`` from pixels of a ``source_size`` square to output pixels; no rotation or shear.
        size: (height, width) of the output.
        source_size: side of the square the matrix is written for. Images of another side are first resized to it.

    Raises:
        ValueError: the matrix rotates, shears or mirrors.
    """

    def __init__(
        self, matrix: NDArray[np.float64], size: tuple[int, int], source_size: int = geometry.CROP_SIZE
    ) -> None:
        super().__init__()
        if abs(matrix[0, 1]) + abs(matrix[1, 0]) > 1e-9 or min(matrix[0, 0], matrix[1, 1]) <= 0:
            raise ValueError(f"FixedWarp only scales and translates, and cannot apply {matrix.tolist()}")
        self.source_size = source_size
        rows, columns = (
            _bilinear_weights(matrix[axis, axis], matrix[axis, 2], n, source_size)
            for axis, n in ((1, size[0]), (0, size[1]))
        )
        # Not persistent: they follow from the constants above and have no place in a file of weights.
        self.register_buffer("rows", rows, persistent=False)
        self.register_buffer("columns", columns, persistent=False)
        self.rows: Tensor
        self.columns: Tensor

    def forward(self, images: Tensor) -> Tensor:
        """Float ``[B, C, S, S]`` to float32 ``[B, C, height, width]``; differentiable in the images."""
        # Half precision has too few bits for pixel positions' weights, and the cost is nothing next to a recogniser.
        with torch.autocast(images.device.type, enabled=False):
            images = images.float()
            if images.shape[-2:] != (self.source_size, self.source_size):
                side = (self.source_size, self.source_size)
                images = F.interpolate(images, side, mode="bilinear", align_corners=False, antialias=True)
            along_x = F.linear(images, self.columns).transpose(-1, -2)
            return F.linear(along_x, self.rows).transpose(-1, -2)


def _bilinear_weights(scale: float, offset: float, count: int, source: int) -> Tensor:
    """Weights ``[count, source]`` of source pixels in output pixels, averaged over samples where the warp shrinks."""
    samples = max(1, math.ceil(1.0 / scale - 1e-6))
    within = (torch.arange(samples, dtype=torch.float64) + 0.5) / samples - 0.5
    wanted = torch.arange(count, dtype=torch.float64)[:, None] + within  # [count, samples], output pixels
    position = (wanted - offset) / scale
    distance = (position[:, :, None] - torch.arange(source, dtype=torch.float64)).abs()
    return (1 - distance).clamp(min=0).mean(dim=1).float()
