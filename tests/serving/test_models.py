"""The served model follows its source: a folder, or an alias of a real MLflow server."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from bench.models import untrained
from mien.errors import ModelError, ModelIntegrityError
from storage import registry

mlflow = pytest.importorskip("mlflow")
pytest.importorskip("sqlalchemy", reason="an MLflow server needs the whole of mlflow, not mlflow-skinny")

NAME = "mien"


class Registry:
    """A real MLflow server and a client of it."""

    def __init__(self, uri: str, folder: Path) -> None:
        self.uri = uri
        self.folder = folder
        self.client = mlflow.MlflowClient(uri, uri)
        self.client.create_registered_model(NAME)
        self.experiment = self.client.create_experiment("serving")

    def register(self, model: Path) -> str:
        """The number of a new version with a folder's files."""
        run = self.client.create_run(self.experiment)
        for name in ("config.json", "model.safetensors", "README.md"):
            if (model / name).exists():
                self.client.log_artifact(run.info.run_id, str(model / name), "model")
        source = f"{run.info.artifact_uri}/model"
        return str(self.client.create_model_version(NAME, source, run.info.run_id).version)

    def point(self, version: str, alias: str = "champion") -> None:
        self.client.set_registered_model_alias(NAME, alias, version)


@pytest.fixture(scope="module")
def server(
    tmp_path_factory: pytest.TempPathFactory, module_background: Callable[..., Any], free_port: int
) -> Iterator[Registry]:
    folder = tmp_path_factory.mktemp("mlflow")
    uri = f"http://127.0.0.1:{free_port}"
    process = module_background(
        [
            *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(free_port)),
            *("--workers", "1", "--backend-store-uri", f"sqlite:///{folder}/mlflow.db"),
            *("--artifacts-destination", str(folder / "artifacts")),
        ],
        log=folder / "log",
        env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        cwd=folder,
    )
    deadline = time.monotonic() + 90
    while True:
        assert process.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()[-2000:]
        try:
            if httpx.get(f"{uri}/health", timeout=1, trust_env=False).status_code == 200:
                break
        except httpx.HTTPError:
            time.sleep(0.2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", uri)
        patch.delenv("MLFLOW_REGISTRY_URI", raising=False)
        yield Registry(uri, folder)


@pytest.fixture(scope="module")
def versions(server: Registry, tiny_model: Path, other_model: Path) -> tuple[str, str]:
    """Two good ones."""
    return server.register(tiny_model), server.register(other_model)


def digest_of(folder: Path) -> str:
    return str(json.loads((folder / "config.json").read_text())["digest"])


def tampered(model: Path, folder: Path) -> Path:
    """Another byte in the weights than the digest allows; another config too, else the cache has the true weights."""
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "images_seen": 13}))
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    return folder


# -- fetching -----------------------------------------------------------------------------------------------------


