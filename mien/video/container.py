"""Clips as files: frames in, frames out, everything that is not the picture copied as it is (PyAV).

Pictures are upright 8-bit RGB inside; the file keeps its own orientation. Of the other streams, sound and subtitles are
copied packet by packet. Cover pictures, data streams (cameras write places into them), attachments, chapters, and all
metadata but languages are left out.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Final, Self

import av
import numpy as np
from av.video.reformatter import ColorRange, Interpolation, VideoReformatter
from numpy.typing import NDArray

from mien.errors import ImageTooLarge
from mien.pictures import DEFAULT_LIMITS, Limits
from mien.video.codecs import Codec
from mien.video.errors import InvalidVideo
from mien.video.geometry_track import Colour

Pixels = NDArray[np.uint8]

_SCALING: Final = (
    Interpolation.BICUBIC | Interpolation.FULL_CHR_H_INT | Interpolation.FULL_CHR_H_INP | Interpolation.ACCURATE_RND
)
# AVCOL_SPC_* that swscale converts, as the SWS_CS_* that PyAV takes. Others (RGB, unspecified) keep its default.
_MATRICES: Final = {1: 1, 4: 4, 5: 5, 6: 5, 7: 7, 9: 9}
_UNSPECIFIED: Final = 2


@dataclass(frozen=True, eq=False)
class Frame:
    """One picture of a clip."""

    index: int
    pts: int
    """In units of the clip's time base."""
    duration: int
    """In the same units; 0 where the file does not say."""
    pixels: Pixels
    """Upright uint8 RGB ``[H, W, 3]``."""
    alpha: Pixels | None = None
    """Upright uint8 ``[H, W]``, or None."""


@dataclass(frozen=True)
class Clip:
    """What a file says of itself."""

    path: str
    coded_width: int
    coded_height: int
    rotation: int
    """Degrees by which the stored pictures are turned counterclockwise to be upright: 0, 90, 180 or 270."""
    time_base: Fraction
    rate: Fraction
    """Frames a second, average."""
    aspect: Fraction
    """Of a pixel, as stored."""
    pixel_format: str
    bits: int
    """Of a colour component."""
    alpha: bool
    colour: Colour
    container: str
    codec: str
    frames: int
    """As the file says, or estimated from its duration; 0 where neither is known."""
    tags: dict[str, str] = field(default_factory=dict, repr=False)
    kept: tuple[int, ...] = ()
    """Indices of the streams that are copied."""
    left_out: tuple[str, ...] = ()
    """Streams that are not, in words."""

    @property
    def width(self) -> int:
        """Of upright pictures."""
        return self.coded_height if self.rotation % 180 else self.coded_width

    @property
    def height(self) -> int:
        return self.coded_width if self.rotation % 180 else self.coded_height


