"""The geometry of a clip, as it travels inside the file.

A text tag ``mien_geometry`` of the container: the one place that MP4, MOV and Matroska share, that PyAV writes and
reads back whole (MP4 and MOV through ``movflags=use_metadata_tags``), and that players ignore. It has two parts, each
deflated and in base64: a JSON header, and for every face and frame one byte of state and four float32 of its
transform, as XOR differences in time with bytes transposed, so that deflate finds something to pack. No pixels, no
secrets. It is read back as untrusted input.
"""

from __future__ import annotations

import base64
import binascii
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mien.pictures import MAX_FACES
from mien.video.tracking import State
from mien.video.trajectories import Trajectory

TAG: Final = "mien_geometry"
_MAX_TEXT: Final = 256 * 1024 * 1024
_MAX_HEADER: Final = 4 * 1024 * 1024
_MAX_TRACKS: Final = 100_000


class Colour(BaseModel):
    """How YUV values mean colours: code points of ISO/IEC 23091-2, as FFmpeg numbers them (2: unspecified)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    range: int = Field(0, ge=0, le=2)
    matrix: int = Field(2, ge=0, le=255)
    primaries: int = Field(2, ge=0, le=255)
    transfer: int = Field(2, ge=0, le=255)


class _Track(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    number: int = Field(ge=0, le=_MAX_TRACKS)
    first: int = Field(ge=0)
    length: int = Field(gt=0)


class _Header(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1] = 1
    width: int = Field(gt=0, le=100_000)
    height: int = Field(gt=0, le=100_000)
    frames: int = Field(gt=0, le=100_000_000)
    crop_size: int = Field(ge=16, le=2048)
    template: str = Field(pattern=r"^[a-z0-9-]{1,32}$")
    model: str = Field(pattern=r"^[0-9a-f]{64}$")
    source: Colour
    tracks: tuple[_Track, ...] = Field(max_length=_MAX_TRACKS)


@dataclass(frozen=True, eq=False)
class ClipGeometry:
    """Where the changed faces of a clip are."""

    width: int
    height: int
    """Of upright pictures."""
    frames: int
    crop_size: int
    template: str
    model: str
    """Digest of the model that changed the faces."""
    source: Colour
    """Of the clip before it was anonymized: RGB files have no place for it, and recovery gives it back."""
    trajectories: tuple[Trajectory, ...]


def encode(clip: ClipGeometry) -> str:
    """The tag's text."""
    header = _Header(
        width=clip.width,
        height=clip.height,
        frames=clip.frames,
        crop_size=clip.crop_size,
        template=clip.template,
        model=clip.model,
        source=clip.source,
        tracks=tuple(_Track(number=t.number, first=t.first, length=len(t.states)) for t in clip.trajectories),
    )
    states = b"".join(t.states.tobytes() for t in clip.trajectories)
    transforms = b"".join(_pack(t.transforms) for t in clip.trajectories)
    parts = (header.model_dump_json().encode(), states + transforms)
    return ".".join(base64.b64encode(zlib.compress(part, 6)).decode() for part in parts)


def decode(text: str | None, *, size: tuple[int, int], frames: int | None = None) -> ClipGeometry | None:
    """Read a tag of any origin.

    Args:
        text: the tag, or None.
        size: (width, height) of the clip's upright pictures.
        frames: of the clip; None where that is not known yet.

    Returns:
        The geometry, or None where there is none, it is malformed in any way, or it was made for another clip.
    """
    if not text or len(text) > _MAX_TEXT or text.count(".") != 1:
        return None
    head, _, body = text.partition(".")
    try:
        header = _Header.model_validate(json.loads(_inflate(head, _MAX_HEADER)))
        total = sum(track.length for track in header.tracks)
        if any(t.first + t.length > header.frames for t in header.tracks) or total > header.frames * MAX_FACES:
            return None
        raw = _inflate(body, 17 * total)
    # RecursionError: thousands of opening brackets.
    except (ValidationError, ValueError, RecursionError, zlib.error):
        return None
    fits = (header.width, header.height) == size and frames in (None, header.frames) and len(raw) == 17 * total
    if not fits:
        return None
    trajectories = []
    at, begin = 0, total
    for track in header.tracks:
        states = np.frombuffer(raw, np.uint8, track.length, at)
        transforms = _unpack(raw[begin : begin + 16 * track.length], track.length)
        at, begin = at + track.length, begin + 16 * track.length
        if states.max() > max(State) or not _possible(transforms, header):
            return None
        trajectories.append(Trajectory(track.number, track.first, states, transforms))
    if len({t.number for t in trajectories}) != len(trajectories) or _crowded(trajectories, header.frames):
        return None
    return ClipGeometry(
        header.width,
        header.height,
        header.frames,
        header.crop_size,
        header.template,
        header.model,
        header.source,
        tuple(trajectories),
    )


def _possible(transforms: NDArray[np.float32], header: _Header) -> bool:
    # A transform decides how much work a face is; see mien.pictures.Geometry.
    if not np.isfinite(transforms).all() or np.abs(transforms).max() > 1e6:
        return False
    scale = np.hypot(transforms[:, 0], transforms[:, 1])
    side = header.crop_size / np.maximum(scale, 1e-9)
    return bool((side >= 4).all() and (side <= 4 * max(header.width, header.height)).all())


def _crowded(trajectories: Sequence[Trajectory], frames: int) -> bool:
    change = np.zeros(frames + 1, dtype=np.int64)
    for t in trajectories:
        change[t.first] += 1
        change[t.last + 1] -= 1
    return bool(change.cumsum().max() > MAX_FACES)


def _pack(transforms: NDArray[np.float32]) -> bytes:
    bits = np.ascontiguousarray(transforms, dtype="<f4").view("<u4")
    change = bits.copy()
    change[1:] ^= bits[:-1]
    return np.ascontiguousarray(change.view(np.uint8).reshape(-1, 16).T).tobytes()


def _unpack(raw: bytes, length: int) -> NDArray[np.float32]:
    change = np.ascontiguousarray(np.frombuffer(raw, np.uint8).reshape(16, length).T).view("<u4")
    return np.bitwise_xor.accumulate(change, axis=0).view("<f4").astype(np.float32)


def _inflate(text: str, limit: int) -> bytes:
    try:
        packed = base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise ValueError("not base64") from error
    inflater = zlib.decompressobj()
    raw = inflater.decompress(packed, max(1, limit))
    if inflater.unconsumed_tail:
        raise ValueError("larger than it says")
    return raw
