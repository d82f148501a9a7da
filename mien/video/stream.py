"""A camera in, an anonymized stream out: ``mien live rtsp://camera/... -o rtsp://relay/...`` (docs/video.md).

Decoding runs in a thread of its own into a :class:`~mien.video.live.Mailbox`, so that a slow network of ours never
makes the camera's picture older: frames are dropped instead. Sound is not carried: it could not be kept in step with
pictures of which some are dropped.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Final

import av

from mien.model import Model
from mien.passwords import Code
from mien.video.clips import video_detector
from mien.video.container import Converter, Frame, Reader, safe_url, upright
from mien.video.errors import InvalidVideo
from mien.video.live import LIVE, LiveFrames, Mailbox
from mien.video.tracking import TrackerConfig

_FORMATS: Final = {"rtsp": "rtsp", "udp": "mpegts", "tcp": "mpegts", "http": "mpegts", "rtmp": "flv", "srt": "mpegts"}
_SUFFIXES: Final = {".ts": "mpegts", ".mkv": "matroska"}
_TIME_BASE: Final = Fraction(1, 90_000)


@dataclass(frozen=True)
class LiveReport:
    """How a stream went."""

    frames: int
    """Written."""
    dropped: int
    transformed: int
    """Faces, over all frames."""
    masked: int


def run_live(
    model: Model,
    source: str,
    target: str,
    code: Code,
    *,
    lookahead: int = 0,
    timeout: float = 10.0,
    capacity: int = 2,
    config: TrackerConfig = LIVE,
    input_options: dict[str, str] | None = None,
    output_options: dict[str, str] | None = None,
    stop: threading.Event | None = None,
    progress: Callable[[LiveReport], None] = lambda report: None,
) -> LiveReport:
    """Anonymize a stream until it ends, or until ``stop``.

    Args:
        model: changes faces.
        source, target: URLs FFmpeg opens (``rtsp://``, ``udp://``, ``tcp://``, ``http://``, ``srt://``), or files (of
            the target ``.ts`` or ``.mkv``).
        code: from ``model.code_for("anonymize", ...)``.
        lookahead: frames to wait, see :mod:`mien.video.live`.
        timeout: seconds without a frame after which the source counts as lost.
        capacity: frames that may wait before the oldest are dropped.
        config: how faces are followed.
        input_options, output_options: FFmpeg's (``{"rtsp_transport": "tcp"}``).
        stop: set it to end.
        progress: told after every frame.

    Raises:
        InvalidVideo: the source or the target cannot be opened, is lost, or is not video.
    """
    stop = stop or threading.Event()
    options = {"rtsp_transport": "tcp"} if source.startswith("rtsp:") else {}
    box: Mailbox[Frame] = Mailbox(capacity)
    trouble: list[BaseException] = []
    with Reader(source, options={**options, **(input_options or {})}, timeout=timeout) as reader:

        def bring() -> None:
            try:
                for frame in reader.frames():
                    if stop.is_set():
                        break
                    box.put(frame)
            except Exception as error:
                # Told by the thread that changes frames, once it has done those that came before.
                trouble.append(error)
            finally:
                box.close()

        thread = threading.Thread(target=bring, name="mien-live-reader", daemon=True)
        live = LiveFrames(
            model.transform_float,
            video_detector(model),
            code,
            size=model.crop_size,
            rate=float(reader.clip.rate),
            lookahead=lookahead,
            config=config,
        )
        out = _Output(target, reader, output_options or {})
        report = LiveReport(0, 0, 0, 0)
        thread.start()
        try:
            while not stop.is_set():
                frame = box.get(timeout)
                results = (
                    live.flush() if frame is None else live.push(frame.pixels, float(frame.pts * reader.clip.time_base))
                )
                for result in results:
                    out.write(result.pixels, result.time)
                    masked = sum(face.masked for face in result.faces)
                    report = LiveReport(
                        report.frames + 1,
                        box.dropped,
                        report.transformed + len(result.faces) - masked,
                        report.masked + masked,
                    )
                    progress(report)
                if frame is None:
                    break
        except TimeoutError:
            raise InvalidVideo(f"No frame came from {safe_url(source)} for {timeout:g} s.") from None
        finally:
            stop.set()
            out.close()
            thread.join(timeout)
    if trouble and not report.frames:
        raise trouble[0]
    return report


class _Output:
    """H.264 with low latency, in the container that the target's URL asks for."""

    def __init__(self, target: str, reader: Reader, options: dict[str, str]) -> None:
        scheme = target.partition("://")[0] if "://" in target else ""
        format_ = _FORMATS.get(scheme) or next((f for s, f in _SUFFIXES.items() if target.endswith(s)), None)
        if format_ is None:
            known = ", ".join([*(f"{s}://" for s in _FORMATS), *_SUFFIXES])
            raise InvalidVideo(f"Live streams go to {known}, not to {safe_url(target)}.")
        if format_ == "rtsp":
            options = {"rtsp_transport": "tcp", **options}
        self._target = target
        try:
            self._container: Any = av.open(target, "w", format=format_, container_options=options)
            clip = upright(reader.clip)
            video = self._container.add_stream(
                "libx264",
                rate=clip.rate,
                options={"preset": "veryfast", "tune": "zerolatency", "crf": "20", "bf": "0"},
            )
        except (av.error.FFmpegError, OSError) as error:
            raise InvalidVideo(
                f"{safe_url(target)} cannot be written to: {getattr(error, 'strerror', error)}."
            ) from None
        even = clip.coded_width % 2 == 0 and clip.coded_height % 2 == 0
        self._format = "yuv420p" if even else "yuv444p"
        video.width, video.height, video.pix_fmt = clip.coded_width, clip.coded_height, self._format
        video.codec_context.time_base = _TIME_BASE
        video.codec_context.gop_size = max(1, round(float(clip.rate)) * 2)
        video.codec_context.color_range = clip.colour.range
        video.codec_context.colorspace = clip.colour.matrix
        self._video = video
        self._colour = clip.colour
        self._convert = Converter(clip)
        self._start: float | None = None
        self._last = -1

    def write(self, pixels: Any, time: float) -> None:
        self._start = time if self._start is None else self._start
        pts = max(self._last + 1, round((time - self._start) / _TIME_BASE))
        self._last = pts
        picture = self._convert.write(Frame(0, pts, 0, pixels), self._format, self._colour)
        picture.time_base = _TIME_BASE
        try:
            for packet in self._video.encode(picture):
                self._container.mux(packet)
        except (av.error.FFmpegError, OSError) as error:
            raise InvalidVideo(f"{safe_url(self._target)} was lost: {getattr(error, 'strerror', error)}.") from None

    def close(self) -> None:
        # What is lost here is the end of a stream whose other side has gone.
        with suppress(Exception):
            for packet in self._video.encode(None):
                self._container.mux(packet)
        with suppress(Exception):
            self._container.close()
