"""What clips are encoded as, and what each choice costs (measured figures: docs/video.md).

Recovery reads the pixels of the anonymized clip. The network that ships is reversible and hides the real face in small
differences, so what a lossy codec throws away is the face: anonymized clips are lossless unless asked otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, Literal

from mien.video.errors import InvalidVideo

CodecName = Literal["lossless", "ffv1", "h264", "h264-444", "h265", "av1"]


@dataclass(frozen=True)
class Codec:
    """One way to encode the pictures of a clip."""

    name: CodecName
    encoder: str
    """FFmpeg's name."""
    pixel_format: str
    """What the encoder takes; RGB formats take pictures as they are, the others through the clip's own matrix."""
    lossless: bool
    """Whether RGB pixels come back bit for bit."""
    containers: tuple[str, ...]
    crf: int | None = None
    """Constant rate factor by default; None where the codec has no quality."""
    crf_range: tuple[int, int] = (0, 51)
    even_sizes: bool = False
    alpha_format: str | None = None
    """Pixel format for pictures with transparency, or None where the codec has none."""
    options: dict[str, str] = field(default_factory=dict)
    quality_note: str = ""


# Presets are for two cores: x264 and x265 `medium` and SVT-AV1's default are two to five times slower for some percent.
CODECS: Final[dict[CodecName, Codec]] = {
    codec.name: codec
    for codec in (
        # High 4:4:4 Predictive in RGB with a quantiser of 0: exact, and about a quarter of FFV1's size on moving faces.
        Codec(
            "lossless",
            "libx264rgb",
            "rgb24",
            True,
            ("mp4", "mov", "matroska"),
            options={"qp": "0", "preset": "veryfast"},
            quality_note="faces come back as from a PNG picture",
        ),
        Codec(
            "ffv1",
            "ffv1",
            "bgr0",
            True,
            ("matroska",),
            alpha_format="bgra",
            quality_note="faces come back as from a PNG picture",
        ),
        Codec(
            "h264",
            "libx264",
            "yuv420p",
            False,
            ("mp4", "mov", "matroska"),
            crf=17,
            even_sizes=True,
            options={"preset": "veryfast"},
            quality_note="small and plays everywhere; faces do not come back well, see docs/video.md",
        ),
        Codec(
            "h264-444",
            "libx264",
            "yuv444p",
            False,
            ("mp4", "mov", "matroska"),
            crf=5,
            options={"preset": "veryfast"},
            quality_note="near-lossless; faces come back softer, see docs/video.md",
        ),
        Codec(
            "h265",
            "libx265",
            "yuv420p",
            False,
            ("mp4", "mov", "matroska"),
            crf=20,
            even_sizes=True,
            options={"preset": "fast", "x265-params": "log-level=none"},
            quality_note="smaller than H.264; faces do not come back well, see docs/video.md",
        ),
        Codec(
            "av1",
            "libsvtav1",
            "yuv420p",
            False,
            ("mp4", "matroska"),
            crf=28,
            crf_range=(1, 63),
            even_sizes=True,
            options={"preset": "8"},
            quality_note="smallest; faces do not come back well, see docs/video.md",
        ),
    )
}

# Containers that are written, by the suffix of the file; anything else that can be read is written as Matroska.
CONTAINERS: Final = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".mkv": "matroska"}
VIDEO_SUFFIXES: Final = frozenset(
    {*CONTAINERS, ".webm", ".avi", ".ts", ".mts", ".m2ts", ".mpg", ".mpeg", ".wmv", ".flv", ".3gp", ".ogv"}
)


def container_of(suffix: str) -> str:
    """FFmpeg's name of the container a file of this suffix is written as.

    Raises:
        InvalidVideo: Mien does not write such files.
    """
    try:
        return CONTAINERS[suffix.lower()]
    except KeyError:
        raise InvalidVideo(
            f"Clips are written as {', '.join(CONTAINERS)}, not as {suffix or 'a file without'!r}."
        ) from None


def choose(name: CodecName, *, container: str, width: int, height: int, alpha: bool, crf: int | None) -> Codec:
    """The codec by name, checked against what it shall hold.

    Raises:
        InvalidVideo: the container, the picture size or transparency does not go with the codec, or the rate factor
            is out of its range.
    """
    codec = CODECS[name]
    if container not in codec.containers:
        raise InvalidVideo(f"{name} goes into {' or '.join(codec.containers)} files, not into {container}.")
    if alpha and codec.alpha_format is None:
        raise InvalidVideo(f"The clip has transparency, which {name} cannot hold. Use --codec ffv1 and a .mkv file.")
    if codec.even_sizes and (width % 2 or height % 2):
        raise InvalidVideo(
            f"{name} needs even sides, and the clip is {width}x{height}. Use --codec lossless, ffv1 or h264-444."
        )
    if name == "av1" and min(width, height) < 64:
        raise InvalidVideo(f"av1 needs sides of 64 pixels, and the clip is {width}x{height}. Use another --codec.")
    if crf is not None:
        if codec.crf is None:
            raise InvalidVideo(f"--crf does not go with {name}, which loses nothing.")
        low, high = codec.crf_range
        if not low <= crf <= high:
            raise InvalidVideo(f"--crf of {name} is {low} to {high}, not {crf}.")
    return codec
