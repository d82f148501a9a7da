"""The frames of a live stream: faces followed from one to the next, changed in batches, and nothing kept without bound.

Three stages overlap. *Reading* fills a small inbox. *Following* (:meth:`mien.video.live.LiveFrames.follow`: detection,
optical flow) goes from frame to frame and is one piece of work at a time, of all frames that wait. *Changing* knows
nothing of other frames: some pieces of work at once, whose crops meet in the engine's batches. Between them are queues
of a few frames, so a caller who takes no answers stops the stages one after the other, down to the reading; or, where
the stream asks to stay live, the inbox drops its oldest frame whenever a new one finds it full.

Knows no wire format: a door gives frames and how to finish them.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

from serving.problems import MalformedRequest, NotInstalled

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from mien.detection import Detector, Face
    from mien.pictures import Picture
    from mien.video.live import LiveFrames, LiveResult, Waiting
    from serving.engine import Call, Codes, Engine

T = TypeVar("T")

MAX_LOOKAHEAD: Final = 250
DEFAULT_LOOKAHEAD: Final = 12
DEFAULT_RATE: Final = 25.0
# Frames that may wait where the oldest is dropped: as `mien live` has it.
_LIVE_CAPACITY: Final = 2
# Numbers of dropped frames that are kept for an answer to name. A stream that drops more before it can answer once is
# slowed down instead.
_MOST_DROPPED: Final = 4096


@dataclass(frozen=True)
class Tracking:
    """What a stream asks for.

    Raises:
        MalformedRequest: out of range.
    """

    lookahead: int = DEFAULT_LOOKAHEAD
    """Frames kept back."""
    rate: float = DEFAULT_RATE
    """Frames a second, nominal."""
    drop: bool = False
    """Stay live by dropping the oldest frame that waits."""

    def __post_init__(self) -> None:
        if not 0 <= self.lookahead <= MAX_LOOKAHEAD:
            raise MalformedRequest(f"'lookahead' is 0 to {MAX_LOOKAHEAD} frames.")
        # Also what is no number.
        if not 0 < self.rate <= 1000:
            raise MalformedRequest("'rate' is above 0 and at most 1000 frames a second.")


@dataclass(eq=False)
class Incoming:
    """A frame that was read."""

    id: int
    """The caller's number."""
    time: float | None
    """Seconds, where the caller says."""
    read: Callable[[], Picture] = field(repr=False)
    """Decodes it; on a worker thread."""
    dropped: list[int] = field(default_factory=list)
    """Ids of the frames that were dropped between the frame before and this one."""