class Reader:
    """An opened clip; a context manager. Reading treats the file as hostile.

    Args:
        path: a file, or a URL that FFmpeg opens (``rtsp://...``).
        limits: refused are pictures outside them.
        options: for FFmpeg's demuxer.
        timeout: seconds to wait for a URL.

    Raises:
        InvalidVideo: not a video, broken, or without frames.
        ImageTooLarge: its pictures are larger than the limits.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        limits: Limits = DEFAULT_LIMITS,
        options: dict[str, str] | None = None,
        timeout: float | None = None,
    ) -> None:
        self.path = os.fspath(path)
        self.name = safe_url(self.path)
        """What messages call it."""
        self.limits = limits
        self._live = "://" in self.path
        if not self._live and not Path(self.path).is_file():
            raise FileNotFoundError(2, "No such file", self.path)
        try:
            self._input: Any = av.open(self.path, options=options or {}, timeout=timeout, metadata_errors="replace")
        except av.error.ExitError:
            raise InvalidVideo(f"{self.name} sent nothing for {timeout:g} s.") from None
        except av.error.FFmpegError as error:
            raise InvalidVideo(f"{self.name} is not a video, or is broken: {_words(error)}.") from None
        try:
            self.clip, self._first = self._probe()
        except BaseException:
            self._input.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._input.close()

    def stream(self, index: int) -> Any:
        """A stream of the opened file."""
        return self._input.streams[index]

    def count(self) -> int:
        """Frames, counted by packets without decoding; once."""
        try:
            return sum(1 for packet in self._input.demux(self._video) if packet.size)
        except av.error.FFmpegError as error:
            raise InvalidVideo(f"{self.name} is broken: {_words(error)}.") from None

    def frames(self) -> Iterator[Frame]:
        """Every frame in display order, once."""
        for item in self.packets(copy=()):
            if isinstance(item, Frame):
                yield item

    def packets(self, copy: tuple[int, ...] | None = None) -> Iterator[Frame | Any]:
        """Frames, and in between the packets of the streams ``copy`` (``clip.kept`` by default); once."""
        wanted = self.clip.kept if copy is None else copy
        streams = [self._video, *(self._input.streams[i] for i in wanted)]
        index, last_pts, end, start = 0, None, 0.0, float("inf")
        declared = self._video.frames
        convert = Converter(self.clip)
        packets = self._input.demux(*streams)
        while True:
            try:
                packet = next(packets)
                decoded = packet.decode() if packet.stream is self._video else None
            except StopIteration:
                break
            except av.error.FFmpegError as error:
                raise InvalidVideo(f"{self.name} is broken after frame {index}: {_words(error)}.") from None
            if decoded is not None and packet.pts is not None and packet.time_base:
                start = min(start, float(packet.pts * packet.time_base))
                end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
            if decoded is None:
                if packet.dts is not None or packet.pts is not None:
                    yield packet
                continue
            for picture in decoded:
                if (picture.width, picture.height) != (self.clip.coded_width, self.clip.coded_height):
                    raise InvalidVideo(f"The pictures of {self.name} change their size at frame {index}.")
                pts = picture.pts if picture.pts is not None else _next_pts(last_pts, self.clip)
                if last_pts is not None and pts <= last_pts:
                    # Encoders refuse time that stands still; such files are rare and broken.
                    pts = last_pts + 1
                last_pts = pts
                yield convert.read(picture, index, pts)
                index += 1
        if not index:
            raise InvalidVideo(f"{self.name} has no frame that can be decoded.")
        if self._live:
            return
        # FFmpeg ends quietly where a file was cut off.
        length = _length(self._video)
        if index < 0.98 * declared - 2:
            raise InvalidVideo(f"{self.name} ends early: {index} of {declared} frames. Is it truncated?")
        if end - start < 0.98 * length - 0.5:
            raise InvalidVideo(f"{self.name} ends early: {end - start:.1f} of {length:.1f} seconds. Is it truncated?")

    def _probe(self) -> tuple[Clip, Any]:
        videos = [s for s in self._input.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
        if not videos:
            raise InvalidVideo(f"{self.name} has no video in it.")
        video = videos[0]
        video.thread_type = "AUTO"
        self._video = video
        context = video.codec_context
        if context is None:
            raise InvalidVideo(f"{self.name} holds video of an unknown kind.")
        width, height = context.width, context.height
        if width * height > self.limits.max_pixels or max(width, height) > self.limits.max_side:
            raise ImageTooLarge(
                f"The clip is {width}x{height}; at most {self.limits.max_pixels:,} pixels and "
                f"{self.limits.max_side} a side are accepted."
            )
        first = self._first_frame() if not self._live else None
        shape = first if first is not None else context
        if min(shape.width, shape.height) < self.limits.min_side or shape.format is None:
            raise InvalidVideo(f"The clip is {shape.width}x{shape.height}, which is too small.")
        kept, left_out = [], []
        for stream in self._input.streams:
            if stream is video:
                continue
            if stream.type in ("audio", "subtitle") and not self._live:
                kept.append(stream.index)
            else:
                left_out.append(f"{stream.type} stream {stream.index}")
        rate = video.average_rate or video.guessed_rate or Fraction(25)
        known = video.frames or (
            round(float(self._input.duration / av.time_base * rate)) if self._input.duration else 0
        )
        format_ = shape.format
        components = format_.components
        turn = (first.rotation if first is not None else 0) % 360
        clip = Clip(
            path=self.name,
            coded_width=shape.width,
            coded_height=shape.height,
            rotation=round(turn / 90) * 90 % 360,
            time_base=Fraction(video.time_base or Fraction(1, 90_000)),
            rate=Fraction(rate),
            aspect=Fraction(video.sample_aspect_ratio or 1) or Fraction(1),
            pixel_format=format_.name,
            bits=max((c.bits for c in components), default=8),
            alpha=any(c.is_alpha for c in components) or format_.name == "pal8",
            colour=Colour(
                range=2 if format_.name.startswith("yuvj") else int(shape.color_range) % 3,
                matrix=int(shape.colorspace),
                primaries=int(shape.color_primaries),
                transfer=int(shape.color_trc),
            ),
            container=self._input.format.name,
            codec=context.name,
            frames=known,
            tags=dict(self._input.metadata),
            kept=tuple(kept),
            left_out=tuple(left_out),
        )
        return clip, first

    def _first_frame(self) -> Any:
        """Decoded by a second opening, so that this one still stands at the beginning."""
        try:
            with av.open(self.path, metadata_errors="replace") as probe:
                for frame in probe.decode(probe.streams[self._video.index]):
                    return frame
        except av.error.FFmpegError as error:
            raise InvalidVideo(f"{self.name} is broken before its first frame: {_words(error)}.") from None
        raise InvalidVideo(f"{self.name} has no frame that can be decoded.")


class Converter:
    """Stored pictures to upright RGB and back. Each way has a scaler of its own, set up once."""

    def __init__(self, clip: Clip) -> None:
        self.clip = clip
        self._scaler = VideoReformatter()

    def read(self, picture: Any, index: int, pts: int) -> Frame:
        clip = self.clip
        matrix = _MATRICES.get(clip.colour.matrix)
        rgb = self._scaler.reformat(
            picture,
            format="rgba" if clip.alpha else "rgb24",
            interpolation=_SCALING,
            src_colorspace=matrix,
            src_color_range=clip.colour.range or None,
            dst_color_range=ColorRange.JPEG,
        ).to_ndarray()
        planes = np.rot90(rgb, clip.rotation // 90)
        return Frame(
            index,
            pts,
            int(getattr(picture, "duration", 0) or 0),
            np.ascontiguousarray(planes[..., :3]),
            np.ascontiguousarray(planes[..., 3]) if clip.alpha else None,
        )

    def write(self, frame: Frame, format_: str, colour: Colour) -> Any:
        planes = frame.pixels
        if format_ == "bgra":
            alpha = frame.alpha if frame.alpha is not None else np.full(planes.shape[:2], 255, np.uint8)
            planes = np.dstack([planes, alpha])
        stored = np.ascontiguousarray(np.rot90(planes, -(self.clip.rotation // 90)))
        rgb = av.VideoFrame.from_ndarray(stored, format="rgba" if stored.shape[2] == 4 else "rgb24")
        rgb.color_range = ColorRange.JPEG
        yuv = format_.startswith("yuv")
        picture = self._scaler.reformat(
            rgb,
            format=format_,
            interpolation=_SCALING,
            src_color_range=ColorRange.JPEG,
            dst_colorspace=_MATRICES.get(colour.matrix, 5) if yuv else None,
            dst_color_range=(ColorRange.JPEG if colour.range == 2 else ColorRange.MPEG) if yuv else ColorRange.JPEG,
        )
        if yuv:
            picture.colorspace = colour.matrix
            picture.color_range = colour.range
        picture.pts, picture.time_base, picture.duration = frame.pts, self.clip.time_base, frame.duration
        return picture


class Writer:
    """A clip being written, beside its place under another name; a context manager.

    Leaving it normally finishes the file and puts it in its place; leaving it by an exception (a full disk, an
    interrupt) removes what there is, so that there is never half a file.

    Args:
        target: where the file goes; None checks only whether the streams fit the container (:meth:`check`).
        container: FFmpeg's name.
        source: the opened clip whose other streams are copied.
        codec: how pictures are encoded.
        crf: quality where the codec has one.
        colour: of YUV pictures.
        tags: metadata to write.
    """

    def __init__(
        self,
        target: Path | None,
        *,
        container: str,
        source: Reader,
        codec: Codec,
        crf: int | None,
        colour: Colour,
        tags: dict[str, str],
    ) -> None:
        self.target, self.codec = target, codec
        self.clip = source.clip
        self.colour = colour
        # SVT-AV1 writes to stderr by itself, whatever FFmpeg's log level.
        os.environ.setdefault("SVT_LOG", "1")
        self._file: IO[bytes]
        if target is None:
            self._temporary = None
            self._file = open(os.devnull, "wb")  # noqa: SIM115
        else:
            self._temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
            self._file = open(self._temporary, "wb")  # noqa: SIM115
        try:
            self._open(container, source, crf, tags)
        except BaseException:
            self._abandon()
            raise

    def _open(self, container: str, source: Reader, crf: int | None, tags: dict[str, str]) -> None:
        clip, codec = self.clip, self.codec
        options = {}
        if container in ("mp4", "mov"):
            # Edit lists count in the movie's own time scale, 1/1000 by default: too coarse for a clip that starts late.
            scale = clip.time_base.denominator if clip.time_base.numerator == 1 else 90_000
            options = {"movflags": "use_metadata_tags", "movie_timescale": str(max(scale, 1000))}
        sink: Any = self._file if self.target is not None else _Null()
        self._output: Any = av.open(sink, "w", format=container, container_options=options)
        picture_format = codec.alpha_format if clip.alpha and codec.alpha_format else codec.pixel_format
        self.pixel_format = picture_format
        settings = dict(codec.options)
        if codec.crf is not None:
            settings["crf"] = str(codec.crf if crf is None else crf)
        video: Any = self._output.add_stream(codec.encoder, rate=clip.rate, options=settings)
        context = video.codec_context
        video.width, video.height, video.pix_fmt = clip.coded_width, clip.coded_height, picture_format
        video.time_base = context.time_base = clip.time_base
        context.sample_aspect_ratio = clip.aspect
        if picture_format.startswith("yuv"):
            context.color_range, context.colorspace = self.colour.range, self.colour.matrix
        context.color_primaries, context.color_trc = self.colour.primaries, self.colour.transfer
        if clip.rotation:
            video.set_display_rotation(clip.rotation)
        self._video = video
        self._copies: dict[int, Any] = {}
        try:
            for index in clip.kept:
                template = source.stream(index)
                copy = self._output.add_stream_from_template(template)
                # Languages and what a stream is for are not about the filmed; everything else of metadata stays behind.
                copy.metadata.clear()
                if template.language:
                    copy.metadata["language"] = template.language
                copy.disposition = template.disposition
                self._copies[index] = copy
            self._output.metadata.update(tags)
            self._output.start_encoding()
        except (av.error.FFmpegError, ValueError) as error:
            kinds = ", ".join(f"{source.stream(i).type} {_codec_name(source.stream(i))}" for i in clip.kept)
            raise InvalidVideo(
                f"A {container} file cannot hold {codec.name} together with {kinds or 'these pictures'} "
                f"({_words(error)}). Try another suffix for OUT: .mkv holds nearly everything."
            ) from None
        self._durations: dict[int, int] = {}
        self._convert = Converter(clip)

    @classmethod
    def check(cls, **arguments: Any) -> None:
        """Raise :class:`InvalidVideo` where the streams do not fit, before hours of work."""
        cls(None, **arguments)._abandon()

    def write(self, frame: Frame) -> None:
        """Encode the next frame."""
        picture = self._convert.write(frame, self.pixel_format, self.colour)
        self._durations[frame.pts] = frame.duration
        self._mux(self._video.encode(picture))

    def copy(self, packet: Any) -> None:
        """Copy a packet of another stream."""
        packet.stream = self._copies[packet.stream.index]
        self._call(self._output.mux, packet)

    def _mux(self, packets: list[Any]) -> None:
        for packet in packets:
            # Encoders do not hand on how long a frame stays, which the last one of a clip needs.
            duration = self._durations.pop(packet.pts, 0)
            if duration:
                packet.duration = duration
            self._call(self._output.mux, packet)

    def _call(self, function: Any, *arguments: Any) -> None:
        try:
            function(*arguments)
        except av.error.FFmpegError as error:
            # An OSError of the file itself (a full disk) comes through as it is.
            if isinstance(error, OSError) and error.errno in (27, 28, 122):
                raise OSError(error.errno, os.strerror(error.errno), str(self.target)) from None
            raise InvalidVideo(f"The clip cannot be written: {_words(error)}.") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._abandon()
            return
        try:
            self._mux(self._video.encode(None))
            self._call(self._output.close)
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            if self._temporary is not None and self.target is not None:
                self._temporary.replace(self.target)
        except BaseException:
            self._abandon()
            raise

    def _abandon(self) -> None:
        with suppress(Exception):
            self._output.close()
        with suppress(Exception):
            self._file.close()
        if self._temporary is not None:
            self._temporary.unlink(missing_ok=True)


class _Null:
    """Takes a header and forgets it."""

    def __init__(self) -> None:
        self._at = self._end = 0

    def write(self, data: bytes) -> int:
        self._at += len(data)
        self._end = max(self._end, self._at)
        return len(data)

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, self._end)[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, count: int = -1) -> bytes:
        return b""


def safe_url(url: str) -> str:
    """A URL without the user and password that cameras have in it; anything else as it is."""
    scheme, mark, rest = url.partition("://")
    host = rest.partition("/")[0]
    return f"{scheme}{mark}{rest[host.rfind('@') + 1 :]}" if mark else url


def upright(clip: Clip) -> Clip:
    """The clip as it is once its pictures are stored the way they are shown."""
    return replace(clip, coded_width=clip.width, coded_height=clip.height, rotation=0)


def _next_pts(last: int | None, clip: Clip) -> int:
    step = max(1, round(1 / (clip.rate * clip.time_base)))
    return 0 if last is None else last + step


def _length(stream: Any) -> float:
    """Seconds that a file says its pictures last; 0 where it says nothing of them alone (sound may last longer)."""
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    # Matroska says it in a tag of the stream, as 00:00:04.000000000.
    parts = next((v for k, v in stream.metadata.items() if k.upper().startswith("DURATION")), "").split(":")
    try:
        hours, minutes, seconds = (float(part) for part in parts)
    except ValueError:
        return 0.0
    return hours * 3600 + minutes * 60 + seconds


def _codec_name(stream: Any) -> str:
    return stream.codec_context.name if stream.codec_context is not None else "of an unknown kind"


def _words(error: BaseException) -> str:
    text = getattr(error, "strerror", None) or str(error)
    return str(text).rstrip(".")
