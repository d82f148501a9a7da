"""Bytes to pictures and back: decoding what strangers send, and the geometry that travels inside the file.

Decoding treats its input as hostile. The format is told by magic bytes, the size is read from the header before any
pixel costs memory, and whatever Pillow raises becomes :class:`~mien.errors.InvalidImage`.

Encoding writes pixels, the ICC profile (it is part of what pixel values mean) and the *geometry*: where the changed
faces are, so that recovery cuts out the very same crops. It is a compact JSON text in an XMP packet, which PNG, JPEG
and WebP all carry. Everything else (EXIF, GPS, comments, foreign XMP) is left out unless asked for, and what may show
the original picture again (EXIF thumbnails and maker notes, foreign XMP) is left out even then.

PNG is the default format because recovery reads the file's pixels: what a lossy format drops, recovery lacks.
"""

from __future__ import annotations

import io
import json
import math
import re
import struct
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal, Self, cast

import numpy as np
from numpy.typing import NDArray
from PIL import AvifImagePlugin, Image, JpegImagePlugin, PngImagePlugin, WebPImagePlugin
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mien import geometry
from mien.errors import ImageTooLarge, InvalidImage

Format = Literal["PNG", "JPEG", "WEBP"]
SUFFIXES: Final[Mapping[Format, str]] = {"PNG": ".png", "JPEG": ".jpg", "WEBP": ".webp"}
MEDIA_TYPES: Final[Mapping[Format, str]] = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp"}
# What decode() reads, by file name; decoding itself looks at the bytes alone.
READABLE_SUFFIXES: Final = frozenset({".png", ".jpg", ".jpeg", ".webp", ".avif", ".heic", ".heif"})

MAX_FACES: Final = 256
_MAX_ICC_BYTES: Final = 4 * 1024 * 1024
_MAX_XMP_BYTES: Final = 256 * 1024
_MAX_TEXT_CHARACTERS: Final = 1024 * 1024
_MAX_JPEG_SEGMENT: Final = 65_000


@dataclass(frozen=True)
class Limits:
    """What a picture may cost."""

    max_pixels: int = 50_000_000
    max_side: int = 16_384
    min_side: int = 16
    max_faces: int = MAX_FACES


DEFAULT_LIMITS: Final = Limits()


class FaceGeometry(BaseModel):
    """Where one changed face is."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    box: tuple[float, float, float, float] = Field(description="x0, y0, x1, y1 in picture pixels")
    matrix: tuple[tuple[float, float, float], tuple[float, float, float]] = Field(
        description="similarity transform from picture pixels to crop pixels"
    )


class Geometry(BaseModel):
    """The faces changed in a picture, in the order of the changes. No pixels, no secrets."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    version: Literal[1] = 1
    width: int = Field(gt=0, le=1_000_000)
    height: int = Field(gt=0, le=1_000_000)
    crop_size: int = Field(ge=16, le=2048)
    template: str = Field(pattern=r"^[a-z0-9-]{1,32}$")
    model: str = Field(pattern=r"^[0-9a-f]{64}$", description="digest of the model that changed the faces")
    faces: tuple[FaceGeometry, ...] = Field(max_length=MAX_FACES)

    @property
    def matrices(self) -> NDArray[np.float64]:
        """The transforms, float64 ``[F, 2, 3]``."""
        return np.array([face.matrix for face in self.faces], dtype=np.float64).reshape(-1, 2, 3)

    @model_validator(mode="after")
    def _transforms_meet_the_picture(self) -> Self:
        # Metadata comes from whoever made the file; a transform decides how much work a face is.
        for (a, b, x), (c, d, y) in (face.matrix for face in self.faces):
            scale = math.hypot(a, c)
            if not 1e-4 < scale < 1e3 or abs(a - d) + abs(b + c) > 1e-3 * scale:
                raise ValueError("a transform is not a similarity")
            side = self.crop_size / scale
            if not 4 <= side <= 4 * max(self.width, self.height):
                raise ValueError("a face has an impossible size")
            if not geometry.meets(np.array([[a, b, x], [c, d, y]]), self.crop_size, (self.height, self.width)):
                raise ValueError("a face lies outside the picture")
        return self


