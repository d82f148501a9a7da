"""What is asked and what comes back, apart from how it travels."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypedDict

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mien import pictures
from mien.pictures import Format, Geometry, Limits, Picture

Operation = Literal["anonymize", "recover"]
Box = Sequence[float]
"""left, top, right, bottom in pixels of the upright picture."""

# A service has its own limits, and what a caller holds in memory may be as large as it likes.
_ANY: Limits = Limits(max_pixels=2**62, max_side=2**31)

# Crops in one request: below the faces that a service accepts in a picture by default.
CROPS: int = 64


class Faces(TypedDict, total=False):
    """Which faces, under which passwords."""

    passwords: Mapping[int, str] | None
    """Passwords of single faces, by number; ``password`` is for the others."""
    faces: Sequence[int] | None
    """Faces to change, by their place in :meth:`Client.detect` (recover: among those changed then); all by default."""
    boxes: Sequence[Box] | None
    """Faces to change, by where they are."""
    exclude_faces: Sequence[int] | None
    """Faces to leave alone, by number; wins over the above."""
    exclude_boxes: Sequence[Box] | None
    """Faces to leave alone: all that overlap one of these boxes well."""


class Files(Faces, total=False):
    """:class:`Faces`, and how the answer is encoded."""

    format: Format
    """``PNG`` (what is to be recovered needs it), ``JPEG`` or ``WEBP``."""
    quality: int
    """1 to 100, for JPEG and WebP."""
    keep_metadata: bool
    """Keep EXIF and comments, which may name the place and the camera."""


@dataclass(frozen=True)
class Edit:
    """One request to change faces.

    Raises:
        ValueError: unknown format, quality out of range.
    """

    operation: Operation
    password: str | None = field(default=None, repr=False)
    passwords: Mapping[int, str] | None = field(default=None, repr=False)
    faces: Sequence[int] | None = None
    boxes: Sequence[Box] | None = None
    exclude_faces: Sequence[int] | None = None
    exclude_boxes: Sequence[Box] | None = None
    aligned: bool = False
    format: Format = "PNG"
    quality: int = 95
    keep_metadata: bool = False

    def __post_init__(self) -> None:
        if self.format not in pictures.SUFFIXES:
            raise ValueError(f"format must be one of {', '.join(pictures.SUFFIXES)}, not {self.format!r}")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"quality is 1 to 100, not {self.quality}")

    def form(self) -> dict[str, str]:
        """The fields of ``multipart/form-data``; what is not given is left out."""
        fields: dict[str, str] = {"format": self.format.lower(), "quality": str(self.quality)}
        if self.password is not None:
            fields["password"] = self.password
        if self.passwords is not None:
            fields["passwords"] = json.dumps({str(k): v for k, v in self.passwords.items()})
        for name, numbers in (("faces", self.faces), ("exclude_faces", self.exclude_faces)):
            if numbers is not None:
                fields[name] = ",".join(str(int(n)) for n in numbers)
        for name, boxes in (("boxes", self.boxes), ("exclude_boxes", self.exclude_boxes)):
            if boxes is not None:
                fields[name] = ";".join(",".join(repr(float(v)) for v in box) for box in boxes)
        for name, yes in (("aligned", self.aligned), ("keep_metadata", self.keep_metadata)):
            if yes:
                fields[name] = "true"
        return fields


@dataclass(frozen=True)
class Answer:
    """A picture that a service changed."""

    data: bytes = field(repr=False)
    """The encoded picture."""
    format: Format
    face_count: int
    """How many faces were changed. Where they are is in the picture: ``mien.pictures.decode(data).geometry``."""
    digest: str
    """Of the model that changed them."""
    request_id: str
    """What the service's log calls the request."""


@dataclass(frozen=True)
class Tracking:
    """Follow faces from frame to frame, so that one which the detector misses for a while stays changed; gRPC alone."""

    lookahead: int = 12
    """Frames that the service keeps back, so that a face it sees late is changed in those before as well. With 0 the
    first frames of such a face come back *unchanged*."""
    rate: float = 25.0
    """Frames a second, nominal."""
    drop: bool = False
    """Stay live: the service drops the oldest frame that waits when a third one comes; :attr:`Frame.dropped` names it.
    Otherwise ``frames`` is read no faster than the service works."""