class Stream(Generic[T]):
    """One stream; see the module.

    Args:
        engine, call: whose.
        codes: of the faces.
        tracking: what was asked for.
        finish: makes the answer, on a worker thread, from the frame, its picture as it came, and what became of it.
    """

    def __init__(
        self,
        engine: Engine,
        call: Call,
        codes: Codes,
        tracking: Tracking,
        finish: Callable[[Incoming, Picture, LiveResult], T],
    ) -> None:
        self._engine = engine
        self._call = call
        self._codes = codes
        self._tracking = tracking
        self._finish = finish
        self._window = _LIVE_CAPACITY if tracking.drop else engine.settings.stream_window
        self._inbox = _Inbox(self._window, drop=tracking.drop)
        self._kept: dict[int, tuple[Incoming, Picture]] = {}
        """What waits, by its number among the frames that were followed."""
        self._arrived = 0
        self._timed: bool | None = None

    async def answers(self, frames: AsyncIterator[Incoming]) -> AsyncGenerator[T]:
        """The answers, in order, while ``frames`` are read.

        Raises:
            What ``frames`` raises, once the frames before it were followed.
            MalformedRequest: frames of several sizes, or times in some of them alone.
            NotInstalled: the packages that follow faces are missing.
            TooManyFaces, InvalidImage, Overloaded, TookTooLong: see :class:`serving.engine.Engine`.
        """
        pending: asyncio.Queue[asyncio.Task[list[T]] | None] = asyncio.Queue(1)
        reader = asyncio.ensure_future(self._read(frames))
        follower = asyncio.ensure_future(self._follow_all(pending))
        current: asyncio.Task[list[T]] | None = None
        try:
            while (current := await first_of(pending, follower)) is not None:
                for answer in await current:
                    yield answer
            await follower
        finally:
            # wait_for() may swallow a cancellation: what is gone on with nevertheless must not wait for room.
            self._call.abandoned.set()
            self._inbox.stop()
            reader.cancel()
            follower.cancel()
            left = [current] if current is not None else []
            while not pending.empty():
                left += [task for task in (pending.get_nowait(),) if task is not None]
            for task in left:
                task.cancel()
            with suppress(asyncio.CancelledError):
                await asyncio.gather(reader, follower, *left, return_exceptions=True)

    # -- in the event loop -------------------------------------------------------------------------------------------

    async def _read(self, frames: AsyncIterator[Incoming]) -> None:
        try:
            async for frame in frames:
                number, self._arrived = self._arrived, self._arrived + 1
                if self._timed not in (None, frame.time is not None):
                    raise MalformedRequest("A stream gives the time of all its frames or of none.")
                self._timed = frame.time is not None
                # Before anything is dropped, so that what is dropped leaves its gap in time.
                frame.time = number / self._tracking.rate if frame.time is None else frame.time
                gone = await self._inbox.put(frame)
                if gone:
                    self._call.facts["dropped"] = self._call.facts.get("dropped", 0) + gone
                    self._engine.metrics.dropped.inc(gone)
        except Exception as error:
            await self._inbox.close(error)
        else:
            await self._inbox.close()

    async def _follow_all(self, pending: asyncio.Queue[asyncio.Task[list[T]] | None]) -> None:
        engine, call = self._engine, self._call
        live = await engine.run_frame(call, self._make)
        while (batch := await self._inbox.take()) is not None:
            leaving, error = await engine.run_frame(call, lambda batch=batch: self._follow(live, batch))
            await self._change_all(live, leaving, pending)
            if error is not None:
                raise error
        await self._change_all(live, live.rest(), pending)
        await pending.put(None)

    async def _change_all(
        self,
        live: LiveFrames,
        leaving: Sequence[Waiting],
        pending: asyncio.Queue[asyncio.Task[list[T]] | None],
    ) -> None:
        for start in range(0, len(leaving), self._window):
            part = leaving[start : start + self._window]
            task = asyncio.ensure_future(
                self._engine.run_frame(self._call, lambda part=part: self._change(live, part))  # type: ignore[misc]
            )
            # An error is raised where its frame's turn is, or not at all when another one came first.
            task.add_done_callback(lambda done: done.cancelled() or done.exception())
            try:
                if self._call.abandoned.is_set():
                    raise asyncio.CancelledError
                await pending.put(task)
            except asyncio.CancelledError:
                task.cancel()
                raise

    # -- on a worker thread ------------------------------------------------------------------------------------------

    def _make(self) -> LiveFrames:
        try:
            from mien.video.live import LiveFrames
            from mien.video.tracking import tracking_detector

            model, usual = self._call.model, self._codes.usual
            if usual is None:
                raise MalformedRequest(
                    "A stream that follows faces needs 'password', for whoever may enter the picture."
                )
            return LiveFrames(
                self._transform,
                _Bounded(tracking_detector(model.detector), self._engine.limits.max_faces),
                usual,
                size=model.crop_size,
                codes=self._codes.single,
                rate=self._tracking.rate,
                lookahead=self._tracking.lookahead,
            )
        except ImportError:
            raise NotInstalled(
                "This service cannot follow faces: it was installed without the extra 'video'. Streams without "
                "'tracking' work."
            ) from None

    def _follow(self, live: LiveFrames, batch: Sequence[Incoming]) -> tuple[list[Waiting], Exception | None]:
        """Frames that wait no longer, and what is wrong with the frame after them."""
        leaving: list[Waiting] = []
        for frame in batch:
            try:
                self._call.check()
                picture = frame.read()
                self._engine.receive(self._call, picture.pixels.nbytes)
                self._kept[live.count] = frame, picture
                leaving += live.follow(picture.pixels, frame.time)
            except ValueError:
                return leaving, MalformedRequest("The frames of a stream that follows faces are of one size.")
            except Exception as error:
                return leaving, error
        return leaving, None

    def _change(self, live: LiveFrames, leaving: Sequence[Waiting]) -> list[T]:
        out = []
        for result in live.change(leaving):
            frame, picture = self._kept.pop(result.index)
            out.append(self._finish(frame, picture, result))
            self._engine.release(self._call, picture.pixels.nbytes)
        return out

    def _transform(self, crops: Tensor, codes: NDArray[np.bool_]) -> Tensor:
        import torch

        from mien.errors import ModelError

        try:
            return self._engine.batch(self._call, crops, torch.from_numpy(codes))
        except ArithmeticError as error:
            # Of these crops alone: the face is masked, and its stream goes on.
            raise ModelError(str(error)) from None


