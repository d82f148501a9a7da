"""Clips with a known truth, made of one picture of a face: for measuring (services.evaluate, bench) and for tests.

A cut-out head is moved, scaled, turned, half hidden, or leaves and returns before a smooth background. Where its
landmarks are in each frame is known exactly, so a face can be judged in frames in which every detector fails.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from mien import geometry
from mien.geometry import Matrix, Points

Motion = Literal["move", "turn", "hide", "leave", "still"]
MOTIONS: Final[tuple[Motion, ...]] = ("move", "turn", "hide", "leave")
RATE: Final = 25
_AUDIO_RATE: Final = 16_000
_STYLE: Final = b"""[Script Info]
ScriptType: v4.00+

[V4+ Styles]
Format: Name, Fontname, Fontsize
Style: Default,Arial,16

[Events]
Format: Layer, Start, End, Style, Text
"""


@dataclass(frozen=True, eq=False)
class Shot:
    """A frame and its truth."""

    pixels: NDArray[np.uint8]
    """uint8 RGB ``[H, W, 3]``."""
    landmarks: Points
    """Where the face is, or would be outside the picture."""
    visible: bool
    """Whether the middle of the face is in the picture."""


def shots(
    picture: NDArray[np.uint8],
    landmarks: Points,
    motion: Motion,
    *,
    frames: int = 36,
    size: tuple[int, int] = (240, 320),
    eyes: float = 32.0,
) -> Iterator[Shot]:
    """The frames of a clip.

    Args:
        picture: uint8 RGB ``[H, W, 3]`` that shows a face.
        landmarks: its landmarks, ``[5, 2]``.
        motion: what the face does.
        frames: how many.
        size: (height, width).
        eyes: distance of the eyes, pixels, on average.
    """
    import cv2

    height, width = size
    ys, xs = np.mgrid[:height, :width].astype(np.float64)
    waves = [110 + 40 * np.sin(xs / 25), 120 + 30 * np.cos(ys / 19), 100 + 20 * np.sin((xs + ys) / 31)]
    background = np.stack(waves, axis=-1)
    alpha = _head(picture.shape[:2], landmarks)
    for i in range(frames):
        where = _place(motion, i / max(1, frames - 1), size, eyes)
        matrix = geometry.compose(where, geometry.crop_transform(landmarks))
        head = cv2.warpAffine(picture, matrix, (width, height), flags=cv2.INTER_AREA, borderMode=cv2.BORDER_REPLICATE)
        cover = cv2.warpAffine(alpha, matrix, (width, height), flags=cv2.INTER_LINEAR)[..., None]
        mixed = background * (1 - cover) + head * cover
        if motion == "hide" and 0.35 < i / frames < 0.65:
            # A post in front of one half of the face.
            middle = geometry.apply(matrix, landmarks.mean(axis=0))[0]
            mixed[:, round(middle) : round(middle + 1.6 * eyes)] = (70, 60, 50)
        truth = geometry.apply(matrix, landmarks)
        centre = truth.mean(axis=0)
        inside = bool((centre > 0).all() and (centre < (width, height)).all())
        yield Shot(np.rint(mixed).clip(0, 255).astype(np.uint8), truth, inside)


def _place(motion: Motion, t: float, size: tuple[int, int], eyes: float) -> Matrix:
    """Crop pixels to picture pixels at time t in [0, 1]."""
    height, width = size
    x, y, scale, angle = width / 2, height / 2, 1.0, 0.0
    wave = math.sin(2 * math.pi * t)
    if motion in ("move", "hide"):
        x, scale = width * (0.35 + 0.3 * t), 1 + 0.15 * wave
        y += 0.04 * height * math.sin(4 * math.pi * t)
    elif motion == "turn":
        angle, scale = math.radians(20) * wave, 1 + 0.2 * t
    elif motion == "leave":
        # Out at the right side by the middle of the clip, and back.
        x = width / 2 + (width / 2 + 3.2 * eyes) * math.sin(math.pi * t)
    factor = scale * eyes / 32
    c, s = factor * math.cos(angle), factor * math.sin(angle)
    centre = (geometry.CROP_SIZE - 1) / 2
    return np.array([[c, -s, x - c * centre + s * centre], [s, c, y - s * centre - c * centre]])


def _head(size: tuple[int, int], landmarks: Points) -> NDArray[np.float32]:
    """A soft ellipse around the head, ``[H, W]``."""
    ys, xs = np.mgrid[: size[0], : size[1]].astype(np.float64)
    at = geometry.apply(geometry.crop_transform(landmarks), np.stack([xs, ys], axis=-1))
    radius = np.hypot((at[..., 0] - 63.5) / 52, (at[..., 1] - 66) / 62)
    return np.clip((1 - radius) / 0.08, 0, 1).astype(np.float32)


def write(
    path: Path | str,
    pictures: Iterable[NDArray[np.uint8]],
    *,
    codec: str = "libx264",
    pixel_format: str = "yuv420p",
    options: dict[str, str] | None = None,
    container: str | None = None,
    container_options: dict[str, str] | None = None,
    rate: int = RATE,
    times: Sequence[int] | None = None,
    time_base: Fraction = Fraction(1, 12_800),
    sound: bool = False,
    subtitles: Sequence[tuple[float, float, str]] = (),
    rotation: int = 0,
    metadata: dict[str, str] | None = None,
    colour: tuple[int, int, int, int] | None = None,
) -> None:
    """Write frames as a clip.

    Args:
        path: the file.
        pictures: uint8 RGB or RGBA ``[H, W, 3 or 4]``.
        codec, pixel_format, options, container, container_options: FFmpeg's.
        rate: frames a second.
        times: of each frame and of the end, in units of ``time_base``, for a variable rate.
        time_base: see there.
        sound: with a tone that rises.
        subtitles: start and end in seconds, text.
        rotation: degrees counterclockwise by which players turn the pictures.
        metadata: tags.
        colour: range, matrix, primaries, transfer (FFmpeg's numbers).
    """
    import av

    video: Any = None
    tone: Any = None
    words: Any = None
    last = 0
    with av.open(str(path), "w", format=container, container_options=container_options or {}) as out:
        out.metadata.update(metadata or {})
        for i, picture in enumerate(pictures):
            if video is None:
                video = out.add_stream(codec, rate=rate, options=options or {"crf": "12", "preset": "veryfast"})
                video.height, video.width = picture.shape[:2]
                video.pix_fmt = pixel_format
                video.time_base = video.codec_context.time_base = time_base
                if rotation:
                    video.set_display_rotation(rotation)
                if colour:
                    context = video.codec_context
                    context.color_range, context.colorspace, context.color_primaries, context.color_trc = colour
                if sound:
                    tone = out.add_stream("aac", rate=_AUDIO_RATE)
                    tone.layout = "mono"
                if subtitles:
                    words = out.add_stream("mov_text" if str(path).endswith(("mp4", "mov")) else "srt")
                    # FFmpeg opens no subtitle encoder without a style to start from.
                    words.codec_context.subtitle_header = _STYLE
            frame: Any = av.VideoFrame.from_ndarray(
                np.ascontiguousarray(picture), format="rgba" if picture.shape[2] == 4 else "rgb24"
            )
            if colour:
                frame = frame.reformat(
                    format=pixel_format, dst_colorspace={6: 5}.get(colour[1], colour[1]), dst_color_range=colour[0]
                )
                frame.colorspace, frame.color_range = colour[1], colour[0]
            step = round(1 / (rate * time_base))
            frame.pts = times[i] if times else i * step
            frame.duration = times[i + 1] - times[i] if times else step
            frame.time_base = time_base
            last = frame.pts + frame.duration
            for packet in video.encode(frame):
                packet.duration = packet.duration or step
                out.mux(packet)
        if video is None:
            raise ValueError("a clip has at least one frame")
        for packet in video.encode(None):
            packet.duration = packet.duration or step
            out.mux(packet)
        if tone is not None:
            _tone(out, tone, float(last * time_base))
        for start, end, text in subtitles:
            raw = text.encode()
            packet = av.Packet(len(raw).to_bytes(2, "big") + raw if words.codec_context.name == "mov_text" else raw)
            packet.stream, packet.time_base = words, Fraction(1, 1000)
            packet.pts = packet.dts = round(start * 1000)
            packet.duration = round((end - start) * 1000)
            out.mux(packet)


def _tone(out: Any, stream: Any, seconds: float) -> None:
    import av

    t = np.arange(int(seconds * _AUDIO_RATE)) / _AUDIO_RATE
    samples = (0.3 * np.sin(2 * np.pi * (220 + 110 * t) * t)).astype(np.float32)
    for start in range(0, len(samples), 1024):
        frame = av.AudioFrame.from_ndarray(samples[None, start : start + 1024], format="fltp", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = _AUDIO_RATE, start, Fraction(1, _AUDIO_RATE)
        for packet in stream.encode(frame):
            out.mux(packet)
    for packet in stream.encode(None):
        out.mux(packet)
