"""Shards to candidate: the fit as a run, from a real S3 server to a real MLflow server, where promotion finds it."""

from __future__ import annotations

import sys
from pathlib import Path

import httpx
import pytest

import storage
from mien import store
from mien.networks.cover import CoverConfig
from services.promote import cli as promote
from storage import registry
from tests.s3 import S3Server, s3_server
from tests.training.conftest import write_shards
from tests.training.launch import Start, environment, free_port, wait_for
from training import config, cover, fit

__all__ = ["s3_server"]

mlflow = pytest.importorskip("mlflow")

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "training" / "configs" / "fit" / "mien-128.yaml"
# Few eigenfaces, samples and steps: what is tested is the road, not the model.
SMALL = [
    'architecture={"name": "cover", "leading_luma": 3, "leading_colour": 2, "landmarks": 2, "luma": 40, "colour": 12,'
    ' "robust": [30, 8], "likenesses": 16, "carriers": 300, "widths": [8, 16], "features": 32,'
    ' "painter": {"widths": [8, 16]}}',
    "bits=16", "steps=20", "batch=8", "recogniser=null", "device=cpu", "threads=1", "patience=20",
]  # fmt: skip


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fit") / "faces"
    write_shards(folder, {"train": 48, "val": 12}, size=64)
    return folder


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, module_background: Start) -> str:
    folder, port = tmp_path_factory.mktemp("mlflow"), free_port()
    uri = f"http://127.0.0.1:{port}"
    process = module_background(
        [
            *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"),
            *("--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", str(folder / "files")),
        ],
        log=folder / "log",
        env=environment(MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false"),
    )

    def answers() -> bool:
        try:
            return httpx.get(f"{uri}/health", timeout=1).status_code == 200
        except httpx.HTTPError:
            return False

    assert wait_for(answers, process, timeout=240), (folder / "log").read_text()[-2000:]
    return uri


def test_a_fit_from_s3_is_a_candidate_that_promotion_asks_for_its_report(
    local: Path, s3_server: S3Server, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    shards = s3_server.prefix()
    place = storage.open_prefix(shards)
    for file in sorted(local.iterdir(), key=lambda f: f.name == "manifest.json"):
        place.write(file.name, file)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    monkeypatch.setenv("MIEN_CACHE", str(tmp_path / "models"))
    command = [
        "--config", str(SHIPPED), f"data.shards={shards}", f"mlflow={server}", f"cache={tmp_path / 'cache'}", *SMALL,
    ]  # fmt: skip
    assert fit.main([*command, f"runs={tmp_path / 'one'}", f"export={tmp_path / 'model'}"]) == 0
    said = capsys.readouterr().out.splitlines()
    folder = tmp_path / "one" / "mien-128-fit"
    assert said[-2].startswith("models:/mien/1 is the candidate") and said[-1] == str(tmp_path / "model")
    network, stored = store.load(registry.fetch("models:/mien@candidate"))
    assert network.config.luma == 40 and stored.bits == 16 and stored.images_seen == 160
    assert (folder / "model" / store.WEIGHTS).read_bytes() == (tmp_path / "model" / store.WEIGHTS).read_bytes()

    client = mlflow.MlflowClient(server, server)
    version = client.get_model_version_by_alias("mien", "candidate")
    made = client.get_run(version.run_id)
    assert made.info.status == "FINISHED" and made.data.params["architecture.likenesses"] == "16"
    assert made.data.metrics.keys() >= {"val/explained", "val/energy", "val/L1_I_R", "seconds"}
    assert made.data.metrics["val/L1_I_R"] < 0.02 < made.data.metrics["val/L1_I_A1"]
    assert version.tags["digest"] == stored.digest and version.tags["data_digest"] == stored.data_digest
    assert made.inputs.dataset_inputs[0].dataset.digest == stored.data_digest[:36]
    assert [f.path for f in client.list_artifacts(version.run_id, "samples")] == ["samples/nimg-000000000160.png"]
    assert "no recogniser" in version.description

    # A pod that comes again begins with an empty disk: the same run, the same weights, no second version.
    assert fit.main([*command, f"runs={tmp_path / 'two'}"]) == 0
    assert capsys.readouterr().out.splitlines()[-2] == said[-2]
    assert len(client.search_runs([made.info.experiment_id])) == 1
    # The folder of a fit takes another one once MLflow has the first.
    assert fit.main([*command, f"runs={tmp_path / 'two'}", "seed=1"]) == 0
    assert "models:/mien/2 is the candidate" in capsys.readouterr().out
    assert len(client.search_runs([made.info.experiment_id])) == 2

    # Nobody has judged it: promotion sees it, says so, and moves nothing.
    monkeypatch.setattr(sys, "argv", ["promote"])
    with pytest.raises(SystemExit) as ended:
        promote.main()
    told = capsys.readouterr()
    assert ended.value.code == promote.REFUSED and "models:/mien/2" in told.err + told.out
    assert "champion" not in client.get_registered_model("mien").aliases


def test_what_is_away_may_be_tried_again_and_what_is_wrong_may_not(
    local: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--config", str(SHIPPED), *SMALL, f"runs={tmp_path / 'runs'}", f"data.shards={local}"]
    nobody = f"mlflow=http://127.0.0.1:{free_port()}"
    assert fit.main([*command, nobody, "patience=1"]) == 75
    said = capsys.readouterr().err
    folder = tmp_path / "runs" / "mien-128-fit"
    assert f"python -m training.tracking {folder}" in said
    assert (folder / "model" / store.WEIGHTS).exists()  # what was fitted is not lost
    assert fit.main([*command, nobody, "seed=1", "patience=1"]) == 1  # it would be, for MLflow
    assert "another fit, which MLflow has not got" in capsys.readouterr().err
    assert fit.main([*command, f"data.shards={tmp_path / 'nothing'}"]) == 1
    assert "manifest.json" in capsys.readouterr().err
    assert fit.main([*command, "step=1"]) == 1 and "step" in capsys.readouterr().err
    assert fit.main([*command, "--dry-run"]) == 0 and '"steps": 20' in capsys.readouterr().out


def test_the_configs_that_ship_are_a_fit_and_a_painter_that_goes_on_from_it() -> None:
    fitted, painted = fit.load(SHIPPED), config.load(ROOT / "training" / "configs" / "mien-128.yaml")
    assert fitted.architecture == CoverConfig(painter=None) and fitted.bits == 128
    assert fitted.recogniser is not None and fitted.recogniser.steps == cover.APART
    # What shall tell likenesses apart is found where the data are.
    assert "$" not in fitted.recogniser.weights
    assert isinstance(painted.architecture, CoverConfig) and painted.architecture.painter is not None
    assert painted.architecture.model_copy(update={"painter": None}) == fitted.architecture
    assert painted.bits == fitted.bits and painted.recogniser.name == fitted.recogniser.name
