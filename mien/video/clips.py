"""A clip in, a clip out: two passes, in constant memory.

Pass one finds and follows the faces of all frames and keeps their geometry alone. Pass two changes them, batches of
frames at a time, and encodes. Nothing of a clip that failed or was interrupted is left.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from mien import compositing, geometry
from mien.detection import Detector, Face, MTCNNDetector
from mien.errors import NoFaceFound, NoSuchFace, WrongModel
from mien.model import Model, Operation
from mien.passwords import Code
from mien.pictures import DEFAULT_LIMITS, Limits
from mien.video import codecs, geometry_track
from mien.video.codecs import CODECS, Codec, CodecName
from mien.video.container import Clip, Frame, Reader, Writer
from mien.video.editing import Edited, FaceInFrame, Transform, edit
from mien.video.errors import InvalidVideo
from mien.video.geometry_track import ClipGeometry, Colour
from mien.video.stages import in_order, threads, usual_workers
from mien.video.tracking import State, Tracker, TrackerConfig, tracking_detector
from mien.video.trajectories import Trajectories, Trajectory

Progress = Callable[[str, int, int], None]
"""``progress(stage, frames done, frames in all or 0)``."""

# A batch ends at this many crops, frames or bytes of pictures; each worker has one.
_BATCH_FACES: Final = 32
_BATCH_FRAMES: Final = 16
_BATCH_BYTES: Final = 64 * 1024 * 1024
# Frames in which faces are looked for ahead of the tracker, in bytes.
_AHEAD_BYTES: Final = 256 * 1024 * 1024

_THUMBNAIL: Final = 96


@dataclass(frozen=True, eq=False)
class Tracks:
    """What :func:`find_tracks` found."""

    clip: Clip
    frames: int
    times: tuple[float, float]
    """Seconds of the first and the last frame."""
    trajectories: list[Trajectory]
    thumbnails: dict[int, NDArray[np.uint8]]
    """Track number -> uint8 RGB ``[96, 96, 3]``; empty where none were asked for."""
    detections: int
    """Frames in which the detector ran."""


@dataclass(frozen=True, eq=False)
class Report:
    """What :func:`anonymize` and :func:`recover` did."""

    target: Path
    clip: Clip
    codec: Codec
    frames: int
    trajectories: tuple[Trajectory, ...]
    """The faces that were to be changed."""
    transformed: dict[int, int]
    """Track -> frames in which it was transformed."""
    masked: dict[int, list[int]]
    """Track -> frames in which it could not be transformed and was masked."""
    notes: tuple[str, ...] = field(default=())
    """What a user should know, in sentences."""


def find_tracks(
    source: str | os.PathLike[str],
    detector: Detector,
    *,
    size: int = geometry.CROP_SIZE,
    config: TrackerConfig | None = None,
    thumbnails: bool = False,
    limits: Limits = DEFAULT_LIMITS,
    progress: Progress = lambda stage, done, total: None,
    workers: int | None = None,
) -> Tracks:
    """Find and follow every face of a clip (pass one).

    Args:
        source: the file.
        detector: see :func:`video_detector`.
        size: side of the crops the geometry is for.
        config: how faces are followed.
        thumbnails: keep a small picture of every face.
        limits: of the pictures.
        progress: told after every frame.
        workers: threads that look for faces, as many as fill the cores by default. The result is the same with any.

    Raises:
        InvalidVideo: see :class:`~mien.video.container.Reader`.
    """
    collected = Trajectories()
    best: dict[int, tuple[float, NDArray[np.uint8]]] = {}
    workers = workers or usual_workers()
    every = (config or TrackerConfig()).every
    # Which frames are due beyond every k-th the tracker alone knows, and asks in. Detectors of others it asks in all:
    # they may care for the order of frames.
    foreseen = isinstance(detector, MTCNNDetector)

    def look(frame: Frame) -> list[Face] | None:
        return detector.detect(frame.pixels) if foreseen and frame.index % every == 0 else None

    def ahead(frame: Frame) -> int:
        return min(workers * every, max(1, _AHEAD_BYTES // frame.pixels.nbytes)) if foreseen else 0

    with Reader(source, limits=limits) as reader, threads(workers) as pool:
        clip = reader.clip
        tracker = Tracker(detector, rate=float(clip.rate), config=config)
        first = last = 0.0
        for frame, faces in in_order(pool, look, reader.frames(), ahead=ahead):
            last = float(frame.pts * clip.time_base)
            first = last if not frame.index else first
            seen = tracker.update(frame.pixels, last, faces)
            collected.add(seen)
            if thumbnails:
                for face in seen:
                    worth = face.confidence * float(np.linalg.norm(face.landmarks[1] - face.landmarks[0]))
                    if face.frame == frame.index and worth > 1.1 * best.get(face.track, (0.0, None))[0]:
                        best[face.track] = worth, _thumbnail(frame.pixels, face.landmarks)
            progress("looking for faces", frame.index + 1, clip.frames)
    return Tracks(
        clip,
        tracker.frames,
        (first, last),
        collected.finish(rate=float(clip.rate), size=size),
        {number: picture for number, (_, picture) in best.items()},
        tracker.detections,
    )


def video_detector(model: Model) -> Detector:
    """The model's detector, and where it is MTCNN one that also answers weak detections, which carry tracks on."""
    return tracking_detector(model.detector)


