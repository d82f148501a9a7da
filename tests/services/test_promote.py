"""Promotion against a real MLflow server: what moves the alias, what does not, and what is written about it."""

from __future__ import annotations

import json
import socket
import sys
import time
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mien import networks, store
from services import gates
from services.promote import cli, promotion
from services.promote.registry import Event, Registry, RegistryError
from tests.training.launch import environment

mlflow = pytest.importorskip("mlflow")
pytest.importorskip("sqlalchemy", reason="an MLflow server needs the whole of mlflow, not mlflow-skinny")

ROOT = Path(__file__).resolve().parents[2]
# What passes every gate of services/promote/gates.yaml.
GOOD: dict[str, Any] = {
    "format": 1, "data.digest": "d" * 64, "data.split": "test", "seed": 0, "fpr": 1e-3, "faces": 600,
    "verification.dlib.I-A.same": 0.02, "verification.dlib.I-R.same": 0.999, "verification.dlib.I-WR.same": 0.01,
    "verification.dlib.I-WR-1bit.same": 0.1, "verification.dlib.A1-A2.same": 0.1,
    "recovery.l1": 0.01, "recovery.dssim": 0.01,
}  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, module_background: Callable[..., Any]) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("mlflow")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    uri, log = f"http://127.0.0.1:{port}", folder / "log"
    process = module_background(
        [
            *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"),
            *("--backend-store-uri", f"sqlite:///{folder}/mlflow.db"),
            *("--artifacts-destination", str(folder / "artifacts")),
        ],
        log=log,
        env=environment(MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false"),
    )
    deadline = time.monotonic() + 240
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MIEN_CACHE", str(folder / "cache"))
        patch.delenv("MIEN_ACTOR", raising=False)
        patch.setenv("MLFLOW_TRACKING_URI", uri)
        while True:
            with suppress(OSError), urllib.request.urlopen(f"{uri}/health", timeout=1):
                break
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-2000:]
            time.sleep(0.1)
        yield uri


@dataclass
class Model:
    """A registered model of a test's own, and the ways in which a test acts on it."""

    name: str
    folder: Path
    registry: Registry
    capture: pytest.CaptureFixture[str]
    monkeypatch: pytest.MonkeyPatch

    @property
    def client(self) -> Any:
        return mlflow.MlflowClient()

    def register(self, seed: int) -> tuple[str, str]:
        """A version with small weights of its own, as candidate; its number and digest."""
        torch.manual_seed(zlib.crc32(f"{self.name} {seed}".encode()))
        architecture = networks.UNetConfig(widths=(8, 8), condition=8)
        folder = self.folder / f"model-{seed}"
        config = store.ModelConfig(architecture=architecture, bits=8, crop_size=64, images_seen=1)
        network = networks.build(architecture, bits=8, size=64)
        config = store.save(folder, network, config, card="# a card\n")
        client = self.client
        run = client.create_run("0")
        for name in (store.WEIGHTS, store.CONFIG, store.CARD):
            client.log_artifact(run.info.run_id, str(folder / name), "model")
        with suppress(mlflow.exceptions.MlflowException):
            client.create_registered_model(self.name)
        version = client.create_model_version(self.name, f"{run.info.artifact_uri}/model", run.info.run_id)
        client.set_registered_model_alias(self.name, "candidate", version.version)
        return str(version.version), config.digest

    def judge(self, digest: str, **changes: Any) -> str:
        """A report in MLflow, written by evaluate itself; its run."""
        from services.evaluate import tracking

        folder = self.folder / "report"
        folder.mkdir(exist_ok=True)
        flat = GOOD | {"model.digest": digest} | {key.replace("__", "."): value for key, value in changes.items()}
        (folder / "report.json").write_text(json.dumps(flat))
        return tracking.log(self.registry.uri, flat, folder)

    def run(self, *arguments: str, expected: int = 0) -> str:
        """``python -m services.promote``; all it says."""
        self.monkeypatch.setattr(sys, "argv", ["promote", "--name", self.name, *arguments])
        self.capture.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.main()
        said = self.capture.readouterr()
        assert (end.value.code or 0) == expected, said
        return said.err + said.out

    @property
    def champion(self) -> str | None:
        return self.registry.alias("champion")

    def trail(self, version: str) -> list[tuple[str, str, str | None]]:
        return [(event.what, event.who, event.other) for event in self.registry.trail(version)]


