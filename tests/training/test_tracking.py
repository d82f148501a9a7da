"""MLflow is told everything, sooner or later, by a run that never waits: a real server, killed and restarted."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from mien import store
from tests.training.launch import Start, environment, free_port
from training import tracking
from training.config import RunConfig
from training.export import export
from training.journal import Journal
from training.loop import train
from training.step import Trainer

mlflow = pytest.importorskip("mlflow")


class Server:
    """An MLflow server with its database and artifacts in a folder; it can be killed and started again."""

    def __init__(self, folder: Path, start: Start) -> None:
        self.folder, self.port, self._start = folder, free_port(), start
        self.uri = f"http://127.0.0.1:{self.port}"
        folder.mkdir()

    def start(self) -> None:
        command = [
            *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)),
            *("--workers", "1", "--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db"),
            *("--artifacts-destination", str(self.folder / "artifacts")),
        ]
        log = self.folder / "log"
        self.process = self._start(command, log=log, env=environment(MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false"))
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                if httpx.get(f"{self.uri}/health", timeout=1).status_code == 200:
                    return
            except httpx.HTTPError:
                time.sleep(0.1)
        raise AssertionError(log.read_text()[-2000:])

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(timeout=30)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, module_background: Start) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("mlflow") / "server", module_background)
    server.start()
    yield server


def _begin(name: str) -> dict[str, object]:
    params = {"optimizer": {"lr": 1e-4}, "batch": 4}
    return tracking.beginning(
        name=name,
        params=params,
        tags={"git_commit": "abc"},
        shards="s3://mien/shards/faces",
        digest="d" * 64,
        samples=9,
    )


def _model(tiny: RunConfig, folder: Path) -> store.ModelConfig:
    import torch

    network = Trainer(tiny, identities=1, device=torch.device("cpu")).ema.network
    return export(network, tiny, folder, nimg=8, data_digest="d" * 64, figures={"cos(I,A1)": 0.5})


def test_what_a_killed_server_missed_arrives_with_its_own_times_after_a_restart_of_both(
    tiny: RunConfig, tmp_path: Path, server: Server
) -> None:
    folder = tmp_path / "run"
    (folder / "samples").mkdir(parents=True)
    key = tracking.new_key(folder)
    first = tracking.MLflow(server.uri, folder=folder, key=key, begin=_begin("killed"), first_delay=0.1)
    first.figures(4, {"loss": 1.0})
    deadline = time.monotonic() + 60
    while not Journal(folder).delivered() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert first.run_id is not None
    server.kill()
    told = []
    began = time.monotonic()
    for nimg in range(8, 408, 4):
        first.figures(nimg, {"loss": 1.0 / nimg})
        told.append(nimg)
    (folder / "samples" / "a.png").write_bytes(b"picture")
    first.picture(408, folder / "samples" / "a.png")
    assert time.monotonic() - began < 2  # a hundred lines and a picture: nobody waited for a server
    between = time.time()
    first.close(patience=0.5)
    assert not Journal(folder).delivered()
    time.sleep(0.1)

    # The process dies with a line half written, and comes back; the server does so later.
    with open(folder / "journal.jsonl", "a") as file:
        file.write('{"kind": "metr')
    second = tracking.MLflow(
        server.uri, folder=folder, key=tracking.new_key(folder), begin=_begin("killed"), first_delay=0.1
    )
    assert second.key == key
    second.figures(412, {"loss": 0.5})
    config = _model(tiny, folder / "model")
    second.finish(folder / "model")
    server.start()
    second.close(patience=60)
    assert Journal(folder).delivered()
    assert second.run_id == first.run_id

    client = mlflow.MlflowClient(server.uri, server.uri)
    history = client.get_metric_history(first.run_id, "loss")
    assert sorted(m.step for m in history) == [4, *told, 412]
    assert all(m.timestamp <= between * 1000 for m in history if m.step < 412)
    run = client.get_run(first.run_id)
    assert run.info.status == "FINISHED" and run.data.params == {"optimizer.lr": "0.0001", "batch": "4"}
    (given,) = run.inputs.dataset_inputs
    assert given.dataset.digest == "d" * 36 and json.loads(given.dataset.profile)["digest"] == "d" * 64
    assert json.loads(given.dataset.source)["uri"] == "s3://mien/shards/faces"
    assert {t.value for t in given.tags} == {"training"}
    assert [a.path for a in client.list_artifacts(first.run_id, "samples")] == ["samples/a.png"]
    versions = json.loads(Path(client.download_artifacts(first.run_id, "environment.json", str(tmp_path))).read_text())
    assert versions["packages"]["torch"].startswith("2.")

    registered = client.get_model_version_by_alias("mien", "candidate")
    assert registered.run_id == first.run_id and registered.tags["digest"] == config.digest
    assert "cos(I,A1)" in registered.description
    os.environ["MLFLOW_TRACKING_URI"] = server.uri
    try:
        got = mlflow.artifacts.download_artifacts("models:/mien@candidate", dst_path=str(tmp_path / "got"))
    finally:
        del os.environ["MLFLOW_TRACKING_URI"]
    assert {p.name for p in Path(got).iterdir() if p.is_file()} - {"registered_model_meta"} == {
        store.WEIGHTS, store.CONFIG, store.CARD,
    }  # fmt: skip
    assert store.load(got)[1].digest == config.digest

    # Delivering all of it once more (the note of how far it came was lost) doubles nothing.
    (folder / "journal.position").unlink()
    assert tracking.main([str(folder), "--to", server.uri]) == 0
    assert len(client.search_runs([run.info.experiment_id], "tags.mlflow.runName = 'killed'")) == 1
    assert len(client.get_metric_history(first.run_id, "loss")) == len(told) + 2
    assert len(client.search_model_versions("name = 'mien'")) == 1


def test_a_run_with_a_server_that_never_answers_is_as_fast_as_one_without_and_can_be_delivered_later(
    bare: RunConfig, server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    silent = socket.socket()  # takes connections and says nothing
    silent.bind(("127.0.0.1", 0))
    silent.listen(50)
    try:
        config = bare.model_copy(update={"mlflow": f"http://127.0.0.1:{silent.getsockname()[1]}", "total_images": 6})
        began = time.monotonic()
        outcome = train(config.model_copy(update={"total_images": 4, "name": "warm", "mlflow": None}))
        without = time.monotonic() - began
        began = time.monotonic()
        outcome = train(config, stop_at=4)
        took = time.monotonic() - began
        assert outcome.nimg == 4 and took < 2 * without + tracking.STOP_PATIENCE + 15
        assert "the same command goes on" in caplog.text
    finally:
        silent.close()
    outcome = train(config.model_copy(update={"mlflow": server.uri}))
    assert outcome.finished
    client = mlflow.MlflowClient(server.uri, server.uri)
    experiment = client.get_experiment_by_name("mien")
    (run,) = client.search_runs([experiment.experiment_id], "tags.mlflow.runName = 'tiny'")
    assert sorted({m.step for m in client.get_metric_history(run.info.run_id, "loss")}) == [2, 4, 6]
    assert {"images_per_second", "data_wait", "val/score"} <= run.data.metrics.keys()
    assert run.data.params["architecture.name"] == "unet" and run.info.status == "FINISHED"


def test_an_entry_that_the_server_refuses_is_left_out_and_the_rest_arrives(tmp_path: Path, server: Server) -> None:
    folder = tmp_path / "run"
    told = tracking.MLflow(server.uri, folder=folder, key="refused", begin=_begin("refused"), first_delay=0.1)
    told.figures(1, {"a (name MLflow refuses)?": 1.0})
    told.picture(1, folder / "not there.png")
    told.figures(2, {"loss": 2.0})
    told.close(patience=60)
    assert Journal(folder).delivered()
    assert told.run_id is not None
    (metric,) = mlflow.MlflowClient(server.uri, server.uri).get_metric_history(told.run_id, "loss")
    assert metric.value == 2.0


def test_a_journal_on_a_full_disk_does_not_stop_a_run(tiny: RunConfig, caplog: pytest.LogCaptureFixture) -> None:
    class Full:
        def figures(self, nimg: int, values: dict[str, float]) -> None:
            raise OSError(28, "No space left on device")

        def picture(self, nimg: int, path: Path) -> None: ...
        def finish(self, model: Path) -> None: ...
        def close(self, patience: float) -> None: ...

    tracking.Tolerant(Full()).figures(1, {})
    assert "No space left" in caplog.text
