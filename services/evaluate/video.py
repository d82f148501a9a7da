"""Over time: no frame with an unchanged face, flicker, one identity along a track, what each codec gives back.

Clips that are given are judged where MTCNN, asked about every single frame of the *input*, sees a face: it knows
nothing of tracks. Without clips some are made of the faces judged elsewhere (:mod:`mien.video.synthetic`); their truth
is known, so they are judged in every frame, also where every detector fails.

``python -m services.evaluate.video`` measures the table of codecs in docs/video.md and writes it there.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from mien import compositing, geometry
from mien.detection import Detector, Face
from mien.geometry import Points
from mien.model import Model
from mien.video import clips, synthetic
from mien.video.codecs import CODECS, VIDEO_SUFFIXES, CodecName
from mien.video.container import Reader
from mien.video.trajectories import Trajectory
from services.evaluate.context import Context
from services.evaluate.distances import Pixels, psnr, to_pixels
from services.evaluate.figures import Result
from services.evaluate.judges import Judge
from services.evaluate.parts.verification import thresholds

# Name in keys -> codec and rate factor: lossless, Mien's defaults, and what cameras and sites commonly use.
SETTINGS: Final[dict[str, tuple[CodecName, int | None]]] = {
    "lossless": ("lossless", None),
    "h264-444-crf5": ("h264-444", 5),
    "h264-crf12": ("h264", 12),
    "h264-crf17": ("h264", 17),
    "h264-crf23": ("h264", 23),
    "h265-crf20": ("h265", 20),
    "h265-crf28": ("h265", 28),
    "av1-crf28": ("av1", 28),
}

# Made clips: so many faces, each in two of the four motions.
_FACES: Final = 2
# The inner face in a 128 pixel crop, and by how many 8-bit levels it must differ to count as changed.
_INNER: Final = np.s_[40:100, 40:88]
_CHANGED: Final = 2.0
DOCS: Final = Path("docs/video.md")


@dataclass(frozen=True, eq=False)
class Material:
    """A clip to judge; ``truth``: landmarks of the one face in each frame, None where it is not in the picture."""

    name: str
    path: Path
    truth: list[Points | None] | None


@dataclass(frozen=True, eq=False)
class Sights:
    """Every face in every frame of a clip: which track it is on (-1: none), its frame, the aligned crops."""

    tracks: NDArray[np.int64]
    frames: NDArray[np.int64]
    before: Pixels
    after: Pixels


class Remembering:
    """A detector that is asked once about each picture: a clip is changed once for every codec."""

    def __init__(self, detector: Detector) -> None:
        self.detector = detector
        self.known: dict[int, list[Face]] = {}

    def detect(self, pixels: Pixels) -> list[Face]:
        """As the detector."""
        key = hash(pixels.tobytes())
        if key not in self.known:
            self.known[key] = self.detector.detect(pixels)
        return self.known[key]


def measure(context: Context) -> Result:
    """Figures ``video.*``; see :mod:`services.evaluate.keys`."""
    result = Result()
    model = context.model
    if not isinstance(model, Model):
        result.skip("video", "what is judged is a function, not a model that clips can be changed with")
        return result
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        material = list(_given(context.clips) if context.clips else _made(context, model, folder))
        if not material:
            result.skip("video", f"there is no clip in {context.clips}")
            return result
        detector = Remembering(clips.video_detector(model))
        _over_time(context, model, material, detector, folder, result)
        _codecs(context, model, material[:: 2 if context.clips is None else 1], detector, folder, result)
    return result


def _given(folder: Path) -> Iterator[Material]:
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in VIDEO_SUFFIXES:
            yield Material(path.stem, path, None)


def _made(context: Context, model: Model, folder: Path) -> Iterator[Material]:
    # A frame is a whole picture: as many as are looked at elsewhere.
    frames = context.sizes.photos + 1
    scale = model.crop_size / geometry.CROP_SIZE
    for i, crop in enumerate(context.sample.faces.images[:_FACES]):
        landmarks = geometry.scale_points(geometry.template(), scale)
        for motion in synthetic.MOTIONS[2 * (i % 2) : 2 * (i % 2) + 2]:
            shots = list(synthetic.shots(crop, landmarks, motion, frames=frames))
            path = folder / f"{i}-{motion}.mkv"
            synthetic.write(path, (s.pixels for s in shots), options={"crf": "12", "preset": "veryfast"})
            yield Material(path.stem, path, [s.landmarks if s.visible else None for s in shots])


def _over_time(
    context: Context, model: Model, material: Sequence[Material], detector: Detector, folder: Path, result: Result
) -> None:
    rng = np.random.default_rng([context.seed, 5])
    sights: list[Sights] = []
    masked = frames = unchanged = 0
    with context.progress.stage("changing clips", len(material)) as advance:
        for clip in material:
            code = rng.integers(0, 2, model.bits).astype(np.bool_)
            target = folder / f"{clip.name}.anon.mkv"
            report = clips.anonymize(model, clip.path, target, code, detector=detector, allow_no_face=True)
            seen = _sights(clip, target, report.trajectories, detector, model.crop_size)
            sights.append(seen)
            frames += report.frames
            masked += sum(len(places) for places in report.masked.values())
            unchanged += len(set(seen.frames[~_changed(seen)].tolist()))
            target.unlink()
            advance(1)
    if not sum(len(s.frames) for s in sights):
        result.skip("video", "no face was seen in the clips")
        return
    result.number("video.frames", frames)
    result.number("video.faces", sum(len(s.frames) for s in sights))
    result.number("video.masked", masked)
    result.number("video.unchanged-frames", unchanged, frames)
    groups = [(i, int(t)) for i, s in enumerate(sights) for t in s.tracks]
    result.mean("video.unchanged", np.concatenate([~_changed(s) for s in sights]), groups)
    pairs = [_neighbours(s) for s in sights]
    kinds = {"": "after", ".of-input": "before"}
    owners = [
        (i, int(s.tracks[a])) for i, (s, (firsts, _)) in enumerate(zip(sights, pairs, strict=True)) for a in firsts
    ]
    for end, kind in kinds.items():
        steps = [
            np.abs(getattr(s, kind)[b].astype(np.int16) - getattr(s, kind)[a]).mean(axis=(1, 2, 3)) / 255
            for s, (a, b) in zip(sights, pairs, strict=True)
        ]
        result.mean(f"video.flicker.l1{end}", np.concatenate(steps), owners)
    for judge in context.judges.values():
        _judge(context, judge, sights, pairs, groups, owners, result)


def _judge(
    context: Context,
    judge: Judge,
    sights: Sequence[Sights],
    pairs: Sequence[tuple[NDArray[np.int64], NDArray[np.int64]]],
    groups: list[tuple[int, int]],
    owners: list[tuple[int, int]],
    result: Result,
) -> None:
    threshold = thresholds(context, judge)[0]
    before = [judge.embed(s.before) for s in sights]
    after = [judge.embed(s.after) for s in sights]
    same = [(a * b).sum(axis=1) >= threshold for a, b in zip(before, after, strict=True)]
    result.mean(f"video.{judge.name}.same", np.concatenate(same), groups)
    for end, embedded in (("", after), (".of-input", before)):
        steps = [1 - (e[a] * e[b]).sum(axis=1) for e, (a, b) in zip(embedded, pairs, strict=True)]
        result.mean(f"video.{judge.name}.flicker{end}", np.concatenate(steps), owners, share=False)
        firsts = [(e[_first(s)] * e).sum(axis=1) >= threshold for e, s in zip(embedded, sights, strict=True)]
        result.mean(f"video.{judge.name}.constancy{end}", np.concatenate(firsts), groups)


def _codecs(
    context: Context, model: Model, material: Sequence[Material], detector: Detector, folder: Path, result: Result
) -> None:
    judge = context.headline
    threshold = thresholds(context, judge)[0]
    rng = np.random.default_rng([context.seed, 6])
    codes = [rng.integers(0, 2, model.bits).astype(np.bool_) for _ in material]
    with context.progress.stage("recovering from codecs", len(SETTINGS) * len(material)) as advance:
        for name, (codec, crf) in SETTINGS.items():
            back: list[Sights] = []
            rates: list[float] = []
            for clip, code in zip(material, codes, strict=True):
                hidden, recovered = folder / "codec.mkv", folder / "recovered.mkv"
                report = clips.anonymize(
                    model, clip.path, hidden, code, codec=codec, crf=crf, detector=detector, allow_no_face=True
                )
                advance(1)
                if not report.trajectories:
                    continue
                clips.recover(model, hidden, recovered, ~code, codec="ffv1")
                seen = _sights(clip, recovered, report.trajectories, detector, model.crop_size)
                # Where it was masked nothing can come back, whatever the codec.
                back.append(_without(seen, report.masked))
                rates.append(hidden.stat().st_size * 8 / 1000 / max(1e-9, report.frames / float(report.clip.rate)))
                hidden.unlink()
                recovered.unlink()
            groups = [(i, int(t)) for i, s in enumerate(back) for t in s.tracks]
            if not groups:
                continue
            values = [psnr(_inner(s.before), _inner(s.after)) for s in back]
            result.mean(f"video.codec.{name}.psnr", np.concatenate(values), groups)
            same = [
                (judge.embed(s.before) * judge.embed(s.after)).sum(axis=1) >= threshold for s in back if len(s.frames)
            ]
            result.mean(f"video.codec.{name}.same", np.concatenate(same), groups)
            result.number(f"video.codec.{name}.kbit", float(np.mean(rates)), len(rates))


def _sights(clip: Material, target: Path, trajectories: Sequence[Trajectory], detector: Detector, size: int) -> Sights:
    tracks, frames, before, after = [], [], [], []
    with Reader(clip.path) as a, Reader(target) as b:
        for old, new in zip(a.frames(), b.frames(), strict=True):
            if clip.truth is not None:
                truth = clip.truth[old.index]
                there = [] if truth is None else [truth]
            else:
                # A face is one that no one doubts: what is none cannot slip.
                there = [f.landmarks for f in detector.detect(old.pixels) if f.confidence >= 0.95]
            for landmarks in there:
                matrix = geometry.crop_transform(landmarks, size)[None]
                tracks.append(_track(landmarks, old.index, trajectories, size))
                frames.append(old.index)
                before.append(to_pixels(compositing.extract(old.pixels, matrix, size))[0])
                after.append(to_pixels(compositing.extract(new.pixels, matrix, size))[0])
    shape = (0, size, size, 3)
    return Sights(
        np.array(tracks, np.int64),
        np.array(frames, np.int64),
        np.array(before, np.uint8).reshape(-1, *shape[1:]),
        np.array(after, np.uint8).reshape(-1, *shape[1:]),
    )


def _track(landmarks: Points, frame: int, trajectories: Sequence[Trajectory], size: int) -> int:
    """The trajectory whose crop has the face nearest to its middle; -1 where none has it inside."""
    best, nearest = -1, size / 2
    for trajectory in trajectories:
        place = trajectory.at(frame)
        if place is None:
            continue
        off = float(np.linalg.norm(geometry.apply(place[0], landmarks.mean(axis=0)) - (size - 1) / 2))
        if off < nearest:
            best, nearest = trajectory.number, off
    return best


def _inner(crops: Pixels) -> Pixels:
    rows, columns = (slice(s.start * crops.shape[1] // 128, s.stop * crops.shape[1] // 128) for s in _INNER)
    return crops[:, rows, columns]


def _changed(sights: Sights) -> NDArray[np.bool_]:
    difference = np.abs(_inner(sights.before).astype(np.int16) - _inner(sights.after))
    changed: NDArray[np.bool_] = difference.reshape(len(difference), -1).mean(axis=1) >= _CHANGED
    return changed


def _without(sights: Sights, masked: dict[int, list[int]]) -> Sights:
    gone = {(track, frame) for track, places in masked.items() for frame in places}
    keep = [int(t) >= 0 and (int(t), int(f)) not in gone for t, f in zip(sights.tracks, sights.frames, strict=True)]
    chosen = np.flatnonzero(keep)
    return Sights(sights.tracks[chosen], sights.frames[chosen], sights.before[chosen], sights.after[chosen])


def _neighbours(sights: Sights) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices of the same track's faces in frames that follow each other."""
    known = {(int(t), int(f)): i for i, (t, f) in enumerate(zip(sights.tracks, sights.frames, strict=True))}
    pairs = [(i, known[t, f + 1]) for (t, f), i in known.items() if (t, f + 1) in known]
    table = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def _first(sights: Sights) -> NDArray[np.int64]:
    """For every face the index of the first of its track."""
    first: dict[int, int] = {}
    for i, track in enumerate(sights.tracks):
        first.setdefault(int(track), i)
    return np.array([first[int(t)] for t in sights.tracks], dtype=np.int64)


