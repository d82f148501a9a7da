"""What saving does to a picture, differentiably: clamp, 8-bit rounding, JPEG, rescale.

A network trained on unrounded floats hides the source in a faint signal that a saved file does not keep (Chu et al.
2017, arXiv 1712.02950). Recovering from what these functions return trains it on the *file*.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# ITU T.81 annex K, tables K.1 and K.2.
_LUMA = (
    16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55, 14, 13, 16, 24, 40, 57, 69, 56, 14, 17, 22, 29, 51,
    87, 80, 62, 18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64, 81, 104, 113, 92, 49, 64, 78, 87, 103, 121, 120, 101,
    72, 92, 95, 98, 112, 100, 103, 99,
)  # fmt: skip
_CHROMA = (
    17, 18, 24, 47, 99, 99, 99, 99, 18, 21, 26, 66, 99, 99, 99, 99, 24, 26, 56, 99, 99, 99, 99, 99, 47, 66, 99, 99, 99,
    99, 99, 99, *([99] * 32),
)  # fmt: skip


def round_8bit(images: Tensor) -> Tensor:
    """Clamp to [-1, 1] and round to the 256 levels of a file; the gradient passes rounding straight through.

    The clamp keeps its own gradient (zero outside), so that what is clipped away is not credited.
    """
    clamped = images.clamp(-1, 1)
    levels = torch.round((clamped.detach() + 1) * 127.5) / 127.5 - 1
    return clamped + (levels - clamped.detach())


def _dct_matrix(like: Tensor) -> Tensor:
    n = torch.arange(8, dtype=torch.float64)
    basis = torch.cos((2 * n[None, :] + 1) * n[:, None] * math.pi / 16) * 0.5
    basis[0] /= math.sqrt(2)
    return basis.to(like)


def jpeg(images: Tensor, quality: int) -> Tensor:
    """Baseline JPEG without chroma subsampling: YCbCr, 8x8 DCT, quantisation by the standard tables.

    Rounding passes its gradient straight through.

    Args:
        images: float ``[B, 3, H, W]`` in [-1, 1], sides multiples of 8.
        quality: 1..100, libjpeg's scale.
    """
    scale = 5000 / quality if quality < 50 else 200 - 2 * quality
    tables = torch.tensor([_LUMA, _CHROMA, _CHROMA], dtype=torch.float64).reshape(3, 8, 8)
    tables = torch.floor((tables * scale + 50) / 100).clamp(1, 255).to(images)
    r, g, b = (images.clamp(-1, 1) * 127.5 + 127.5).unbind(dim=1)
    y = 0.299 * r + 0.587 * g + 0.114 * b
    planes = torch.stack([y - 128, (b - y) / 1.772, (r - y) / 1.402], dim=1)
    batch, channels, height, width = planes.shape
    blocks = planes.reshape(batch, channels, height // 8, 8, width // 8, 8).transpose(3, 4)
    dct = _dct_matrix(images)
    coefficients = dct @ blocks @ dct.T
    steps = tables[None, :, None, None]
    quantised = coefficients / steps
    quantised = quantised + (torch.round(quantised) - quantised).detach()
    blocks = dct.T @ (quantised * steps) @ dct
    y, cb, cr = blocks.transpose(3, 4).reshape(batch, channels, height, width).unbind(dim=1)
    y = y + 128
    rgb = torch.stack([y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb], dim=1)
    return round_8bit(rgb / 127.5 - 1)


def rescale(images: Tensor, factor: float) -> Tensor:
    """Shrink by ``factor`` (antialiased) and enlarge again, as a picture that was resized on its way."""
    size = images.shape[-2:]
    smaller = F.interpolate(
        images, size=[max(8, round(s * factor)) for s in size], mode="bilinear", antialias=True, align_corners=False
    )
    return F.interpolate(round_8bit(smaller), size=size, mode="bilinear", align_corners=False)


def save(images: Tensor, *, jpeg_share: float, rescale_share: float, generator: torch.Generator) -> Tensor:
    """A saved and reopened batch: 8-bit always, through JPEG or a rescale for the given shares of batches."""
    draw, amount = torch.rand(2, generator=generator).tolist()
    if draw < jpeg_share:
        return jpeg(images, quality=75 + round(amount * 23))
    if draw < jpeg_share + rescale_share:
        return round_8bit(rescale(images.clamp(-1, 1), factor=0.5 + amount / 2))
    return round_8bit(images)