@dataclass(frozen=True)
class Metadata:
    """What a file carried besides pixels, colour profile and geometry; kept only when asked for."""

    exif: bytes = b""
    comment: bytes = b""
    text: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Picture:
    """A decoded picture, upright."""

    pixels: NDArray[np.uint8]
    """uint8 RGB ``[H, W, 3]``."""
    alpha: NDArray[np.uint8] | None = None
    """uint8 ``[H, W]``, or None where the picture is opaque."""
    icc_profile: bytes | None = None
    format: str | None = None
    """Where it came from: ``PNG``, ``JPEG``, ``WEBP``, ``AVIF``, ``HEIF``."""
    geometry: Geometry | None = None
    metadata: Metadata | None = None

    @property
    def width(self) -> int:
        return int(self.pixels.shape[1])

    @property
    def height(self) -> int:
        return int(self.pixels.shape[0])

    def with_pixels(self, pixels: NDArray[np.uint8], geometry: Geometry | None) -> Picture:
        """The same picture with other pixels and geometry."""
        return replace(self, pixels=pixels, geometry=geometry)


def decode(data: bytes, *, limits: Limits = DEFAULT_LIMITS, keep_metadata: bool = False) -> Picture:
    """Decode an untrusted JPEG, PNG, WebP, AVIF or (where pillow-heif is installed) HEIF file.

    EXIF rotation is applied. Gray, palette, 16-bit and CMYK pictures become 8-bit RGB (CMYK without colour
    management). Of a JPEG with several pictures (MPO) the first is read, of a HEIF file the primary one.

    Args:
        data: the whole file.
        limits: refused are more pixels than ``max_pixels``, sides outside ``min_side``..``max_side``.
        keep_metadata: fill :attr:`Picture.metadata`.

    Raises:
        ImageTooLarge: the header announces more than the limits allow; nothing was decoded.
        InvalidImage: not a picture of these formats, broken, animated or too small.
    """
    name, opener = _sniff(data)
    if name == "WEBP" and (size := _webp_size(data)):
        # Opening a WebP file already allocates its canvas.
        _check_size(size, limits)
    try:
        image = opener(io.BytesIO(data))
        _check_size(image.size, limits)
        if name not in ("JPEG", "HEIF") and (getattr(image, "is_animated", False) or getattr(image, "n_frames", 1) > 1):
            raise InvalidImage("The picture is animated. Mien changes single pictures: send its frames one by one.")
        image.load()
        return _from_image(image, name, keep_metadata=keep_metadata)
    except (InvalidImage, KeyboardInterrupt):
        raise
    except Exception:
        # Pillow raises nearly anything on broken input (OSError, SyntaxError, struct.error, ValueError, EOFError,
        # MemoryError...), and its messages speak of its own internals.
        raise InvalidImage(f"The {name} file is broken or truncated and cannot be read.") from None


def from_pil(image: Image.Image, *, keep_metadata: bool = False, limits: Limits = DEFAULT_LIMITS) -> Picture:
    """A picture from a PIL image of any mode, made upright; geometry comes from its ``info["xmp"]``.

    Raises:
        InvalidImage: see :func:`decode`.
    """
    _check_size(image.size, limits)
    if getattr(image, "is_animated", False) and image.format not in ("JPEG", "MPO"):
        raise InvalidImage("The picture is animated. Mien changes single pictures: give its frames one by one.")
    try:
        return _from_image(image, image.format, keep_metadata=keep_metadata)
    except (OSError, SyntaxError, ValueError, struct.error):
        raise InvalidImage("The picture is broken or truncated and cannot be read.") from None


def to_pil(picture: Picture) -> Image.Image:
    """A PIL image, ``RGB`` or ``RGBA``, whose plain ``save("x.png")`` keeps geometry, profile and kept metadata."""
    planes = picture.pixels if picture.alpha is None else np.dstack([picture.pixels, picture.alpha])
    plain = Image.fromarray(np.ascontiguousarray(planes))
    image = _CarryingImage.carry(plain)
    if picture.icc_profile:
        image.info["icc_profile"] = picture.icc_profile
    if picture.geometry is not None:
        image.info["xmp"] = to_xmp(picture.geometry)
    kept = picture.metadata or Metadata()
    if kept.exif:
        image.info["exif"] = kept.exif
    if kept.comment:
        image.info["comment"] = kept.comment
    image.kept_text = dict(kept.text)
    return image