# The table of the docs. -----------------------------------------------------------------------------------------------


def table(figures: dict[str, Any], digest: str, judge: str) -> str:
    """Markdown: a line for each of :data:`SETTINGS`."""
    defaults = {(name, codec.crf) for name, codec in CODECS.items()}
    count = figures["video.codec.lossless.psnr.n"]
    lines = [
        f"Model `{digest[:12]}`, judge {judge}, {count:.0f} faces in frames of 320x240:",
        "",
        "| codec | `--codec` | PSNR of the recovered face, dB | recognised as the person | kbit/s |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, setting in SETTINGS.items():
        key = f"video.codec.{name}"
        option = setting[0] if setting in defaults else f"{setting[0]} --crf {setting[1]}"
        lines.append(
            f"| {CODECS[setting[0]].encoder}{'' if setting[1] is None else f', CRF {setting[1]}'} | `{option}` "
            f"| {figures[f'{key}.psnr']:.1f} | {figures[f'{key}.same']:.0%} | {figures[f'{key}.kbit']:,.0f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure with the model and the faces, and write the table."""
    from rich.console import Console

    from mien.store import write_atomically
    from services.evaluate.setup import Request, prepare

    parser = argparse.ArgumentParser(
        description="Measure what each codec gives back; writes the table of docs/video.md."
    )
    parser.add_argument("--model", default="models/mien-128")
    parser.add_argument("--shards", default="shards/lfw")
    parser.add_argument("--faces", type=int, default=400, help="for the judge's threshold")
    parser.add_argument("--frames", type=int, default=25, help="of every clip")
    parser.add_argument("--docs", type=Path, default=DOCS)
    options = parser.parse_args()
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory() as out:
        ready = prepare(
            Request(options.model, options.shards, Path(out), judges=("dlib",), limit=options.faces), console
        )
        ready.context.sizes = replace(ready.context.sizes, photos=options.frames - 1)
        with ready.context.progress.run():
            result = measure(ready.context)
    for key, value in result.figures.items():
        if not key.endswith((".low", ".high", ".n")):
            console.print(f"{key} {value:.4g}", markup=False, highlight=False)
    new = table(result.figures, ready.context.subject.digest, ready.context.headline.name)
    text, found = re.subn(
        r"(<!-- codecs -->\n).*?(<!-- /codecs -->)",
        lambda m: f"{m[1]}{new}{m[2]}",
        options.docs.read_text(),
        flags=re.DOTALL,
    )
    if found != 1:
        raise SystemExit(f"{options.docs} has {found} places <!-- codecs --> ... <!-- /codecs -->, not one.")
    write_atomically(options.docs, text.encode())
    console.print(f"Written: {options.docs}")


if __name__ == "__main__":
    main()
