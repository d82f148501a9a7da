"""What ``mien anonymize``, ``recover`` and ``detect`` do with clips, and ``mien live``. Heavy modules come late."""

from __future__ import annotations

import contextlib
import json
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from mien import errors
from mien.video import codecs, require_extra
from mien.video.errors import InvalidVideo, VideoExtraMissing

if TYPE_CHECKING:
    import numpy as np

    from mien.model import Model
    from mien.passwords import Code
    from mien.video.clips import Progress, Report, Tracks
    from mien.video.stream import LiveReport


class CodecOption(StrEnum):
    """How clips are encoded."""

    lossless = "lossless"
    ffv1 = "ffv1"
    h264 = "h264"
    h264_444 = "h264-444"
    h265 = "h265"
    av1 = "av1"


Except = Annotated[
    str | None, typer.Option("--except", metavar="0,2,...", help="Clips: all faces but these tracks of `mien detect`.")
]
VideoCodec = Annotated[
    CodecOption | None,
    typer.Option(
        "--codec", help="Clips: `lossless` (default to anonymize) keeps what recovery needs; see docs/video.md."
    ),
]
Crf = Annotated[
    int | None, typer.Option("--crf", min=0, max=63, help="Clips: quality of a lossy codec, less is better.")
]
Every = Annotated[
    int, typer.Option("--detect-every", min=1, metavar="K", help="Clips: detect in every K-th frame, track in between.")
]
TrackPasswords = Annotated[
    Path | None,
    typer.Option(
        "--track-passwords",
        metavar="FILE",
        help="Clips: a line `NUMBER PASSWORD` for each track with a password of its own.",
    ),
]
Sheet = Annotated[
    Path | None, typer.Option("--sheet", metavar="FILE", help="Clips: where the pictures of the tracks go (PNG).")
]
NoSheet = Annotated[bool, typer.Option("--no-sheet", help="Clips: make no pictures of the tracks.")]

_ENDING: Final = {"anonymize": "anon", "recover": "recovered"}


@dataclass(frozen=True)
class Options:
    """What the command line says of clips alone."""

    exclude: str | None = None
    codec: CodecOption | None = None
    crf: int | None = None
    every: int = 1
    track_passwords: Path | None = None


def is_video(path: Path) -> bool:
    """By the name: whether a file is taken for a clip."""
    return path.suffix.lower() in codecs.VIDEO_SUFFIXES


def beside(source: Path, operation: str) -> Path:
    """Where a clip is written by default."""
    stem = source.stem.removesuffix(".anon") if operation == "recover" else source.stem
    suffix = source.suffix.lower() if source.suffix.lower() in codecs.CONTAINERS else ".mkv"
    return source.with_name(f"{stem}.{_ENDING[operation]}{suffix}")


