"""The BentoML service: ``bentoml serve serving.service:MienService``.

BentoML starts, supervises and stops the process; our own ASGI application answers every request. It is put in front of
BentoML's router as a middleware, because a mounted application would leave ``/readyz``, ``/metrics`` and unknown paths
to BentoML, whose readiness knows nothing of our model and whose errors have another format.
"""

from __future__ import annotations

import hashlib
import json
import os

# Before bentoml is imported: it reports usage to its makers otherwise.
os.environ.setdefault("BENTOML_DO_NOT_TRACK", "true")

from serving import metrics  # first of ours: see its docstring  # isort: skip

import bentoml
from starlette.types import ASGIApp, Receive, Scope, Send

from mien.errors import ModelError, ModelIntegrityError
from serving import app, hardening
from serving.engine import Engine
from serving.settings import Settings


class FrontDoor:
    """Sends HTTP requests to our application, and everything else (the lifespan) to BentoML."""

    current: ASGIApp | None = None

    def __init__(self, app: ASGIApp) -> None:
        self._bentoml = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and FrontDoor.current is not None:
            await FrontDoor.current(scope, receive, send)
        else:
            await self._bentoml(scope, receive, send)


@bentoml.service(
    name="mien",
    workers=1,  # one engine; more copies are more pods
    # Our own deadline (MIEN_REQUEST_TIMEOUT) answers in the one error format; BentoML's is only the net below it.
    traffic={"timeout": 600},
    metrics={"enabled": False},
    logging={"access": {"enabled": False}},
)
class MienService:
    """Holds the engine for as long as the process lives."""

    def __init__(self) -> None:
        hardening.forbid_core_dumps()
        self.engine = Engine(Settings(), metrics.Metrics())
        FrontDoor.current = app.build(self.engine)

    @bentoml.on_deployment  # type: ignore[untyped-decorator]
    @staticmethod
    def check() -> None:
        """Stop ``bentoml serve`` at once, with a clear message, where the model cannot be the right one."""
        check_model_files(Settings())

    @bentoml.on_startup  # type: ignore[untyped-decorator]
    def start(self) -> None:
        self.engine.start()

    @bentoml.on_shutdown  # type: ignore[untyped-decorator]
    def stop(self) -> None:
        self.engine.close()


MienService.add_asgi_middleware(FrontDoor)  # type: ignore[attr-defined]


def check_model_files(settings: Settings) -> None:
    """Compare the model's weights with the digest its config names, without loading either.

    Raises:
        ModelError: no model at ``settings.model``.
        ModelIntegrityError: the weights are not those the config names.
    """
    try:
        named = json.loads((settings.model / "config.json").read_text())["digest"]
        with open(settings.model / "model.safetensors", "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"no usable model in {settings.model} (MIEN_MODEL): {error}") from error
    if digest != named:
        raise ModelIntegrityError(f"the weights in {settings.model} are not those its config.json names")
