from __future__ import annotations

import io
import json
import struct
import subprocess
import sys
import warnings
import zlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

from mien import pictures
from mien.errors import ImageTooLarge, InvalidImage
from mien.pictures import FaceGeometry, Geometry, Limits, Picture


def save(image: Image.Image, format_: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format_, **options)
    return buffer.getvalue()


def gradient(mode: str = "RGB", size: tuple[int, int] = (40, 24)) -> Image.Image:
    x, y = np.meshgrid(np.linspace(0, 255, size[0]), np.linspace(0, 255, size[1]))
    return Image.fromarray(np.stack([x, y, 255 - x], axis=-1).astype(np.uint8)).convert(mode)


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


GEOMETRY = Geometry(
    width=40,
    height=24,
    crop_size=128,
    template="mien-v1",
    model="ab" * 32,
    faces=(FaceGeometry(box=(5, 5, 15, 17), matrix=((8.0, 0.5, -10.25), (-0.5, 8.0, -20.125))),),
)


# What is refused. ------------------------------------------------------------------------------------------------

JPEG = save(gradient(), "JPEG")
PNG = save(gradient(), "PNG")
WEBP = save(gradient(), "WEBP")
ANIMATION = {"save_all": True, "append_images": [gradient().rotate(180)], "duration": 100}