def one(
    operation: str,
    model: Model,
    code: Code | None,
    source: Path,
    target: Path,
    *,
    faces: list[int] | None = None,
    options: Options = Options(),
    allow_no_face: bool = False,
    quiet: bool = False,
) -> Report:
    """Do one clip. ``code`` may be None, recovering, where every track has a password of its own.

    Raises:
        MienError, OSError: see :mod:`mien.video.clips`.
    """
    require_extra()
    from mien.video import clips
    from mien.video.tracking import TrackerConfig

    codes = _track_codes(model, operation, options.track_passwords)
    if code is None:
        faces, code = sorted(codes) if faces is None else faces, next(iter(codes.values()))
        if set(faces) - set(codes):
            raise errors.InvalidPassword("A track was asked for that has no line in --track-passwords.")
    exclude = _numbers(options.exclude, "--except") or []
    shared: dict[str, Any] = {
        "codes": codes,
        "faces": faces,
        "excluded": exclude,
        "codec": options.codec.value if options.codec else None,
        "crf": options.crf,
        "config": TrackerConfig(every=options.every),
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    with _terminable(), _whole_frames(), _progress(quiet) as progress:
        if operation == "anonymize":
            return clips.anonymize(
                model, source, target, code, allow_no_face=allow_no_face, progress=progress, **shared
            )
        return clips.recover(model, source, target, code, progress=progress, **shared)


def tell(report: Report, operation: str) -> None:
    """Say what was done: notes on stderr, one last line with the result on stdout."""
    for note in report.notes:
        typer.echo(f"mien: {note}", err=True)
    if operation == "anonymize":
        for track, frames in sorted(report.masked.items()):
            typer.echo(f"mien: track {track} is masked in {len(frames):,} frames: {_ranges(frames)}", err=True)
    tracks = len(report.trajectories)
    done = "anonymized" if operation == "anonymize" else "recovered"
    what = f"{tracks:,} track{'' if tracks == 1 else 's'} in {report.frames:,} frames {done}, {report.codec.name}"
    typer.echo(f"{what}: {report.target}" if tracks else f"No face, written without metadata: {report.target}")


def list_tracks(source: Path, *, as_json: bool, sheet: Path | None, no_sheet: bool, every: int = 1) -> int:
    """``mien detect CLIP``; the number of tracks."""
    require_extra()
    from mien.detection import MTCNNDetector
    from mien.store import write_atomically
    from mien.video import clips
    from mien.video.tracking import WEAK, State, TrackerConfig

    want_sheet = not no_sheet and (sheet is not None or not as_json)
    with _terminable(), _whole_frames(), _progress(as_json) as progress:
        found = clips.find_tracks(
            source,
            MTCNNDetector(min_confidence=WEAK),
            config=TrackerConfig(every=every),
            thumbnails=want_sheet,
            progress=progress,
        )
    rows = []
    for t in found.trajectories:
        counts = {state.name: int((t.states == state).sum()) for state in State}
        start, end = (_seconds(found, frame) for frame in (t.first, t.last))
        rows.append({"track": t.number, "first": t.first, "last": t.last, "start": start, "end": end, **counts})
    if as_json:
        typer.echo(json.dumps({"file": str(source), "frames": found.frames, "tracks": rows}))
    else:
        clip = found.clip
        typer.echo(
            f"{source}: {len(rows)} track{'' if len(rows) == 1 else 's'} in {found.frames:,} frames, "
            f"{clip.width}x{clip.height}, {float(clip.rate):g} frames/s"
        )
        for row in rows:
            typer.echo(
                f"  {row['track']}: {row['start']:.2f} to {row['end']:.2f} s, frames {row['first']} to {row['last']}; "
                f"detected in {row['detected']}, carried by flow in {row['flow']}, would be masked in {row['held']}"
            )
    if want_sheet and found.thumbnails:
        place = sheet or source.with_name(f"{source.stem}.tracks.png")
        write_atomically(place, _sheet(found))
        typer.echo(f"Pictures of the tracks (real faces!): {place}", err=as_json)
    return len(rows)


def run_live(
    model: Model, source: str, target: str, code: Code, *, lookahead: int, timeout: float, every: int
) -> LiveReport:
    """``mien live``."""
    require_extra()
    from dataclasses import replace

    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    from mien.video.live import LIVE
    from mien.video.stream import run_live as run

    stop = threading.Event()
    with _stopping(stop), Live(console=Console(stderr=True), transient=True, refresh_per_second=2) as line:

        def progress(report: LiveReport) -> None:
            line.update(
                Text(
                    f"{report.frames:,} frames, {report.dropped:,} dropped, {report.masked:,} faces masked; Ctrl-C ends"
                )
            )

        return run(
            model,
            source,
            target,
            code,
            lookahead=lookahead,
            timeout=timeout,
            config=replace(LIVE, every=every),
            stop=stop,
            progress=progress,
        )


def _track_codes(model: Model, operation: str, path: Path | None) -> dict[int, Code]:
    if path is None:
        return {}
    codes: dict[int, Code] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        number, _, password = line.partition(" ")
        if not number.isdecimal() or not password:
            # The line itself is not quoted: it may be a password.
            raise errors.InvalidPassword(f"A line of {path} is not `NUMBER PASSWORD`.")
        codes[int(number)] = model.code_for(operation, password)  # type: ignore[arg-type]
    if not codes:
        raise errors.InvalidPassword(f"{path} is empty.")
    return codes


def _numbers(text: str | None, option: str) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise errors.NoSuchFace(f"{option} takes numbers separated by commas, like 0,2, not {text!r}.") from None


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends the work as Ctrl-C does, so that it clears up after itself."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _whole_frames() -> Iterator[None]:
    """A core for each of several frames, instead of all cores for each layer of a small network."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _stopping(stop: threading.Event) -> Iterator[None]:
    """SIGINT and SIGTERM end a stream properly."""
    before = {s: signal.signal(s, lambda *_: stop.set()) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _progress(quiet: bool) -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars
    from rich.progress import Task as RichTask
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: RichTask) -> Text:
            return Text(f"{task.speed:.1f} frames/s" if task.speed else "- frames/s")

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Rate(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Bars(*columns, console=console, transient=True, disable=quiet or not console.is_terminal) as bars:
        stages: dict[str, Any] = {}

        def progress(stage: str, done: int, total: int) -> None:
            if stage not in stages:
                stages[stage] = bars.add_task(stage, total=None)
            bars.update(stages[stage], completed=done, total=total or None)

        yield progress


def _seconds(found: Tracks, frame: int) -> float:
    first, last = found.times
    return round(first + (last - first) * frame / max(1, found.frames - 1), 3)


def _ranges(frames: list[int], most: int = 8) -> str:
    """3-5, 9, ..."""
    parts: list[list[int]] = []
    for frame in frames:
        if parts and frame == parts[-1][-1] + 1:
            parts[-1][-1:] = [frame] if len(parts[-1]) > 1 else [parts[-1][0], frame]
        else:
            parts.append([frame])
    words = ["-".join(map(str, part)) for part in parts[:most]]
    return ", ".join(words) + (", ..." if len(parts) > most else "")


def _sheet(found: Tracks) -> bytes:
    """PNG: a picture of every track with its number, eight in a row."""
    import io

    from PIL import Image, ImageDraw

    side, label = 96, 14
    tracks = [t for t in found.trajectories if t.number in found.thumbnails]
    columns = min(8, len(tracks))
    rows = -(-len(tracks) // columns)
    sheet = Image.new("RGB", (columns * (side + 4), rows * (side + label + 4)), (255, 255, 255))
    draw = ImageDraw.Draw(sheet)
    for i, track in enumerate(tracks):
        x, y = i % columns * (side + 4) + 2, i // columns * (side + label + 4) + 2
        picture: np.ndarray[Any, np.dtype[np.uint8]] = found.thumbnails[track.number]
        sheet.paste(Image.fromarray(picture), (x, y))
        draw.text((x + 2, y + side), f"{track.number}: {_seconds(found, track.first):.1f} s", fill=(0, 0, 0))
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()


__all__ = [
    "Crf",
    "Every",
    "Except",
    "InvalidVideo",
    "NoSheet",
    "Options",
    "Sheet",
    "TrackPasswords",
    "VideoCodec",
    "VideoExtraMissing",
    "beside",
    "is_video",
    "list_tracks",
    "one",
    "run_live",
    "tell",
]
