"""The images together, as in k8s/dev and k8s/promote: MLflow, a candidate, the gates, and the service that follows.

One podman pod without a network: its containers reach one another on loopback and nothing else. Commands are those of
the manifests, environment variables those of the chart; only S3 and the volume are a memory folder instead.

    MIEN_SOAK=1 python -m pytest tests/images/test_chain.py
"""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from tests.e2e import objects
from tests.helm import chart
from tests.images.test_pod import IMAGE, TRAINING_IMAGE, podman

URI: Final = "http://localhost:5000"
PATIENCE: Final = 240.0


def arguments_of(path: str, kind: str, name: str) -> list[str]:
    """What the manifest's container runs."""
    for document in yaml.safe_load_all((chart.ROOT / "k8s" / path).read_text()):
        if (document["kind"], document["metadata"]["name"]) == (kind, name):
            spec = document["spec"].get("jobTemplate", document)["spec"]["template"]["spec"]
            found: list[str] = spec["containers"][0]["args"]
            return found
    raise LookupError(f"no {kind} {name} in {path}")


def mlflow_arguments() -> list[str]:
    arguments = arguments_of("dev/mlflow.yaml", "StatefulSet", "mien-mlflow")
    return [word.replace("s3://mien/mlflow", "/data/artifacts") for word in arguments]


def service_environment() -> dict[str, str]:
    """The chart's, following a registry on loopback."""
    values = chart.values_of(chart.CHART / "ci" / "mlflow-values.yaml")
    values = {"model": {"source": "mlflow", "mlflow": values["model"]["mlflow"]}}
    values["model"]["mlflow"] |= {"trackingUri": URI, "pollSeconds": 1}
    found = chart.environment(chart.render(values))
    return {name: value for name, value in found.items() if isinstance(value, str)}


def test_the_chain_runs_what_the_manifests_and_the_chart_say() -> None:
    """The short twin of the run below."""
    assert mlflow_arguments()[:2] == ["mlflow", "server"]
    assert any("localhost:*" in word for word in mlflow_arguments())  # MLflow refuses hosts that it was not told of
    assert arguments_of("promote/promote.yaml", "CronJob", "mien-promote")[:3] == ["python", "-m", "services.promote"]
    assert arguments_of("promote/rollback.yaml", "CronJob", "mien-rollback")[-1] == "--rollback"
    environment = service_environment()
    assert environment["MIEN_MODEL"] == "models:/mien@champion"
    assert environment["MLFLOW_TRACKING_URI"] == URI


@dataclass(frozen=True)
class Pod:
    name: str
    user: str
    programs: Path

    def run(
        self, image: str, *words: str, name: str = "", tmpfs: tuple[str, ...] = (), timeout: float = PATIENCE,
        **environment: str,
    ) -> tuple[int, str]:  # fmt: skip
        """A restricted container in the pod; exit code and output. With a name it goes on in the background."""
        mode = ["--detach", "--name", f"{self.name}-{name}"] if name else ["--rm"]
        options = ["--tmpfs=/tmp:size=512m,mode=1777", *(f"--tmpfs={path}:mode=1777" for path in tmpfs)]
        options += [word for item in environment.items() for word in ("--env", "=".join(item))]
        done = podman(
            "run", *mode, "--pod", self.name, "--user", f"{self.user}:{self.user}", "--read-only", "--cap-drop", "ALL",
            "--security-opt", "no-new-privileges", "--volume", f"{self.programs}:/test:ro", "--env", "HOME=/tmp",
            "--env", "USER=mien", *options, image, *words, timeout=timeout,
        )  # fmt: skip
        return done.returncode, done.stdout + done.stderr

    def ask(self, name: str, url: str) -> Any:
        """JSON or text of a GET from inside; None where there is no answer of 200."""
        script = f"import urllib.request as u; print(u.urlopen({url!r}, timeout=5).read().decode())"
        done = podman("exec", f"{self.name}-{name}", "python", "-c", script)
        if done.returncode != 0:
            return None
        return json.loads(done.stdout) if done.stdout.startswith("{") else done.stdout


@pytest.fixture
def pod(tmp_path: Path) -> Iterator[Pod]:
    if shutil.which("podman") is None:
        pytest.skip("no podman on the PATH")
    for image in (IMAGE, TRAINING_IMAGE):
        if podman("image", "exists", image).returncode != 0:
            pytest.skip(f"no image {image} (make image-serve image-train)")
    programs = tmp_path / "programs"
    programs.mkdir(mode=0o755)
    for name, text in objects.programs("n")["data"].items():
        (programs / name).write_text(text)
    tmp_path.chmod(0o755)
    user = str(random.SystemRandom().randint(20_000, 60_000))
    made = Pod(f"mien-chain-{user}", user, programs)
    created = podman("pod", "create", "--name", made.name, "--network", "none")
    assert created.returncode == 0, created.stderr
    try:
        yield made
    finally:
        podman("pod", "rm", "--force", "--time", "0", made.name)


def until(holds: Any, what: str, log: Any) -> None:
    deadline = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < deadline, f"waited for {what}: {log()}"
        time.sleep(0.5)


@pytest.mark.soak
@pytest.mark.timeout(1500)
def test_the_service_follows_what_the_gates_let_through_and_nothing_else(pod: Pod) -> None:
    def log(name: str) -> Any:
        return lambda: podman("logs", "--tail", "30", f"{pod.name}-{name}").stderr

    variables = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    code, said = pod.run(TRAINING_IMAGE, *mlflow_arguments(), name="mlflow", tmpfs=("/data",), **variables)
    assert code == 0, said
    until(lambda: pod.ask("mlflow", f"{URI}/health"), "MLflow", log("mlflow"))

    def candidate(kind: str, seed: int) -> str:
        code, said = pod.run(TRAINING_IMAGE, "python", "/test/registry.py", kind, str(seed), URI)
        assert code == 0, said
        last = next(line for line in reversed(said.splitlines()) if line.startswith('{"version"'))
        return str(json.loads(last)["digest"])

    def decide(path: str, name: str) -> int:
        code, said = pod.run(TRAINING_IMAGE, *arguments_of(path, "CronJob", name), MLFLOW_TRACKING_URI=URI)
        assert code in (0, 3), said
        return code

    def served() -> str | None:
        answer = pod.ask("service", "http://localhost:3000/v1/model")
        return answer["digest"] if answer else None

    first = candidate("good", 1)
    assert decide("promote/promote.yaml", "mien-promote") == 0
    code, said = pod.run(IMAGE, name="service", tmpfs=("/cache",), **service_environment())
    assert code == 0, said
    until(lambda: served() == first, "the first champion", log("service"))
    second = candidate("good", 2)
    assert decide("promote/promote.yaml", "mien-promote") == 0
    until(lambda: served() == second, "the second champion", log("service"))
    candidate("bad", 3)
    assert decide("promote/promote.yaml", "mien-promote") == 3
    assert decide("promote/rollback.yaml", "mien-rollback") == 0
    until(lambda: served() == first, "the first champion again", log("service"))
    assert first != second