def anonymize(
    model: Model,
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    code: Code,
    *,
    codes: Mapping[int, Code] | None = None,
    faces: Collection[int] | None = None,
    excluded: Collection[int] = (),
    codec: CodecName | None = None,
    crf: int | None = None,
    config: TrackerConfig | None = None,
    detector: Detector | None = None,
    allow_no_face: bool = False,
    limits: Limits = DEFAULT_LIMITS,
    progress: Progress = lambda stage, done, total: None,
    transform: Transform | None = None,
    workers: int | None = None,
) -> Report:
    """Change the faces of a clip.

    Args:
        model: changes and, by default, finds them.
        source: the file; left as it is.
        target: the file to write (``.mp4``, ``.mov``, ``.mkv``); replaced where it exists, and only once it is whole.
        code: from :meth:`Model.code_for`.
        codes: codes of single tracks, by their numbers.
        faces: numbers of the tracks to change; all by default.
        excluded: numbers of tracks to leave as they are.
        codec: lossless by default, because recovery needs the pixels (docs/video.md has what others cost).
        crf: quality, for codecs that have one.
        config: how faces are followed.
        detector: the model's own by default, see :func:`video_detector`.
        allow_no_face: write clips without faces too.
        limits: of the pictures.
        progress: told after every frame of both passes.
        transform: runs the network in the model's place, for servers that batch. Called from several threads.
        workers: threads that find and change faces, as many as fill the cores by default. The result is the same with
            any number.

    Raises:
        NoFaceFound: there is none in the whole clip.
        NoSuchFace: a number is not a track's.
        InvalidVideo: the clip cannot be read, or not be written as asked.
        OSError: the file cannot be written.
    """
    target = Path(target)
    with Reader(source, limits=limits) as reader:
        clip = reader.clip
        chosen = _codec(codec, crf, clip, target, recoverable=True)
        Writer.check(
            container=codecs.container_of(target.suffix),
            source=reader,
            codec=chosen,
            crf=crf,
            colour=clip.colour,
            tags={},
        )
    found = find_tracks(
        source,
        detector or video_detector(model),
        size=model.crop_size,
        config=config,
        limits=limits,
        progress=progress,
        workers=workers,
    )
    if not found.trajectories and not allow_no_face:
        raise NoFaceFound("No face was found in the clip.")
    wanted = _wanted(found.trajectories, faces, excluded)
    clip_geometry = ClipGeometry(
        clip.width,
        clip.height,
        found.frames,
        model.crop_size,
        model.config.template,
        model.digest,
        clip.colour,
        tuple(wanted),
    )
    return _second_pass(
        model,
        source,
        target,
        "anonymize",
        wanted,
        code,
        codes or {},
        chosen,
        crf,
        clip.colour,
        clip_geometry if wanted else None,
        found.frames,
        limits,
        progress,
        transform,
        _notes(clip, chosen, "anonymize"),
        workers,
    )


