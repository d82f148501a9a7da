"""A real S3 server (SeaweedFS) for the tests of a module; it takes seconds to start, so one a module at most.

``from tests.s3 import s3_server`` in a test module, and take the fixture. The AWS variables of the test process (and of
what it starts) point to the server for as long as the module runs.
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from storage.base import StorageError, Unreachable
from storage.local_s3 import Server, free_ports

BUCKET = "mien"


class S3Server:
    """A server that can be stopped and started again, on the same port and with its objects."""

    def __init__(self, folder: Path, start: Callable[..., subprocess.Popen[bytes]]) -> None:
        self._start_process = start
        self._process: subprocess.Popen[bytes] | None = None
        self._numbers = itertools.count()
        self._server = Server(folder, free_ports(1)[0])
        self.start()
        self._server.create_bucket(BUCKET)

    @property
    def endpoint(self) -> str:
        return self._server.endpoint

    @property
    def environment(self) -> dict[str, str]:
        return self._server.environment

    def start(self) -> None:
        """Call it in the main thread: the kernel ends a process with the *thread* that started it (PDEATHSIG)."""
        again = (self._server.folder / "ports.json").exists()
        for attempt in range(3):
            self._process = self._start_process(self._server.command(), log=self._server.folder / "weed.log")
            try:
                return self._server.ready(self._process)
            except Unreachable:
                # Between our choosing a free port and its use another process may have taken it.
                if again or attempt == 2 or self._process.poll() is None:
                    raise
                shutil.rmtree(self._server.folder / "data", ignore_errors=True)
                (self._server.folder / "ports.json").unlink(missing_ok=True)

    def stop(self) -> None:
        assert self._process is not None
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(timeout=30)

    def prefix(self) -> str:
        """A URL under which nothing is yet, in :data:`BUCKET`."""
        return f"s3://{BUCKET}/{next(self._numbers)}"

    def client(self) -> object:
        """boto3's, for what Mien's own storage layer should not be asked about itself."""
        import boto3

        return boto3.session.Session().client("s3", endpoint_url=self.endpoint)


@pytest.fixture(scope="module")
def s3_server(
    tmp_path_factory: pytest.TempPathFactory, module_background: Callable[..., subprocess.Popen[bytes]]
) -> Iterator[S3Server]:
    """A running server, and the AWS variables set for it."""
    folder = tmp_path_factory.mktemp("s3")
    try:
        server = S3Server(folder, module_background)
    except StorageError as error:
        if "no `weed`" in str(error):
            pytest.skip(str(error))
        raise
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        for name, value in server.environment.items():
            patch.setenv(name, value)
        # Whatever the machine's user has configured for the cloud stays out of it.
        for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
            patch.setenv(name, str(folder / "none"))
        yield server
    server.stop()
    shutil.rmtree(folder, ignore_errors=True)
