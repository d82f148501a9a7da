"""The serving image in the pod that the chart renders: unknown user, read-only root, no capabilities, a round trip.

`podman play kube` runs it, without a cluster. podman (4.3) reads of a Pod what it can do: probes and preStop are the
kubelet's, memory volumes become plain ones, so the sizes of those are judged by tests/helm alone.

    MIEN_SOAK=1 python -m pytest tests/images/test_pod.py    # E2E_SERVE_IMAGE, E2E_TRAIN_IMAGE name other images
"""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import pytest
import yaml
from skimage import data

import mien
from mien.clients import Tracking
from tests.e2e import objects
from tests.helm import chart

IMAGE: Final = os.environ.get("E2E_SERVE_IMAGE", "localhost/mien-serve:0.1.0")
TRAINING_IMAGE: Final = os.environ.get("E2E_TRAIN_IMAGE", "localhost/mien-train:0.1.0")
READY_WITHIN: Final = 120.0  # aim: 15 s on an idle machine; this bound is for a busy one


def pod_of_the_chart(user: int, http: int, grpc: int) -> chart.Object:
    """The Deployment's pod as a Pod, unchanged but for its user, its ports on the host, and what podman cannot read."""
    repository, _, tag = IMAGE.rpartition(":")
    objects = chart.render({"image": {"repository": repository, "tag": tag, "pullPolicy": "Never"}})
    template = chart.of_kind(objects, "Deployment")["spec"]["template"]
    spec = template["spec"]
    spec["securityContext"] |= {"runAsUser": user, "runAsGroup": user, "fsGroup": user}
    spec.pop("topologySpreadConstraints")
    for port, host in zip(spec["containers"][0]["ports"], (http, grpc), strict=True):
        port["hostPort"] = host
    name = f"mien-test-{http}"
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": template["metadata"]["labels"]},
            "spec": spec}  # fmt: skip


def test_the_pod_for_podman_is_the_charts_own() -> None:
    """The short twin of the run below: what is run there is what tests/helm judges."""
    spec = pod_of_the_chart(48_211, 1, 2)["spec"]
    rendered = chart.of_kind(chart.render(), "Deployment")["spec"]["template"]["spec"]
    assert spec["securityContext"]["runAsUser"] == 48_211
    assert spec["containers"][0]["securityContext"] == rendered["containers"][0]["securityContext"]
    assert spec["containers"][0]["env"] == rendered["containers"][0]["env"]
    assert spec["volumes"] == rendered["volumes"]


@dataclass(frozen=True)
class Running:
    container: str
    user: int
    http: str
    grpc: str
    seconds_to_ready: float
    cpu_to_ready: float
    """Seconds of CPU: what the start costs, however busy the machine is."""


def podman(*arguments: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    command = ["podman"]
    # Where no systemd runs, as in a container, podman's defaults do not work; runc and cgroupfs do.
    if not Path("/run/systemd/private").exists():
        command += ["--cgroup-manager", "cgroupfs"]
        command += ["--runtime", "runc"] if shutil.which("runc") else []
    return subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=timeout, check=False)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    if shutil.which("podman") is None:
        pytest.skip("no podman on the PATH")
    if podman("image", "exists", IMAGE).returncode != 0:
        pytest.skip(f"no image {IMAGE} (make image-serve, or E2E_SERVE_IMAGE)")
    with socket.socket() as one, socket.socket() as other:
        one.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", 0))
        http, grpc = one.getsockname()[1], other.getsockname()[1]
    user = random.SystemRandom().randint(20_000, 60_000)
    pod = pod_of_the_chart(user, http, grpc)
    file = tmp_path_factory.mktemp("pod") / "pod.yaml"
    file.write_text(yaml.safe_dump(pod))
    container = f"{pod['metadata']['name']}-mien"
    started = time.monotonic()
    try:
        played = podman("play", "kube", str(file))
        assert played.returncode == 0, played.stderr
        while not answers(f"http://127.0.0.1:{http}/readyz"):
            assert time.monotonic() - started < READY_WITHIN, podman("logs", container).stderr[-3000:]
            time.sleep(0.1)
        seconds = time.monotonic() - started
        cpu = cpu_seconds(container)
        yield Running(container, user, f"http://127.0.0.1:{http}", f"127.0.0.1:{grpc}", seconds, cpu)
    finally:
        podman("play", "kube", "--down", str(file))


def cpu_seconds(container: str) -> float:
    """That a container has used so far, from its control group (version 2, or 1 in nanoseconds)."""
    script = (
        "sed -n 's/^usage_usec //p' /sys/fs/cgroup/cpu.stat 2> /dev/null"
        " || head -c -4 /sys/fs/cgroup/cpuacct/cpuacct.usage"  # without newline and thousands
    )
    return int(podman("exec", container, "sh", "-c", script).stdout.strip() or "0") / 1e6


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


@pytest.mark.soak
def test_it_is_ready_as_a_user_nobody_knows(running: Running) -> None:
    size = json.loads(podman("image", "inspect", IMAGE).stdout)[0]["Size"]
    took = f"{running.seconds_to_ready:.1f} s, {running.cpu_to_ready:.1f} s of CPU"
    sys.stdout.write(f"\n{IMAGE}: {size / 1e9:.2f} GB, ready after {took}\n")
    assert 0 < running.cpu_to_ready < 15
    assert podman("exec", running.container, "id", "-u").stdout.strip() == str(running.user)