def encode(picture: Picture, format: Format = "PNG", *, quality: int = 95) -> bytes:  # noqa: A002
    """Encode a picture with its ICC profile, geometry and kept metadata, and nothing else.

    Args:
        picture: what to write.
        format: ``PNG`` (lossless; recovery reads the file's pixels), ``JPEG`` or ``WEBP``.
        quality: 1 to 100, for JPEG and WebP; WebP at 100 is lossless.

    Raises:
        InvalidImage: the format cannot hold the picture (transparency in JPEG, sides over WebP's 16,383).
        ValueError: unknown format, quality out of range.
    """
    if format not in SUFFIXES:
        raise ValueError(f"format must be one of {', '.join(SUFFIXES)}, not {format!r}")
    if not 1 <= quality <= 100:
        raise ValueError(f"quality is 1 to 100, not {quality}")
    if format == "JPEG" and picture.alpha is not None:
        if (picture.alpha != 255).any():
            raise InvalidImage("JPEG cannot hold the picture's transparency. Choose PNG or WebP.")
        picture = replace(picture, alpha=None)
    if format == "JPEG" and picture.metadata and len(picture.metadata.exif) > _MAX_JPEG_SEGMENT:
        raise InvalidImage("JPEG cannot hold this much EXIF data. Choose PNG or WebP, or let metadata be removed.")
    if format == "WEBP" and max(picture.width, picture.height) > 16_383:
        raise InvalidImage("WebP holds at most 16,383 pixels a side. Choose PNG or JPEG.")
    # PNG: of what deflate can look for in filtered photos, runs are all that pays. Against zlib's usual level a crop of
    # 128 x 128 takes a fifth of the time (1.1 and 5 ms) and is as long (30.7 kB); the time depends less on content.
    options: dict[str, Any] = {"compress_level": 1, "compress_type": zlib.Z_RLE} if format == "PNG" else {}
    if format == "JPEG":
        # 4:4:4: subsampled colour is lost to recovery.
        options = {"quality": quality, "subsampling": 0}
    elif format == "WEBP":
        options = {"quality": quality, "lossless": quality == 100, "exact": True, "method": 4}
    buffer = io.BytesIO()
    to_pil(picture).save(buffer, format=format, **options)
    return buffer.getvalue()


def padded(png: bytes, length: int) -> bytes:
    """A PNG file made exactly ``length`` bytes long by a chunk of zeros that readers skip.

    For who must not learn from a file's length what is in it.

    Args:
        png: a whole file, as :func:`encode` writes it.
        length: at least 12 more than it has.

    Raises:
        ValueError: it is no PNG file, or there is no room for a chunk.
    """
    if not png.startswith(b"\x89PNG") or png[-8:-4] != b"IEND":
        raise ValueError("only whole PNG files can be padded")
    room = length - len(png) - 12
    if room < 0:
        raise ValueError(f"a file of {len(png)} bytes cannot be padded to {length}")
    # Ancillary, private, safe to copy (PNG specification, section 5.4).
    body = b"miPd" + bytes(room)
    return b"".join((png[:-12], struct.pack(">I", room), body, struct.pack(">I", zlib.crc32(body)), png[-12:]))


class _CarryingImage(Image.Image):
    """A PIL image that writes its geometry, profile and kept metadata without being asked.

    Pillow's writers take XMP and EXIF from the arguments of ``save`` only, so ``safe.save("x.png")`` would drop the
    geometry. What Pillow derives from this image (a resized copy, say) is a plain image again, rightly so.
    """

    kept_text: dict[str, str]

    @classmethod
    def carry(cls, image: Image.Image) -> Self:
        image.__class__ = cls
        carrying = cast("Self", image)
        carrying.kept_text = {}
        return carrying

    def save(self, fp: Any, format: str | None = None, **params: Any) -> None:  # noqa: A002
        for key in ("xmp", "exif", "icc_profile", "comment"):
            if self.info.get(key):
                params.setdefault(key, self.info[key])
        if "pnginfo" not in params and ("xmp" in params or self.kept_text):
            # PNG has no argument for XMP: it is an iTXt chunk of this name (XMP specification, part 3).
            chunks = PngImagePlugin.PngInfo()
            for key, value in self.kept_text.items():
                chunks.add_itxt(key, value)
            if xmp := params.get("xmp"):
                chunks.add_itxt("XML:com.adobe.xmp", xmp.decode() if isinstance(xmp, bytes) else xmp)
            params["pnginfo"] = chunks
        super().save(fp, format, **params)


