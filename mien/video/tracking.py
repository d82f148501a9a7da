"""Following faces from frame to frame; what offline clips and live frames share.

Three sources agree on where a face is. The *detector* (every frame, or every k-th and whenever a track is in doubt)
gives landmarks. *ByteTrack* (Zhang et al. 2022, package ``trackers``) links detections over time, weak ones too. Where
the detector is silent, *optical flow* (pyramidal Lucas-Kanade of OpenCV, checked forwards against backwards and against
the face's look when it was last detected) carries the landmarks on. What no source can vouch for is *held*: the face is
taken to be where it was going, and is masked there instead of transformed.

A face that is found for the first time, or again, is also followed *backwards* through the frames of the last second,
which are kept as small gray pictures: a detector that sees a face late does not let its first frames slip.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from mien import geometry
from mien.detection import Detector, Face, MTCNNDetector
from mien.geometry import Points

Gray = NDArray[np.uint8]

# Weak detections may carry a track on, and start none (TrackerConfig.new_confidence).
WEAK: Final = 0.7

# Points followed by optical flow: a grid over the face, in pixels of Mien's 128 pixel crop.
_GRID: Final[Points] = np.stack(np.meshgrid(np.linspace(36, 92, 8), np.linspace(42, 106, 8)), axis=-1).reshape(-1, 2)
# The face alone, seen in 32 x 32 pixels, for the check of its look.
_LOOK_SIDE: Final = 32
_LOOK: Final = geometry.fit_similarity(np.array([[28.0, 36.0], [100.0, 108.0]]), np.array([[0.0, 0.0], [31.0, 31.0]]))


class State(IntEnum):
    """How well the place of a face in a frame is known."""

    detected = 0
    flow = 1
    held = 2


@dataclass(frozen=True, eq=False)
class Observation:
    """A face in a frame."""

    frame: int
    track: int
    """Number of the track, from 0 in order of first detection."""
    state: State
    landmarks: Points
    """float ``[5, 2]``, picture pixels."""
    box: NDArray[np.float64]
    """x0, y0, x1, y1, float ``[4]``."""
    confidence: float
    """The detector's; 0 where it did not see the face."""


@dataclass(frozen=True)
class TrackerConfig:
    """How faces are followed."""

    every: int = 1
    """Detect in every k-th frame, and in every frame in which a track is in doubt."""
    bridge: float = 2.0
    """Seconds for which optical flow may carry a face that the detector does not see."""
    hold: float = 0.25
    """Seconds for which a face of which nothing is known any more stays masked, also where flow may carry it no
    longer. For so long a lost track may be found again."""
    lookback: float = 1.0
    """Seconds for which a face is followed backwards from where it was found."""
    max_lookback_frames: int = 60
    """Bounds the memory of ``lookback``."""
    gray_side: int = 640
    """Longer side of the pictures for optical flow."""
    new_confidence: float = 0.9
    """A detection from here on starts a track; weaker ones only carry tracks on."""


@dataclass(eq=False)
class _Track:
    number: int
    landmarks: Points
    box: NDArray[np.float64]
    look: NDArray[np.float32]
    seen: float
    """Time of the last detection."""
    sure: float
    """Time of the last frame with a detection or verified flow."""
    sure_frame: int
    velocity: Points = field(default_factory=lambda: np.zeros(2))
    """Of the face, picture pixels a frame."""
    state: State = State.detected


