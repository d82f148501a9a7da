"""No frame shows the face: clips whose truth is known, judged by recognisers; the detector is made to fail on them."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mien import geometry, recognisers
from mien.compositing import extract
from mien.detection import MTCNNDetector
from mien.errors import ModelError
from mien.model import Model
from mien.video import clips, synthetic
from mien.video.synthetic import Motion, Shot
from mien.video.tracking import TrackerConfig
from tests.mien.video_parts import Blind, Remembering, differ, frames, hiding, no_change, not_finite

FRAMES = 20


class Clip(NamedTuple):
    path: Path
    shots: list[Shot]


@pytest.fixture(scope="module")
def clip(
    astronaut: NDArray[np.uint8], remembering: Remembering, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Motion], Clip]:
    """Lossless, so that a frame is the shot it was made of."""
    (face,) = remembering.detect(astronaut)
    folder = tmp_path_factory.mktemp("clips")
    made: dict[str, Clip] = {}

    def of(motion: Motion) -> Clip:
        if motion not in made:
            shots = list(synthetic.shots(astronaut, face.landmarks, motion, frames=FRAMES))
            path = folder / f"{motion}.mkv"
            synthetic.write(
                path, (s.pixels for s in shots), codec="libx264rgb", pixel_format="rgb24", options={"qp": "0"}
            )
            made[motion] = Clip(path, shots)
        return made[motion]

    return of


class Judge:
    """dlib by the distance 0.6 that its makers give, and MobileFaceNet by its threshold, where its weights are."""

    def __init__(self, astronaut: NDArray[np.uint8], landmarks: NDArray[np.float64]) -> None:
        self.judges = [recognisers.load("dlib")]
        shared = Path(os.environ.get("MIEN_SHARED", Path(__file__).resolve().parents[3] / "shared"))
        # dlib is there everywhere.
        with suppress(ModelError):
            self.judges.append(recognisers.load("mobilefacenet-ms1m", shared / "weights"))
        self.known = [judge(extract(astronaut, geometry.crop_transform(landmarks)[None], 128)) for judge in self.judges]

    @torch.inference_mode()
    def recognised(self, shots: list[Shot], pictures: list[NDArray[np.uint8]]) -> list[tuple[int, str]]:
        """(frame, judge) of each frame in which a judge sees the astronaut where the face is known to be."""
        there = [i for i, shot in enumerate(shots) if shot.visible]
        crops = torch.cat([extract(pictures[i], geometry.crop_transform(shots[i].landmarks)[None], 128) for i in there])
        out = []
        for judge, known in zip(self.judges, self.known, strict=True):
            seen = judge(crops)
            if judge.threshold is None:
                same = (seen - known).norm(dim=1) < 0.6
            else:
                same = recognisers.cosine(seen, known) >= judge.threshold
            out += [(i, judge.name) for i, yes in zip(there, same.tolist(), strict=True) if yes]
        return out


@pytest.fixture(scope="module")
def judge(astronaut: NDArray[np.uint8], remembering: Remembering) -> Judge:
    return Judge(astronaut, remembering.detect(astronaut)[0].landmarks)


@pytest.mark.parametrize(
    ("motion", "missed"),
    [
        ("move", ()),
        ("move", [*range(0, 7), *range(15, FRAMES)]),
        ("turn", range(6, 14)),
        ("turn", range(1, FRAMES, 2)),
        ("hide", range(7, 14)),
        ("leave", ()),
        ("leave", range(15, 18)),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{len(value)} missed",
)
def test_no_frame_shows_the_face(
    motion: Motion,
    missed: Collection[int],
    clip: Callable[[Motion], Clip],
    remembering: Remembering,
    judge: Judge,
    model: Model,
    tmp_path: Path,
) -> None:
    path, shots = clip(motion)
    code = model.code_for("anonymize", "x")
    report = clips.anonymize(
        model, path, tmp_path / "out.mkv", code, detector=Blind(remembering, missed), transform=hiding
    )
    after = [frame.pixels for frame in frames(tmp_path / "out.mkv")]
    assert report.frames == len(after) == FRAMES
    assert judge.recognised(shots, after) == []
    # Not by chance of a judge: where the face is, hardly a pixel is what it was.
    for i, (shot, picture) in enumerate(zip(shots, after, strict=True)):
        if shot.visible:
            matrix = geometry.crop_transform(shot.landmarks)[None]
            before, now = (extract(p, matrix, 128)[0, :, 40:100, 42:86] for p in (shot.pixels, picture))
            assert float((before - now).abs().mean()) > 0.1, f"frame {i}"


def test_judges_recognise_what_slips(
    clip: Callable[[Motion], Clip], remembering: Remembering, judge: Judge, model: Model, tmp_path: Path
) -> None:
    """The counter-proof: the judges know the face in every frame, and without looking back eight frames slip."""
    path, shots = clip("move")
    everywhere = {(i, j.name) for i in range(FRAMES) for j in judge.judges}
    assert set(judge.recognised(shots, [s.pixels for s in shots])) == everywhere
    clips.anonymize(
        model,
        path,
        tmp_path / "out.mkv",
        model.code_for("anonymize", "x"),
        detector=Blind(remembering, range(8)),
        config=TrackerConfig(lookback=0.0),
        transform=hiding,
    )
    slipped = judge.recognised(shots, [frame.pixels for frame in frames(tmp_path / "out.mkv")])
    assert {i for i, _ in slipped} == set(range(8))


@pytest.mark.parametrize("broken", [no_change, not_finite])
def test_a_face_that_the_network_does_not_change_is_masked_and_reported(
    broken: object, clip: Callable[[Motion], Clip], remembering: Remembering, judge: Judge, model: Model, tmp_path: Path
) -> None:
    path, shots = clip("turn")
    code = model.code_for("anonymize", "x")
    report = clips.anonymize(model, path, tmp_path / "out.mkv", code, detector=remembering, transform=broken)  # type: ignore[arg-type]
    assert report.masked == {0: list(range(FRAMES))} and not report.transformed
    assert any("masked" in note for note in report.notes)
    assert judge.recognised(shots, [frame.pixels for frame in frames(tmp_path / "out.mkv")]) == []


def test_one_bad_face_does_not_take_its_batch_with_it(
    clip: Callable[[Motion], Clip], remembering: Remembering, model: Model, tmp_path: Path
) -> None:
    """Batches go over frames: an error that one crop causes masks that crop alone."""
    path, _ = clip("turn")
    calls: list[int] = []

    def refusing(crops: torch.Tensor, codes: object) -> torch.Tensor:
        calls.append(len(crops))
        if len(crops) > 1 or len(calls) == 4:
            raise ModelError("no")
        return hiding(crops, codes)  # type: ignore[arg-type]

    report = clips.anonymize(
        model,
        path,
        tmp_path / "out.mkv",
        model.code_for("anonymize", "x"),
        detector=remembering,
        transform=refusing,
        workers=1,
    )
    assert calls[0] > 8, "the network is given a batch over frames"
    assert report.masked == {0: [2]}
    assert report.transformed == {0: FRAMES - 1}


def test_the_same_password_gives_the_faces_back_and_another_does_not(
    clip: Callable[[Motion], Clip], remembering: Remembering, model: Model, judge: Judge, tmp_path: Path
) -> None:
    path, shots = clip("turn")
    anonymized, back, wrong = (tmp_path / name for name in ("a.mp4", "r.mkv", "w.mkv"))
    report = clips.anonymize(model, path, anonymized, model.code_for("anonymize", "right"), detector=remembering)
    assert report.codec.name == "lossless" and not report.masked
    clips.recover(model, anonymized, back, model.code_for("recover", "right"), codec="ffv1")
    clips.recover(model, anonymized, wrong, model.code_for("recover", "wrong"), codec="ffv1")
    face = np.s_[60:180, 110:210]
    middles = []
    for path_ in (anonymized, back, wrong):
        pictures = frames(path_)
        assert len(pictures) == FRAMES
        middles.append([differ(p.pixels[face], s.pixels[face]) for p, s in zip(pictures, shots, strict=True)])
    changed, right, third = (np.array(m) for m in middles)
    # Resampling and 8 bits: docs of mien.compositing.
    assert (right < 5).all(), right
    assert (changed > 3 * right).all() and (third > 3 * right).all(), (changed, right, third)
    recovered = judge.recognised(shots, [frame.pixels for frame in frames(back)])
    assert {i for i, _ in recovered} == set(range(FRAMES))


def test_chosen_tracks_are_changed_with_passwords_of_their_own(
    clip: Callable[[Motion], Clip], detector: MTCNNDetector, model: Model, tmp_path: Path
) -> None:
    left, right = clip("turn").shots[:6], clip("move").shots[:6]
    both = [np.hstack([a.pixels, b.pixels]) for a, b in zip(left, right, strict=True)]
    source = tmp_path / "both.mkv"
    synthetic.write(source, both, codec="libx264rgb", pixel_format="rgb24", options={"qp": "0"})
    seeing = Remembering(detector)
    found = clips.find_tracks(source, seeing, thumbnails=True)
    assert [t.number for t in found.trajectories] == [0, 1] and set(found.thumbnails) == {0, 1}
    place = found.trajectories[0].at(0)
    assert place is not None
    first_is_left = geometry.apply(geometry.invert(place[0]), np.array([63.5, 63.5]))[0] < 320
    sides = {0: np.s_[:, :320], 1: np.s_[:, 320:]} if first_is_left else {1: np.s_[:, :320], 0: np.s_[:, 320:]}

    def code(operation: str, password: str) -> NDArray[np.bool_]:
        return model.code_for(operation, password)  # type: ignore[arg-type]

    one, two = tmp_path / "one.mkv", tmp_path / "two.mkv"
    clips.anonymize(model, source, one, code("anonymize", "a"), detector=seeing, excluded=[1])
    clips.anonymize(model, source, two, code("anonymize", "a"), detector=seeing, codes={1: code("anonymize", "b")})
    for before, picture in zip(both, frames(one), strict=True):
        assert np.array_equal(before[sides[1]], picture.pixels[sides[1]]), "who is left out stays bit for bit"
        assert differ(before[sides[0]], picture.pixels[sides[0]]) > 1

    # The second person alone is given back, with that person's password; the first stays changed, and can follow later.
    half, whole = tmp_path / "half.mkv", tmp_path / "whole.mkv"
    clips.recover(model, two, half, code("recover", "b"), faces=[1])
    clips.recover(model, half, whole, code("recover", "a"), codec="ffv1")
    for before, mid, after in zip(both, frames(half), frames(whole), strict=True):
        assert differ(before[sides[1]], mid.pixels[sides[1]]) < 1 < differ(before[sides[0]], mid.pixels[sides[0]])
        assert differ(before, after.pixels) < 1