# Geometry in XMP. ------------------------------------------------------------------------------------------------

_XMP_HEAD: Final = (
    '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/">'
    '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description rdf:about="" xmlns:mien="urn:mien:geometry:1">'
)
_XMP_TAIL: Final = '</rdf:Description></rdf:RDF></x:xmpmeta><?xpacket end="w"?>'
_XMP_PROPERTY: Final = re.compile(rb"<mien:geometry>([^<>&]{2,%d})</mien:geometry>" % _MAX_XMP_BYTES)


def to_xmp(geometry: Geometry) -> bytes:
    """The XMP packet that carries a geometry; its JSON has no character that XML would need escaped."""
    return f"{_XMP_HEAD}<mien:geometry>{geometry.model_dump_json()}</mien:geometry>{_XMP_TAIL}".encode()


def from_xmp(packet: bytes | str | None, *, size: tuple[int, int], max_faces: int = MAX_FACES) -> Geometry | None:
    """Read a geometry back from an untrusted XMP packet.

    The packet is searched for the one property Mien writes and never parsed as XML, so there are no entities to expand.

    Args:
        packet: XMP, of any origin.
        size: (width, height) of the picture; a geometry of another size was made for another picture.
        max_faces: more make it absent.

    Returns:
        The geometry, or None where there is none or it is malformed in any way.
    """
    if not packet:
        return None
    raw = packet.encode("utf-8", "replace") if isinstance(packet, str) else bytes(packet)
    if len(raw) > _MAX_XMP_BYTES:
        return None
    found = _XMP_PROPERTY.findall(raw)
    if len(found) != 1:
        return None
    try:
        # RecursionError: thousands of opening brackets.
        parsed = Geometry.model_validate(json.loads(found[0]))
    except (ValidationError, ValueError, RecursionError):
        return None
    fits = (parsed.width, parsed.height) == size and len(parsed.faces) <= max_faces
    return parsed if fits else None


# Decoding. -------------------------------------------------------------------------------------------------------


def _sniff(data: bytes) -> tuple[str, Callable[[io.BytesIO], Image.Image]]:
    # The plugins are called directly: Image.open would try all it knows, and warn about large pictures on stderr
    # before our own limits have spoken.
    if not data:
        raise InvalidImage("The file is empty.")
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG", JpegImagePlugin.jpeg_factory
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG", PngImagePlugin.PngImageFile
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP", WebPImagePlugin.WebPImageFile
    if data[4:8] == b"ftyp":
        # The brands of the file type box (ISO/IEC 14496-12): the box's length is in front of it.
        brands = data[8 : min(64, int.from_bytes(data[:4], "big"))]
        if b"avif" in brands or b"avis" in brands:
            return "AVIF", AvifImagePlugin.AvifImageFile
        if b"heic" in brands or b"heix" in brands or b"mif1" in brands:
            return "HEIF", _heif
    raise InvalidImage("This is not a picture Mien reads. It takes JPEG, PNG, WebP, AVIF and HEIF files.")


def _heif(file: io.BytesIO) -> Image.Image:
    try:
        from pillow_heif import HeifImageFile
    except ImportError:
        raise InvalidImage("HEIF files are not read here: pillow-heif is not installed. Send JPEG or PNG.") from None
    image: Image.Image = HeifImageFile(file)  # type: ignore[no-untyped-call]
    return image


def _webp_size(data: bytes) -> tuple[int, int] | None:
    """Size in a WebP header (RFC 9649, section 2.5 to 2.7), None where it is too short or of an unknown kind."""
    if len(data) < 30:
        return None
    if data[12:16] == b"VP8X":
        return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
    if data[12:16] == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if data[12:16] == b"VP8 ":
        return int.from_bytes(data[26:28], "little") & 0x3FFF, int.from_bytes(data[28:30], "little") & 0x3FFF
    return None


