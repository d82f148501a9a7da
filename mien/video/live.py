"""Live frames: the same tracker with a bounded look ahead, and what that costs.

Offline, a face that the detector sees late is followed back through a second of frames. Live, frames have left by then.
With ``lookahead`` L a frame leaves L frames after it came, and a face found late is changed in those L frames; in
earlier ones it has been seen. With 0 (the default) nothing is waited for, and the first frames of a face that the
detector misses *leave unchanged*: who must not have that gives latency for it. A known face is carried by flow for
``bridge`` seconds, and where flow cannot, the place it was going to is masked for ``hold`` seconds. A frame that an
error stops is not given out.

Drop policy (:class:`Mailbox`): when frames come faster than they are done, the *oldest waiting* ones are dropped before
anything is spent on them, and counted. Frames that were taken are finished, in order, none twice. Times are those of
the frames, so tracking bridges what was dropped.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from mien import geometry
from mien.detection import Detector
from mien.geometry import Matrix, Points
from mien.model import Operation
from mien.passwords import Code
from mien.video.editing import FaceInFrame, Transform, edit
from mien.video.tracking import State, Tracker, TrackerConfig

LIVE: Final = TrackerConfig(hold=1.0)
"""Longer than offline: nobody can come back and look how it went on."""

# Casiez, Roussel, Vogel 2012, "1 Euro filter": cut-off of a still face in Hz, and by how much it grows with its speed
# in distances between the eyes a second.
_CUTOFF: Final = 2.0
_SPEED_GAIN: Final = 12.0
_SPEED_CUTOFF: Final = 1.0


@dataclass(frozen=True, eq=False)
class LiveFace:
    """A face in a live frame."""

    track: int
    matrix: Matrix
    """``[2, 3]``, picture to crop, rounded to what 9 decimals hold: recovery needs this very transform."""
    box: NDArray[np.float64]
    state: State
    masked: bool


@dataclass(frozen=True, eq=False)
class LiveResult:
    """A finished frame."""

    index: int
    """Number of the frame as it was pushed, from 0."""
    time: float
    pixels: NDArray[np.uint8]
    """uint8 RGB ``[H, W, 3]``."""
    faces: tuple[LiveFace, ...]


@dataclass(eq=False)
class Waiting:
    """A frame whose faces are known as well as they will be, and not yet changed."""

    index: int
    time: float
    pixels: NDArray[np.uint8]
    faces: dict[int, tuple[State, Points, NDArray[np.float64]]] = field(default_factory=dict)
    given: Sequence[LiveFace] | None = None


class LiveFrames:
    """Frames in, changed frames out, ``lookahead`` frames later at most. One instance is one stream.

    :meth:`push` is :meth:`follow`, one frame after the other, and then :meth:`change`, which knows nothing of other
    frames: a server changes some frames while it follows the next ones.

    Args:
        transform: see :data:`~mien.video.editing.Transform`.
        detector: finds faces; see :func:`~mien.video.tracking.tracking_detector`.
        code: of every track, from ``Model.code_for``.
        operation: ``anonymize`` or ``recover``.
        size: side of the crops.
        codes: of single tracks.
        rate: frames a second, nominal.
        lookahead: frames to wait, see above.
        config: how faces are followed; its ``lookback`` is set to ``lookahead``.
    """

    def __init__(
        self,
        transform: Transform,
        detector: Detector,
        code: Code,
        *,
        operation: Operation = "anonymize",
        size: int = geometry.CROP_SIZE,
        codes: Mapping[int, Code] | None = None,
        rate: float = 25.0,
        lookahead: int = 0,
        config: TrackerConfig = LIVE,
    ) -> None:
        if lookahead < 0:
            raise ValueError("lookahead is not negative")
        self.lookahead = lookahead
        self.operation: Operation = operation
        self._transform, self._code, self._codes, self._size = transform, code, dict(codes or {}), size
        # As many as wait, never more: what has left cannot be changed.
        config = replace(config, lookback=lookahead / rate + 1e-6, max_lookback_frames=lookahead)
        self._tracker = Tracker(detector, rate=rate, config=config)
        self._rate = rate
        self._smooth: dict[int, _OneEuro] = {}
        self._waiting: deque[Waiting] = deque()
        self.count = 0
        """Frames taken so far, and so the number of the next one."""
        self._shape: tuple[int, ...] | None = None

    def push(
        self, pixels: NDArray[np.uint8], time: float | None = None, faces: Sequence[LiveFace] | None = None
    ) -> list[LiveResult]:
        """Take a frame; give out those that are done. Arguments and errors are those of :meth:`follow`."""
        return self.change(self.follow(pixels, time, faces))

    def flush(self) -> list[LiveResult]:
        """The frames that still wait."""
        return self.change(self.rest())

    def follow(
        self, pixels: NDArray[np.uint8], time: float | None = None, faces: Sequence[LiveFace] | None = None
    ) -> list[Waiting]:
        """Take a frame; give out those that wait no longer, for :meth:`change`. Not for two threads at once.

        Args:
            pixels: uint8 RGB ``[H, W, 3]``, all of one size; not modified.
            time: seconds; by count and rate where it is not given.
            faces: recovering, what :class:`LiveResult` said of this frame; detected again where it is not given.

        Raises:
            ValueError: not such pixels, or of another size than before.
        """
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
            raise ValueError(f"expected uint8 pixels [H, W, 3], not {pixels.dtype} {pixels.shape}")
        if self._shape not in (None, pixels.shape):
            raise ValueError(f"frames of a stream are of one size: {self._shape} before, {pixels.shape} now")
        self._shape = pixels.shape
        index = self.count
        self.count += 1
        now = index / self._rate if time is None else time
        frame = Waiting(index, now, pixels, given=faces if self.operation == "recover" else None)
        self._waiting.append(frame)
        if frame.given is None:
            self._look(frame)
        return self._leave(self.lookahead)

    def rest(self) -> list[Waiting]:
        """The frames that still wait, for :meth:`change`."""
        return self._leave(0)

    def _leave(self, keep: int) -> list[Waiting]:
        return [self._waiting.popleft() for _ in range(max(0, len(self._waiting) - keep))]

    def _look(self, frame: Waiting) -> None:
        by_index = {waiting.index: waiting for waiting in self._waiting}
        base = frame.index - (self._tracker.frames)
        for seen in self._tracker.update(frame.pixels, frame.time):
            place = by_index.get(seen.frame + base)
            if place is None:
                continue
            landmarks = seen.landmarks
            if place is frame and seen.state is not State.held:
                landmarks = self._smooth.setdefault(seen.track, _OneEuro())(landmarks, frame.time)
            known = place.faces.get(seen.track)
            if known is None or seen.state <= known[0]:
                place.faces[seen.track] = seen.state, landmarks, seen.box
        for gone in self._smooth.keys() - self._tracker.tracks:
            del self._smooth[gone]

    def change(self, leaving: Sequence[Waiting]) -> list[LiveResult]:
        """Change the faces of frames that wait no longer: one batch of the network. For any thread.

        Raises:
            What the transform raises, but for :class:`~mien.errors.ModelError`, which masks the face.
        """
        if not leaving:
            return []
        faces = [list(frame.given) if frame.given is not None else self._faces(frame) for frame in leaving]
        work = [
            (
                frame.pixels,
                [FaceInFrame(f.track, f.matrix, f.state, self._codes.get(f.track, self._code)) for f in there],
            )
            for frame, there in zip(leaving, faces, strict=True)
        ]
        done = edit(work, self._transform, size=self._size, operation=self.operation)
        out = []
        for frame, there, edited in zip(leaving, faces, done, strict=True):
            # A face that lies outside the picture is in neither list.
            masked = set(edited.masked)
            shown = masked | set(edited.transformed)
            told = tuple(replace(f, masked=f.track in masked) for f in there if f.track in shown)
            out.append(LiveResult(frame.index, frame.time, edited.pixels, told))
        return out

    def _faces(self, frame: Waiting) -> list[LiveFace]:
        out = []
        for track, (state, landmarks, box) in sorted(frame.faces.items()):
            matrix = np.round(geometry.crop_transform(landmarks, self._size), 9)
            out.append(LiveFace(track, matrix, box, state, False))
        return out


class _OneEuro:
    """Smooths landmarks with what is known so far: strongly while a face is still, hardly while it moves."""

    def __init__(self) -> None:
        self._last: tuple[float, Points, Points] | None = None

    def __call__(self, points: Points, time: float) -> Points:
        if self._last is None or time <= self._last[0] or time - self._last[0] > 0.5:
            self._last = time, points, np.zeros_like(points)
            return points
        before, last, speed = self._last
        step = time - before
        eyes = max(1e-6, float(np.linalg.norm(points[1] - points[0])))
        raw = (points - last) / step
        share = _share(_SPEED_CUTOFF, step)
        speed = speed + share * (raw - speed)
        pace = float(np.linalg.norm(speed.mean(axis=0))) / eyes
        smooth = last + _share(_CUTOFF + _SPEED_GAIN * pace, step) * (points - last)
        # As offline, never far from what was measured: a fast face must not outrun its crop.
        off = float(np.linalg.norm(smooth - points, axis=1).max())
        smooth = points + (smooth - points) * min(1.0, 0.08 * eyes / max(off, 1e-9))
        self._last = time, smooth, speed
        return smooth


def _share(cutoff: float, step: float) -> float:
    """Of the new value in a first-order low-pass filter."""
    return 1 / (1 + 1 / (2 * np.pi * cutoff * step))


Item = TypeVar("Item")


class Mailbox(Generic[Item]):
    """A bounded queue between who brings frames and who changes them; full, it drops the oldest. For two threads."""

    def __init__(self, capacity: int = 2) -> None:
        self._items: deque[Item] = deque()
        self._capacity = capacity
        self._changed = threading.Condition()
        self._closed = False
        self.dropped = 0
        """Items that nobody took."""

    def put(self, item: Item) -> None:
        """Add an item; never waits."""
        with self._changed:
            if len(self._items) >= self._capacity:
                self._items.popleft()
                self.dropped += 1
            self._items.append(item)
            self._changed.notify()

    def close(self) -> None:
        """No more items will come."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def get(self, timeout: float | None = None) -> Item | None:
        """The oldest item, waiting for it; None once it is closed and empty.

        Raises:
            TimeoutError: nothing came in time.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._items or self._closed, timeout):
                raise TimeoutError("no frame came in time")
            return self._items.popleft() if self._items else None
