"""The report in MLflow: a real server, read back through its own interface."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from services.evaluate import tracking
from tests.training.launch import environment, free_port

mlflow = pytest.importorskip("mlflow")

FLAT = {
    "format": 1,
    "model.digest": "abc123" * 10,
    "judges": "dlib",
    "verification.dlib.I-A.same": 0.25,
    "verification.dlib.I-R@jpeg75.same": 0.5,  # MLflow takes no @ in a name
    "skipped.video": "no clips were given",
    **{f"figure.{i}": float(i) for i in range(1200)},  # more than one request takes
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, module_background: Any) -> str:
    folder = tmp_path_factory.mktemp("mlflow")
    port = free_port()
    process = module_background(
        [
            *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"),
            *("--backend-store-uri", f"sqlite:///{folder}/mlflow.db"),
            *("--artifacts-destination", str(folder / "artifacts")),
        ],
        log=folder / "log",
        env=environment(MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false"),
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(f"http://127.0.0.1:{port}/health", timeout=2).status_code == 200:
                return f"http://127.0.0.1:{port}"
        except httpx.HTTPError:
            time.sleep(0.2)
    raise AssertionError((folder / "log").read_text()[-2000:])


def test_figures_become_metrics_texts_parameters_and_files_artifacts(server: str, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(json.dumps(FLAT))
    (tmp_path / "report.html").write_text("<h1>report</h1>")
    first = tracking.log(server, FLAT | {"recovery.psnr": math.inf}, tmp_path)
    second = tracking.log(server, FLAT, tmp_path)
    client = mlflow.MlflowClient(tracking_uri=server)
    run = client.get_run(first)
    assert run.info.status == "FINISHED" and run.info.experiment_id == client.get_run(second).info.experiment_id
    assert client.get_experiment(run.info.experiment_id).name == "mien-evaluate"
    metrics = run.data.metrics
    assert metrics["verification.dlib.I-A.same"] == 0.25 and metrics["verification.dlib.I-R_jpeg75.same"] == 0.5
    assert metrics["figure.1199"] == 1199 and len(metrics) == 1 + 2 + 1200, "what is not finite stays out"
    assert run.data.params == {"model.digest": FLAT["model.digest"], "judges": "dlib"}
    assert run.data.tags["model.digest"] == FLAT["model.digest"]
    assert {f.path for f in client.list_artifacts(first)} == {"report.json", "report.html"}
    path = client.download_artifacts(first, "report.json", str(tmp_path))
    assert json.loads(Path(path).read_text()) == FLAT


def test_a_server_that_is_not_there_is_said_soon(tmp_path: Path) -> None:
    start = time.monotonic()
    with pytest.raises(ConnectionError, match="MLflow at http://127"):
        tracking.log(f"http://127.0.0.1:{free_port()}", FLAT, tmp_path)
    assert time.monotonic() - start < 60
    assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "1"