def recover(
    model: Model,
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    code: Code,
    *,
    codes: Mapping[int, Code] | None = None,
    faces: Collection[int] | None = None,
    excluded: Collection[int] = (),
    codec: CodecName | None = None,
    crf: int | None = None,
    config: TrackerConfig | None = None,
    detector: Detector | None = None,
    limits: Limits = DEFAULT_LIMITS,
    progress: Progress = lambda stage, done, total: None,
    transform: Transform | None = None,
    workers: int | None = None,
) -> Report:
    """Give the faces of a clip back; a wrong code makes them third ones.

    Arguments and errors as for :func:`anonymize`; codes come from ``Model.code_for("recover", ...)``, and track numbers
    are those of anonymizing. Where the clip carries no geometry (or one of another cut), faces are found again. The
    default codec is H.264 where all faces are given back, and lossless where some stay changed.

    Raises:
        WrongModel: the clip says that another model changed it.
    """
    target = Path(target)
    with Reader(source, limits=limits) as reader:
        clip = reader.clip
    carried = _carried(clip, source)
    notes: list[str] = []
    if carried is not None:
        if carried.model != model.digest:
            raise WrongModel(
                f"Model {carried.model[:12]}... changed this clip, and model {model.digest[:12]}... is loaded. "
                "Load that one to recover it."
            )
        if carried.crop_size != model.crop_size:
            carried = None
    if carried is None:
        notes.append("The clip carries no geometry that fits it; faces were found again, and come back less exactly.")
        found = find_tracks(
            source,
            detector or video_detector(model),
            size=model.crop_size,
            config=config,
            limits=limits,
            progress=progress,
            workers=workers,
        )
        trajectories, frames, colour = found.trajectories, found.frames, clip.colour
    else:
        trajectories, frames, colour = list(carried.trajectories), carried.frames, carried.source
    if not trajectories:
        raise NoFaceFound("No face was found in the clip.")
    wanted = _wanted(trajectories, faces, excluded)
    rest = [t for t in trajectories if t not in wanted] if carried is not None else []
    left = None
    if carried is not None and rest:
        left = ClipGeometry(
            carried.width,
            carried.height,
            carried.frames,
            carried.crop_size,
            carried.template,
            carried.model,
            carried.source,
            tuple(rest),
        )
    chosen = _codec(codec, crf, clip, target, recoverable=bool(rest))
    return _second_pass(
        model,
        source,
        target,
        "recover",
        wanted,
        code,
        codes or {},
        chosen,
        crf,
        colour,
        left,
        frames,
        limits,
        progress,
        transform,
        [*notes, *_notes(clip, chosen, "recover")],
        workers,
    )


def default_suffix(clip: Clip) -> str:
    """Of the file a clip is written to: its own where Mien writes such files, ``.mkv`` otherwise."""
    suffix = Path(clip.path).suffix.lower()
    return suffix if suffix in codecs.CONTAINERS and not clip.alpha else ".mkv"


def _second_pass(
    model: Model,
    source: str | os.PathLike[str],
    target: Path,
    operation: Operation,
    trajectories: list[Trajectory],
    code: Code,
    codes: Mapping[int, Code],
    codec: Codec,
    crf: int | None,
    colour: Colour,
    carried: ClipGeometry | None,
    frames: int,
    limits: Limits,
    progress: Progress,
    transform: Transform | None,
    notes: list[str],
    workers: int | None,
) -> Report:
    run = transform or model.transform_float
    transformed: dict[int, int] = {}
    masked: dict[int, list[int]] = {}
    stage = "changing faces" if operation == "anonymize" else "giving faces back"
    tags = {geometry_track.TAG: geometry_track.encode(carried)} if carried is not None else {}
    done = 0

    def change(piece: tuple[list[Frame], list[Any]]) -> list[Edited]:
        work = [(frame.pixels, _faces_in(frame.index, trajectories, code, codes)) for frame in piece[0]]
        return edit(work, run, size=model.crop_size, operation=operation)

    workers = workers or usual_workers()
    with Reader(source, limits=limits) as reader, threads(workers) as pool:
        container = codecs.container_of(target.suffix)
        with Writer(
            target, container=container, source=reader, codec=codec, crf=crf, colour=colour, tags=tags
        ) as writer:
            pieces = _batches(reader, trajectories)
            for (batch, packets), changed in in_order(pool, change, pieces, ahead=lambda _: workers):
                for frame, edited in zip(batch, changed, strict=True):
                    writer.write(Frame(frame.index, frame.pts, frame.duration, edited.pixels, frame.alpha))
                    for track in edited.transformed:
                        transformed[track] = transformed.get(track, 0) + 1
                    for track in edited.masked:
                        masked.setdefault(track, []).append(frame.index)
                for packet in packets:
                    writer.copy(packet)
                done += len(batch)
                progress(stage, done, frames)
            if done != frames:
                raise InvalidVideo(f"{reader.name} had {frames} frames at first and {done} now; was it changed?")
    if masked and operation == "anonymize":
        count = sum(len(v) for v in masked.values())
        notes = [
            *notes,
            f"In {count} places a face was tracked but could not be transformed; it was masked there for good.",
        ]
    return Report(target, reader.clip, codec, done, tuple(trajectories), transformed, masked, tuple(notes))


