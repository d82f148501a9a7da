"""Where a face is: five landmarks, one similarity transform, the crop templates.

Coordinates are pixels, x to the right, y down, and an integer coordinate is a pixel's *centre*. Five landmarks are
float ``[5, 2]`` in image order: left eye, right eye, nose tip, left and right mouth corner *as seen in the image*.
A transform is an affine matrix ``[2, 3]`` that takes points (x, y, 1) of one picture to points of another.
Pure NumPy; the differentiable warp that uses these transforms is in :mod:`mien.warp`.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

Points = NDArray[np.float64]
Matrix = NDArray[np.float64]

CROP_SIZE: Final = 128
TEMPLATE_NAME: Final = "mien-v1"

# The five points of a 112x112 recogniser crop (InsightFace's order and convention).
RECOGNISER_112: Final[Points] = np.array(
    [[38.29, 51.70], [73.53, 51.50], [56.03, 71.74], [41.55, 92.37], [70.73, 92.20]], dtype=np.float64
)

# Mien's square: the same shape with 32 px between the eyes of a 128 px crop, so that the whole head and some
# background are inside (the paper's crops are resized LFW frames: about 22 px between the eyes). Recognition loses
# nothing down to 24 px (measured, shared/weights/README.md).
_SCALE: Final = 32.0 / float(np.linalg.norm(RECOGNISER_112[1] - RECOGNISER_112[0]))
_EYES_112: Final[Points] = RECOGNISER_112[:2].mean(axis=0)
MIEN_128: Final[Points] = (RECOGNISER_112 - _EYES_112) * _SCALE + np.array([63.5, 61.5])


def template(size: int = CROP_SIZE) -> Points:
    """Mien's five template points for a square crop of ``size`` pixels, float ``[5, 2]``."""
    return scale_points(MIEN_128, size / CROP_SIZE)


def scale_points(points: Points, factor: float) -> Points:
    """Points after the picture is resized by ``factor``, pixel centres at integers."""
    return (points + 0.5) * factor - 0.5


def fit_similarity(source: Points, target: Points) -> Matrix:
    """Least-squares similarity (rotation, uniform scale, translation; no reflection) from source to target.

    Closed form of Umeyama (1991) in two dimensions.

    Args:
        source, target: float ``[K, 2]``, K >= 2, in corresponding order.

    Returns:
        float ``[2, 3]`` that minimises the summed squared distance of ``source`` mapped to ``target``.

    Raises:
        ValueError: shapes differ, a value is not finite, or all source points coincide.
    """
    source = np.asarray(source, dtype=np.float64)
    target = np.asarray(target, dtype=np.float64)
    if source.shape != target.shape or source.ndim != 2 or source.shape[1] != 2 or len(source) < 2:
        raise ValueError(f"expected two [K, 2] arrays of at least two points, not {source.shape} and {target.shape}")
    if not (np.isfinite(source).all() and np.isfinite(target).all()):
        raise ValueError("landmarks must be finite numbers")
    mean_s, mean_t = source.mean(axis=0), target.mean(axis=0)
    s, t = source - mean_s, target - mean_t
    variance = float((s**2).sum())
    if variance < 1e-9:
        raise ValueError("all landmarks coincide")
    # As complex numbers the best similarity is one product: a = <s, t> / <s, s>.
    real = float((s * t).sum()) / variance
    imag = float((s[:, 0] * t[:, 1] - s[:, 1] * t[:, 0]).sum()) / variance
    linear = np.array([[real, -imag], [imag, real]])
    return np.hstack([linear, (mean_t - linear @ mean_s)[:, None]])


def crop_transform(landmarks: Points, size: int = CROP_SIZE) -> Matrix:
    """The transform from picture pixels to pixels of Mien's square crop, ``[2, 3]``.

    Args:
        landmarks: float ``[5, 2]`` in picture pixels.
        size: side of the crop.

    Raises:
        ValueError: see :func:`fit_similarity`.
    """
    return fit_similarity(np.asarray(landmarks, dtype=np.float64), template(size))


def invert(matrix: Matrix) -> Matrix:
    """The inverse affine transform, ``[2, 3]``; raises ``numpy.linalg.LinAlgError`` where there is none."""
    linear = np.linalg.inv(matrix[:, :2])
    return np.hstack([linear, -(linear @ matrix[:, 2])[:, None]])


def compose(outer: Matrix, inner: Matrix) -> Matrix:
    """The transform that applies ``inner`` first, then ``outer``."""
    return np.hstack([outer[:, :2] @ inner[:, :2], (outer[:, :2] @ inner[:, 2] + outer[:, 2])[:, None]])


def apply(matrix: Matrix, points: Points) -> Points:
    """Transform points ``[..., 2]``."""
    return np.asarray(points, dtype=np.float64) @ matrix[:, :2].T + matrix[:, 2]


def scale_of(matrix: Matrix) -> float:
    """Output pixels per input pixel of a similarity transform."""
    return float(np.sqrt(abs(np.linalg.det(matrix[:, :2]))))


def corners(size: int) -> Points:
    """The outer corners of a square crop, ``[4, 2]``, clockwise from top left."""
    low, high = -0.5, size - 0.5
    return np.array([[low, low], [high, low], [high, high], [low, high]])


def overlap(a: Points, b: Points) -> bool:
    """Whether two convex polygons ``[K, 2]`` share a point (separating axis theorem)."""
    for polygon in (a, b):
        sides = np.roll(polygon, -1, axis=0) - polygon
        axes = np.stack([-sides[:, 1], sides[:, 0]], axis=1)
        on_a, on_b = a @ axes.T, b @ axes.T
        if ((on_a.max(axis=0) < on_b.min(axis=0)) | (on_b.max(axis=0) < on_a.min(axis=0))).any():
            return False
    return True


def meets(matrix: Matrix, size: int, picture: tuple[int, int]) -> bool:
    """Whether a square crop cut by ``matrix`` shows any of a picture of (height, width)."""
    height, width = picture
    frame = np.array([[0.0, 0.0], [width, 0.0], [width, height], [0.0, height]]) - 0.5
    return overlap(apply(invert(matrix), corners(size)), frame)


# Recogniser crops as fixed transforms of Mien's square at 128. A least-squares similarity to a template composes with
# any similarity between templates, so this equals aligning to the recogniser's template from the photo itself.
TO_112: Final[Matrix] = fit_similarity(MIEN_128, RECOGNISER_112)
# SphereFace's 112 high x 96 wide crop is columns 8..103 of the 112 x 112 one.
TO_112X96: Final[Matrix] = TO_112 - np.array([[0.0, 0.0, 8.0], [0.0, 0.0, 0.0]])
# InceptionResnetV1 was trained on MTCNN boxes expanded 1.3 times: an 88 px square around the face in Mien's crop.
TO_160: Final[Matrix] = fit_similarity(
    np.array([[63.5 - 44, 75.5 - 44], [63.5 + 44, 75.5 + 44]]), np.array([[-0.5, -0.5], [159.5, 159.5]])
)
