"""Mutated pictures through the very path that untrusted bytes take: each is read or refused by a documented error."""

from __future__ import annotations

import io
import os
import random
import time
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image, features

from mien import pictures
from mien.errors import ImageTooLarge, InvalidImage
from serving.problems import PROBLEMS

_PATIENCE = 5.0  # seconds for a picture of 160 x 160: one that takes longer is a way to hold a worker


@pytest.fixture(scope="module")
def originals(astronaut: bytes) -> dict[str, bytes]:
    """Real pictures of each format, small, with the metadata that the decoder also reads."""
    with Image.open(io.BytesIO(astronaut)) as opened:
        photo = opened.convert("RGB").resize((160, 160))
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "a description"
    xmp = pictures.to_xmp(
        pictures.Geometry(width=160, height=160, crop_size=128, template="mien-128", model="0" * 64, faces=())
    )
    alpha = photo.convert("RGBA")
    alpha.putalpha(Image.fromarray(np.tile(np.arange(160, dtype=np.uint8), (160, 1))))
    kinds: dict[str, tuple[Image.Image, str, dict[str, Any]]] = {
        "jpeg": (photo, "JPEG", {"quality": 80, "exif": exif, "xmp": xmp}),
        "progressive jpeg": (photo, "JPEG", {"quality": 80, "progressive": True, "subsampling": 0}),
        "cmyk jpeg": (photo.convert("CMYK"), "JPEG", {}),
        "png": (photo, "PNG", {"exif": exif}),
        "palette png": (photo.quantize(64), "PNG", {"transparency": 3}),
        "16-bit png": (Image.fromarray(np.asarray(photo.convert("L")).astype(np.uint16) * 257), "PNG", {}),
        "alpha png": (alpha, "PNG", {}),
        "webp": (photo, "WEBP", {"quality": 80, "exif": exif, "xmp": xmp}),
        "lossless webp": (alpha, "WEBP", {"lossless": True}),
    }
    if features.check("avif"):
        kinds["avif"] = (photo, "AVIF", {"quality": 60})
    out = {}
    for name, (image, form, options) in kinds.items():
        buffer = io.BytesIO()
        image.save(buffer, form, **options)
        out[name] = buffer.getvalue()
    return out


def _bits(data: bytearray, draw: random.Random) -> bytes:
    for _ in range(draw.choice((1, 2, 8, 64))):
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return bytes(data)


def _header_bits(data: bytearray, draw: random.Random) -> bytes:
    for _ in range(draw.choice((1, 2, 4))):
        data[draw.randrange(min(len(data), 200))] = draw.randrange(256)
    return bytes(data)


def _truncated(data: bytearray, draw: random.Random) -> bytes:
    return bytes(data[: draw.randrange(len(data))])


def _removed(data: bytearray, draw: random.Random) -> bytes:
    start = draw.randrange(len(data))
    del data[start : start + draw.choice((1, 4, 100, 1000))]
    return bytes(data)


def _repeated(data: bytearray, draw: random.Random) -> bytes:
    start = draw.randrange(len(data))
    return bytes(data[:start] + data[max(0, start - draw.choice((4, 100, 1000))) :])


def _lengths(data: bytearray, draw: random.Random) -> bytes:
    """Extreme numbers where a length, a size or an offset may stand."""
    start = draw.randrange(max(1, len(data) - 4))
    data[start : start + 4] = draw.choice(
        (b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\x80\0\0\0", b"\0\0\xff\xff")
    )
    return bytes(data)


def _trailing(data: bytearray, draw: random.Random) -> bytes:
    return bytes(data) + draw.randbytes(draw.choice((1, 100, 5000)))


MUTATIONS: tuple[Callable[[bytearray, random.Random], bytes], ...] = (
    _bits,
    _header_bits,
    _truncated,
    _removed,
    _repeated,
    _lengths,
    _trailing,
)


def fuzz(originals: dict[str, bytes], count: int, seed: int) -> Counter[str]:
    """Decode ``count`` mutated pictures; returns how many were read and how many refused, by error."""
    limits = pictures.Limits(max_pixels=1_000_000, max_side=4096)
    names = sorted(originals)
    outcomes: Counter[str] = Counter()
    for number in range(count):
        draw = random.Random(f"{seed}-{number}")
        name = names[number % len(names)]
        mutate = draw.choice(MUTATIONS)
        data = mutate(bytearray(originals[name]), draw)
        began = time.perf_counter()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                read = pictures.decode(data, limits=limits, keep_metadata=bool(number % 2))
        except (InvalidImage, ImageTooLarge) as refused:
            outcomes[type(refused).__name__] += 1
            assert type(refused) in PROBLEMS
        except BaseException as other:
            pytest.fail(f"case {seed}-{number} ({name}, {mutate.__name__}) raised {other!r}, which no one documents")
        else:
            outcomes["read"] += 1
            height, width, channels = read.pixels.shape
            assert read.pixels.dtype == np.uint8 and channels == 3, (name, mutate.__name__)
            assert width * height <= limits.max_pixels and max(width, height) <= limits.max_side
        took = time.perf_counter() - began
        assert took < _PATIENCE, f"case {seed}-{number} ({name}, {mutate.__name__}) took {took:.1f} s"
    return outcomes


def assert_both(outcomes: Counter[str], count: int) -> None:
    """A fuzzer whose every picture is refused at the door would not have tested the decoders."""
    assert outcomes.total() == count
    assert outcomes["read"] > count / 20 and outcomes["InvalidImage"] > count / 20, outcomes


def test_the_originals_are_read(originals: dict[str, bytes]) -> None:
    for name, data in originals.items():
        assert pictures.decode(data).pixels.shape == (160, 160, 3), name


def test_5000_mutated_pictures_are_read_or_refused_by_a_documented_error(originals: dict[str, bytes]) -> None:
    outcomes = fuzz(originals, 5000, int(os.environ.get("MIEN_FUZZ_SEED", "2")))
    assert_both(outcomes, 5000)
