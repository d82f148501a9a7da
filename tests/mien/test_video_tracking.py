"""Where faces are, frame by frame, on clips whose truth is known; the detector is real and is made to fail."""

from __future__ import annotations

from collections.abc import Callable, Collection

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from mien import geometry
from mien.detection import Face
from mien.video import geometry_track, synthetic
from mien.video.geometry_track import ClipGeometry, Colour
from mien.video.synthetic import Shot
from mien.video.tracking import Observation, State, Tracker, TrackerConfig
from mien.video.trajectories import Trajectories, Trajectory, smoothed
from tests.mien.video_parts import Blind, Remembering

FRAMES = 30


@pytest.fixture(scope="module")
def clip(astronaut: NDArray[np.uint8], remembering: Remembering) -> Callable[[synthetic.Motion], list[Shot]]:
    (face,) = remembering.detect(astronaut)
    made: dict[str, list[Shot]] = {}

    def of(motion: synthetic.Motion) -> list[Shot]:
        if motion not in made:
            made[motion] = list(synthetic.shots(astronaut, face.landmarks, motion, frames=FRAMES))
        return made[motion]

    return of


def follow(
    shots: list[Shot], detector: Remembering | Blind, config: TrackerConfig | None = None
) -> tuple[list[Trajectory], Tracker]:
    tracker, collected = Tracker(detector, rate=25, config=config), Trajectories()
    for shot in shots:
        collected.add(tracker.update(shot.pixels))
    return collected.finish(rate=25, size=128), tracker


def off(trajectory: Trajectory, frame: int, shot: Shot) -> float:
    """How far the middle of the face is from the middle of the crop's template, in crop pixels (of 128)."""
    place = trajectory.at(frame)
    assert place is not None
    middle = geometry.apply(place[0], shot.landmarks.mean(axis=0))
    return float(np.linalg.norm(middle - geometry.template().mean(axis=0)))


def uncovered(trajectories: list[Trajectory], shots: list[Shot]) -> list[int]:
    """Frames that show the face and in which no crop or mask has it in the middle."""
    out = []
    for i, shot in enumerate(shots):
        # A masked ellipse is 147 crop pixels wide and the face 80: it covers the face where it is 30 off.
        limits = {State.detected: 8, State.flow: 10, State.held: 30}
        good = [t for t in trajectories if (p := t.at(i)) is not None and off(t, i, shot) < limits[p[1]]]
        if shot.visible and not good:
            out.append(i)
    return out


@pytest.mark.parametrize("motion", ["move", "turn", "hide", "leave"])
def test_a_face_is_followed_through_every_frame(motion: synthetic.Motion, clip, remembering: Remembering) -> None:  # type: ignore[no-untyped-def]
    trajectories, _ = follow(clip(motion), remembering)
    assert uncovered(trajectories, clip(motion)) == []
    # Who leaves and returns is another track, and nobody else is.
    assert len(trajectories) == (2 if motion == "leave" else 1)


@pytest.mark.parametrize(
    "missed",
    [range(0, 8), range(10, 18), range(22, 30), [*range(0, 12), *range(13, 30)], range(1, 30, 2)],
    ids=["at first", "in the middle", "at last", "in all but one frame", "in every other frame"],
)
@pytest.mark.parametrize("motion", ["move", "turn"])
def test_frames_that_the_detector_misses_are_bridged_forwards_and_backwards(
    motion: synthetic.Motion,
    missed: Collection[int],
    clip,  # type: ignore[no-untyped-def]
    remembering: Remembering,
) -> None:
    trajectories, _ = follow(clip(motion), Blind(remembering, missed))
    assert len(trajectories) == 1
    assert uncovered(trajectories, clip(motion)) == []
    states = trajectories[0].states
    assert (states[list(missed)] == State.flow).all(), "flow vouches for these, so nothing has to be masked"


def test_a_half_hidden_face_that_the_detector_misses_is_covered(clip, remembering: Remembering) -> None:  # type: ignore[no-untyped-def]
    hidden = range(11, 20)
    trajectories, _ = follow(clip("hide"), Blind(remembering, hidden))
    assert uncovered(trajectories, clip("hide")) == []
    assert {t.number for t in trajectories} == {0}, "it is the same face before and after"


def test_without_looking_back_the_first_frames_would_slip(clip, remembering: Remembering) -> None:  # type: ignore[no-untyped-def]
    """The counter-proof: what this file asserts can fail."""
    config = TrackerConfig(lookback=0.0)
    trajectories, _ = follow(clip("move"), Blind(remembering, range(0, 8)), config)
    assert uncovered(trajectories, clip("move")) == list(range(8))


def test_a_face_that_flow_may_carry_no_longer_is_masked_before_it_is_given_up(clip, remembering: Remembering) -> None:  # type: ignore[no-untyped-def]
    tracker = Tracker(Blind(remembering, range(1, 99)), rate=25, config=TrackerConfig(bridge=0.4, hold=0.2))
    states = [[seen.state for seen in tracker.update(shot.pixels)] for shot in clip("turn")[:20]]
    assert states == [[State.detected], *[[State.flow]] * 10, *[[State.held]] * 5, *[[]] * 4]
    assert not tracker.tracks


