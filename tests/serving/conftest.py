"""One real service for the session: ``bentoml serve`` in a process of its own, with a small real model."""

from __future__ import annotations

import asyncio
import ctypes
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import structlog

from bench.models import untrained

ROOT = Path(__file__).resolve().parents[2]

#: Limits small enough that a test reaches them.
LIMITS = {
    "MIEN_WORKERS": "2",
    "MIEN_QUEUE_SIZE": "2",
    "MIEN_MODEL_POLL": "0.5",
    "MIEN_MAX_BODY_BYTES": str(4 * 1024 * 1024),
    "MIEN_MAX_FACES": "3",
    "MIEN_STALL_TIMEOUT": "3",
    "MIEN_CPU_THREADS": "1",
}
COMMAND = [sys.executable, "-m", "bentoml", "serve", "serving.service:MienService"]
OPTIONS = ["--host", "127.0.0.1", "--working-dir", str(ROOT)]


@dataclass
class Service:
    """A running service and everything it may write to."""

    process: subprocess.Popen[bytes]
    url: str
    home: Path
    log: Path
    grpc_port: int

    @property
    def grpc(self) -> str:
        """Where gRPC is served: ``host:port``."""
        return f"127.0.0.1:{self.grpc_port}"

    def client(self, timeout: float = 60) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=timeout, trust_env=False)

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])

    @property
    def worker(self) -> int:
        """Process id of the one process that serves."""
        listed = subprocess.run(
            ["ps", "-o", "pid=,args=", "--ppid", str(self.process.pid)], capture_output=True, text=True, check=True
        )
        return next(int(line.split()[0]) for line in listed.stdout.splitlines() if "service" in line)

    def printed(self) -> str:
        return self.log.read_text(errors="replace")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return untrained(tmp_path_factory.mktemp("model") / "tiny", 7)


@contextmanager
def _serve(model: Path, folder: Path, *, under: Sequence[str] = (), **environment: str) -> Iterator[Service]:
    """Start ``bentoml serve`` and wait until it is ready; stopped by SIGTERM at the end.

    Args:
        model: what it serves.
        folder: empty; its home, its temporary folder and its log.
        under: a command that runs it in its own process id, as ``strace -D``.
        environment: settings.
    """
    home = folder / "home"
    (home / "tmp").mkdir(parents=True)
    log = folder / "log.txt"
    port, grpc_port = free_ports(2)
    with open(log, "wb") as output:
        process = subprocess.Popen(
            # Its output goes through a pipe, as in a container: a test forbids the process to write to files.
            ["bash", "-c", 'exec "$@" > >(exec cat) 2>&1', "serve", *under, *COMMAND, "--port", str(port), *OPTIONS],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_die_with_parent,
            env={
                **os.environ,
                **LIMITS,
                "MIEN_MODEL": str(model),
                "MIEN_GRPC_PORT": str(grpc_port),
                "BENTOML_HOME": str(home / "bentoml"),
                "HOME": str(home),
                "TMPDIR": str(home / "tmp"),
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": str(ROOT),
                "PYTHONDONTWRITEBYTECODE": "1",
                **environment,
            },
        )
    service = Service(process, f"http://127.0.0.1:{port}", home, log, grpc_port)
    try:
        deadline = time.monotonic() + 150
        with service.client(timeout=5) as client:
            while True:
                assert process.poll() is None, f"the service ended:\n{service.printed()}"
                assert time.monotonic() < deadline, f"the service is not ready:\n{service.printed()}"
                try:
                    if client.get("/readyz").status_code == 200:
                        break
                except httpx.TransportError:
                    pass
                time.sleep(0.3)
        yield service
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(30)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)


def free_ports(count: int) -> list[int]:
    """Ports nobody listens at right now, all different."""
    with ExitStack() as probes:
        sockets = [probes.enter_context(socket.socket()) for _ in range(count)]
        for probe in sockets:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in sockets]


def _die_with_parent() -> None:
    """Linux: the kernel ends the process when pytest dies, even of SIGKILL (as tests/conftest.py has it)."""
    PR_SET_PDEATHSIG = 1
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


