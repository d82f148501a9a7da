"""The BentoML service: ``bentoml serve serving.service:MienService``.

BentoML starts, supervises and stops the process; our own ASGI application answers every request. It is put in front of
BentoML's, because a mounted application would leave ``/readyz``, ``/metrics`` and unknown paths to BentoML, whose
readiness knows nothing of our model and whose errors have another format.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING

# Before bentoml is imported: it reports usage to its makers otherwise.
os.environ.setdefault("BENTOML_DO_NOT_TRACK", "true")

from serving import metrics  # first of ours: see its docstring  # isort: skip

import bentoml
import click
from starlette.types import ASGIApp, Receive, Scope, Send

from mien.errors import MienError, ModelError, ModelIntegrityError
from serving import app, hardening
from serving.engine import Engine
from serving.settings import Settings

if TYPE_CHECKING:
    from serving.grpc_door import GrpcDoor


class FrontDoor:
    """Sends HTTP requests to our application, and everything else (the lifespan) to BentoML.

    BentoML puts a middleware behind its own, of which the one with the timeout keeps every request's context until the
    timeout is over, though answered long ago, and one makes spans that nobody reads. So when the service starts, this
    one takes the place of the whole stack.
    """

    current: ASGIApp | None = None

    def __init__(self, app: ASGIApp) -> None:
        self._bentoml = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and FrontDoor.current is not None:
            await FrontDoor.current(scope, receive, send)
        else:
            if scope["type"] == "lifespan":
                scope["app"].middleware_stack = self
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
        self.grpc: GrpcDoor | None = None
        FrontDoor.current = app.build(self.engine)

    @bentoml.on_deployment  # type: ignore[untyped-decorator]
    @staticmethod
    def check() -> None:
        """Stop ``bentoml serve`` at once, with a clear message, where it could not serve or should not."""
        settings = Settings()
        hardening.be_supervisor()
        check_address(settings, _host_of_command())
        check_model_files(settings)

    @bentoml.on_startup  # type: ignore[untyped-decorator]
    async def start(self) -> None:
        hardening.end_with_supervisor()
        settings = self.engine.settings
        host = _host_of_socket()
        # Again, for who starts the service without the command that checks.
        check_address(settings, host)
        self.engine.start()
        if settings.grpc_port is not None:
            # Here, because grpc is not needed without.
            from serving.grpc_door import GrpcDoor

            bound = settings.grpc_host or host or "127.0.0.1"
            check_address(settings, bound)
            self.grpc = GrpcDoor(self.engine)
            await self.grpc.open(bound, settings.grpc_port)

    @bentoml.on_shutdown  # type: ignore[untyped-decorator]
    async def stop(self) -> None:
        # HTTP has drained by now; gRPC drains while the engine still works.
        if self.grpc is not None:
            await self.grpc.close()
        await asyncio.to_thread(self.engine.close)


MienService.add_asgi_middleware(FrontDoor)  # type: ignore[attr-defined]


class NotGuarded(MienError):
    """Other machines would reach the service, and anybody on them could use it."""


def check_address(settings: Settings, host: str | None) -> None:
    """Refuse an address that other machines reach where there are no API keys.

    Args:
        settings: of the service.
        host: what is bound, None where it is not known.

    Raises:
        NotGuarded: it must not be.
    """
    if host is None or hardening.is_local(host) or settings.api_keys is not None or settings.insecure:
        return
    raise NotGuarded(
        f"{host} can be reached from other machines and there are no API keys. Set MIEN_API_KEYS to a file of keys "
        "(python -m serving.keys NAME), bind 127.0.0.1, or set MIEN_INSECURE=true where something in front guards it."
    )


def _host_of_command() -> str | None:
    """What ``bentoml serve`` was told to bind."""
    context = click.get_current_context(silent=True)
    while context is not None:
        if context.params.get("host"):
            return str(context.params["host"])
        context = context.parent
    return None


def _host_of_socket() -> str | None:
    """The address of the socket that BentoML hands to its worker by number (``--fd``)."""
    try:
        number = int(sys.argv[sys.argv.index("--fd") + 1])
        with socket.socket(fileno=os.dup(number)) as bound:
            return str(bound.getsockname()[0])
    except (ValueError, IndexError, OSError):
        return None


def check_model_files(settings: Settings) -> None:
    """Compare the weights in a model's folder with the digest its config names, without loading either.

    A model in a registry is verified when it has been fetched.

    Raises:
        ModelError: no model at ``settings.model``.
        ModelIntegrityError: the weights are not those the config names.
    """
    if settings.model.startswith("models:"):
        return
    folder = Path(settings.model)
    try:
        named = json.loads((folder / "config.json").read_text())["digest"]
        with open(folder / "model.safetensors", "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"no usable model in {folder} (MIEN_MODEL): {error}") from error
    if digest != named:
        raise ModelIntegrityError(f"the weights in {folder} are not those its config.json names")