def test_an_alias_becomes_a_verified_folder_that_is_fetched_once(
    server: Registry, versions: tuple[str, str], tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.point(versions[0])
    folder = registry.fetch(f"models:/{NAME}@champion", cache=tmp_path)
    assert digest_of(folder) == digest_of(tiny_model)
    for name in ("config.json", "model.safetensors", "README.md"):
        assert (folder / name).read_bytes() == (tiny_model / name).read_bytes()
    assert sorted(tmp_path.iterdir()) == [folder], "no scratch folder stays"

    fetched: list[str] = []
    download = registry._download
    monkeypatch.setattr(registry, "_download", lambda *a: (fetched.append(a[1]), download(*a)))
    assert registry.fetch(f"models:/{NAME}/{versions[0]}", cache=tmp_path) == folder
    assert fetched == ["config.json"]
    # What lies in the cache is not believed: a damaged folder is fetched again.
    (folder / "model.safetensors").write_bytes(b"damaged")
    assert registry.fetch(f"models:/{NAME}/{versions[0]}", cache=tmp_path) == folder
    assert hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest() == digest_of(tiny_model)


def test_the_library_loads_by_uri(
    server: Registry, versions: tuple[str, str], other_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mien

    monkeypatch.setenv("MIEN_CACHE", str(tmp_path))
    assert mien.load(f"models:/{NAME}/{versions[1]}").digest == digest_of(other_model)


def test_weights_that_are_not_those_of_the_config_are_not_kept(
    server: Registry, tiny_model: Path, tmp_path: Path
) -> None:
    bad = server.register(tampered(tiny_model, tmp_path / "bad"))
    with pytest.raises(ModelIntegrityError, match="sha256"):
        registry.fetch(f"models:/{NAME}/{bad}", cache=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("models:/mien", "names no registered model"),
        ("models:/mien@nobody", "does not say what"),
        ("models:/mien/999", "has no models:/mien/999"),
        ("models:/../mien/1", "names no registered model"),
    ],
)
def test_what_is_not_there_is_said_in_one_line(server: Registry, tmp_path: Path, uri: str, says: str) -> None:
    with pytest.raises(ModelError, match=says) as caught:
        registry.fetch(uri, cache=tmp_path)
    assert "\n" not in str(caught.value)


# -- following ----------------------------------------------------------------------------------------------------


def test_the_engine_follows_the_alias_and_a_bad_version_leaves_the_old_one_serving(
    server: Registry,
    versions: tuple[str, str],
    tiny_model: Path,
    other_model: Path,
    run_engine: Callable[..., Any],
    tmp_path: Path,
    wait_until: Callable[..., None],
) -> None:
    server.point(versions[0])
    running = run_engine(f"models:/{NAME}@champion", model_poll=0.2, cache=tmp_path / "cache")
    model = running.ask("GET", "/v1/model").json()
    assert (model["digest"], model["model_version"]) == (digest_of(tiny_model), versions[0])

    server.point(versions[1])
    wait_until(lambda: running.lines.of("model_exchanged"))
    assert running.engine.digest == digest_of(other_model)
    assert f'digest="{digest_of(other_model)}",version="{versions[1]}"' in running.metrics()
    assert digest_of(tiny_model) not in running.metrics()
    assert 'mien_model_reloads_total{outcome="ok"} 2.0' in running.metrics()

    bad = server.register(tampered(tiny_model, tmp_path / "bad"))
    server.point(bad)
    wait_until(lambda: running.lines.of("model_failed"))
    assert "mien_model_stale 1.0" in running.metrics()
    assert running.engine.digest == digest_of(other_model)
    assert running.ask("GET", "/readyz").status_code == 200
    assert 'mien_model_reloads_total{outcome="failed"} 1.0' in running.metrics()
    failed = running.lines.of("model_failed")[0]
    assert failed["model"] == f"models:/{NAME}/{bad}" and "sha256" in failed["reason"]

    server.point(versions[0])
    wait_until(lambda: len(running.lines.of("model_exchanged")) == 2)
    assert running.engine.digest == digest_of(tiny_model)
    assert "mien_model_stale 0.0" in running.metrics()


def test_a_registry_that_goes_away_leaves_the_model_serving_and_is_followed_again(
    server: Registry,
    versions: tuple[str, str],
    run_engine: Callable[..., Any],
    tmp_path: Path,
    wait_until: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server.point(versions[0])
    running = run_engine(f"models:/{NAME}@champion", model_poll=0.2, cache=tmp_path / "cache")
    before = running.engine.digest
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    wait_until(lambda: running.lines.of("model_failed"))
    assert "mien_model_stale 1.0" in running.metrics()
    assert running.engine.digest == before
    assert running.ask("GET", "/readyz").status_code == 200
    assert "does not say what" in running.lines.of("model_failed")[0]["reason"]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    wait_until(lambda: "mien_model_stale 0.0" in running.metrics())


def test_a_folder_is_followed_by_its_config(
    tiny_model: Path,
    other_model: Path,
    exchange: Callable[[Path, Path], None],
    run_engine: Callable[..., Any],
    tmp_path: Path,
    wait_until: Callable[..., None],
) -> None:
    exchange(tiny_model, tmp_path / "served")
    running = run_engine(tmp_path / "served", model_poll=0.1)
    exchange(other_model, tmp_path / "served")
    wait_until(lambda: running.lines.of("model_exchanged"))
    assert running.engine.digest == digest_of(other_model)
    assert running.lines.of("model_exchanged")[0]["before"] == digest_of(tiny_model)


def test_a_model_that_leaves_faces_as_they_are_does_not_take_over(
    tiny_model: Path,
    exchange: Callable[[Path, Path], None],
    run_engine: Callable[..., Any],
    tmp_path: Path,
    wait_until: Callable[..., None],
) -> None:
    exchange(tiny_model, tmp_path / "served")
    running = run_engine(tmp_path / "served", model_poll=0.1)
    untrained(tmp_path / "idle", seed=0, gain=0)
    exchange(tmp_path / "idle", tmp_path / "served")
    wait_until(lambda: running.lines.of("model_failed"))
    assert "leaves faces as they are" in running.lines.of("model_failed")[0]["reason"]
    assert running.engine.digest == digest_of(tiny_model)
