"""The engine behind every door: one model, a bounded number of requests, one batching thread.

A request is *admitted* (or refused at once), its body is read, its work waits for one of a few worker threads, and the
crops of all workers meet in :class:`serving.batching.Batcher`. Doors (HTTP, gRPC) translate; they decide nothing.

Reading a body takes no worker and no place in the queue, however slowly it arrives: uploads have bounds of their own.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar

import structlog

from mien import __version__
from serving import logs
from serving.batching import Batcher
from serving.keys import Gate
from serving.memory import Trimmer, one_arena
from serving.metrics import Metrics
from serving.models import Models, Served
from serving.problems import (
    CallerGone,
    InternalError,
    MalformedRequest,
    NotReady,
    Overloaded,
    TookTooLong,
    problem_of,
)
from serving.settings import Settings

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from mien.detection import Face
    from mien.model import Model
    from mien.passwords import Code, Workspace
    from mien.pictures import FaceGeometry, Geometry, Limits, Picture
    from serving.options import EditOptions

Operation = Literal["anonymize", "recover", "detect"]
Edit = Literal["anonymize", "recover"]
Status = Literal["loading", "ready", "failed", "closed"]
T = TypeVar("T")

_CANCELLED: Final = "cancelled"
_FORMATS: Final[dict[str, Literal["PNG", "JPEG", "WEBP"]]] = {"png": "PNG", "jpeg": "JPEG", "webp": "WEBP"}
# How much longer a recovered file becomes than the one received, of the bytes of the crops' pixels. The longest of ten
# codes was measured to take 0.05 of them more than the anonymized face (40 faces of LFW).
_ROOM: Final = 0.25
# Room for what surrounds the pixels of a PNG.
_CHUNKS: Final = 1024
# How soon a stream's frame that found the queue full asks again, seconds.
_AGAIN: Final = 0.01


@dataclass
class Call:
    """One request on its way through the engine."""

    operation: Operation
    transport: str
    request_id: str
    caller: str = ""
    """Name of the caller's key, or the caller's address."""
    facts: dict[str, int] = field(default_factory=dict)
    """Sizes for the log: bytes_in, bytes_out, faces."""
    started: float = field(default_factory=time.monotonic)
    deadline: float = float("inf")
    """``time.monotonic()`` at which nobody waits any more."""
    abandoned: threading.Event = field(default_factory=threading.Event, repr=False)
    """Set when nobody waits for the answer any more, so that work not yet begun is dropped."""
    served: Served | None = field(default=None, repr=False)
    """The model that does the work, once it has begun: the same for all of it, whatever comes meanwhile."""
    buffered: int = 0
    """Bytes of its body in memory."""
    ended: bool = False
    uploading: bool = False

    def check(self) -> None:
        """Raise :class:`CallerGone` where going on would be for nobody."""
        if self.abandoned.is_set():
            raise CallerGone("Nobody waits for this answer.")

    @property
    def model(self) -> Model:
        """The model of :attr:`served`."""
        if self.served is None:
            raise NotReady("No model is loaded.")
        return self.served.model


@dataclass(frozen=True)
class Edited:
    """An anonymized or recovered picture, encoded."""

    data: bytes = field(repr=False)
    format: Literal["png", "jpeg", "webp"]
    faces: tuple[FaceGeometry, ...]
    digest: str


@dataclass(frozen=True)
class Detected:
    """The faces of a picture."""

    faces: list[Face]
    size: tuple[int, int]
    """Width and height, pixels, upright."""
    digest: str


class Codes:
    """The codes of one request's or stream's faces, derived once from its passwords."""

    def __init__(self, usual: Code | None, single: dict[int, Code]) -> None:
        self.usual = usual
        self.single = single

    def of(self, faces: Sequence[int]) -> NDArray[np.bool_]:
        """bool ``[F, N]``.

        Raises:
            MalformedRequest: a face has none.
        """
        import numpy as np

        chosen = [self.single.get(n, self.usual) for n in faces]
        if any(code is None for code in chosen):
            raise MalformedRequest(_NO_PASSWORD)
        return np.stack([code for code in chosen if code is not None])


_NO_PASSWORD: Final = "A face has no password: give 'password' for the faces that 'passwords' does not name."  # noqa: S105


class Engine:
    """Loads the model in the background and runs requests on it.

    Args:
        settings: limits and where the model comes from.
        metrics: told of every request.
        log: one line a request.

    Raises:
        InvalidKeyFile: API keys are on, and their file is none.
    """

    def __init__(
        self, settings: Settings, metrics: Metrics, log: structlog.typing.FilteringBoundLogger | None = None
    ) -> None:
        self.settings = settings
        self.metrics = metrics
        self.log = log or logs.configure()
        self.version = __version__
        self.status: Status = "loading"
        self.gate = Gate(settings, self.log)
        self.models = Models(settings, metrics, self.log)
        one_arena()
        self._memory = Trimmer()
        self._uploading = 0
        self._buffered = 0
        self._waiting = 0
        self._running = 0
        self._streams = 0
        self._seconds = 0.5  # what a request's work takes, on average; see _backlog
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(settings.workers, thread_name_prefix="mien-work")
        # Argon2 releases the GIL and runs beside decoding and detection.
        self._kdf = ThreadPoolExecutor(settings.workers, thread_name_prefix="mien-kdf")
        self._workspaces: list[Workspace] = []  # of derivations, those that nobody uses now
        self._batcher = Batcher(
            size=settings.batch_size,
            wait=settings.batch_wait_ms / 1000,
            company=lambda: self._running > 1,
            observe=metrics.batch_size.observe,
        )
        metrics.watch(
            queue_depth=lambda: self._waiting,
            inflight=lambda: self._running,
            uploads=lambda: self._uploading,
            streams=lambda: self._streams,
        )

    # -- life ------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to load the model; :attr:`status` says how it went."""
        self._memory.start()
        self.models.start(self._loaded, self._failed)

    def _loaded(self) -> None:
        if self.status != "closed":
            self.status = "ready"

    def _failed(self) -> None:
        # A registry may come back; a folder that was named and has no model will not by itself.
        if self.status == "loading" and not self.settings.model.startswith("models:"):
            self.status = "failed"

    def close(self) -> None:
        """Refuse new work, finish what is admitted, end the threads."""
        self.status = "closed"
        self.models.close()
        self._memory.close()
        self._pool.shutdown(wait=True)
        self._kdf.shutdown(wait=True)
        self._batcher.close()

    # -- requests --------------------------------------------------------------------------------------------------

    @property
    def model(self) -> Model | None:
        """The model that serves; ``None`` until there is one."""
        return self.models.current.model if self.models.current else None

    @property
    def digest(self) -> str | None:
        """Its digest."""
        return self.models.current.digest if self.models.current else None

    @contextmanager
    def request(
        self,
        operation: Operation,
        transport: str,
        request_id: str,
        *,
        authorization: str | None = None,
        peer: str = "",
        uploading: bool = False,
    ) -> Iterator[Call]:
        """The frame around one request: admits it, measures it, logs it, whatever happens inside.

        Args:
            operation, transport, request_id: for metrics and log.
            authorization: what the caller shows, see :meth:`serving.keys.Gate.identify`.
            peer: the caller's address.
            uploading: its body is still to come, and counts among the uploads until :meth:`run`.

        Raises:
            Unauthenticated, RateLimited: see :class:`serving.keys.Gate`.
            NotReady: no model is loaded.
            Overloaded: the service has all the work it can take.
        """
        call = Call(operation, transport, request_id)
        call.deadline = call.started + self.settings.request_timeout
        outcome, unexpected = "ok", {}
        try:
            call.caller = self.gate.identify(authorization, peer)
            self.gate.admit(call.caller)
            self._admit(call, uploading)
            yield call
        except asyncio.CancelledError:
            outcome = _CANCELLED
            raise
        except Exception as error:
            problem = problem_of(error)
            outcome = problem.slug
            if problem.status == 500:
                unexpected = logs.describe(error)
                raise InternalError from None
            raise
        finally:
            self._end(call)
            seconds = time.monotonic() - call.started
            labels = {"operation": operation, "transport": transport}
            self.metrics.requests.labels(outcome=outcome, **labels).inc()
            self.metrics.seconds.labels(**labels).observe(seconds)
            if outcome == "ok":
                self.metrics.faces.labels(operation).inc(call.facts.get("faces", 0))
            (self.log.error if unexpected else self.log.info)(
                "request",
                request_id=request_id,
                **labels,
                outcome=outcome,
                seconds=round(seconds, 4),
                model_digest=call.served.digest if call.served else self.digest,
                # An address is a person's; a key's name is the operator's own.
                **({"caller": call.caller} if self.gate.named else {}),
                **call.facts,
                **unexpected,
            )

    def _admit(self, call: Call, uploading: bool) -> None:
        with self._lock:
            if self.status != "ready":
                reason = {"loading": "The model is being loaded.", "closed": "The service is shutting down."}
                raise NotReady(reason.get(self.status, "The model could not be loaded; the log says why."))
            # What could not be worked on anyway is refused before its body costs anything.
            if self._full():
                raise self._overloaded()
            if uploading:
                if self._uploading >= self.settings.max_uploads:
                    raise self._overloaded()
                self._uploading += 1
                call.uploading = True

    def receive(self, call: Call, count: int) -> None:
        """Count bytes of a body that were received and are kept until the request ends.

        Raises:
            Overloaded: all bodies together have become too many bytes.
        """
        with self._lock:
            if self._buffered + count > self.settings.max_buffered_bytes:
                raise self._overloaded()
            if not call.ended:  # a worker may still read for a call that was cancelled: nobody would give these back
                self._buffered += count
                call.buffered += count

    def release(self, call: Call, count: int) -> None:
        """Some of the bytes that :meth:`receive` counted are kept no longer; the call's end gave all of them back."""
        with self._lock:
            count = min(count, call.buffered)
            self._buffered -= count
            call.buffered -= count

    def _end(self, call: Call) -> None:
        with self._lock:
            self._buffered -= call.buffered
            call.buffered, call.ended = 0, True
            if call.uploading:
                self._uploading -= 1
                call.uploading = False

    def _full(self) -> bool:
        return self._waiting + self._running >= self.settings.workers + self.settings.queue_size

    def _overloaded(self) -> Overloaded:
        """With the time that what is waiting will take."""
        return Overloaded(
            "All workers are busy and the queue is full. Try again in a moment.",
            retry_after=min(30.0, (self._waiting + 1) * self._seconds / self.settings.workers),
        )

    async def run(self, call: Call, work: Callable[[], T], gone: Callable[[], Awaitable[None]] | None = None) -> T:
        """Run blocking work of an admitted request on a worker thread.

        Args:
            call: the request.
            work: what to do; should ask ``call.check()`` between its steps.
            gone: waits until the caller has closed the connection.

        Raises:
            Overloaded: the queue is full.
            TookTooLong: the request's time is over. A worker that is in the middle of something keeps its slot until
                it is done, so that what runs stays bounded.
            CallerGone: the caller left.
        """
        future = asyncio.wrap_future(self._submit(call, work))
        watch = asyncio.ensure_future(gone()) if gone else None
        try:
            waiting: set[asyncio.Future[Any]] = {future} if watch is None else {future, watch}
            remaining = max(0.0, call.deadline - time.monotonic())
            await asyncio.wait(waiting, timeout=remaining, return_when=asyncio.FIRST_COMPLETED)
            if future.done():
                return future.result()
            if watch is not None and watch.done():
                raise CallerGone("The caller closed the connection.")
            raise TookTooLong("The picture was not finished in the time there was for it.")
        finally:
            call.abandoned.set()
            future.cancel()  # takes work that has not begun out of the queue
            if watch is not None:
                watch.cancel()

    async def run_frame(self, call: Call, work: Callable[[], T]) -> T:
        """:meth:`run` for one of many pieces of work of a call: it waits where the queue is full, and the call stays.

        Raises:
            TookTooLong: the frame was not finished within the request timeout.
        """
        deadline = min(call.deadline, time.monotonic() + self.settings.request_timeout)
        while True:
            try:
                future = asyncio.wrap_future(self._submit(call, work))
                break
            except Overloaded:
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(_AGAIN)
        try:
            return await asyncio.wait_for(future, max(0.0, deadline - time.monotonic()))
        except TimeoutError:
            raise TookTooLong("The frame was not finished in the time there was for it.") from None

    def _submit(self, call: Call, work: Callable[[], T]) -> Future[T]:
        with self._lock:
            if call.uploading:
                self._uploading -= 1
                call.uploading = False
            if self._full():
                raise self._overloaded()
            self._waiting += 1
        begun = False

        def task() -> T:
            nonlocal begun
            begun = True
            with self._lock:
                self._waiting -= 1
                self._running += 1
            began = time.monotonic()
            try:
                call.check()
                if call.served is None:
                    call.served = self._serving()
                return work()
            finally:
                with self._lock:
                    self._running -= 1
                    self._seconds += 0.1 * (time.monotonic() - began - self._seconds)

        def done(_: Future[T]) -> None:
            if not begun:  # cancelled in the queue
                with self._lock:
                    self._waiting -= 1

        try:
            future = self._pool.submit(task)
        except RuntimeError:  # the pool was shut down
            with self._lock:
                self._waiting -= 1
            raise NotReady("The service is shutting down.") from None
        future.add_done_callback(done)
        return future

    @contextmanager
    def stream(self) -> Iterator[None]:
        """The place of an open stream.

        Raises:
            Overloaded: there are as many as may be.
        """
        with self._lock:
            if self._streams >= self.settings.max_streams:
                raise Overloaded(f"At most {self.settings.max_streams} streams may be open. Try again in a moment.")
            self._streams += 1
        try:
            yield
        finally:
            with self._lock:
                self._streams -= 1

    def _serving(self) -> Served:
        if self.models.current is None:
            raise NotReady("No model is loaded.")
        return self.models.current

    # -- work, on a worker thread -----------------------------------------------------------------------------------

    def edit(self, call: Call, data: bytes, options: EditOptions) -> Edited:
        """Anonymize or recover the faces of an encoded picture.

        Raises:
            InvalidImage, ImageTooLarge, NoFaceFound, TooManyFaces, NoSuchFace, InvalidPassword, WrongModel: see
                :mod:`mien.errors`.
            RateLimited: recovering, too many passwords were tried.
            CallerGone: nobody waits any more.
        """
        from mien import pictures

        operation = _edit_of(call)
        check_passwords(options)
        picture = pictures.decode(data, limits=self.limits, keep_metadata=options.keep_metadata)
        call.check()
        # Beside detection, and after decoding: what is no picture must not cost 64 MiB and a tenth of a second.
        codes = self._kdf.submit(self.codes, call, options)
        try:
            done, plan = self.transform(call, picture, operation, options, codes.result)
        finally:
            codes.cancel()
        call.check()
        encoded = self.encode(call, done, plan.faces, options, source=picture, received=len(data))
        call.facts["faces"] = len(plan.faces)
        return Edited(encoded, options.format, plan.faces, call.model.digest)

    def codes(self, call: Call, options: EditOptions) -> Codes:
        """Derive the codes of a request's passwords, each once.

        Raises:
            InvalidPassword: one cannot be used.
            RateLimited: recovering, too many were tried.
        """
        from mien.passwords import derive_code

        operation = _edit_of(call)
        usual = options.password.get_secret_value() if options.password is not None else None
        single = {n: word.get_secret_value() for n, word in (options.passwords or {}).items()}
        words = dict.fromkeys([*([usual] if usual is not None else []), *single.values()])
        if operation == "recover":
            self.gate.try_passwords(call.caller, len(words))
        model = call.model
        derived: dict[str, Code] = {}
        with self._workspace() as workspace:
            for word in words:
                call.check()
                # Alone it is the sooner done on several processors; in company each has work already.
                threads = 4 if self._running < 2 else 1
                code = derive_code(word, realm=model.realm, bits=model.bits, workspace=workspace, threads=threads)
                derived[word] = model.code_for(operation, code=code)
        return Codes(derived[usual] if usual is not None else None, {n: derived[word] for n, word in single.items()})

    @contextmanager
    def _workspace(self) -> Iterator[Workspace]:
        """One of as many as there are workers; more are made where streams begin beside them, and not kept."""
        from mien.passwords import Workspace

        with self._lock:
            mine = self._workspaces.pop() if self._workspaces else None
        mine = mine or Workspace()
        try:
            yield mine
        finally:
            with self._lock:
                if len(self._workspaces) < self.settings.workers:
                    self._workspaces.append(mine)

    def transform(
        self,
        call: Call,
        picture: Picture,
        operation: Edit,
        options: EditOptions,
        codes: Callable[[], Codes],
        *,
        geometry: Geometry | None = None,
    ) -> tuple[Picture, Geometry]:
        """Change the chosen faces of a decoded picture, in batches with everybody else's.

        Args:
            call, operation, options: of the request.
            picture: decoded.
            codes: gives the codes, once they are needed.
            geometry: the faces, where the caller knows them; found otherwise.

        Returns:
            The picture, and the faces that were changed.
        """
        from mien.model import subset

        model = call.model
        if geometry is not None:
            found = geometry
        elif options.aligned:
            found = model.find_aligned(picture, operation, limits=self.limits)
        else:
            found = model.find(picture, operation, limits=self.limits)
        chosen = _choose(found, operation, options)
        of_faces = codes().of(chosen)
        plan = subset(found, chosen)
        steps = model.steps(picture, plan, operation, aligned=options.aligned)
        try:
            crops = next(steps)
            while True:
                crops = steps.send(self.batch(call, crops.images, _rows(of_faces, crops.faces)))
        except StopIteration as finished:
            done: Picture = finished.value
            return done, plan

    def batch(self, call: Call, crops: Tensor, codes: Tensor) -> Tensor:
        """Transform crops with the call's model, in batches with everybody else's.

        Args:
            call: the request.
            crops: float ``[F, 3, S, S]`` in [-1, 1].
            codes: bool ``[F, N]``.

        Raises:
            CallerGone: nobody waits any more.
            ArithmeticError: what came out is not finite.
        """
        call.check()
        return self._batcher.transform((call.served or self._serving()).run, crops, codes)

    def encode(
        self,
        call: Call,
        done: Picture,
        faces: Sequence[FaceGeometry],
        options: EditOptions,
        *,
        source: Picture,
        received: int,
    ) -> bytes:
        """Encode a changed picture; a recovered PNG has a length that says nothing of the password.

        Faces under a wrong password compress less well than under the right one, so that who sees lengths alone, of an
        encrypted connection say, could tell which of several tries was right. The length given to the file depends on
        what was sent and on how much of it is faces, which are the same for every password.

        Args:
            call, options: of the request.
            done: the picture, changed.
            faces: those that were changed.
            source: the picture before.
            received: bytes of the file it came in.
        """
        from mien import pictures

        encoded = pictures.encode(done, _FORMATS[options.format], quality=options.quality)
        if call.operation != "recover" or options.format != "png":
            return encoded
        usual = received if source.format == "PNG" else len(pictures.encode(source))
        length = usual + round(_ROOM * 3 * _pixels_of(done, faces, call.model.crop_size)) + _CHUNKS
        while length < len(encoded) + _CHUNKS:
            length += length // 8
        return pictures.padded(encoded, length)

    def detect(self, call: Call, data: bytes) -> Detected:
        """Find the faces of an encoded picture.

        Raises:
            InvalidImage, ImageTooLarge, TooManyFaces, CallerGone: as :meth:`edit`.
        """
        from mien import pictures
        from mien.errors import TooManyFaces

        limits = self.limits
        picture = pictures.decode(data, limits=limits)
        call.check()
        faces = call.model.detect(picture)
        if len(faces) > limits.max_faces:
            raise TooManyFaces(f"The picture has {len(faces)} faces; at most {limits.max_faces} are accepted.")
        call.facts["faces"] = len(faces)
        return Detected(faces, (picture.width, picture.height), call.model.digest)

    @property
    def limits(self) -> Limits:
        """What a picture may cost."""
        from mien.pictures import Limits

        settings = self.settings
        return Limits(max_pixels=settings.max_pixels, max_side=settings.max_side, max_faces=settings.max_faces)


