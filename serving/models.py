"""The model that is served, and how another one takes its place while requests run.

A thread looks every ``MIEN_MODEL_POLL`` seconds where the model comes from: a folder whose config changed, a registry
alias that moved. What is new is fetched, verified, loaded and warmed up beside the one that serves, and takes over by
one assignment: requests under way finish with the model they began with, later ones begin with the new. Whatever goes
wrong leaves the old model serving and is said in the log, in the metrics and by ``/v1/model``.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

import structlog

from serving import logs, memory
from serving.metrics import Metrics
from serving.settings import Settings

if TYPE_CHECKING:
    from mien.detection import Detector
    from mien.model import Model
    from serving.runner import Runner

# What failed is tried again ever more rarely, up to this.
_LONGEST_PAUSE: Final = 600.0
# A service that has no model yet asks a registry that does not answer more often than it polls.
_FIRST_PAUSE: Final = 2.0


@dataclass(frozen=True)
class Served:
    """A model that is ready for requests."""

    model: Model = field(repr=False)
    run: Runner = field(repr=False)
    source: str
    """Where it came from: ``models:/mien/3``, or a folder."""
    version: str
    """``3``, or the folder's name."""
    since: datetime

    @property
    def digest(self) -> str:
        return self.model.digest


class Source(Protocol):
    """Where models come from."""

    def look(self) -> tuple[str, str]:
        """What is there now: a token that changes when the model does, and the version's name.

        Raises:
            MienError: it cannot be told.
        """
        ...

    def fetch(self, token: str) -> Path:
        """The folder of the model that :meth:`look` named.

        Raises:
            MienError: it cannot be had.
        """
        ...

    def describe(self, token: str) -> str:
        """The token for people."""
        ...


class FolderSource:
    """A folder. It is another model when its config, which names the weights' digest, is another one."""

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)

    def look(self) -> tuple[str, str]:
        from mien import store
        from mien.errors import ModelError

        try:
            text = (self._folder / store.CONFIG).read_bytes()
        except OSError as error:
            raise ModelError(
                f"no model in {self._folder}: cannot read {store.CONFIG} ({error.strerror}); see MIEN_MODEL"
            ) from None
        return hashlib.sha256(text).hexdigest(), self._folder.resolve().name or "folder"

    def fetch(self, token: str) -> Path:
        return self._folder

    def describe(self, token: str) -> str:
        return str(self._folder)


class RegistrySource:
    """A registered model; an alias is another model when it has moved."""

    def __init__(self, uri: str, cache: Path | None) -> None:
        self._uri = uri
        self._cache = cache / "models" if cache is not None else None

    def look(self) -> tuple[str, str]:
        from storage import registry

        version = registry.resolve(self._uri)
        return version.uri, version.number

    def fetch(self, token: str) -> Path:
        from storage import registry

        return registry.fetch(token, cache=self._cache)

    def describe(self, token: str) -> str:
        return token


def source_of(settings: Settings) -> Source:
    """The source that ``settings.model`` names."""
    if settings.model.startswith("models:"):
        return RegistrySource(settings.model, settings.cache)
    return FolderSource(settings.model)


class Models:
    """Holds what is served and follows its source.

    Args:
        settings: where the model comes from and how it runs.
        metrics: told of every load.
        log: one line for each.
    """

    def __init__(self, settings: Settings, metrics: Metrics, log: structlog.typing.FilteringBoundLogger) -> None:
        self._settings = settings
        self._metrics = metrics
        self._log = log
        self._source = source_of(settings)
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self._detector: Detector | None = None
        self._token: str | None = None
        self._bad: tuple[str, float, float] | None = None  # token, when to try it again, pause after that
        self.current: Served | None = None
        self.failure: dict[str, Any] | None = None
        """The last look or load that failed, until one succeeds: ``at``, ``source``, ``reason``."""

    def start(self, loaded: Callable[[], None], failed: Callable[[], None]) -> None:
        """Begin to load and to follow.

        Args:
            loaded: called when there is a model for the first time.
            failed: called when a folder that was named has no usable one, and there is none yet.
        """

        def run() -> None:
            pause = _FIRST_PAUSE
            while not self._closing.is_set():
                before = self.current
                ok = self.look()
                if before is None:
                    (loaded if ok else failed)()
                if self.current is None:
                    wait, pause = pause, min(pause * 2, 30.0)
                elif self._settings.model_poll:
                    wait = self._settings.model_poll
                else:
                    return
                self._closing.wait(wait)

        self._thread = threading.Thread(target=run, name="mien-models", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop following; a load under way is left to end with the process."""
        self._closing.set()
        if self._thread is not None:
            self._thread.join(1.0)

    @property
    def follows(self) -> bool:
        """Whether another model may come."""
        return self._settings.model_poll > 0

    def look(self) -> bool:
        """One look at the source, and what follows from it.

        Returns:
            Whether the source's model is the one that serves now.
        """
        began = time.monotonic()
        token = None
        try:
            token, version = self._source.look()
            if token == self._token:
                self._settle()
                return True
            if self._bad is not None and self._bad[0] == token and began < self._bad[1]:
                return False
            served = self._prepare(token, version)
        except Exception as error:
            self._fail(token, began, error)
            return False
        before, self.current, self._token = self.current, served, token
        self._settle()
        memory.set_aside()
        self._metrics.model(served.digest, served.version)
        self._metrics.model_reloads.labels("ok").inc()
        self._log.info(
            "model_ready" if before is None else "model_exchanged",
            model=served.source,
            model_version=served.version,
            model_digest=served.digest,
            seconds=round(time.monotonic() - began, 3),
            **({"before": before.digest} if before else {}),
        )
        return True

    def _settle(self) -> None:
        self._bad = self.failure = None
        self._metrics.model_stale.set(0)

    def _fail(self, token: str | None, began: float, error: Exception) -> None:
        where = self._source.describe(token) if token else self._settings.model
        # A model's errors speak of files, addresses and digests, never of a request.
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        self.failure = {"at": _now().isoformat(timespec="seconds"), "source": where, "reason": reason}
        if token:
            pause = self._bad[2] if self._bad and self._bad[0] == token else max(self._settings.model_poll, 1.0)
            self._bad = (token, began + pause, min(pause * 2, _LONGEST_PAUSE))
        self._metrics.model_stale.set(1)
        self._metrics.model_reloads.labels("failed").inc()
        self._log.error("model_failed", model=where, reason=reason, **logs.describe(error))

    def _prepare(self, token: str, version: str) -> Served:
        """Fetch, verify, load and warm up."""
        import numpy as np
        import torch

        from mien.detection import MTCNNDetector
        from mien.model import load
        from serving.runner import Runner

        settings = self._settings
        if settings.cpu_threads:
            torch.set_num_threads(settings.cpu_threads)
        folder = self._source.fetch(token)
        model = load(folder, realm=settings.realm, device=settings.device, detector=self._detector)
        if self._detector is None:
            # One for all models: loading it takes longer than loading them.
            self._detector = MTCNNDetector(device=str(model.device))
            model.detector = self._detector
            self._detector.detect(np.zeros((160, 160, 3), np.uint8))
        runner = Runner(
            model,
            batch_size=settings.batch_size,
            precision=settings.precision,
            channels_last=settings.channels_last,
            compile=settings.compile,
            cuda_graphs=settings.cuda_graphs,
        )
        runner.warm_up()
        model.code_for("anonymize", "warm-up")
        return Served(model, runner, self._source.describe(token), version, _now())


def _now() -> datetime:
    return datetime.now(UTC)