def _batches(reader: Reader, trajectories: list[Trajectory]) -> Iterator[tuple[list[Frame], list[Any]]]:
    """Frames, as many as make a good batch, and the packets of other streams that came with them."""
    frames: list[Frame] = []
    packets: list[Any] = []
    faces = size = 0
    for item in reader.packets():
        if not isinstance(item, Frame):
            packets.append(item)
            # Sound may come long before its pictures.
            if len(packets) >= 4096:
                yield frames, packets
                frames, packets, faces, size = [], [], 0, 0
            continue
        frames.append(item)
        faces += sum(t.first <= item.index <= t.last for t in trajectories)
        size += item.pixels.nbytes
        if faces >= _BATCH_FACES or len(frames) >= _BATCH_FRAMES or size >= _BATCH_BYTES:
            yield frames, packets
            frames, packets, faces, size = [], [], 0, 0
    if frames or packets:
        yield frames, packets


def _faces_in(index: int, trajectories: list[Trajectory], code: Code, codes: Mapping[int, Code]) -> list[FaceInFrame]:
    out = []
    for trajectory in trajectories:
        place = trajectory.at(index)
        if place is not None:
            out.append(FaceInFrame(trajectory.number, place[0], State(place[1]), codes.get(trajectory.number, code)))
    return out


def _wanted(
    trajectories: list[Trajectory], faces: Collection[int] | None, excluded: Collection[int]
) -> list[Trajectory]:
    numbers = {t.number for t in trajectories}
    unknown = sorted((set(faces or ()) | set(excluded)) - numbers)
    if unknown or (faces is not None and not faces):
        known = ", ".join(map(str, sorted(numbers))) or "none"
        raise NoSuchFace(f"The clip has no track {', '.join(map(str, unknown))}; its tracks are {known}.")
    return [t for t in trajectories if (faces is None or t.number in faces) and t.number not in excluded]


def _codec(name: CodecName | None, crf: int | None, clip: Clip, target: Path, *, recoverable: bool) -> Codec:
    container = codecs.container_of(target.suffix)
    if name is None:
        odd = bool(clip.coded_width % 2 or clip.coded_height % 2)
        if clip.alpha:
            name = "ffv1"
        elif recoverable:
            name = "lossless"
        else:
            name = "h264-444" if odd else "h264"
    return codecs.choose(
        name, container=container, width=clip.coded_width, height=clip.coded_height, alpha=clip.alpha, crf=crf
    )


def _carried(clip: Clip, source: str | os.PathLike[str]) -> ClipGeometry | None:
    text = next((v for k, v in clip.tags.items() if k.lower() == geometry_track.TAG), None)
    if text is None:
        return None
    return geometry_track.decode(text, size=(clip.width, clip.height), frames=_count(source))


def _count(source: str | os.PathLike[str]) -> int:
    """Frames of a clip, counted by its packets."""
    with Reader(source) as reader:
        return reader.count()


def _notes(clip: Clip, codec: Codec, operation: Operation) -> list[str]:
    notes = []
    if clip.bits > 8:
        notes.append(f"The clip has {clip.bits} bits a colour; faces are changed at 8, and so is what is written.")
    if clip.left_out:
        notes.append(f"Left out: {', '.join(clip.left_out)}.")
    if operation == "anonymize" and not codec.lossless:
        notes.append(f"{codec.name}: {codec.quality_note}. `--codec lossless` keeps what recovery needs.")
    return notes


def _thumbnail(pixels: NDArray[np.uint8], landmarks: NDArray[np.float64]) -> NDArray[np.uint8]:
    matrix = geometry.crop_transform(landmarks, _THUMBNAIL)
    try:
        crop = compositing.extract(pixels, matrix[None], _THUMBNAIL)[0]
    except ValueError:
        return np.full((_THUMBNAIL, _THUMBNAIL, 3), 127, np.uint8)
    out: NDArray[np.uint8] = ((crop.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).contiguous().numpy()
    return out


__all__ = ["CODECS", "Report", "Tracks", "anonymize", "default_suffix", "find_tracks", "recover", "video_detector"]