class Tracker:
    """Faces of consecutive frames as numbered tracks. Deterministic; one instance follows one clip.

    Args:
        detector: finds faces; see :class:`~mien.detection.Detector`. It may answer weak detections
            (``TrackerConfig.new_confidence``).
        rate: frames a second, nominal; times given to :meth:`update` go first.
        config: see :class:`TrackerConfig`.
    """

    def __init__(self, detector: Detector, *, rate: float = 25.0, config: TrackerConfig | None = None) -> None:
        from trackers import ByteTrackTracker

        self.config = config or TrackerConfig()
        self.rate = rate if 0 < rate < 1000 else 25.0
        self.detector = detector
        self.frames = 0
        """Frames seen so far."""
        self.detections = 0
        """Frames in which the detector ran."""
        self._alive: list[_Track] = []
        self._tracks = 0
        self._aliases: dict[int, _Track] = {}
        self._time = -np.inf
        self._link = ByteTrackTracker(
            lost_track_buffer=max(1, round(30 * self.config.bridge)),
            frame_rate=self.rate,
            track_activation_threshold=self.config.new_confidence,
            high_conf_det_threshold=self.config.new_confidence,
            minimum_consecutive_frames=1,
        )
        lookback = min(self.config.max_lookback_frames, round(self.config.lookback * self.rate))
        # (gray, whether a cut lies before it); the newest last.
        self._past: deque[tuple[Gray, bool]] = deque(maxlen=lookback + 1)
        self._thumbnail: NDArray[np.float32] | None = None

    @property
    def tracks(self) -> frozenset[int]:
        """Numbers of the faces that are followed now."""
        return frozenset(track.number for track in self._alive)

    def update(
        self, pixels: NDArray[np.uint8], time: float | None = None, faces: list[Face] | None = None
    ) -> list[Observation]:
        """Take the next frame.

        Args:
            pixels: uint8 RGB ``[H, W, 3]``, the same size for all frames.
            time: seconds; frame number over rate by default. Should increase.
            faces: what the detector answers for this frame, where somebody has asked it already.

        Returns:
            Faces of this frame, and of earlier frames (``lookback`` at most) where a face was found late. An earlier
            frame's observation replaces a *held* one of the same track and frame.
        """
        index = self.frames
        self.frames += 1
        now = index / self.rate if time is None else time
        now = max(now, self._time + 1e-6)
        self._time = now
        gray, factor = _gray(pixels, self.config.gray_side)
        cut = self._is_cut(gray)
        if cut:
            self._alive.clear()
            self._aliases.clear()
            self._link.reset()
        previous = self._past[-1][0] if self._past and not cut else None
        self._past.append((gray, cut))

        for track in self._alive:
            self._predict(track, previous, gray, factor, now, index)
        due = index % self.config.every == 0 or cut or any(t.state is State.held for t in self._alive)
        found: list[Observation] = []
        if due:
            self.detections += 1
            faces = self.detector.detect(pixels) if faces is None else faces
            for owner, face in self._associate(faces, now):
                found += self._accept(owner, face, gray, factor, now, index)
        bridge, hold = self.config.bridge + 1e-9, self.config.hold + 1e-9
        self._alive = [t for t in self._alive if now - t.seen <= bridge + hold]
        for alias, track in list(self._aliases.items()):
            if track not in self._alive:
                del self._aliases[alias]
        for track in self._alive:
            if track.state is State.detected or (track.state is State.held and now - track.sure > hold):
                continue
            found.append(Observation(index, track.number, track.state, track.landmarks, track.box, 0.0))
        return found

    # Flow. -------------------------------------------------------------------------------------------------------

    def _predict(self, track: _Track, previous: Gray | None, gray: Gray, factor: float, now: float, index: int) -> None:
        """Where the face is by optical flow, else by the way it went; before the detector is asked."""
        moved = None
        # Flow is trusted for so long; where it may carry a face no longer, the face is not shown for it: it is masked.
        trusted = now - track.seen <= self.config.bridge + 1e-9
        if previous is not None and trusted and track.state is not State.held:
            moved = _follow(previous, gray, geometry.scale_points(track.landmarks, factor), track.look)
        if moved is None:
            # Slows down: after a second without news, where it was going says little.
            track.velocity = track.velocity * 0.9
            shift = track.velocity
            track.landmarks, track.box = track.landmarks + shift, track.box + np.tile(shift, 2)
            track.state = State.held
            return
        landmarks = geometry.scale_points(moved, 1 / factor)
        track.velocity = 0.5 * track.velocity + 0.5 * (landmarks - track.landmarks).mean(axis=0)
        track.box = _carry_box(track.box, track.landmarks, landmarks)
        track.landmarks, track.state, track.sure, track.sure_frame = landmarks, State.flow, now, index

    def _backwards(self, track: _Track, factor: float, index: int, stop: int) -> list[Observation]:
        """The face in frames before ``index``, down to frame ``stop`` at most, the newest first."""
        seconds = 1 / self.rate
        out: list[Observation] = []
        landmarks, box = track.landmarks, track.box
        past = list(self._past)
        place = len(past) - 1
        frame = index
        while place > 0 and frame - 1 >= stop and not past[place][1]:
            moved = _follow(past[place][0], past[place - 1][0], geometry.scale_points(landmarks, factor), track.look)
            if moved is None:
                break
            place, frame = place - 1, frame - 1
            new = geometry.scale_points(moved, 1 / factor)
            box, landmarks = _carry_box(box, landmarks, new), new
            out.append(Observation(frame, track.number, State.flow, landmarks, box, 0.0))
        held = 0
        while place > 0 and frame - 1 >= stop and not past[place][1] and held * seconds < self.config.hold:
            place, frame, held = place - 1, frame - 1, held + 1
            out.append(Observation(frame, track.number, State.held, landmarks, box, 0.0))
        return out

    # Detections. -------------------------------------------------------------------------------------------------

    def _associate(self, faces: list[Face], now: float) -> list[tuple[_Track | None, Face]]:
        """Which track each usable detection belongs to; None starts one."""
        import supervision
        from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped, unused-ignore]

        boxes = np.array([face.box for face in faces], dtype=np.float64).reshape(-1, 4)
        confidences = np.array([face.confidence for face in faces], dtype=np.float64)
        linked: Any = self._link.update(
            supervision.Detections(xyxy=boxes, confidence=confidences, data={"index": np.arange(len(faces))}),
            timestamp=now,
        )
        ids = np.full(len(faces), -1)
        if len(linked):
            ids[np.asarray(linked.data["index"], dtype=int)] = linked.tracker_id
        pairs: dict[int, _Track] = {}
        if faces and self._alive:
            # Overlap with where flow expects the face decides; ByteTrack's memory adds to it, and bridges jumps.
            score = np.zeros((len(faces), len(self._alive)))
            for row, face in enumerate(faces):
                for column, track in enumerate(self._alive):
                    remembered = self._aliases.get(int(ids[row])) is track
                    overlap = _iou(face.box, track.box)
                    score[row, column] = overlap + (0.3 if remembered else 0.0)
                    # Two faces of one person are about equally large.
                    if not 0.4 < _side(face.box) / _side(track.box) < 2.5:
                        score[row, column] = 0
            for row, column in zip(*linear_sum_assignment(score, maximize=True), strict=True):
                if score[row, column] >= 0.15:
                    pairs[int(row)] = self._alive[int(column)]
        out: list[tuple[_Track | None, Face]] = []
        for row, face in enumerate(faces):
            owner = pairs.get(row)
            if owner is not None and ids[row] >= 0:
                self._aliases[int(ids[row])] = owner
            if owner is not None or face.confidence >= self.config.new_confidence:
                out.append((owner, face))
        return out

    def _accept(
        self, track: _Track | None, face: Face, gray: Gray, factor: float, now: float, index: int
    ) -> list[Observation]:
        look = _look(gray, geometry.scale_points(face.landmarks, factor))
        if track is None:
            track = _Track(self._tracks, face.landmarks, face.box, look, now, now, index)
            self._tracks += 1
            self._alive.append(track)
            stop, late = 0, True
        else:
            stop, late = track.sure_frame + 1, track.state is State.held
            if late:
                # Where it was held is no measure of how fast it goes.
                track.velocity = np.zeros(2)
            track.landmarks, track.box, track.look = face.landmarks, face.box, look
            track.seen = track.sure = now
            track.sure_frame = index
        track.state = State.detected
        out = [Observation(index, track.number, State.detected, face.landmarks, face.box, face.confidence)]
        return out + (self._backwards(track, factor, index, stop) if late else [])

    def _is_cut(self, gray: Gray) -> bool:
        """Whether this frame has nothing to do with the one before. Strict: a face that is missed is worse than a
        track that goes on into another scene."""
        import cv2

        small = cv2.resize(gray, (32, 18), interpolation=cv2.INTER_AREA).astype(np.float32)
        last, self._thumbnail = self._thumbnail, small
        if last is None:
            return False
        return bool(np.abs(small - last).mean() > 20 and _correlation(small, last) < 0.1)