@pytest.fixture
def model(
    server: str,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Model:
    name = f"mien-{zlib.crc32(request.node.name.encode())}"
    return Model(name, tmp_path, Registry(server, name), capsys, monkeypatch)


def test_a_candidate_that_passes_becomes_the_champion_once_and_its_version_says_who_what_and_why(model: Model) -> None:
    assert "nothing to do" in model.run()  # nothing is registered
    version, digest = model.register(1)
    assert "services.evaluate --model models:/" in model.run(expected=3)  # nobody measured it
    assert model.champion is None and model.trail(version) == []
    run = model.judge(digest)
    assert "would be champion" in model.run("--dry-run") and model.champion is None and model.trail(version) == []

    said = model.run("--who", "somebody", "--why", "the auditors' release")
    assert said.endswith(f"champion: models:/{model.name}/{version}\n") and model.champion == version
    assert said.count("pass  ") == len(gates.load().gates) and "there is no champion to compare with" in said
    assert "nothing to do" in model.run()
    (event,) = model.registry.trail(version)  # the second time added nothing
    assert (event.what, event.who, event.other) == ("promoted", "somebody", None)
    assert event.why == "the auditors' release; 9 of 9 gates of version 1 hold"
    assert event.details["evaluation"] == f"run {run}" and event.details["digest"] == digest
    assert event.details["gates.sha256"] == gates.digest() and len(event.details["report"]) == 64
    assert "promoted by somebody" in model.run("--history")


def test_a_candidate_that_fails_is_refused_with_the_gates_it_failed_and_the_trail_says_so_once(model: Model) -> None:
    good, digest = model.register(1)
    model.judge(digest)
    model.run()
    bad, digest = model.register(2)
    bad_figures = {"verification__dlib__I-A__same": 0.6, "recovery__l1": float("nan")}
    model.judge(digest, **bad_figures)
    for _ in range(2):
        said = model.run("--who", "clock", expected=3)
        assert "3 of 9 gates failed" in said.splitlines()[-1]
        for part in (
            "verification.dlib.I-A.same <= 0.05 (measured: 0.6)",
            "verification.dlib.I-A.same <= champion's +0.005 (measured: 0.6)",
            "recovery.l1 <= 0.04 (measured: not measured)",
        ):
            assert part in said.splitlines()[-1]
    assert model.champion == good and model.trail(bad) == [("refused", "clock", None)]
    # Measured again and better, it passes: the newest report counts. An older one can still be named.
    model.judge(digest)
    old = model.run("--run", next(r.source for r in list(model.registry.reports(digest))[1:]).split()[1], expected=3)
    assert "3 of 9 gates failed" in old
    model.run()
    assert model.champion == bad and model.trail(bad)[-1][0] == "promoted" and model.trail(bad)[-1][2] == good


def test_a_champion_is_beaten_on_the_same_faces_only(model: Model) -> None:
    first, digest = model.register(1)
    model.judge(digest, seed=1)
    model.run()
    second, digest_of_second = model.register(2)
    model.judge(digest_of_second)
    said = model.run(expected=3)  # the champion was judged under other codes: not comparable
    assert "1 of 9 gates failed" in said and "was not judged on the same faces" in said
    model.judge(digest, **{"verification__dlib__I-A__same": 0.001})  # now it was, and hides better than the candidate
    said = model.run(expected=3)
    assert "1 of 9 gates failed" in said and f"compared with version {first} by run" in said
    model.judge(digest, **{"verification__dlib__I-A__same": 0.016})  # within the tolerance
    model.run()
    assert model.champion == second


def test_a_rollback_gives_the_alias_back_and_the_clock_does_not_promote_again(model: Model) -> None:
    versions, digests = [], []
    for seed in range(3):
        version, digest = model.register(seed)
        model.judge(digest)
        model.run()
        versions.append(version)
        digests.append(digest)
    first, second, third = versions
    assert f"would be champion: models:/{model.name}/{second}" in model.run("--rollback", "--dry-run")
    assert model.champion == third
    model.run("--rollback", "--who", "on duty", "--why", "lattices on dark skin")
    assert model.champion == second
    assert model.trail(third)[-1] == ("rolled-back", "on duty", second)
    assert model.trail(second)[-1] == ("restored", "on duty", third)
    said = model.run(expected=3)  # third is still the candidate and still passes
    assert "was rolled back" in said and "lattices on dark skin" in said and model.champion == second
    model.run("--rollback")
    assert model.champion == first
    assert "the first champion" in model.run("--rollback", expected=3)
    assert "has no version 99" in model.run("--rollback", "--to", "99", expected=3)
    never, _ = model.register(9)
    assert "only the gates make it so" in model.run("--rollback", "--to", never, expected=3)
    model.run("--rollback", "--to", second)
    assert model.champion == second
    model.client.set_registered_model_alias(model.name, "candidate", third)
    model.run("--again", "--why", "it was the camera")
    assert model.champion == third


def test_reports_of_other_models_and_changed_weights_are_refused(model: Model, tmp_path: Path) -> None:
    version, digest = model.register(1)
    report = tmp_path / "report.json"
    report.write_text(json.dumps(GOOD | {"model.digest": "0" * 64}))
    assert "is about a model with digest 000000000000" in model.run("--report", str(report), expected=3)
    report.write_text("[]")
    assert "no report of services.evaluate" in model.run("--report", str(report), expected=1)
    report.write_text(json.dumps(GOOD | {"model.digest": digest}))
    # The registry's copy of the weights is changed by other hands after it was judged.
    run = model.client.get_model_version(model.name, version).run_id
    damaged = tmp_path / store.WEIGHTS
    data = bytearray((model.folder / "model-1" / store.WEIGHTS).read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(data)
    model.client.log_artifact(run, str(damaged), "model")
    assert "have sha256" in model.run("--report", str(report), expected=3)
    assert model.champion is None
    model.client.log_artifact(run, str(model.folder / "model-1" / store.WEIGHTS), "model")
    model.run("--report", str(report))
    assert model.champion == version and model.registry.trail(version)[0].details["evaluation"] == str(report)


def test_a_promotion_that_comes_between_wins(model: Model) -> None:
    version, digest = model.register(1)
    model.judge(digest)
    other, _ = model.register(2)
    model.client.set_registered_model_alias(model.name, "candidate", version)

    def meanwhile(text: str) -> None:
        if text.startswith("  pass"):
            model.client.set_registered_model_alias(model.name, "champion", other)

    with pytest.raises(RegistryError, match="another promotion"):
        promotion.promote(model.registry, promotion.load_rules(gates.DEFAULT), who="me", say=meanwhile)
    assert model.champion == other and model.trail(version) == []


def test_a_trail_that_other_hands_changed_is_said(model: Model) -> None:
    version, digest = model.register(1)
    model.judge(digest)
    model.run()
    key = next(k for k in model.client.get_model_version(model.name, version).tags if k.startswith("mien.audit."))
    model.client.set_model_version_tag(model.name, version, key, "{}")
    assert "not what promotion wrote" in model.run("--history", expected=1)


def test_wrong_usage_broken_gates_and_a_registry_that_is_away_have_codes_of_their_own(
    model: Model, tmp_path: Path
) -> None:
    model.run("--to", "1", expected=2)
    model.run("--rollback", "--again", expected=2)
    broken = tmp_path / "gates.yaml"
    broken.write_text("version: 1\ngates: []\n")
    assert "not a gate file" in model.run("--gates", str(broken), expected=2)
    model.monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    assert "the registry http://127.0.0.1:9" in model.run("--mlflow", "http://127.0.0.1:9", expected=1)
    model.monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert "MLFLOW_TRACKING_URI" in model.run(expected=2)


@pytest.mark.parametrize(("job", "code"), [("promote", 0), ("rollback", 3)])
def test_the_command_of_the_cluster_s_job_runs_as_it_is(
    job: str, code: int, model: Model, server: str, background: Callable[..., Any], tmp_path: Path
) -> None:
    """Arguments, environment and exit code of k8s/promote; only the address of the registry is another."""
    manifest = yaml.safe_load((ROOT / "k8s" / "promote" / f"{job}.yaml").read_text())
    (container,) = manifest["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    final = {c for rule in manifest["spec"]["jobTemplate"]["spec"]["podFailurePolicy"]["rules"] if "onExitCodes" in rule
             for c in rule["onExitCodes"]["values"]}  # fmt: skip
    assert final == {2, cli.REFUSED}
    given = {v["name"]: v["value"] for v in container["env"] if "value" in v}
    assert given.pop("HOME") == "/tmp"
    env = environment(**given, HOME=str(tmp_path), MIEN_ACTOR="mien-promote-1", MLFLOW_TRACKING_URI=server)
    command = [sys.executable, *container["args"][1:], "--name", model.name]
    version = None
    if job == "promote":
        version, digest = model.register(1)
        model.judge(digest)
    log = tmp_path / "log"
    process = background(command, log=log, env=env)
    assert process.wait(timeout=120) == code, log.read_text()
    assert model.champion == version
    if version is not None:
        assert model.trail(version) == [("promoted", "mien-promote-1", None)]


def test_an_event_reads_as_a_sentence() -> None:
    event = Event("rolled-back", "on duty", "lattices", when="2026-11-26T01:02:03.000004+00:00", other="2")
    assert str(event) == "2026-11-26T01:02:03Z rolled-back by on duty, back to version 2: lattices"
