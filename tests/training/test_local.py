"""``make train-local``, shortened: real servers, every part a process of its own, pictures that a package carries."""

from __future__ import annotations

import json
import os
import sqlite3
import sys
import time
from pathlib import Path

import psutil
import pytest

from mien import store
from tests.training.launch import Start, environment, finish
from training import local

pytest.importorskip("mlflow")
pytest.importorskip("skimage")


@pytest.mark.timeout(600)
def test_the_chain_goes_from_pictures_to_a_judged_model_in_the_registry(tmp_path: Path, background: Start) -> None:
    folder, log = tmp_path / "local", tmp_path / "log"
    command = [sys.executable, "-m", "training.local", "--folder", str(folder)]
    command += ["--photos", "96", "--images", "16"]
    environ = environment(MIEN_SHARED=str(tmp_path / "nothing"))
    text = finish(background(command, log=log, env=environ), log, timeout=570)
    assert "2 processes on cpu" in text and "alias candidate" in text
    # Training read its shards from S3 through a cache that was empty, and wrote its checkpoints there and nowhere else.
    assert json.loads((folder / "runs" / "local" / "config.json").read_text())["data"]["shards"] == "s3://mien/shards"
    assert len([p for p in (folder / "cache" / "shards").rglob("*") if p.is_file() and p.stat().st_size > 100_000]) == 2
    assert not list(folder.glob("**/*.tar"))
    assert "files of checkpoints in s3://mien/checkpoints" in text
    assert not (folder / "runs" / "local" / "checkpoints").exists()
    # What the registry gave to evaluate is the run's model, and both runs are in MLflow's database.
    report = json.loads((folder / "report" / "report.json").read_text())
    assert report["model.digest"] == store.load_config(folder / "runs" / "local" / "model").digest
    assert report["model.path"].startswith("models:/mien/") and report["data.path"] == "s3://mien/shards"
    with sqlite3.connect(folder / "mlflow" / "mlflow.db") as database:
        names = {name for (name,) in database.execute("select name from runs where status = 'FINISHED'")}
        tags = dict(database.execute("select key, value from model_version_tags"))
        aliases = {alias for (alias,) in database.execute("select alias from registered_model_aliases")}
    assert "local" in names and any(name.startswith("evaluate-") for name in names)
    # Promotion found that report, and the gates refused it, in the registry's own words.
    assert "promote: refused: version 1 stays candidate" in text and aliases == {"candidate"}
    (event,) = [json.loads(value) for key, value in tags.items() if key.startswith("mien.audit.")]
    assert event["what"] == "refused" and "faces >= 600" in event["why"]


def test_a_part_that_fails_or_hangs_is_named_and_ends_with_all_it_started(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    chain = local._Chain(local.Options(tmp_path, tmp_path, timeout=4.0), dict(os.environ))
    with pytest.raises(local.ChainError, match=r"ingest ended with 3; its output is in .*1-ingest\.log"):
        chain.part("ingest", "-c", "print('words'); raise SystemExit(3)", accept=(0, 1))
    assert (tmp_path / "logs" / "1-ingest.log").read_text() == "words\n"
    assert chain.part("promote", "-c", "raise SystemExit(3)", accept=(0, local.REFUSED)) == 3
    child = "import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(99)'])"
    began = time.monotonic()
    with pytest.raises(local.ChainError, match="took too long"):
        chain.part("training", "-c", f"{child}; print(p.pid, flush=True); time.sleep(99)")
    assert time.monotonic() - began < 30
    started = int((tmp_path / "logs" / "3-training.log").read_text())
    deadline = time.monotonic() + 20  # a process that was killed is gone soon, not at once
    while psutil.pid_exists(started) and psutil.Process(started).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "what a part started outlives it"
        time.sleep(0.05)
