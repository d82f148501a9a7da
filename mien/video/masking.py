"""Where a face cannot be transformed, nothing of it is left: fail closed."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from mien import geometry
from mien.geometry import Matrix

# Sides of the masked ellipse in crops: the crop holds the whole head with some background, and where a face is masked
# its place is known less well.
DEFAULT_MARGIN: Final = 1.15


def mask(pixels: NDArray[np.uint8], matrix: Matrix, size: int, *, margin: float = DEFAULT_MARGIN) -> bool:
    """Fill the ellipse around a face with one colour, in place.

    The colour is the mean of a ring around the ellipse, not of the face, so that not even the shade of the skin stays.

    Args:
        pixels: uint8 RGB ``[H, W, 3]``, changed in place.
        matrix: ``[2, 3]``, picture to crop.
        size: side of the crop.
        margin: sides of the ellipse in crop sides.

    Returns:
        Whether any pixel of the picture was under the mask.
    """
    height, width = pixels.shape[:2]
    inverse = geometry.invert(matrix)
    centre = geometry.apply(inverse, np.array([(size - 1) / 2, (size - 1) / 2]))
    reach = size / geometry.scale_of(matrix) / 2 * margin * 1.25 + 2
    x0, y0 = np.maximum(np.floor(centre - reach).astype(int), 0)
    x1, y1 = np.minimum(np.ceil(centre + reach).astype(int) + 1, (width, height))
    if x1 <= x0 or y1 <= y0:
        return False
    ys, xs = np.mgrid[y0:y1, x0:x1].astype(np.float64)
    at = geometry.apply(matrix, np.stack([xs, ys], axis=-1))
    radius = np.linalg.norm(at - (size - 1) / 2, axis=-1) / (size / 2)
    under = radius <= margin
    if not under.any():
        return False
    ring = (radius > margin) & (radius <= margin * 1.25)
    view = pixels[y0:y1, x0:x1]
    colour = view[ring].mean(axis=0) if ring.any() else np.full(3, 128.0)
    view[under] = np.rint(colour).astype(np.uint8)
    return True
