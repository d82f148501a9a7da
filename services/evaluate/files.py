"""What saving does to a picture. Every function encodes a real file and reads it again."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Final

import numpy as np
from PIL import Image

from services.evaluate.distances import Pixels


def _through(image: Image.Image, kind: str, **options: object) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return Image.open(buffer).convert("RGB")


def _png(image: Image.Image) -> Image.Image:
    return _through(image, "PNG", compress_level=1)


def _jpeg(quality: int) -> Callable[[Image.Image], Image.Image]:
    # Pillow's defaults (4:2:0 chroma below quality 95 as elsewhere): what other people's software does.
    return lambda image: _through(image, "JPEG", quality=quality)


def _half(image: Image.Image) -> Image.Image:
    size = image.size
    small = image.resize((max(1, size[0] // 2), max(1, size[1] // 2)), Image.Resampling.LANCZOS)
    return _png(_png(small).resize(size, Image.Resampling.LANCZOS))


CODECS: Final[dict[str, Callable[[Image.Image], Image.Image]]] = {
    "png": _png,
    "jpeg95": _jpeg(95),
    "jpeg90": _jpeg(90),
    "jpeg75": _jpeg(75),
    "half": _half,
}
"""Name to codec; ``half`` is a resize to half the side and back, saved as PNG each time."""

LOSSY: Final = ("jpeg95", "jpeg90", "jpeg75", "half")


def save(pixels: Pixels, codec: str = "png") -> Pixels:
    """Uint8 ``[B, S, S, 3]`` as they are read back from files."""
    through = CODECS[codec]
    out = [np.asarray(through(Image.fromarray(p))) for p in pixels]
    return np.stack(out) if out else pixels.copy()
