"""Observations of a whole clip -> where every face is in every frame: gaps bridged, landmarks smoothed without delay.

Smoothing is zero-phase (Savitzky and Golay 1964: a least-squares parabola over a sliding window), so a moving face is
not lagged behind, as it is by filters that only know the past.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from mien import geometry
from mien.geometry import Matrix
from mien.video.tracking import Observation, State

# Seconds of the smoothing window, and how far a landmark may be moved by it, of the distance between the eyes.
_WINDOW: Final = 0.3
_LIMIT: Final = 0.08


@dataclass(frozen=True, eq=False)
class Trajectory:
    """One face through the clip, over consecutive frames."""

    number: int
    first: int
    """Its first frame."""
    states: NDArray[np.uint8]
    """:class:`~mien.video.tracking.State` of each frame, ``[L]``."""
    transforms: NDArray[np.float32]
    """a, b, x, y of each frame, ``[L, 4]``: picture (u, v) -> crop (a u - b v + x, b u + a v + y)."""
    confidence: float = 0.0
    """The best a detector said of it."""

    @property
    def last(self) -> int:
        return self.first + len(self.states) - 1

    def at(self, frame: int) -> tuple[Matrix, State] | None:
        """The transform ``[2, 3]`` from picture to crop in a frame, and how well it is known."""
        if not self.first <= frame <= self.last:
            return None
        a, b, x, y = (float(v) for v in self.transforms[frame - self.first])
        return np.array([[a, -b, x], [b, a, y]]), State(int(self.states[frame - self.first]))


class Trajectories:
    """Collects observations frame by frame, at some hundred bytes a face and frame."""

    def __init__(self) -> None:
        self._rows: dict[int, dict[int, tuple[int, NDArray[np.float32]]]] = {}
        self._confidence: dict[int, float] = {}

    def add(self, observations: Iterable[Observation]) -> None:
        """Take what :meth:`~mien.video.tracking.Tracker.update` gave."""
        for seen in observations:
            rows = self._rows.setdefault(seen.track, {})
            known = rows.get(seen.frame)
            # What is better known stays.
            if known is None or seen.state <= known[0]:
                rows[seen.frame] = (int(seen.state), seen.landmarks.astype(np.float32))
            self._confidence[seen.track] = max(self._confidence.get(seen.track, 0.0), seen.confidence)

    def finish(self, *, rate: float, size: int) -> list[Trajectory]:
        """Every face over consecutive frames, by number; it may lie outside the picture in some.

        Args:
            rate: frames a second.
            size: side of the crops.
        """
        return [
            _trajectory(number, rows, self._confidence[number], rate, size)
            for number, rows in sorted(self._rows.items())
        ]


def _trajectory(
    number: int, rows: dict[int, tuple[int, NDArray[np.float32]]], confidence: float, rate: float, size: int
) -> Trajectory:
    known = np.array(sorted(rows))
    frames = np.arange(known[0], known[-1] + 1)
    points = np.stack([rows[int(f)][1] for f in known]).astype(np.float64)
    states = np.full(len(frames), int(State.held), dtype=np.uint8)
    states[known - known[0]] = [rows[int(f)][0] for f in known]
    # Held places are guesses: between two sure ones the straight line between them is the better guess.
    sure = np.flatnonzero(states[known - known[0]] != State.held)
    inner = (known > known[sure[0]]) & (known < known[sure[-1]])
    keep = np.isin(np.arange(len(known)), sure) | ~inner
    flat = points.reshape(len(known), 10)[keep]
    filled = np.stack([np.interp(frames, known[keep], flat[:, i]) for i in range(10)], axis=1).reshape(-1, 5, 2)
    smooth = smoothed(filled, rate)
    transforms = np.empty((len(frames), 4), dtype=np.float32)
    for i, landmarks in enumerate(smooth):
        matrix = geometry.crop_transform(landmarks, size)
        transforms[i] = matrix[0, 0], matrix[1, 0], matrix[0, 2], matrix[1, 2]
    return Trajectory(number, int(frames[0]), states, transforms, confidence)


def smoothed(points: NDArray[np.float64], rate: float) -> NDArray[np.float64]:
    """Landmarks ``[L, 5, 2]`` of consecutive frames without the detector's jitter, never far from what was measured."""
    from scipy.signal import savgol_filter  # type: ignore[import-untyped, unused-ignore]

    window = min(round(_WINDOW * rate) // 2 * 2 + 1, (len(points) - 1) // 2 * 2 + 1)
    if window < 5:
        return points
    smooth = savgol_filter(points, window, polyorder=2, axis=0, mode="interp")
    change = smooth - points
    eyes = np.linalg.norm(points[:, 1] - points[:, 0], axis=-1)
    most = np.linalg.norm(change, axis=-1).max(axis=-1)
    share = np.minimum(1.0, _LIMIT * eyes / np.maximum(most, 1e-9))
    return np.asarray(points + change * share[:, None, None], dtype=np.float64)