def tracking_detector(detector: Detector) -> Detector:
    """A detector that, where it is MTCNN, also answers weak detections, which carry tracks on."""
    return detector.with_confidence(WEAK) if isinstance(detector, MTCNNDetector) else detector


def _gray(pixels: NDArray[np.uint8], side: int) -> tuple[Gray, float]:
    """Gray, at most ``side`` long, and gray pixels per picture pixel."""
    import cv2

    gray = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
    factor = min(1.0, side / max(gray.shape))
    if factor < 1:
        size = (max(1, round(gray.shape[1] * factor)), max(1, round(gray.shape[0] * factor)))
        gray = cv2.resize(gray, size, interpolation=cv2.INTER_AREA)
    return np.asarray(gray, dtype=np.uint8), factor


def _follow(before: Gray, after: Gray, landmarks: Points, look: NDArray[np.float32]) -> Points | None:
    """Landmarks of a gray picture in the next one; None where flow cannot vouch for them."""
    import cv2

    try:
        matrix = geometry.crop_transform(landmarks)
        points = geometry.apply(geometry.invert(matrix), _GRID)
    except (ValueError, np.linalg.LinAlgError):
        return None
    height, width = before.shape
    inside = ((points >= 0) & (points <= np.array([width - 1, height - 1]))).all(axis=1)
    if inside.sum() < len(_GRID) // 3:
        return None
    start = points[inside].astype(np.float32)[:, None]
    eyes = 32 / geometry.scale_of(matrix)
    # The stubs of OpenCV do not know that the points to start from may be left out.
    flow: Any = cv2.calcOpticalFlowPyrLK
    there, ok_there, _ = flow(before, after, start, None, winSize=(15, 15), maxLevel=3)
    back, ok_back, _ = flow(after, before, there, None, winSize=(15, 15), maxLevel=3)
    round_trip = np.linalg.norm(back - start, axis=-1)[:, 0]
    good = (ok_there[:, 0] == 1) & (ok_back[:, 0] == 1) & (round_trip < max(0.5, 0.04 * eyes))
    if good.sum() < max(6, 0.4 * len(start)):
        return None
    motion, agree = cv2.estimateAffinePartial2D(
        start[good], there[good], method=cv2.RANSAC, ransacReprojThreshold=max(1.0, 0.06 * eyes)
    )
    if motion is None or agree.mean() < 0.5 or not 0.8 < geometry.scale_of(motion) < 1.25:
        return None
    moved = geometry.apply(motion, landmarks)
    if _correlation(_look(after, moved), look) < 0.5:
        return None
    return moved