@pytest.mark.soak
def test_it_has_no_capabilities_and_can_get_none(running: Running) -> None:
    lines = podman("exec", running.container, "cat", "/proc/1/status").stdout.splitlines()
    status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
    assert {name: int(status[name], 16) for name in ("CapPrm", "CapEff", "CapBnd", "CapAmb")} == {
        "CapPrm": 0, "CapEff": 0, "CapBnd": 0, "CapAmb": 0,
    }  # fmt: skip
    assert status["NoNewPrivs"] == "1"
    assert status["Seccomp"] == "2"  # a filter


@pytest.mark.soak
def test_its_root_is_read_only_and_its_tmp_is_not(running: Running) -> None:
    for path in ("/x", "/opt/mien/x", "/models/mien/x"):
        assert "Read-only file system" in podman("exec", running.container, "touch", path).stderr
    assert podman("exec", running.container, "touch", "/tmp/x").returncode == 0


@pytest.mark.soak
def test_no_compiler_no_cache_and_no_installer_are_left_in_it(running: Running) -> None:
    script = (
        "for p in gcc cc clang make uv; do command -v $p; done; ls -d /root/.cache /var/cache/uv/* /tmp/uv-* "
        "/opt/mien/lib/python*/site-packages/torch/include"
    )
    assert podman("exec", running.container, "sh", "-c", script).stdout.strip() == ""


@pytest.mark.soak
def test_a_picture_goes_there_and_back_over_both_doors(running: Running) -> None:
    """The very program that `helm test` runs."""
    program = chart.CHART / "files" / "round_trip.py"
    done = subprocess.run(
        [sys.executable, str(program), "--http", running.http, "--grpc", running.grpc],
        capture_output=True, text=True, timeout=120, check=False, cwd=chart.ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "OK, model" in done.stdout


@pytest.mark.soak
def test_a_stream_that_follows_faces_is_answered(running: Running) -> None:
    """What that needs (trackers, OpenCV without a display) is in the image; the face changes in each frame."""
    astronaut = data.astronaut()
    sent = [np.roll(astronaut, 2 * n, axis=1)[:360, :480].copy() for n in range(6)]
    with mien.Client(f"grpc://{running.grpc}", timeout=120) as client:
        got = list(client.stream(iter(sent), "correct horse", tracking=Tracking(lookahead=2)))
    assert len(got) == len(sent)
    for before, after in zip(sent, got, strict=True):
        assert [face.track for face in after.tracked] == [0] and not after.tracked[0].masked
        pixels = np.asarray(after.picture, dtype=np.int16)
        assert np.abs(pixels - before)[75:170, 185:265].mean() > 3


@pytest.mark.soak
def test_the_image_has_what_helm_test_needs_in_it(running: Running) -> None:
    """`helm test` runs that program in this image, as a pod beside the service."""
    program = chart.CHART / "files" / "round_trip.py"
    done = podman(
        "run", "--rm", "--pod", running.container.removesuffix("-mien"), "--user", f"{running.user}", "--read-only",
        "--cap-drop", "ALL", "--volume", f"{program}:/test/round_trip.py:ro", "--entrypoint", "python", IMAGE,
        "/test/round_trip.py", "--http", "http://127.0.0.1:3000", "--grpc", "127.0.0.1:3001",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "OK, model" in done.stdout


@pytest.mark.soak
def test_two_pods_of_the_training_image_train_together_as_a_user_nobody_knows(tmp_path: Path) -> None:
    """The Job of tests/e2e in podman: its own command, restricted pods, memory in /tmp; one host for both."""
    if shutil.which("podman") is None or podman("image", "exists", TRAINING_IMAGE).returncode != 0:
        pytest.skip(f"no podman, or no image {TRAINING_IMAGE} (make image-train, or E2E_TRAIN_IMAGE)")
    programs, _, job = objects.training_job("e2e", TRAINING_IMAGE)
    for name, text in programs["data"].items():
        (tmp_path / name).write_text(text)
    tmp_path.chmod(0o755)
    script = job["spec"]["template"]["spec"]["containers"][0]["command"][2].replace("train-0.train", "127.0.0.1")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        script = script.replace("29500", str(free.getsockname()[1]))
    user = str(random.SystemRandom().randint(20_000, 60_000))
    first = f"mien-train-test-{user}"
    shared = [
        "--user", f"{user}:{user}", "--read-only", "--read-only-tmpfs=false", "--cap-drop", "ALL", "--security-opt",
        "no-new-privileges", "--tmpfs", "/tmp:size=256m,mode=1777", "--shm-size", "128m", "--memory", "2g",
        "--volume", f"{tmp_path}:/test:ro", "--env", "HOME=/tmp", "--env", "USER=mien",
    ]  # fmt: skip
    try:
        for index, name in enumerate((first, f"{first}-b")):
            network = "none" if index == 0 else f"container:{first}"  # they need each other and nothing else
            started = podman(
                "run", "--detach", "--name", name, "--network", network, *shared, "--env",
                f"JOB_COMPLETION_INDEX={index}", TRAINING_IMAGE, "sh", "-c", script,
            )  # fmt: skip
            assert started.returncode == 0, started.stderr
        for name in (first, f"{first}-b"):
            ended = podman("wait", name, timeout=300).stdout.strip()
            assert ended == "0", podman("logs", name).stderr[-3000:]
    finally:
        for name in (f"{first}-b", first):  # one after the other: the second lives in the first one's network
            podman("rm", "--force", "--time", "0", name)


@pytest.mark.soak
def test_sigterm_reaches_it_through_its_init_and_it_leaves_by_itself(running: Running) -> None:
    """Last of the file: it ends the pod."""
    started = time.monotonic()
    podman("stop", "--time", "60", running.container)
    assert time.monotonic() - started < 30
    state = json.loads(podman("inspect", running.container).stdout)[0]["State"]
    assert state["ExitCode"] == 0