REFUSED: dict[str, bytes] = {
    "nothing": b"",
    "text named .png": b"hello, I am no picture\n",
    "truncated JPEG": JPEG[: len(JPEG) // 2],
    "truncated PNG": PNG[: len(PNG) // 2],
    "truncated WebP": WEBP[: len(WEBP) // 2],
    "JPEG signature alone": JPEG[:4],
    "PNG signature alone": PNG[:8],
    "WebP signature alone": WEBP[:16],
    "PNG with a flipped bit": PNG[:60] + bytes([PNG[60] ^ 0x40]) + PNG[61:],
    "1x1": save(Image.new("RGB", (1, 1)), "PNG"),
    "animated WebP": save(gradient(), "WEBP", **ANIMATION),
    "animated PNG": save(gradient(), "PNG", **ANIMATION),
    "GIF": save(gradient(), "GIF"),
    "HEIF signature and nothing behind it": b"\0\0\0\x20ftypheic\0\0\0\0mif1heic" + b"\0" * 40,
    "AVIF signature and nothing behind it": b"\0\0\0\x20ftypavif\0\0\0\0avifmif1" + b"\0" * 40,
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_one_whole_picture_is_refused(name: str) -> None:
    with pytest.raises(InvalidImage) as caught:
        pictures.decode(REFUSED[name])
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    assert "Traceback" not in str(caught.value) and "PIL" not in str(caught.value)


_HUGE = """
import resource, sys, time, warnings
from mien import pictures
from mien.errors import ImageTooLarge
data = sys.stdin.buffer.read()
warnings.simplefilter("error")
before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
try:
    pictures.decode(data)
except ImageTooLarge as error:
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(grown, time.process_time() - began, error)
"""


def _webp_canvas(side: int) -> bytes:
    extended = struct.pack("<I", 0) + (side - 1).to_bytes(3, "little") * 2
    body = b"WEBPVP8X" + struct.pack("<I", 10) + extended
    return b"RIFF" + struct.pack("<I", len(body)) + body


@pytest.mark.parametrize(
    "data",
    [png_header(60_000, 60_000), png_header(12_000, 12_000), _webp_canvas(16_384)],
    ids=["60000", "12000", "webp"],
)
def test_a_huge_header_is_refused_before_it_costs_memory_or_time(data: bytes) -> None:
    done = subprocess.run([sys.executable, "-c", _HUGE], input=data, capture_output=True, check=True, timeout=280)
    kib, seconds, *message = done.stdout.decode().split()
    assert int(kib) < 8 * 1024 and float(seconds) < 2
    assert "megapixels" in " ".join(message)
    assert done.stderr == b""


def test_limits_are_the_callers() -> None:
    with pytest.raises(ImageTooLarge):
        pictures.decode(PNG, limits=pictures.Limits(max_side=30))
    with pytest.raises(ImageTooLarge):
        pictures.decode(PNG, limits=pictures.Limits(max_pixels=900))
    assert pictures.decode(PNG, limits=pictures.Limits(max_pixels=960, max_side=40)).width == 40


@given(data=st.binary(max_size=200), start=st.sampled_from([b"", JPEG[:40], PNG[:40], WEBP[:30], JPEG[:300], PNG[:90]]))
def test_arbitrary_bytes_are_pictures_or_invalid_and_nothing_else(data: bytes, start: bytes) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            pictures.decode(start + data)
        except InvalidImage:
            return


@given(at=st.integers(0, len(JPEG) - 1), value=st.integers(0, 255), which=st.sampled_from([JPEG, PNG, WEBP]))
def test_a_damaged_byte_gives_a_picture_or_invalid_and_nothing_else(at: int, value: int, which: bytes) -> None:
    damaged = bytearray(which)
    damaged[at % len(which)] = value
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            picture = pictures.decode(bytes(damaged))
        except InvalidImage:
            return
    assert picture.pixels.dtype == np.uint8


# What is read. ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("format_", "options"), [("PNG", {}), ("JPEG", {"quality": 97}), ("WEBP", {}), ("AVIF", {})])
def test_every_format_is_read_by_its_content(format_: str, options: dict[str, Any]) -> None:
    picture = pictures.decode(save(gradient(), format_, **options))
    assert picture.format == format_ and picture.pixels.shape == (24, 40, 3) and picture.alpha is None
    assert np.abs(picture.pixels.astype(int) - np.asarray(gradient())).mean() < 8


def test_heif_is_read_where_the_library_is_there_and_its_absence_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    pillow_heif = pytest.importorskip("pillow_heif")
    buffer = io.BytesIO()
    large = gradient().resize((80, 64))
    pillow_heif.from_pillow(large).save(buffer, quality=95)
    picture = pictures.decode(buffer.getvalue())
    assert picture.format == "HEIF" and picture.pixels.shape == (64, 80, 3) and picture.alpha is None
    assert np.abs(picture.pixels.astype(int) - np.asarray(large)).mean() < 8
    with pytest.raises(ImageTooLarge):
        pictures.decode(buffer.getvalue(), limits=Limits(max_pixels=5000))
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(InvalidImage, match="not installed"):
        pictures.decode(buffer.getvalue())


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(orientation: int) -> None:
    upright = np.asarray(gradient())
    # How a camera held differently would store it: the inverse of what a viewer must do (EXIF 3.0, table 6).
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: np.rot90(upright, 2).transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = pictures.decode(save(Image.fromarray(np.ascontiguousarray(stored)), "PNG", exif=exif))
    np.testing.assert_array_equal(picture.pixels, upright)
    assert b"eXIf" not in pictures.encode(picture)


def test_cmyk_becomes_rgb_and_loses_its_profile() -> None:
    data = save(gradient("CMYK"), "JPEG", quality=97, icc_profile=b"\0" * 16 + b"CMYK" + b"\0" * 108)
    picture = pictures.decode(data)
    assert np.abs(picture.pixels.astype(int) - np.asarray(gradient())).mean() < 4
    assert picture.icc_profile is None


def test_sixteen_bit_gray_is_scaled_not_cut() -> None:
    wide = np.linspace(0, 65535, 40 * 24).reshape(24, 40).astype(np.uint16)
    picture = pictures.decode(save(Image.fromarray(wide), "PNG"))
    expected = np.rint(wide / 257).astype(np.uint8)
    np.testing.assert_array_equal(picture.pixels, np.repeat(expected[..., None], 3, axis=2))


def test_sixteen_bit_rgb_is_read_as_eight() -> None:
    wide = np.random.default_rng(0).integers(0, 65536, (24, 40, 3)).astype(">u2")
    raw = b"".join(b"\0" + row.tobytes() for row in wide)

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 40, 24, 16, 2, 0, 0, 0))
    data = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")
    assert np.abs(pictures.decode(data).pixels.astype(int) - wide.astype(int) / 257).max() <= 1


def _palette(transparent: bool) -> Image.Image:
    image = gradient().quantize(16)
    if transparent:
        image.info["transparency"] = bytes([0, 128] + [255] * 14)
    return image


@pytest.mark.parametrize(
    ("image", "has_alpha"),
    [
        (_palette(False), False),
        (_palette(True), True),
        (gradient("L"), False),
        (gradient("LA"), True),
        (gradient("RGBA"), True),
        (gradient("1"), False),
    ],
    ids=["palette", "palette with alpha", "gray", "gray with alpha", "RGBA", "black and white"],
)
def test_every_kind_of_png_becomes_rgb_with_its_alpha(image: Image.Image, has_alpha: bool) -> None:
    picture = pictures.decode(
        save(image, "PNG", **({"transparency": t} if (t := image.info.get("transparency")) else {}))
    )
    reference = np.asarray(Image.open(io.BytesIO(save(image, "PNG"))).convert("RGBA"))
    np.testing.assert_array_equal(picture.pixels, reference[..., :3])
    assert (picture.alpha is not None) == has_alpha
    if picture.alpha is not None:
        np.testing.assert_array_equal(picture.alpha, reference[..., 3])


def test_of_a_jpeg_with_several_pictures_the_first_is_read() -> None:
    several = save(gradient(), "MPO", save_all=True, append_images=[gradient().rotate(180)])
    assert np.abs(pictures.decode(several).pixels.astype(int) - np.asarray(gradient())).mean() < 8


# What is written. ------------------------------------------------------------------------------------------------


def _random_picture(**fields: Any) -> Picture:
    pixels = np.random.default_rng(1).integers(0, 256, (24, 40, 3)).astype(np.uint8)
    return Picture(pixels, **fields)


def test_png_and_lossless_webp_keep_every_pixel_and_alpha() -> None:
    alpha = np.random.default_rng(2).integers(0, 256, (24, 40)).astype(np.uint8)
    picture = _random_picture(alpha=alpha)
    for data in (pictures.encode(picture), pictures.encode(picture, "WEBP", quality=100)):
        again = pictures.decode(data)
        np.testing.assert_array_equal(again.pixels, picture.pixels)
        np.testing.assert_array_equal(again.alpha, alpha)


@pytest.mark.parametrize("format_", ["PNG", "JPEG", "WEBP"])
def test_geometry_and_colour_profile_travel_in_every_format(format_: pictures.Format) -> None:
    from PIL import ImageCms

    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    again = pictures.decode(pictures.encode(_random_picture(geometry=GEOMETRY, icc_profile=profile), format_))
    assert again.geometry == GEOMETRY
    assert again.icc_profile == profile


def test_a_plain_save_of_the_pil_image_keeps_geometry_and_alpha(tmp_path: Any) -> None:
    picture = _random_picture(geometry=GEOMETRY, alpha=np.full((24, 40), 7, np.uint8))
    pictures.to_pil(picture).save(tmp_path / "x.png")
    again = pictures.from_pil(Image.open(tmp_path / "x.png"))
    assert again.geometry == GEOMETRY
    np.testing.assert_array_equal(again.alpha, picture.alpha)
    # A resized copy is another picture: its faces lie elsewhere.
    pictures.to_pil(picture).resize((80, 48)).save(tmp_path / "y.png")
    assert pictures.decode((tmp_path / "y.png").read_bytes()).geometry is None


def _with_secrets() -> bytes:
    exif = Image.Exif()
    exif[0x010F] = "CAMERA-MAKER"
    exif[0x0112] = 6
    exif.get_ifd(0x8825)[1] = "N"
    exif.get_ifd(0x8825)[29] = "2026:01:02"
    exif.get_ifd(0x8769)[0x927C] = b"MAKERNOTE-PREVIEW"
    exif.get_ifd(0x8769)[0x9003] = "2026:01:02 03:04:05"
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", "HARMLESS-COMMENT")
    text.add_text("Raw profile type exif", "DISGUISED-EXIF")
    text.add_itxt("XML:com.adobe.xmp", "<x:xmpmeta>FOREIGN-XMP</x:xmpmeta>")
    return save(gradient(), "PNG", exif=exif, pnginfo=text)


ALL = [b"CAMERA-MAKER", b"2026:01:02", b"MAKERNOTE-PREVIEW", b"HARMLESS-COMMENT", b"DISGUISED-EXIF", b"FOREIGN-XMP"]


@pytest.mark.parametrize("format_", ["PNG", "JPEG", "WEBP"])
def test_metadata_is_removed(format_: pictures.Format) -> None:
    data = _with_secrets()
    written = pictures.encode(pictures.decode(data), format_)
    for secret in ALL:
        assert secret in data
        assert secret not in written


def test_metadata_asked_for_stays_but_for_what_may_show_the_original() -> None:
    picture = pictures.decode(_with_secrets(), keep_metadata=True)
    written = pictures.encode(picture)
    kept = {secret for secret in ALL if secret in written}
    assert kept == {b"CAMERA-MAKER", b"2026:01:02", b"HARMLESS-COMMENT"}
    again = Image.open(io.BytesIO(written))
    assert again.getexif()[0x0112] == 1
    assert again.getexif().get_ifd(0x8825)[1] == "N"


def test_an_exif_thumbnail_never_survives() -> None:
    """A thumbnail shows the face that was there before."""
    thumbnail = save(gradient(size=(16, 16)), "JPEG")
    directory = struct.pack("<H", 1) + struct.pack("<HHII", 0x0112, 3, 1, 1)
    second = (
        struct.pack("<H", 2)
        + struct.pack("<HHII", 0x0201, 4, 1, 60)
        + struct.pack("<HHII", 0x0202, 4, 1, len(thumbnail))
    )
    tiff = b"II*\0" + struct.pack("<I", 8) + directory + struct.pack("<I", 8 + len(directory) + 4)
    tiff = (tiff + second + b"\0" * 4).ljust(60, b"\0") + thumbnail
    data = save(gradient(), "JPEG", exif=b"Exif\0\0" + tiff)
    assert thumbnail in data
    for keep in (False, True):
        assert thumbnail[:200] not in pictures.encode(pictures.decode(data, keep_metadata=keep), "JPEG")


def test_jpeg_refuses_transparency_and_drops_an_opaque_alpha() -> None:
    with pytest.raises(InvalidImage, match="transparency"):
        pictures.encode(_random_picture(alpha=np.full((24, 40), 200, np.uint8)), "JPEG")
    assert (
        pictures.decode(pictures.encode(_random_picture(alpha=np.full((24, 40), 255, np.uint8)), "JPEG")).alpha is None
    )


def test_as_many_faces_as_are_allowed_fit_every_format() -> None:
    face = FaceGeometry(box=(1234.56,) * 4, matrix=((0.123456789, -0.012345678, 1234.123456789),) * 2)
    many = Geometry.model_construct(**{**dict(GEOMETRY), "faces": (face,) * pictures.MAX_FACES})
    for format_ in pictures.SUFFIXES:
        assert len(pictures.to_xmp(many)) < len(pictures.encode(_random_picture(geometry=many), format_))


# Geometry from strangers. ----------------------------------------------------------------------------------------


def packet(change: Callable[[dict[str, Any]], None]) -> bytes:
    raw = GEOMETRY.model_dump(mode="json")
    change(raw)
    head, _, rest = pictures.to_xmp(GEOMETRY).partition(b"<mien:geometry>")
    tail = rest.partition(b"</mien:geometry>")[2]
    return head + b"<mien:geometry>" + json.dumps(raw).encode() + b"</mien:geometry>" + tail


def matrix(*rows: list[float]) -> Callable[[dict[str, Any]], None]:
    return lambda raw: raw["faces"][0].update(matrix=list(rows))


HOSTILE: dict[str, Callable[[dict[str, Any]], None]] = {
    "another version": lambda raw: raw.update(version=2),
    "another size": lambda raw: raw.update(width=41),
    "an unknown key": lambda raw: raw.update(password="x"),
    "too many faces": lambda raw: raw.update(faces=raw["faces"] * 300),
    "not a number": matrix([float("nan"), 0, 0], [0, float("nan"), 0]),
    "infinity": matrix([float("inf"), 0, 0], [0, float("inf"), 0]),
    "no scale": matrix([0, 0, 0], [0, 0, 0]),
    "a mirror image": matrix([8, 0, 0], [0, -8, 0]),
    "shear": matrix([8, 3, 0], [0, 8, 0]),
    "a crop as large as a house": matrix([1e-3, 0, 60], [0, 1e-3, 60]),
    "a face far away": matrix([8, 0, 1e6], [0, 8, 1e6]),
    "markup in a name": lambda raw: raw.update(template="<b>"),
    "a digest that is none": lambda raw: raw.update(model="zz"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_geometry_that_cannot_be_right_is_treated_as_absent(name: str) -> None:
    assert pictures.from_xmp(packet(lambda raw: None), size=(40, 24)) == GEOMETRY
    assert pictures.from_xmp(packet(HOSTILE[name]), size=(40, 24)) is None


@pytest.mark.parametrize(
    "raw",
    [
        b"<mien:geometry>" + b"[" * 100_000 + b"</mien:geometry>",
        b"<mien:geometry>{}</mien:geometry>",
        pictures.to_xmp(GEOMETRY) * 2,
        pictures.to_xmp(GEOMETRY) + b" " * 300_000,
        b'<!DOCTYPE x [<!ENTITY a "b">]><mien:geometry>&a;</mien:geometry>',
        b"\xff\xfe\0",
    ],
    ids=["deep nesting", "empty", "twice", "too long", "entity", "not text"],
)
def test_malformed_packets_are_treated_as_absent(raw: bytes) -> None:
    assert pictures.from_xmp(raw, size=(40, 24)) is None


@given(st.binary(max_size=300))
def test_arbitrary_geometry_never_raises(raw: bytes) -> None:
    assert pictures.from_xmp(b"<mien:geometry>" + raw + b"</mien:geometry>", size=(40, 24)) is None


def test_malformed_geometry_does_not_make_the_picture_invalid() -> None:
    text = PngImagePlugin.PngInfo()
    text.add_itxt("XML:com.adobe.xmp", "<mien:geometry>{broken</mien:geometry>")
    picture = pictures.decode(save(gradient(), "PNG", pnginfo=text))
    assert picture.geometry is None


def test_the_file_holds_geometry_and_no_secret(model: Any, photo: Image.Image) -> None:
    data = save(photo, "PNG")
    result = model.anonymize_bytes(data, "correct horse battery")
    written: NDArray[np.uint8] = np.frombuffer(result.data, np.uint8)
    assert b"mien:geometry" in written.tobytes()
    code = "".join("1" if bit else "0" for bit in model.code_for("anonymize", "correct horse battery"))
    for secret in (b"correct", b"horse", code.encode()):
        assert secret not in result.data


def test_a_picture_keeps_all_but_pixels_and_geometry() -> None:
    picture = _random_picture(geometry=GEOMETRY, icc_profile=b"x", format="JPEG")
    other = picture.with_pixels(picture.pixels[::-1], None)
    assert replace(other, pixels=picture.pixels, geometry=GEOMETRY).__dict__ == picture.__dict__


def test_a_png_is_padded_to_a_length_and_stays_the_picture_it_is() -> None:
    picture = _random_picture(geometry=GEOMETRY)
    written = pictures.encode(picture)
    for length in (len(written) + 12, len(written) + 5000):
        long = pictures.padded(written, length)
        assert len(long) == length
        again = pictures.decode(long)
        assert (again.pixels == picture.pixels).all()
        assert again.geometry == GEOMETRY
    with pytest.raises(ValueError, match="cannot be padded"):
        pictures.padded(written, len(written) + 11)
    with pytest.raises(ValueError, match="only whole PNG"):
        pictures.padded(pictures.encode(picture, "JPEG"), 10**6)