@pytest.fixture(scope="session")
def service(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with _serve(tiny_model, tmp_path_factory.mktemp("service")) as running:
        yield running


@pytest.fixture
def client(service: Service) -> Iterator[httpx.Client]:
    with service.client() as client:
        yield client


@pytest.fixture(scope="session")
def astronaut() -> bytes:
    """A photo with one face, PNG: the one that scikit-image carries."""
    from skimage import data

    return encoded(data.astronaut())


@pytest.fixture(scope="session")
def start_service() -> Callable[..., AbstractContextManager[Service]]:
    """Starts another service: ``start_service(model, empty folder, **environment)``."""
    return _serve


@pytest.fixture(scope="session")
def encode() -> Callable[..., bytes]:
    """Pixels to a file: ``encode(array, "JPEG", quality=90)``."""
    return encoded


def encoded(pixels: object, form: str = "PNG", **options: object) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


# -- an engine in the test's own process ----------------------------------------------------------------------------


class Lines:
    """Collects what is logged."""

    def __init__(self) -> None:
        self.text: list[str] = []
        self.logger = structlog.wrap_logger(
            self,
            processors=[structlog.processors.add_log_level, structlog.processors.JSONRenderer()],
            wrapper_class=structlog.make_filtering_bound_logger("info"),
        )

    def msg(self, message: str) -> None:
        self.text.append(message)

    info = error = warning = msg

    def all(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.text]

    def of(self, event: str) -> list[dict[str, Any]]:
        return [line for line in self.all() if line["event"] == event]


@dataclass
class Running:
    """An engine behind its real HTTP application, without a server."""

    engine: Any
    lines: Lines

    def ask(self, method: str, path: str, **options: Any) -> httpx.Response:
        from serving import app

        async def send() -> httpx.Response:
            transport = httpx.ASGITransport(app.build(self.engine), raise_app_exceptions=True)
            async with httpx.AsyncClient(transport=transport, base_url="http://mien", timeout=60) as client:
                return await client.request(method, path, **options)

        return asyncio.run(send())

    def metrics(self) -> str:
        return str(self.engine.metrics.render().decode())


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


@pytest.fixture
def run_engine() -> Iterator[Callable[..., Running]]:
    """Starts engines that are closed at the end: ``run_engine(model, workers=1)``; waits until one knows its model."""
    from serving.engine import Engine
    from serving.metrics import Metrics
    from serving.settings import Settings

    started: list[Any] = []

    def start(model: object, *, wait: bool = True, **settings: Any) -> Running:
        lines = Lines()
        usual = {"workers": 1, "cpu_threads": 1, "model_poll": 0}
        engine = Engine(Settings(model=model, **{**usual, **settings}), Metrics(), lines.logger)
        started.append(engine)
        engine.start()
        if wait:
            wait_for(lambda: engine.status != "loading", 120)
        return Running(engine, lines)

    yield start
    for engine in started:
        engine.close()


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> Iterator[Any]:
    """One that is ready, shared by the tests of a file: they put back what they exchange."""
    from serving.engine import Engine
    from serving.metrics import Metrics
    from serving.settings import Settings

    engine = Engine(Settings(model=tiny_model, workers=2, batch_wait_ms=0), Metrics())
    engine.start()
    wait_for(lambda: engine.status != "loading", 90)
    assert engine.status == "ready"
    yield engine
    engine.close()


@pytest.fixture(scope="session")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another one than ``tiny_model``."""
    return untrained(tmp_path_factory.mktemp("model") / "other", 8)


@pytest.fixture(scope="session")
def exchange() -> Callable[[Path, Path], None]:
    """Puts one model folder in the place of another as a deployment would: config last."""

    def put(new: Path, place: Path) -> None:
        place.mkdir(exist_ok=True)
        for name in ("README.md", "model.safetensors", "config.json"):
            scratch = place / f".{name}"
            shutil.copyfile(new / name, scratch)
            scratch.replace(place / name)

    return put


@pytest.fixture(scope="session")
def wait_until() -> Callable[..., None]:
    """``wait_until(condition, seconds=60)``."""
    return wait_for


@pytest.fixture(scope="module")
def free_port() -> int:
    return free_ports(1)[0]