@dataclass(frozen=True)
class TrackedFace:
    """A face that is followed, in one frame."""

    track: int
    """Number of the track, from 0."""
    box: tuple[float, float, float, float]
    state: Literal["detected", "flow", "held"]
    """The detector saw it, optical flow carried it on, or its place is a guess."""
    masked: bool
    """It could not be transformed and was masked; the others are, in this order, those of the frame's geometry."""


@dataclass(frozen=True, eq=False)
class Frame:
    """One frame of a video, on its way there or back."""

    picture: NDArray[np.uint8] | bytes = field(repr=False)
    """uint8 RGB ``[H, W, 3]``, or a file's bytes; what comes back is of the kind that was sent."""
    geometry: Geometry | None = None
    """There: the crops to change instead of detecting (empty: none). Back: those that were changed, for recovering."""
    time: float | None = None
    """There, with :class:`Tracking`: seconds; of all frames or of none."""
    number: int | None = None
    """Back, over gRPC: its place among the frames that were sent, from 0."""
    tracked: tuple[TrackedFace, ...] = ()
    """Back, with :class:`Tracking`: every face, by number of its track."""
    dropped: tuple[int, ...] = ()
    """Back, with ``Tracking.drop``: the places of the frames dropped between the one before and this one."""


def image_to_bytes(image: Image.Image) -> bytes:
    """A PIL image as PNG, with the geometry it carries.

    Raises:
        InvalidImage: see :func:`mien.pictures.from_pil`.
    """
    return pictures.encode(pictures.from_pil(image, limits=_ANY), "PNG")


def bytes_to_image(data: bytes) -> Image.Image:
    """The PIL image of a service's answer; saved as PNG it keeps its geometry."""
    return pictures.to_pil(pictures.decode(data, limits=_ANY))


def crops_to_bytes(crops: NDArray[np.uint8]) -> bytes:
    """Crops uint8 ``[B, S, S, 3]`` one below the other, as PNG."""
    count, side = crops.shape[:2]
    return pictures.encode(Picture(np.ascontiguousarray(crops).reshape(count * side, side, 3)), "PNG")


def bytes_to_crops(data: bytes, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """:func:`crops_to_bytes` backwards."""
    return pictures.decode(data, limits=_ANY).pixels.reshape(shape)


def check_crops(crops: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The crops, or ValueError where they are not uint8 ``[B, S, S, 3]``."""
    crops = np.asarray(crops)
    if crops.dtype != np.uint8 or crops.ndim != 4 or crops.shape[3] != 3 or crops.shape[1] != crops.shape[2]:
        raise ValueError(f"expected uint8 crops [B, S, S, 3], not {crops.dtype} {crops.shape}")
    return crops


def frame_to_bytes(frame: Frame) -> bytes:
    """A frame as a file that carries its geometry.

    Raises:
        InvalidImage: an encoded frame with a geometry beside it cannot be read.
    """
    if isinstance(frame.picture, bytes):
        if frame.geometry is None:
            return frame.picture
        read = pictures.decode(frame.picture, limits=_ANY)
        return pictures.encode(read.with_pixels(read.pixels, frame.geometry), "PNG")
    return pictures.encode(Picture(check_frame(frame.picture), geometry=frame.geometry), "PNG")


def bytes_to_frame(data: bytes, *, raw: bool) -> Frame:
    """A service's answer as a frame, pixels or file."""
    read = pictures.decode(data, limits=_ANY)
    return Frame(read.pixels if raw else data, read.geometry)


def check_frame(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The pixels, or ValueError where they are not uint8 ``[H, W, 3]``."""
    pixels = np.asarray(pixels)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(f"expected a frame uint8 [H, W, 3], not {pixels.dtype} {pixels.shape}")
    return np.ascontiguousarray(pixels)


def size_of(frame: Frame) -> tuple[int, int]:
    """Height and width of a frame, pixels."""
    if isinstance(frame.picture, bytes):
        read = pictures.decode(frame.picture, limits=_ANY)
        return read.height, read.width
    height, width = frame.picture.shape[:2]
    return height, width