def test_detecting_every_fifth_frame_asks_the_detector_a_fifth_as_often(clip, remembering: Remembering) -> None:  # type: ignore[no-untyped-def]
    trajectories, tracker = follow(clip("move"), remembering, TrackerConfig(every=5))
    assert uncovered(trajectories, clip("move")) == []
    assert tracker.detections == FRAMES // 5


def test_two_faces_keep_their_numbers(clip, remembering: Remembering) -> None:  # type: ignore[no-untyped-def]
    """Side by side, one of them missed for a while: numbers decide whose password changes whom."""
    left, right = clip("turn"), clip("move")
    both = [
        Shot(np.hstack([a.pixels, b.pixels]), b.landmarks + np.array([320.0, 0.0]), True)
        for a, b in zip(left, right, strict=True)
    ]

    class LeftOnly:
        count = -1

        def detect(self, pixels: NDArray[np.uint8]) -> list[Face]:
            self.count += 1
            faces = remembering.detect(pixels)
            return [f for f in faces if f.box[0] < 320] if 8 <= self.count < 15 else faces

    trajectories, _ = follow(both, LeftOnly())  # type: ignore[arg-type]
    assert [(t.first, t.last) for t in trajectories] == [(0, FRAMES - 1)] * 2
    mine = next(t for t in trajectories if off(t, 0, both[0]) < 20)
    assert all(off(mine, i, shot) < 10 for i, shot in enumerate(both))


def test_a_track_ends_at_a_cut(clip, remembering: Remembering) -> None:  # type: ignore[no-untyped-def]
    noise = np.random.default_rng(3).integers(0, 256, (12, 16, 3)).astype(np.uint8)
    other = np.kron(noise, np.ones((20, 20, 1), np.uint8))
    tracker = Tracker(Blind(remembering, range(10, 99)), rate=25)
    seen: list[list[Observation]] = [tracker.update(shot.pixels) for shot in clip("move")[:10]]
    assert all(seen)
    assert not any(tracker.update(other) for _ in range(5))


def test_smoothing_takes_jitter_and_not_motion() -> None:
    rng = np.random.default_rng(0)
    still = np.tile(geometry.template(), (60, 1, 1))
    t = np.arange(60.0)[:, None, None]
    moving = still + np.concatenate([3.0 * t, 0.02 * t**2], axis=-1)
    noise = rng.normal(0, 0.8, still.shape)
    for truth in (still, moving):
        error = smoothed(truth + noise, 30) - truth
        assert error.std() < 0.6 * noise.std()
        assert abs(error.mean()) < 0.05, "a lag would be a bias along the way"
    assert np.abs(smoothed(moving, 30) - moving).max() < 1e-6


@st.composite
def clips(draw: st.DrawFn) -> ClipGeometry:
    frames = draw(st.integers(1, 40))
    trajectories = []
    for number in range(draw(st.integers(0, 3))):
        first = draw(st.integers(0, frames - 1))
        length = draw(st.integers(1, frames - first))
        rng = np.random.default_rng(draw(st.integers(0, 99)))
        angle, scale = rng.uniform(-3, 3, length), rng.uniform(0.3, 3, length)
        rows = np.stack([scale * np.cos(angle), scale * np.sin(angle), *rng.normal(0, 200, (2, length))], axis=1)
        states = rng.integers(0, 3, length).astype(np.uint8)
        trajectories.append(Trajectory(number, first, states, rows.astype(np.float32)))
    return ClipGeometry(320, 240, frames, 128, "mien-v1", "ab" * 32, Colour(range=1, matrix=6), tuple(trajectories))


@given(clips())
def test_geometry_travels_bit_for_bit(clip: ClipGeometry) -> None:
    text = geometry_track.encode(clip)
    back = geometry_track.decode(text, size=(320, 240), frames=clip.frames)
    assert back is not None and back.source == clip.source and len(back.trajectories) == len(clip.trajectories)
    for a, b in zip(back.trajectories, clip.trajectories, strict=True):
        assert (a.number, a.first) == (b.number, b.first)
        assert np.array_equal(a.states, b.states) and a.transforms.tobytes() == b.transforms.tobytes()
    assert geometry_track.decode(text, size=(320, 241)) is None
    assert geometry_track.decode(text, size=(320, 240), frames=clip.frames + 1) is None


@given(st.one_of(st.text(max_size=80), st.binary(max_size=80).map(lambda raw: raw.hex() + "." + raw.hex())), st.data())
def test_geometry_of_any_origin_is_refused_quietly(text: str, data: st.DataObject) -> None:
    assert geometry_track.decode(text, size=(320, 240)) is None
    one = Trajectory(0, 0, np.zeros(3, np.uint8), np.tile(np.float32([1, 0, 5, 5]), (3, 1)))
    good = geometry_track.encode(ClipGeometry(320, 240, 3, 128, "mien-v1", "ab" * 32, Colour(), (one,)))
    at = data.draw(st.integers(0, len(good) - 1))
    broken = good[:at] + data.draw(st.characters(codec="ascii")) + good[at + 1 :]
    geometry_track.decode(broken, size=(320, 240))  # anything but an exception
    assert geometry_track.decode(good[: len(good) // 2], size=(320, 240)) is None
