"""The paper's baselines (its table 2): ways to hide a face that were not made to be undone.

Pure functions from uint8 ``[B, S, S, 3]`` to the same. What undoes them as far as can be is a network of its own each
(:mod:`services.evaluate.deanonymizer`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np
from PIL import Image

from services.evaluate.distances import Pixels

Anonymizer = Callable[[Pixels], Pixels]


def superpixel(faces: Pixels) -> Pixels:
    """Mean colour of about 250 SLIC superpixels (Achanta et al. 2012); the paper does not say how many."""
    from skimage.segmentation import slic

    out = np.empty_like(faces)
    for i, face in enumerate(faces):
        labels = slic(face, n_segments=250, compactness=10, start_label=0)
        counts = np.maximum(np.bincount(labels.ravel()), 1)
        means = [np.bincount(labels.ravel(), weights=face[..., c].ravel()) / counts for c in range(3)]
        out[i] = np.stack(means, axis=-1)[labels].round()
    return out


def edge(faces: Pixels) -> Pixels:
    """Canny edges (sigma 1), white on black."""
    from skimage.color import rgb2gray
    from skimage.feature import canny

    lines = np.stack([canny(rgb2gray(face), sigma=1.0) for face in faces])
    return np.repeat((lines * 255).astype(np.uint8)[..., None], 3, axis=-1)


def blur(faces: Pixels) -> Pixels:
    """Down to 8x8 and up again."""
    size = (faces.shape[2], faces.shape[1])
    small = [Image.fromarray(f).resize((8, 8), Image.Resampling.BOX) for f in faces]
    return np.stack([np.asarray(s.resize(size, Image.Resampling.BILINEAR)) for s in small])


def noise(faces: Pixels) -> Pixels:
    """Gaussian noise of variance 0.5 on [-1, 1], clipped by the file; drawn from the picture, so that it repeats."""
    out = np.empty_like(faces)
    for i, face in enumerate(faces):
        rng = np.random.default_rng(np.frombuffer(face.tobytes()[:4096], dtype=np.uint32))
        noisy = face / 127.5 - 1 + rng.normal(0, np.sqrt(0.5), size=face.shape)
        out[i] = ((noisy.clip(-1, 1) + 1) * 127.5).round()
    return out


def mask(faces: Pixels) -> Pixels:
    """A gray square of 0.6 of the side over the middle of the head."""
    size = faces.shape[1]
    half, row, column = 0.3 * size, 0.53 * size, 0.5 * size
    out = faces.copy()
    out[:, round(row - half) : round(row + half), round(column - half) : round(column + half)] = 127
    return out


FIXED: Final[dict[str, Anonymizer]] = {
    "superpixel": superpixel,
    "edge": edge,
    "blur": blur,
    "noise": noise,
    "mask": mask,
}
LEARNED: Final = "ren"
NAMES: Final = (LEARNED, *FIXED)
