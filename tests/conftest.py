"""Shared fixtures. Anything that needs ``../shared`` says so when it skips."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Some machines forbid bytecode caches; then each of the hundreds of processes these tests start compiles torch anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
os.environ.setdefault("PYTHONPYCACHEPREFIX", str(ROOT / ".cache" / "pycache"))


@pytest.fixture(autouse=True)
def _patience() -> Iterator[None]:
    """How long MLflow's client waits is set for a whole process by whoever calls it, and is not the next test's."""
    before = {name: value for name, value in os.environ.items() if name.startswith("MLFLOW_HTTP_")}
    yield
    for name in [name for name in os.environ if name.startswith("MLFLOW_HTTP_")]:
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real faces and recogniser weights that lies beside the project (``MIEN_SHARED``)."""
    folder = Path(os.environ.get("MIEN_SHARED", ROOT.parent / "shared"))
    if not (folder / "weights").is_dir() or not (folder / "data").is_dir():
        pytest.skip(f"no data and weights at {folder} (set MIEN_SHARED)")
    return folder


Start = Callable[..., "subprocess.Popen[bytes]"]
"""``start(arguments, *, log, env=None, cwd=ROOT)``: a process whose output goes to the file ``log``."""


@pytest.fixture
def background() -> Iterator[Start]:
    """Start processes that are gone, with all they started, when the test ends, however it ends."""
    with _processes() as start:
        yield start


@pytest.fixture(scope="module")
def module_background() -> Iterator[Start]:
    """:func:`background` for what the tests of a module share."""
    with _processes() as start:
        yield start


@contextmanager
def _processes() -> Iterator[Start]:
    started: list[subprocess.Popen[bytes]] = []

    def start(
        arguments: Sequence[str | os.PathLike[str]],
        *,
        log: Path,
        env: Mapping[str, str] | None = None,
        cwd: Path = ROOT,
    ) -> subprocess.Popen[bytes]:
        # Never pytest's own pipes: a process that outlived pytest would keep them open, and whoever reads them waiting.
        with open(log, "ab") as output:
            process = subprocess.Popen(
                arguments,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=env,
                cwd=cwd,
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )
        started.append(process)
        return process

    try:
        yield start
    finally:
        for process in reversed(started):
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(timeout=30)


def _die_with_parent() -> None:
    """Linux: the kernel kills this process when pytest dies, even of SIGKILL."""
    PR_SET_PDEATHSIG = 1
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Acceptance runs of minutes are asked for; each has a shortened twin that always runs."""
    if os.environ.get("MIEN_SOAK") == "1":
        return
    skip = pytest.mark.skip(reason="minutes of acceptance run: MIEN_SOAK=1, or `make soak`")
    for item in items:
        if "soak" in item.keywords:
            item.add_marker(skip)