def _look(gray: Gray, landmarks: Points) -> NDArray[np.float32]:
    """The face in 32 x 32 gray pixels, aligned."""
    import cv2

    matrix = geometry.compose(_LOOK, geometry.crop_transform(landmarks))
    return np.asarray(
        cv2.warpAffine(gray, matrix, (_LOOK_SIDE, _LOOK_SIDE), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE),
        dtype=np.float32,
    )


def _correlation(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    """Of two pictures of equal size, in [-1, 1]; 0 where one is flat."""
    a, b = a - a.mean(), b - b.mean()
    norm = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float((a * b).sum()) / norm if norm > 1e-6 else 0.0


def _carry_box(box: NDArray[np.float64], before: Points, after: Points) -> NDArray[np.float64]:
    """The box moved and scaled as the landmarks were."""
    motion = geometry.fit_similarity(before, after)
    centre = geometry.apply(motion, (box[:2] + box[2:]) / 2)
    half = (box[2:] - box[:2]) / 2 * geometry.scale_of(motion)
    return np.concatenate([centre - half, centre + half])


def _side(box: NDArray[np.float64]) -> float:
    return float(np.sqrt(max(1e-9, (box[2] - box[0]) * (box[3] - box[1]))))


def _iou(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    low, high = np.maximum(a[:2], b[:2]), np.minimum(a[2:], b[2:])
    common = float(np.prod(np.clip(high - low, 0, None)))
    union = float(np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2])) - common
    return common / union if union > 0 else 0.0