def check_passwords(options: EditOptions) -> None:
    """Refuse what no code can be derived from before anything is done for it.

    Raises:
        InvalidPassword: a password is empty, too long or not encodable.
    """
    from mien.passwords import check_password

    for word in (options.password, *(options.passwords or {}).values()):
        if word is not None:
            check_password(word.get_secret_value())


def _pixels_of(picture: Picture, faces: Sequence[FaceGeometry], crop_size: int) -> float:
    """Pixels of the picture that the crops cover, overlaps counted twice; at most those of the picture."""
    sides = (crop_size / math.hypot(face.matrix[0][0], face.matrix[1][0]) for face in faces)
    return min(sum(side * side for side in sides), picture.width * picture.height)


def _edit_of(call: Call) -> Edit:
    return "recover" if call.operation == "recover" else "anonymize"


def _choose(found: Geometry, operation: Edit, options: EditOptions) -> list[int]:
    """The faces that the options mean.

    Raises:
        NoSuchFace: see :class:`mien.model.Selection`.
        MalformedRequest: a chosen face has no password, and leaving it as it is was not asked for.
    """
    from mien.errors import NoSuchFace
    from mien.model import Selection

    named = options.passwords or {}
    if any(n >= len(found.faces) for n in named):
        raise NoSuchFace(f"Faces are numbered from 0, and the last one here is {len(found.faces) - 1}.")
    chosen = Selection(options.faces, options.boxes, options.exclude_faces, options.exclude_boxes).choose(found.faces)
    if options.password is None and not set(chosen) <= set(named):
        if operation == "anonymize" or options.faces is not None or options.boxes is not None:
            raise MalformedRequest(_NO_PASSWORD)
        # Nobody's face shows that should not when a recovery leaves it anonymized.
        chosen = [n for n in chosen if n in named]
        if not chosen:
            raise MalformedRequest(_NO_PASSWORD)
    return chosen


def _rows(codes: NDArray[np.bool_], faces: Sequence[int]) -> Any:
    import torch

    return torch.from_numpy(codes[list(faces)])