def _check_size(size: tuple[int, int], limits: Limits) -> None:
    width, height = size
    if max(size) > limits.max_side or width * height > limits.max_pixels:
        raise ImageTooLarge(
            f"The picture is {width} x {height} pixels. At most {limits.max_side} a side and "
            f"{limits.max_pixels / 1e6:g} megapixels are accepted; make it smaller."
        )
    if min(size) < limits.min_side:
        raise InvalidImage(f"The picture is {width} x {height} pixels. At least {limits.min_side} a side are needed.")


def _from_image(image: Image.Image, name: str | None, *, keep_metadata: bool) -> Picture:
    image.load()
    info = dict(image.info)
    exif, orientation = _exif(image)
    profile = info.get("icc_profile")
    if not isinstance(profile, bytes) or len(profile) > _MAX_ICC_BYTES or profile[16:20] != b"RGB ":
        # A gray or CMYK profile does not describe the RGB values they are converted to.
        profile = None
    turned = image.transpose(_UPRIGHT[orientation]) if orientation != 1 else image
    pixels, alpha = _planes(turned)
    found = from_xmp(info.get("xmp"), size=(pixels.shape[1], pixels.shape[0])) if orientation == 1 else None
    metadata = _metadata(image, exif) if keep_metadata else None
    return Picture(pixels, alpha, profile, name, found, metadata)


def _planes(image: Image.Image) -> tuple[NDArray[np.uint8], NDArray[np.uint8] | None]:
    if image.mode.startswith("I"):  # 16-bit gray
        wide = np.asarray(image).astype(np.int64)
        key = image.info.get("transparency")
        alpha = np.where(wide == key, 0, 255).astype(np.uint8) if isinstance(key, int) else None
        gray = ((wide.clip(0, 65535) * 255 + 32767) // 65535).astype(np.uint8)
        return np.repeat(gray[..., None], 3, axis=2), alpha
    if image.mode == "F":
        raise InvalidImage("The picture has floating point pixels, whose range is unknown. Convert it to 8 bits.")
    if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
        four = np.array(image.convert("RGBA"))
        alpha = np.ascontiguousarray(four[..., 3])
        return np.ascontiguousarray(four[..., :3]), alpha
    return np.array(image.convert("RGB")), None


def _exif(image: Image.Image) -> tuple[Image.Exif, int]:
    try:
        exif = image.getexif()
        orientation = exif.get(0x0112, 1)
    except Exception:  # malformed EXIF raises anything; the picture is fine without it
        return Image.Exif(), 1
    return exif, orientation if orientation in range(1, 9) else 1


def _metadata(image: Image.Image, exif: Image.Exif) -> Metadata:
    try:
        kept = Image.Exif()
        for tag, value in exif.items():
            if tag not in (0x8769, 0x8825, 0xA005):
                kept[tag] = value
        kept[0x0112] = 1
        for pointer in (0x8769, 0x8825):  # Exif and GPS directories; thumbnails live in IFD1, which is not copied
            directory = {t: v for t, v in exif.get_ifd(pointer).items() if t not in _TELLING_TAGS}
            if directory:
                kept.get_ifd(pointer).update(directory)
        packed = kept.tobytes() if len(exif) else b""
    except Exception:
        packed = b""
    comment = image.info.get("comment", b"")
    text, room = {}, _MAX_TEXT_CHARACTERS
    for key, value in getattr(image, "text", {}).items():
        room -= len(key) + len(value)
        # "Raw profile type ..." and XMP are whole metadata blocks in disguise, thumbnails included.
        if room >= 0 and not key.startswith("Raw profile type") and key != "XML:com.adobe.xmp":
            text[key] = str(value)
    return Metadata(packed, comment if isinstance(comment, bytes) else b"", text)


# MakerNote often holds a preview of the picture; 0xA005 points to a directory that is not copied.
_TELLING_TAGS: Final = frozenset({0x927C, 0xA005})

# By EXIF orientation (EXIF 3.0, tag 0x0112): how to turn the stored pixels upright.
_UPRIGHT: Final[Mapping[int, Image.Transpose]] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