class _Bounded:
    """A detector that refuses crowds, as the engine does for single pictures."""

    def __init__(self, detector: Detector, most: int) -> None:
        self._detector = detector
        self._most = most

    def detect(self, pixels: NDArray[np.uint8]) -> list[Face]:
        from mien.errors import TooManyFaces

        found = self._detector.detect(pixels)
        if len(found) > self._most:
            raise TooManyFaces(f"A frame has {len(found)} faces; at most {self._most} are accepted.")
        return found


class _Inbox:
    """Frames between who reads and who follows, in one event loop.

    Args:
        capacity: how many may wait.
        drop: a frame that finds it full takes the place of the oldest; otherwise it waits.
    """

    def __init__(self, capacity: int, *, drop: bool) -> None:
        self._capacity = capacity
        self._drop = drop
        self._frames: deque[Incoming] = deque()
        self._changed = asyncio.Condition()
        self._closed = False
        self._stopped = False
        self._error: Exception | None = None

    async def put(self, frame: Incoming) -> int:
        """Add a frame; how many were dropped for it."""
        async with self._changed:
            await self._changed.wait_for(self._room)
            if self._stopped:
                raise asyncio.CancelledError
            gone = 0
            if len(self._frames) >= self._capacity:
                oldest = self._frames.popleft()
                heir = self._frames[0] if self._frames else frame
                heir.dropped[:0] = [*oldest.dropped, oldest.id]
                gone = 1
            self._frames.append(frame)
            self._changed.notify_all()
            return gone

    def _room(self) -> bool:
        if self._stopped or len(self._frames) < self._capacity:
            return True
        return self._drop and len(self._frames[0].dropped) < _MOST_DROPPED

    def stop(self) -> None:
        """Nobody takes any more; who comes from now on is cancelled."""
        self._stopped = True

    async def close(self, error: Exception | None = None) -> None:
        """No more will come; ``error`` is for who takes them, after the last one."""
        async with self._changed:
            self._closed, self._error = True, error
            self._changed.notify_all()

    async def take(self) -> list[Incoming] | None:
        """All frames that wait, one at least; None once there will be no more."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._frames or self._closed or self._stopped)
            if self._stopped:
                raise asyncio.CancelledError
            if not self._frames:
                if self._error is not None:
                    raise self._error
                return None
            frames = list(self._frames)
            self._frames.clear()
            self._changed.notify_all()
            return frames


async def first_of(pending: asyncio.Queue[Any], worker: asyncio.Future[None]) -> Any:
    """The next item in order; or what went wrong with who puts them, once every item before was taken."""
    if pending.empty():
        get = asyncio.ensure_future(pending.get())
        try:
            await asyncio.wait({get, worker}, return_when=asyncio.FIRST_COMPLETED)
            if get.done():
                return get.result()
            if worker.done() and pending.empty():
                worker.result()
        finally:
            if not get.done():
                get.cancel()
    return await pending.get()
