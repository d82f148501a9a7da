"""What operators put around the service: a real Prometheus that scrapes it, and BentoML's own packaging."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

ROOT = Path(__file__).resolve().parents[2]


# -- Prometheus ---------------------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not installed (Debian: prometheus)")
def test_a_real_prometheus_scrapes_it_and_knows_its_series(
    service: Any, client: httpx.Client, astronaut: bytes, background: Callable[..., Any], free_port: int, tmp_path: Path
) -> None:
    client.post("/v1/anonymize", files={"image": astronaut}, data={"password": "p"}).raise_for_status()
    (tmp_path / "prometheus.yml").write_text(
        json.dumps(  # JSON is YAML
            {
                "global": {"scrape_interval": "500ms", "scrape_timeout": "500ms"},
                "scrape_configs": [
                    {"job_name": "mien", "static_configs": [{"targets": [service.url.removeprefix("http://")]}]}
                ],
            }
        )
    )
    process = background(
        [
            "prometheus",
            f"--config.file={tmp_path}/prometheus.yml",
            f"--storage.tsdb.path={tmp_path}/data",
            f"--web.listen-address=127.0.0.1:{free_port}",
        ],
        log=tmp_path / "log",
    )

    def ask(query: str) -> list[dict[str, Any]]:
        try:
            answer = httpx.get(
                f"http://127.0.0.1:{free_port}/api/v1/query", params={"query": query}, timeout=5, trust_env=False
            )
            return list(answer.json()["data"]["result"]) if answer.status_code == 200 else []
        except httpx.TransportError:
            return []

    deadline = time.monotonic() + 40
    while not ask("mien_model_info"):
        assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()[-2000:]
        time.sleep(0.2)
    (up,) = ask('up{job="mien"}')
    assert up["value"][1] == "1"
    digest = client.get("/v1/model").json()["digest"]
    assert [found["metric"]["digest"] for found in ask("mien_model_info")] == [digest]
    (count,) = ask('mien_requests_total{operation="anonymize",outcome="ok",transport="http"}')
    assert float(count["value"][1]) >= 1
    (quantile,) = ask('histogram_quantile(0.5, mien_request_seconds_bucket{operation="anonymize",transport="http"})')
    assert 0 < float(quantile["value"][1]) <= 60
    # What autoscaling reads.
    assert ask("mien_queue_depth + mien_inflight_requests")


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed (Debian: prometheus)")
def test_promtool_finds_nothing_to_say_about_the_metrics(client: httpx.Client) -> None:
    linted = subprocess.run(
        ["promtool", "check", "metrics"], input=client.get("/metrics").content, capture_output=True, timeout=30
    )
    assert (linted.returncode, linted.stdout, linted.stderr) == (0, b"", b"")


# -- BentoML ------------------------------------------------------------------------------------------------------


def test_a_bento_is_built_serves_its_own_model_and_ends_with_its_supervisor(
    background: Callable[..., Any], free_port: int, wait_until: Callable[..., None], tmp_path: Path
) -> None:
    own = ROOT / ".cache" / "uv" / "bin"
    path = f"{own}:{os.environ['PATH']}" if own.is_dir() else os.environ["PATH"]
    if shutil.which("uv", path=path) is None:
        pytest.skip("uv is not installed, and BentoML builds with it")
    environment = {**os.environ, "PATH": path, "BENTOML_HOME": str(tmp_path / "home"), "BENTOML_DO_NOT_TRACK": "true"}
    for name in [name for name in environment if name.startswith("MIEN_") or name == "PYTHONPATH"]:
        del environment[name]
    bentoml = [sys.executable, "-m", "bentoml"]
    built = subprocess.run(
        [*bentoml, "build", "-f", "serving/bentofile.yaml", "--output", "tag", "."],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr[-2000:]
    tag = re.search(r"mien:[a-z0-9]+", built.stdout)
    assert tag, built.stdout
    (inside,) = (tmp_path / "home" / "bentos" / "mien").glob(f"{tag[0].split(':')[1]}/src")
    names = {file.relative_to(inside).as_posix() for file in inside.rglob("*") if file.is_file()}
    assert {"serving/page/index.html", "mien/v1/face_identity_pb2.py", "models/mien-128/model.safetensors"} <= names
    assert not [name for name in names if name.endswith(".pyc") or name.startswith(("tests/", "training/", "demo/"))]
    hashed = (inside.parent / "env" / "python" / "requirements.txt").read_text()
    assert "bentoml==" in hashed

    log = tmp_path / "log"
    process = background(
        [*bentoml, "serve", tag[0], "--host", "127.0.0.1", "--port", str(free_port)],
        log=log,
        env={**environment, "MIEN_CPU_THREADS": "1", "MIEN_MODEL_POLL": "0", "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
    )
    url = f"http://127.0.0.1:{free_port}"
    deadline = time.monotonic() + 90
    try:
        while True:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            try:
                if httpx.get(f"{url}/readyz", timeout=2, trust_env=False).status_code == 200:
                    break
            except httpx.TransportError:
                pass
            time.sleep(0.3)
        model = httpx.get(f"{url}/v1/model", timeout=5, trust_env=False).json()
        assert model["digest"] == json.loads((inside / "models" / "mien-128" / "config.json").read_text())["digest"]
    finally:
        # The worker is in a session of its own, so killing the group would not reach it.
        workers = [int(pid) for pid in children(process.pid)]
        process.kill()
        process.wait(30)
    assert workers
    wait_until(lambda: not any(running(pid) for pid in workers), 30)


def children(pid: int) -> list[str]:
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, timeout=10)
    return listed.stdout.split()


def running(pid: int) -> bool:
    """Whether a process is there and not only waiting to be reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


_WORKER = """
import pathlib, signal, sys, time
from serving import hardening
while len(sys.argv) > 3 and not pathlib.Path(sys.argv[3]).exists():
    time.sleep(0.01)
signal.signal(signal.SIGTERM, lambda *_: (pathlib.Path(sys.argv[2]).touch(), sys.exit()))
hardening.end_with_supervisor()
pathlib.Path(sys.argv[1]).touch()
time.sleep(60)
"""
_SUPERVISOR = """
import subprocess, sys, time
from serving import hardening
hardening.be_supervisor()
subprocess.Popen([sys.executable, "-c", *sys.argv[1:]])
time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent is gone")
@pytest.mark.parametrize("early", [False, True], ids=["later", "before-it-asked"])
def test_a_worker_is_told_to_end_when_its_supervisor_is_killed(
    background: Callable[..., Any], wait_until: Callable[..., None], tmp_path: Path, early: bool
) -> None:
    up, ended, go = (tmp_path / name for name in ("up", "ended", "go"))
    supervisor = background(
        [sys.executable, "-c", _SUPERVISOR, _WORKER, up, ended, *([go] if early else [])], log=tmp_path / "log"
    )
    if early:
        wait_until(lambda: children(supervisor.pid), 20)
    else:
        wait_until(up.exists, 20)
    assert not ended.exists()
    supervisor.kill()
    supervisor.wait(10)
    go.touch()
    wait_until(ended.exists, 20)
