"""The engine behind every door: one model, a bounded number of requests, one batching thread.

A request is *admitted* (or refused at once), its body is read, its work waits for one of a few worker threads, and the
crops of all workers meet in :class:`serving.batching.Batcher`. Doors (HTTP here) translate; they decide nothing.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar

import structlog

from serving import logs
from serving.batching import Batcher
from serving.metrics import Metrics
from serving.problems import CallerGone, InternalError, NotReady, Overloaded, TookTooLong, problem_of
from serving.settings import Settings

if TYPE_CHECKING:
    from torch import Tensor

    from mien.detection import Face
    from mien.model import Model
    from mien.passwords import Code
    from mien.pictures import FaceGeometry, Limits
    from serving.options import EditOptions

Operation = Literal["anonymize", "recover", "detect"]
Status = Literal["loading", "ready", "failed", "closed"]
T = TypeVar("T")

_CANCELLED: Final = "cancelled"
_FORMATS: Final[dict[str, Literal["PNG", "JPEG", "WEBP"]]] = {"png": "PNG", "jpeg": "JPEG", "webp": "WEBP"}


@dataclass
class Call:
    """One request on its way through the engine."""

    operation: Operation
    transport: str
    request_id: str
    facts: dict[str, int] = field(default_factory=dict)
    """Sizes for the log: bytes_in, bytes_out, faces."""
    started: float = field(default_factory=time.monotonic)
    abandoned: threading.Event = field(default_factory=threading.Event, repr=False)
    """Set when nobody waits for the answer any more, so that work not yet begun is dropped."""
    handed_over: bool = False
    """Whether a worker gives the slot back, rather than the end of the request."""

    def check(self) -> None:
        """Raise :class:`CallerGone` where going on would be for nobody."""
        if self.abandoned.is_set():
            raise CallerGone("Nobody waits for this answer.")


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


class Engine:
    """Loads the model in the background and runs requests on it.

    Args:
        settings: limits and where the model lies.
        metrics: told of every request.
        log: one line a request.
    """

    def __init__(
        self, settings: Settings, metrics: Metrics, log: structlog.typing.FilteringBoundLogger | None = None
    ) -> None:
        self.settings = settings
        self.metrics = metrics
        self.log = log or logs.configure()
        self.version = importlib.metadata.version("mien")
        self.status: Status = "loading"
        self.model: Model | None = None
        self._admitted = 0
        self._running = 0
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(settings.workers, thread_name_prefix="mien-work")
        self._batcher = Batcher(
            size=settings.batch_size,
            wait=settings.batch_wait_ms / 1000,
            company=lambda: self._running > 1,
            observe=metrics.batch_size.observe,
        )
        metrics.watch(queue_depth=lambda: max(0, self._admitted - self._running), inflight=lambda: self._running)

    # -- life ------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to load the model; :attr:`status` says how it went."""
        threading.Thread(target=self._load, name="mien-load", daemon=True).start()

    def _load(self) -> None:
        began = time.monotonic()
        try:
            import torch

            import mien

            if self.settings.cpu_threads:
                torch.set_num_threads(self.settings.cpu_threads)
            model = mien.load(self.settings.model, realm=self.settings.realm, device=self.settings.device)
            self._warm_up(model)
        except Exception as error:
            self.status = "failed"
            self.metrics.model_reloads.labels("failed").inc()
            # A model's errors speak of files and digests, never of a request.
            self.log.error("model_failed", model=str(self.settings.model), reason=str(error), **logs.describe(error))
            return
        self.model = model
        self.metrics.model_info.labels(digest=model.digest, version=self.version).set(1)
        self.metrics.model_reloads.labels("ok").inc()
        self.status = "ready"
        self.log.info(
            "model_ready",
            model=str(self.settings.model),
            model_digest=model.digest,
            seconds=round(time.monotonic() - began, 3),
        )

    @staticmethod
    def _warm_up(model: Model) -> None:
        """Something through every part, so that the first caller does not pay for lazy initialisation."""
        import numpy as np
        from PIL import Image

        size = model.crop_size
        code = model.code_for("anonymize", "warm-up")
        model.transform(np.zeros((1, size, size, 3), np.uint8), code[None])
        model.detect(Image.new("RGB", (160, 160)))

    def close(self) -> None:
        """Refuse new work, finish what is admitted, end the threads."""
        self.status = "closed"
        self._pool.shutdown(wait=True)
        self._batcher.close()

    # -- requests --------------------------------------------------------------------------------------------------

    @property
    def digest(self) -> str | None:
        """Digest of the model that is served; ``None`` until there is one."""
        return self.model.digest if self.model else None

    @contextmanager
    def request(self, operation: Operation, transport: str, request_id: str) -> Iterator[Call]:
        """The frame around one request: admits it, measures it, logs it, whatever happens inside.

        Raises:
            NotReady: no model is loaded.
            Overloaded: all workers are busy and the queue is full.
        """
        call = Call(operation, transport, request_id)
        outcome, unexpected = "ok", {}
        admitted = False
        try:
            self._admit()
            admitted = True
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
            if admitted and not call.handed_over:
                self._release()
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
                model_digest=self.digest,
                **call.facts,
                **unexpected,
            )

    def _admit(self) -> None:
        with self._lock:
            if self.status != "ready":
                reason = {"loading": "The model is being loaded.", "closed": "The service is shutting down."}
                raise NotReady(reason.get(self.status, "The model could not be loaded; the log says why."))
            if self._admitted >= self.settings.workers + self.settings.queue_size:
                raise Overloaded("All workers are busy and the queue is full. Try again in a moment.")
            self._admitted += 1

    def _release(self) -> None:
        with self._lock:
            self._admitted -= 1

    async def run(self, call: Call, work: Callable[[], T], gone: Callable[[], Awaitable[None]] | None = None) -> T:
        """Run blocking work of an admitted request on a worker thread.

        Args:
            call: the request.
            work: what to do; should ask ``call.check()`` between its steps.
            gone: waits until the caller has closed the connection.

        Raises:
            TookTooLong: the request's time is over. A worker that is in the middle of something keeps its slot until
                it is done, so that what runs stays bounded.
            CallerGone: the caller left.
        """
        future = asyncio.wrap_future(self._submit(call, work))
        watch = asyncio.ensure_future(gone()) if gone else None
        remaining = self.settings.request_timeout - (time.monotonic() - call.started)
        try:
            waiting: set[asyncio.Future[Any]] = {future} if watch is None else {future, watch}
            await asyncio.wait(waiting, timeout=max(0.0, remaining), return_when=asyncio.FIRST_COMPLETED)
            if future.done():
                return future.result()
            if watch is not None and watch.done():
                raise CallerGone("The caller closed the connection.")
            raise TookTooLong(f"The picture was not finished within {self.settings.request_timeout:g} seconds.")
        finally:
            call.abandoned.set()
            future.cancel()  # takes work that has not begun out of the queue
            if watch is not None:
                watch.cancel()

    def _submit(self, call: Call, work: Callable[[], T]) -> Future[T]:
        def task() -> T:
            with self._lock:
                self._running += 1
            try:
                call.check()
                return work()
            finally:
                with self._lock:
                    self._running -= 1

        try:
            future = self._pool.submit(task)
        except RuntimeError:  # the pool was shut down
            raise NotReady("The service is shutting down.") from None
        # From here on the slot belongs to the work, which may outlive the request; a cancelled future calls back too.
        call.handed_over = True
        future.add_done_callback(lambda _: self._release())
        return future

    # -- work, on a worker thread -----------------------------------------------------------------------------------

    def edit(self, call: Call, data: bytes, options: EditOptions) -> Edited:
        """Anonymize or recover the faces of an encoded picture.

        Raises:
            InvalidImage, ImageTooLarge, NoFaceFound, TooManyFaces, NoSuchFace, InvalidPassword, WrongModel: see
                :mod:`mien.errors`.
            CallerGone: nobody waits any more.
        """
        from mien import pictures

        operation: Literal["anonymize", "recover"] = "recover" if call.operation == "recover" else "anonymize"
        model = self._serving_model()
        limits = self._limits()
        picture = pictures.decode(data, limits=limits, keep_metadata=options.keep_metadata)
        call.check()
        code = model.code_for(operation, options.password.get_secret_value())
        call.check()
        plan = model.plan(picture, operation, faces=options.faces, limits=limits)
        steps = model.steps(picture, plan, operation)
        try:
            crops = next(steps)
            while True:
                call.check()
                crops = steps.send(self._batcher.transform(model.transform_float, crops, _repeat(code, len(crops))))
        except StopIteration as finished:
            done: pictures.Picture = finished.value
        call.check()
        encoded = pictures.encode(done, _FORMATS[options.format], quality=options.quality)
        call.facts["faces"] = len(plan.faces)
        return Edited(encoded, options.format, plan.faces, model.digest)

    def detect(self, call: Call, data: bytes) -> Detected:
        """Find the faces of an encoded picture.

        Raises:
            InvalidImage, ImageTooLarge, TooManyFaces, CallerGone: as :meth:`edit`.
        """
        from mien import pictures
        from mien.errors import TooManyFaces

        model = self._serving_model()
        limits = self._limits()
        picture = pictures.decode(data, limits=limits)
        call.check()
        faces = model.detect(picture)
        if len(faces) > limits.max_faces:
            raise TooManyFaces(f"The picture has {len(faces)} faces; at most {limits.max_faces} are accepted.")
        call.facts["faces"] = len(faces)
        return Detected(faces, (picture.width, picture.height), model.digest)

    def _serving_model(self) -> Model:
        if self.model is None:
            raise NotReady("No model is loaded.")
        return self.model

    def _limits(self) -> Limits:
        from mien.pictures import Limits

        return Limits(max_pixels=self.settings.max_pixels, max_faces=self.settings.max_faces)


def _repeat(code: Code, count: int) -> Tensor:
    import torch

    return torch.from_numpy(code).expand(count, -1)
