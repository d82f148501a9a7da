"""kubectl and helm against the cluster of the current kubeconfig. Standard library alone, like all of tests/e2e here.

What runs inside the cluster (tests/e2e/pods) runs in the project's own images and may use what is in them.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

from k8s import tools
from tests.e2e import objects

ROOT: Final = Path(__file__).resolve().parents[2]
CHART: Final = ROOT / "helm" / "mien"
RELEASE: Final = "mien"

Object = dict[str, Any]
T = TypeVar("T")


class NoCluster(Exception):
    """There is no cluster to talk to, or no program to do so; the message says which."""


class Failed(Exception):
    """Something did not hold; the message says what."""


class Skipped(Exception):
    """The cluster lacks what the step is about; the message says what."""


@dataclass(frozen=True)
class Cluster:
    """A cluster, and the images that it can pull (or has)."""

    kubectl: str
    helm: str
    serve_image: str
    train_image: str
    values: tuple[str, ...] = ()
    """More values files for every installation: pull secrets, labels that this cluster's Prometheus wants."""
    keep: bool = False
    """Leave the namespaces of steps that failed, to look at."""

    @classmethod
    def connect(cls, *, keep: bool = False) -> Cluster:
        """The cluster of the kubeconfig.

        Raises:
            NoCluster: see there.
        """
        try:
            kubectl, helm = (str(tools.find(name)) for name in ("kubectl", "helm"))  # type: ignore[arg-type]
        except tools.ToolMissing as error:
            raise NoCluster(str(error)) from error
        found = subprocess.run(
            [kubectl, "version", "--output", "json", "--request-timeout", "10s"],
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        if found.returncode != 0:
            raise NoCluster((found.stderr.strip().splitlines() or ["kubectl found no server"])[-1])
        extra = os.environ.get("E2E_VALUES", "")
        return cls(
            kubectl,
            helm,
            os.environ.get("E2E_SERVE_IMAGE", "mien-serve:0.1.0"),
            os.environ.get("E2E_TRAIN_IMAGE", "mien-train:0.1.0"),
            tuple(str(Path(name).resolve()) for name in extra.split(os.pathsep) if name),
            keep,
        )

    def run(
        self, program: str, *arguments: str, text: str | None = None, timeout: float = 300
    ) -> subprocess.CompletedProcess[str]:
        """Run kubectl or helm, whatever the exit code."""
        command = [{"kubectl": self.kubectl, "helm": self.helm}[program], *arguments]
        return subprocess.run(
            command, input=text, capture_output=True, text=True, timeout=timeout, check=False, cwd=ROOT
        )

    def ask(self, *arguments: str, text: str | None = None, timeout: float = 300) -> str:
        """What kubectl prints.

        Raises:
            Failed: it exits with another code than 0.
        """
        done = self.run("kubectl", *arguments, text=text, timeout=timeout)
        if done.returncode != 0:
            raise Failed(f"kubectl {' '.join(arguments)}: {done.stderr.strip()}")
        return done.stdout

    def apply(self, *made: Object) -> None:
        """Server-side, so that field errors are the server's.

        Raises:
            Failed: the server refuses one.
        """
        self.ask("apply", "--server-side", "-f", "-", text=json.dumps(objects.listed(*made)))

    def get(self, *arguments: str) -> Object:
        """``kubectl get ... -o json``; raises :class:`Failed`."""
        found: Object = json.loads(self.ask("get", *arguments, "--output", "json"))
        return found

    def has(self, *arguments: str) -> bool:
        """Whether ``kubectl get ...`` finds it."""
        return self.run("kubectl", "get", *arguments).returncode == 0

    @contextmanager
    def namespace(self, step: str) -> Iterator[str]:
        """A fresh namespace that admits restricted pods alone; gone afterwards, with all that is in it."""
        name = f"mien-e2e-{step}-{secrets.token_hex(3)}"
        self.apply(objects.namespace(name))
        failed = True
        try:
            yield name
            failed = False
        except (Failed, subprocess.TimeoutExpired):
            self._tell(name)
            raise
        except Skipped:
            failed = False
            raise
        finally:
            if not (failed and self.keep):
                self.run("kubectl", "delete", "namespace", name, "--wait=true", "--timeout=180s")

    def _tell(self, namespace: str) -> None:
        """What a person would look at first, on stderr."""
        for arguments in (
            ("get", "pods", "--output", "wide"),
            ("get", "events", "--sort-by", ".lastTimestamp"),
            ("logs", "--selector", f"app.kubernetes.io/instance={RELEASE}", "--tail", "20", "--prefix"),
        ):
            done = self.run("kubectl", *arguments, "--namespace", namespace)
            tail = "\n".join((done.stdout or done.stderr).strip().splitlines()[-20:])
            sys.stderr.write(f"-- kubectl {' '.join(arguments)}\n{tail}\n")

    # -- the chart -----------------------------------------------------------------------------------------------------

    def upgrade(self, namespace: str, values: Object | None = None) -> subprocess.CompletedProcess[str]:
        """``helm upgrade --install --wait`` with small pods of the image under test, whatever the exit code."""
        merged = objects.merged(objects.values(self.serve_image), values or {})
        files = [word for name in self.values for word in ("--values", name)]
        return self.run(
            "helm", "upgrade", "--install", RELEASE, str(CHART), "--namespace", namespace, *files, "--values", "-",
            "--wait", "--timeout", "5m", text=json.dumps(merged), timeout=400,
        )  # fmt: skip

    def install(self, namespace: str, values: Object | None = None) -> None:
        """:meth:`upgrade`; raises :class:`Failed` where Helm does not report success."""
        done = self.upgrade(namespace, values)
        if done.returncode != 0:
            raise Failed(f"helm upgrade --install: {done.stderr.strip()}")

    def pods(self, namespace: str, component: str = "server") -> list[Object]:
        """The service's pods that are not on their way out."""
        selector = f"app.kubernetes.io/instance={RELEASE},app.kubernetes.io/component={component}"
        found = self.get("pods", "--namespace", namespace, "--selector", selector)["items"]
        return [pod for pod in found if "deletionTimestamp" not in pod["metadata"]]

    # -- programs in pods ----------------------------------------------------------------------------------------------

    def start(self, namespace: str, name: str, program: str, *arguments: str, image: str | None = None) -> None:
        """Start ``python tests/e2e/pods/PROGRAM ARGUMENTS`` in a pod."""
        made = objects.program(namespace, name, image or self.serve_image, program, arguments)
        self.apply(*made)

    def finish(self, namespace: str, name: str, timeout: float = 180) -> Object:
        """Wait for such a pod; its last line, a JSON object.

        Raises:
            Failed: the program did, or has not ended in time.
        """

        def phase() -> str | None:
            found: str = self.get("pod", name, "--namespace", namespace)["status"].get("phase", "Pending")
            return found if found in ("Succeeded", "Failed") else None

        ended = wait(phase, timeout, f"pod {name} to end")
        lines = self.ask("logs", name, "--namespace", namespace).strip().splitlines()
        if ended == "Failed" or not lines:
            raise Failed(f"{name}: {' | '.join(lines[-5:]) or 'no output'}")
        said: Object = json.loads(lines[-1])
        return said

    def python(self, namespace: str, name: str, program: str, *arguments: str, image: str | None = None) -> Object:
        """:meth:`start` and :meth:`finish`."""
        self.start(namespace, name, program, *arguments, image=image)
        return self.finish(namespace, name)


def wait(question: Callable[[], T | None], timeout: float, what: str, period: float = 2.0) -> T:
    """Ask until the answer is not None.

    Raises:
        Failed: that did not come in ``timeout`` seconds.
    """
    deadline = time.monotonic() + timeout
    while (answer := question()) is None:
        if time.monotonic() > deadline:
            raise Failed(f"waited {timeout:.0f} s for {what}")
        time.sleep(period)
    return answer
