"""The service against its own description: schemathesis makes requests of /openapi.json and judges every answer."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("schemathesis", reason="schemathesis is not installed (extra: dev)")

# What a description cannot say: that the bytes of `image` are a picture (422) of a size (413). Every other refusal of a
# request that fits the description is a failure, 400 above all.
CONFIG = """
hooks = "formats"
[checks.positive_data_acceptance]
expected-statuses = ["2xx", 413, 422]
"""
# How the one format that is ours is made.
FORMATS = r"""
import json
import schemathesis
from hypothesis import strategies as st

names = st.integers(0, 999).map(str)
words = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20)
mappings = st.dictionaries(names, words, min_size=1, max_size=4)
schemathesis.openapi.format("passwords-by-face", mappings.map(json.dumps))
"""


def check(service: Any, folder: Path, *, examples: int, seconds: float) -> str:
    """Run all checks of schemathesis against a service; returns what it printed."""
    (folder / "schemathesis.toml").write_text(CONFIG, encoding="utf-8")
    (folder / "formats.py").write_text(FORMATS, encoding="utf-8")
    log = folder / "printed"
    with open(log, "wb") as output:
        ran = subprocess.run(
            [
                *(sys.executable, "-m", "schemathesis.cli"),
                "run",
                f"{service.url}/openapi.json",
                "--checks=all",
                "--phases=examples,coverage,fuzzing",
                f"--max-examples={examples}",
                "--max-response-time=20",
                "--request-timeout=30",
                "--seed=1",
                "--generation-database=none",
                "--no-color",
            ],
            cwd=folder,
            env={**os.environ, "NO_PROXY": "*", "PYTHONPATH": str(folder)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            timeout=seconds,
        )
    printed = log.read_text(encoding="utf-8", errors="replace")
    assert ran.returncode == 0, printed[-12_000:]
    return printed


def cases(printed: str) -> int:
    """How many requests were made up."""
    found = re.search(r"(\d+) generated", printed)
    assert found, printed[-3000:]
    return int(found[1])


def test_the_service_does_what_its_description_says(service: Any, tmp_path: Path) -> None:
    printed = check(service, tmp_path, examples=3, seconds=100)
    assert "Tested: 7" in printed, printed
    assert cases(printed) > 100
    assert service.process.poll() is None


@pytest.mark.soak
def test_the_service_does_what_its_description_says_under_many_requests(service: Any, tmp_path: Path) -> None:
    print(json.dumps({"cases": cases(check(service, tmp_path, examples=200, seconds=1500))}))


def test_the_examples_of_the_description_work(service: Any) -> None:
    with service.client() as client:
        paths = client.get("/openapi.json").json()["paths"]
        for path in ("/v1/anonymize", "/v1/detect"):
            examples = paths[path]["post"]["requestBody"]["content"]["application/json"]["examples"]
            for example in examples.values():
                answer = client.post(path, json=example["value"])
                assert answer.status_code == 200, answer.text
                assert re.fullmatch("[0-9a-f]{64}", answer.headers["x-mien-model-digest"])
