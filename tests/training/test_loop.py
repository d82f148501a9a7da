"""Whole runs: learning, logging, and going on exactly where a killed one stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import storage
from mien import store
from training import checkpoint
from training.config import RunConfig
from training.loop import train

ROOT = Path(__file__).parents[2]


def _weights(config: RunConfig) -> dict[str, torch.Tensor]:
    found = checkpoint.latest(storage.open_prefix(Path(config.runs) / config.name / "checkpoints"))
    assert found is not None
    flat: dict[str, torch.Tensor] = {}

    def walk(prefix: str, value: object) -> None:
        if isinstance(value, torch.Tensor):
            flat[prefix] = value
        elif isinstance(value, dict):
            for key, child in value.items():
                walk(f"{prefix}/{key}", child)

    walk("", found[1]["trainer"])
    return flat


def _assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [k for k in one if not torch.equal(one[k], other[k])] == []


@pytest.mark.parametrize("architecture", ["resnet", "unet", "coupling"])
def test_every_architecture_trains_exports_and_loads_by_one_line_of_config(
    tiny: RunConfig, architecture: str, tmp_path: Path
) -> None:
    options = {
        "resnet": {"name": "resnet", "width": 8, "blocks": 1},
        "unet": {"name": "unet", "widths": [8, 16], "condition": 16},
        "coupling": {"name": "coupling", "widths": [16, 16], "steps": 1, "condition": 16},
    }[architecture]
    raw = tiny.model_dump() | {
        "architecture": options,
        "total_images": 4,
        "data": {**tiny.data.model_dump(), "limit": 4},
    }
    outcome = train(RunConfig.model_validate(raw))
    assert outcome.finished and outcome.model is not None
    network, config = store.load(outcome.model)
    assert config.architecture.name == architecture and config.images_seen == 4 and config.bits == 8
    out = network(torch.zeros(1, 3, 64, 64), torch.full((1, 8), 0.5))
    assert out.shape == (1, 3, 64, 64) and torch.isfinite(out).all()
    assert "images seen" in (outcome.model / store.CARD).read_text().lower()


def test_a_run_logs_figures_and_grids_to_its_folder_and_to_mlflow(tiny: RunConfig, tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    import mlflow

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    config = tiny.model_copy(update={"mlflow": uri, "total_images": 6})
    os.environ["MLFLOW_ARTIFACT_ROOT"] = str(tmp_path / "artifacts")
    mlflow.MlflowClient(uri).create_experiment("mien", artifact_location=(tmp_path / "artifacts").as_uri())
    outcome = train(config)
    folder = Path(config.runs) / config.name
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [x["nimg"] for x in lines if "loss" in x] == [2, 4, 6]
    assert {"images_per_second", "data_wait", "recovery", "q_accuracy"} <= lines[0].keys()
    grids = sorted((folder / "samples").glob("*.png"))
    assert grids and np.asarray(Image.open(grids[0])).shape == (4 * 64, 6 * 64, 3)
    assert outcome.model is not None

    client = mlflow.MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name("mien").experiment_id])
    assert run.info.status == "FINISHED" and run.data.params["objective.weights.recovery"] == "100.0"
    assert run.data.metrics["recovery"] > 0 and "val/L1_I_R" in run.data.metrics
    assert run.data.tags["data_digest"]
    assert {a.path for a in client.list_artifacts(run.info.run_id)} == {"model", "samples", "environment.json"}


def test_a_run_that_stops_and_goes_on_equals_one_that_never_stopped(tiny: RunConfig, tmp_path: Path) -> None:
    whole = tiny.model_copy(update={"runs": str(tmp_path / "whole")})
    train(whole)
    for stop in (4, 8):
        outcome = train(tiny, stop_at=stop)
        assert not outcome.finished and outcome.nimg == stop
    assert train(tiny).finished
    _assert_equal(_weights(whole), _weights(tiny))


def test_sigkill_at_any_moment_changes_nothing_of_where_a_run_ends(tiny: RunConfig, tmp_path: Path) -> None:
    whole = tiny.model_copy(update={"runs": str(tmp_path / "whole")})
    train(whole)
    path = tmp_path / "tiny.json"
    path.write_text(tiny.model_dump_json())
    command = [sys.executable, "-m", "training", "--config", str(path), "threads=1"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    kills = 0
    for attempt in range(6):
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        if attempt < 2:
            # Kill right after the first new checkpoint begins to appear, so that writes are hit as well as steps.
            folder = Path(tiny.runs) / tiny.name / "checkpoints"
            before = set(folder.glob("*")) if folder.exists() else set()
            deadline = time.monotonic() + 120
            while time.monotonic() < deadline and process.poll() is None:
                if folder.exists() and set(folder.glob("*")) | set(folder.glob(".*")) != before:
                    break
                time.sleep(0.002)
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                kills += 1
        _, stderr = process.communicate(timeout=240)
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, stderr.decode()[-2000:]
    assert kills >= 1 and process.returncode == 0
    _assert_equal(_weights(whole), _weights(tiny))


def test_sigterm_saves_and_exits_with_a_code_that_kubernetes_retries(tiny: RunConfig, tmp_path: Path) -> None:
    path = tmp_path / "tiny.json"
    path.write_text(tiny.model_copy(update={"total_images": 100_000, "checkpoint_every": 50_000}).model_dump_json())
    process = subprocess.Popen(
        [sys.executable, "-m", "training", "--config", str(path), "threads=1"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "min left" in line:
            break
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert process.returncode == 143
    found = checkpoint.latest(storage.open_prefix(Path(tiny.runs) / "tiny" / "checkpoints"))
    assert found is not None and found[0] >= 2


def test_a_run_that_exists_refuses_another_config_unless_it_is_told_to_go_on(tiny: RunConfig) -> None:
    train(tiny, stop_at=2)
    other = tiny.model_copy(update={"optimizer": tiny.optimizer.model_copy(update={"lr": 0.5})})
    with pytest.raises(ValueError, match="--allow-change optimizer"):
        train(other)
    outcome = train(other, stop_at=4, allow_change=frozenset({"optimizer"}))
    assert outcome.nimg == 4
    before = json.loads((Path(tiny.runs) / "tiny" / "config.until-0.json").read_text())
    assert before["optimizer"]["lr"] == tiny.optimizer.lr


def test_a_tracker_that_fails_does_not_stop_training(tiny: RunConfig, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("mlflow")
    outcome = train(tiny.model_copy(update={"mlflow": "http://127.0.0.1:9", "total_images": 2}))
    assert outcome.finished
    assert "is away" in caplog.text
