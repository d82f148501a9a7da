"""Whole runs: learning, logging, and going on exactly where a killed one stopped."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mien import store
from tests.training.launch import Start, assert_equal, environment, finish, wait_for, weights, write
from training.config import RunConfig
from training.loop import train


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
    tiny = tiny.model_copy(update={"total_images": 8})
    whole = tiny.model_copy(update={"runs": str(tmp_path / "whole")})
    train(whole)
    for stop in (2, 6):
        outcome = train(tiny, stop_at=stop)
        assert not outcome.finished and outcome.nimg == stop
    assert train(tiny).finished
    assert_equal(weights(whole), weights(tiny))


def test_one_process_that_is_killed_while_it_writes_a_checkpoint_ends_where_one_left_alone_does(
    bare: RunConfig, tmp_path: Path, background: Start
) -> None:
    """Of two processes, at more moments: test_killed.py."""
    bare = bare.model_copy(update={"total_images": 100_000})
    command = [sys.executable, "-m", "training", "--config", write(bare, tmp_path / "bare.json")]
    folder = Path(bare.runs) / bare.name / "checkpoints"
    process = background(command, log=tmp_path / "log", env=environment())
    assert wait_for(lambda: bool(list(folder.rglob("*"))), process) and process.poll() is None
    process.send_signal(signal.SIGKILL)
    finish(process, tmp_path / "log", expected=-signal.SIGKILL)
    stop = int(weights(bare)["nimg"]) + 4 if list(folder.rglob("state.json")) else 4
    command += ["--stop-at", str(stop)]
    finish(background(command, log=tmp_path / "log2", env=environment()), tmp_path / "log2")
    whole = bare.model_copy(update={"runs": str(tmp_path / "whole")})
    train(whole, stop_at=stop)
    assert_equal(weights(whole), weights(bare))


def test_sigterm_saves_and_exits_with_a_code_that_kubernetes_retries(
    bare: RunConfig, tmp_path: Path, background: Start
) -> None:
    config = bare.model_copy(update={"total_images": 100_000, "checkpoint_every": 50_000})
    command, log = [sys.executable, "-m", "training", "--config", write(config, tmp_path / "c.json")], tmp_path / "log"
    process = background(command, log=log, env=environment())
    assert wait_for(lambda: "min left" in log.read_text(), process)
    process.send_signal(signal.SIGTERM)
    finish(process, log, expected=143)
    assert weights(config)["nimg"] >= 2


def test_a_run_that_exists_refuses_another_config_unless_it_is_told_to_go_on(bare: RunConfig) -> None:
    train(bare, stop_at=2)
    other = bare.model_copy(update={"optimizer": bare.optimizer.model_copy(update={"lr": 0.5})})
    with pytest.raises(ValueError, match="--allow-change optimizer"):
        train(other)
    outcome = train(other, stop_at=4, allow_change=frozenset({"optimizer"}))
    assert outcome.nimg == 4
    before = json.loads((Path(bare.runs) / bare.name / "config.until-0.json").read_text())
    assert before["optimizer"]["lr"] == bare.optimizer.lr


def test_a_tracker_that_fails_does_not_stop_training(
    bare: RunConfig, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setattr("training.loop.FINISH_PATIENCE", 2.0)  # a minute, so that the model is delivered
    outcome = train(bare.model_copy(update={"mlflow": "http://127.0.0.1:9", "total_images": 2}))
    assert outcome.finished
    assert "is away" in caplog.text
