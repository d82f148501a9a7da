"""What runs inside the cluster, run here: the same programs against a real service, a real registry, real training."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import yaml

from k8s import tools
from tests.conftest import Start
from tests.e2e import objects
from tests.e2e.cluster import ROOT
from tests.helm import chart
from tests.serving.conftest import free_ports
from training.config import RunConfig

# The folder that the ConfigMap makes of them: all programs side by side.
PATHS = os.pathsep.join([str(ROOT), str(objects.PODS), str(objects.ROUND_TRIP.parent)])
ENVIRONMENT = os.environ | {"PYTHONPATH": PATHS, "OMP_NUM_THREADS": "1", "GIT_PYTHON_REFRESH": "quiet"}


def program(name: str, *arguments: str) -> dict[str, Any]:
    """Run one as ``python /test/NAME ARGUMENTS`` would, in this process: imports take longer than what is done."""
    output = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(output):
        for path in (objects.ROUND_TRIP.parent, objects.PODS):  # the ConfigMap lays them side by side
            patch.syspath_prepend(path)
        patch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(objects.PODS / name), run_name="__main__")
    said: dict[str, Any] = json.loads((output.getvalue().splitlines() or ["{}"])[-1])
    return said


@pytest.fixture(scope="module")
def service(module_background: Start, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The chart's own command, on free ports of this machine."""
    folder = tmp_path_factory.mktemp("service")
    http, grpc = free_ports(2)
    module_background(
        [sys.executable, "-m", "bentoml", "serve", "serving.service:MienService", "--host", "127.0.0.1", "--port",
         str(http), "--working-dir", str(ROOT)],
        log=folder / "log",
        env=ENVIRONMENT | {"MIEN_GRPC_PORT": str(grpc), "MIEN_WORKERS": "2", "MIEN_CPU_THREADS": "1",
                           "HOME": str(folder), "BENTOML_HOME": str(folder / "bentoml")},
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while True:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{http}/readyz", timeout=2).close()
        except OSError:
            assert time.monotonic() < deadline, (folder / "log").read_text()[-3000:]
            time.sleep(0.2)
        else:
            return f"http://127.0.0.1:{http}"


def test_a_wrong_password_looks_like_the_right_one_and_bad_input_is_refused(service: str) -> None:
    said = program("client.py", "wrong-password", service)
    assert said["recovered"] < said["wrong"] / 2


def test_load_counts_what_was_answered_and_what_was_not(service: str) -> None:
    said = program("client.py", "load", service, "--seconds=3", "--callers=2")
    assert said["good"] > 0
    assert (said["failed"], said["failures"]) == (0, [])
    assert len(program("client.py", "digests", service, "--count=3")["digests"]) == 1


def test_load_notices_a_service_that_goes(service: str, tmp_path: Path) -> None:
    """A server that answers one question, about the model, and then no more."""
    digest = program("client.py", "digests", service, "--count=1")["digests"]
    script = (
        "import http.server as h\n"
        "class A(h.BaseHTTPRequestHandler):\n"
        "    def do_GET(self):\n"
        "        self.send_response(200); self.end_headers()\n"
        f'        self.wfile.write(b\'{{"crop_size": 128, "digest": "{digest[0]}"}}\')\n'
        "    def do_POST(self): self.send_error(503)\n"
        "s = h.HTTPServer(('127.0.0.1', 0), A); print(s.server_port, flush=True); s.serve_forever()\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as server:
        try:
            assert server.stdout is not None
            port = int(server.stdout.readline())
            said = program("client.py", "load", f"http://127.0.0.1:{port}", "--seconds=1", "--callers=1")
        finally:
            server.kill()
    assert said["good"] == 0
    assert {failure["what"] for failure in said["failures"]} == {"503"}


def test_doors_are_found_open_and_closed() -> None:
    (port,) = free_ports(1)
    listening = [sys.executable, str(objects.PODS / "client.py"), "listen", str(port), "--seconds=20"]
    with subprocess.Popen(listening, env=ENVIRONMENT, stdout=subprocess.DEVNULL) as listener:
        try:
            deadline = time.monotonic() + 20
            while not program("client.py", "connect", "127.0.0.1", str(port))["open"]:
                assert time.monotonic() < deadline
        finally:
            listener.kill()
    assert program("client.py", "connect", "127.0.0.1", str(port)) == {"open": False, "why": "ConnectionRefusedError"}


def test_registered_candidates_are_promoted_or_refused_and_rolled_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")  # so that it is put back
    monkeypatch.chdir(tmp_path)  # where MLflow lays artifacts without a server
    from services import gates
    from services.promote import promotion
    from services.promote.registry import Registry

    registry, rules = Registry(uri, "mien"), promotion.load_rules(gates.DEFAULT)

    def decide() -> str | None:
        return promotion.promote(registry, rules, who="a test").champion

    made = [program("registry.py", "good", "1", uri)]
    assert decide() == made[0]["version"]
    made.append(program("registry.py", "good", "2", uri))
    assert decide() == made[1]["version"]
    program("registry.py", "bad", "3", uri)
    with pytest.raises(promotion.Refused):
        decide()
    assert promotion.roll_back(registry, who="a test").champion == made[0]["version"]
    assert made[0]["digest"] != made[1]["digest"]


def test_the_tiny_run_is_one_that_the_trainer_takes(tmp_path: Path) -> None:
    """The short twin of the run below."""
    program("tiny_run.py", str(tmp_path))
    config = RunConfig.model_validate_json((tmp_path / "config.json").read_text())
    assert (tmp_path / "shards" / "manifest.json").exists()
    assert config.total_images == 16


@pytest.mark.soak
def test_two_pods_of_the_job_train_to_the_end(background: Start, tmp_path: Path) -> None:
    """The very command of the Job, twice on this machine instead of in two pods."""
    _, _, job = objects.training_job("n", "i:1")
    (container,) = job["spec"]["template"]["spec"]["containers"]
    (port,) = free_ports(1)
    pods = []
    for index in ("0", "1"):
        folder = tmp_path / index
        script = container["command"][2].replace("train-0.train", "127.0.0.1").replace("29500", str(port))
        script = script.replace("/test/", f"{objects.PODS}/").replace("/tmp/run", str(folder))
        script = script.replace("python ", f"{shlex.quote(sys.executable)} ")
        pods.append(background(
            ["sh", "-c", script], log=tmp_path / f"log-{index}", env=ENVIRONMENT | {"JOB_COMPLETION_INDEX": index}
        ))  # fmt: skip
    for index, pod in enumerate(pods):
        assert pod.wait(timeout=240) == 0, (tmp_path / f"log-{index}").read_text()[-3000:]
    assert list((tmp_path / "0" / "runs").rglob("model.safetensors"))


# -- objects ----------------------------------------------------------------------------------------------------------


EVERY = [
    objects.namespace("n"), objects.deny_all("n"), objects.secret("n", "s", KEY="v"),
    *objects.program("n", "caller", "registry.example.com/mien:1", "client.py", ["connect", "h", "1"]),
    *objects.training_job("n", "i:1"), *objects.pytorchjob("n", "i:1"),
]  # fmt: skip


@pytest.mark.parametrize("version", ["1.28", "1.35"])
def test_a_cluster_takes_what_the_steps_apply(version: str) -> None:
    for document in EVERY:
        if document["kind"] != "PyTorchJob" or chart.CRDS.is_dir():
            assert chart.complaint(document, version) is None, document["kind"]


def test_restricted_namespaces_admit_what_the_steps_apply() -> None:
    specs = [found for document in EVERY for found in pod_specs(document)]
    assert len(specs) == 3
    for spec in specs:
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in spec["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert all(volume.keys() & {"configMap", "emptyDir"} for volume in spec["volumes"])


def pod_specs(document: Any) -> list[dict[str, Any]]:
    if isinstance(document, dict):
        own = [document] if "containers" in document else []
        return own + [found for value in document.values() for found in pod_specs(value)]
    return []


def test_a_program_in_a_pod_starts_the_same_file() -> None:
    made = objects.program("n", "caller", "i:1", "client.py", ["load", "http://mien:3000", "--seconds=1"])
    (container,) = made[1]["spec"]["containers"]
    assert container["command"][3:] == ["/test/client.py", "load", "http://mien:3000", "--seconds=1"]
    assert made[0]["data"].keys() == {"client.py", "registry.py", "tiny_run.py", "round_trip.py"}
    assert sum(map(len, made[0]["data"].values())) < 900_000  # a ConfigMap holds 1 MiB
    with pytest.raises(FileNotFoundError):
        objects.program("n", "caller", "i:1", "no.py", [])


@pytest.mark.parametrize(
    ("image", "values"),
    [
        ("mien-serve:0.1.0", {"repository": "mien-serve", "tag": "0.1.0"}),
        ("host:5000/a/b:1", {"repository": "host:5000/a/b", "tag": "1"}),
        (f"host:5000/a@sha256:{'0' * 64}", {"repository": "host:5000/a", "digest": f"sha256:{'0' * 64}"}),
    ],
)
def test_an_image_becomes_the_charts_values(image: str, values: dict[str, str]) -> None:
    assert objects.image_values(image) == values
    rendered = chart.container(chart.render(objects.values(image)))
    assert rendered["image"] == image


@pytest.mark.parametrize("image", ["mien", "host:5000/a/b"])
def test_an_image_without_a_tag_is_refused(image: str) -> None:
    with pytest.raises(ValueError, match="neither a tag nor a digest"):
        objects.image_values(image)


@pytest.mark.parametrize("name", ["dev", "promote"])
def test_an_overlay_moves_everything_into_the_steps_namespace(name: str, tmp_path: Path) -> None:
    try:
        kubectl = tools.find("kubectl")
    except tools.ToolMissing as error:
        pytest.skip(f"no kubectl to build kustomizations with: {error}")
    folder = objects.overlay(tmp_path / "deep" / "er", ROOT / "k8s" / name, "mien-e2e-x", "host:5000/mien/train:9")
    done = subprocess.run([kubectl, "kustomize", folder], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    made = list(yaml.safe_load_all(done.stdout))
    assert {document["metadata"]["namespace"] for document in made} == {"mien-e2e-x"}
    images = set(re.findall(r"image: (\S+)", done.stdout))
    assert "host:5000/mien/train:9" in images
    assert not {image for image in images if image.startswith("mien-train")}
