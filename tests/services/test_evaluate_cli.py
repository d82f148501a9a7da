"""The command as its user runs it: on a real model and real judges, killed and gone on with; and the study."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from services.evaluate import keys, study
from tests.services.stand_ins import astronaut_shards

ROOT = Path(__file__).parents[2]
CHROMIUM = os.environ.get("MIEN_CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"))), None
)
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return astronaut_shards(tmp_path_factory.mktemp("astronaut"))


def command(shards: Path, out: Path, *more: str) -> list[str]:
    return [
        *(sys.executable, "-W", "ignore", "-m", "services.evaluate", "--data", str(shards), "--out", str(out)),
        *("--quick", "--judges", "dlib", *more),
    ]


def evaluate(*arguments: str) -> subprocess.CompletedProcess[str]:
    call = [sys.executable, "-W", "ignore", "-m", "services.evaluate", *arguments]
    return subprocess.run(call, capture_output=True, text=True, timeout=250, env=ENVIRONMENT, cwd=ROOT)


def test_a_run_that_was_killed_goes_on_and_ends_with_the_same_figures(
    shards: Path, tmp_path: Path, background: Any
) -> None:
    out, log, parts = tmp_path / "report", tmp_path / "log", "recovery,detection,background,ablations"
    process = background(command(shards, out, "--parts", parts), log=log, env=ENVIRONMENT)
    deadline = time.monotonic() + 200
    while not (out / "parts" / "recovery.json").exists():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(timeout=30)
    assert not (out / "report.json").exists()
    kept = (out / "parts" / "recovery.json").stat().st_mtime_ns

    process = background(command(shards, out, "--parts", parts), log=log, env=ENVIRONMENT)
    assert process.wait(timeout=250) == 0, log.read_text()
    said = log.read_text()
    assert "[1/4] recovery: kept" in said
    assert "[3/4] background ... (all: about " in said and "[4/4] ablations done in" in said
    assert said.splitlines()[-1] == str(out / "report.html"), "the last line says where the result is"
    assert (out / "parts" / "recovery.json").stat().st_mtime_ns == kept
    report = json.loads((out / "report.json").read_text())
    assert keys.unknown(report) == []
    assert report["faces"] == report["people-with-two-photos"] == 24 and report["judges.headline"] == "dlib"
    assert report["recovery.psnr"] > 30, "the model in models/ gives faces back"
    assert "skipped.background.picture" in report or report["background.picture.unchanged"] > 0
    html = (out / "report.html").read_text()
    assert f"digest\n<code>{report['model.digest'][:12]}</code>" in html


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--parts", "verifikation"], "there is no part 'verifikation'"),
        (["--model", "models/none"], "models/none"),
        (["--data", "shards/none"], "shards/none"),
        (["--judges", "arcface"], "there is no judge 'arcface'"),
        (["--judges", "mobilefacenet-casia"], "no judge is left"),
        (["--split", "tests"], "train, val, test"),
    ],
)
def test_what_the_user_got_wrong_is_one_line(shards: Path, tmp_path: Path, arguments: list[str], says: str) -> None:
    from typer.testing import CliRunner

    from mien.errors import MienError
    from services.evaluate.cli import app

    defaults = [] if "--data" in arguments else ["--data", str(shards)]
    result = CliRunner().invoke(app, [*defaults, "--out", str(tmp_path), *arguments])
    assert result.exit_code != 0
    told = result.output if isinstance(result.exception, SystemExit) else str(result.exception)
    assert says in " ".join(told.split())
    assert isinstance(result.exception, SystemExit | MienError | OSError | ValueError), "main() makes one line of these"


def test_a_dry_run_says_what_would_be_done_and_does_nothing(tmp_path: Path) -> None:
    ran = evaluate("--dry-run", "--parts", "attacks", "--out", str(tmp_path / "report"))
    assert ran.returncode == 0 and "attack-sweep" in ran.stdout and not (tmp_path / "report").exists()


# The human study.


@pytest.fixture(scope="module")
def made(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("study")
    ran = evaluate("study", "--data", str(shards), "--out", str(out), "--faces", "6", "--same", "6",
                   "--real-anonymized", "2", "--real-wrong", "2")  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines()[-1] == str(out / "study.html")
    return out


def test_the_page_of_the_study_does_not_hold_the_truth(made: Path) -> None:
    page, key = (made / "study.html").read_text(), json.loads((made / "study-key.json").read_text())
    words = re.sub(r"[A-Za-z0-9+/=]{200,}", "", page)  # without the pictures
    for word in ("truth", "I-A", "WR", "anonymized", "http", "kind"):
        assert word not in words, word
    kinds = [question["kind"] for question in key["questions"].values()]
    assert sorted(kinds) == sorted([*study.KINDS, "A", "A", "WR", "WR"])


def test_a_person_does_the_study_in_a_browser_and_the_answers_are_scored(made: Path, tmp_path: Path) -> None:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no Chromium here (install one, or set MIEN_CHROMIUM)")
    key = json.loads((made / "study-key.json").read_text())["questions"]
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page()
        page.set_default_timeout(30_000)
        outside: list[str] = []
        page.on("request", lambda r: None if r.url.startswith(("file:", "data:", "blob:")) else outside.append(r.url))
        page.goto((made / "study.html").as_uri())
        page.click("#start")
        # One answer by mistake, taken back; then by mouse and by keyboard in turn: yes / left always.
        page.keyboard.press("2")
        page.click("#back")
        asked = []
        for number in range(len(key)):
            asked.append(page.text_content("#question"))
            assert page.evaluate("document.getElementById('left').naturalWidth") == 128
            page.keyboard.press("1") if number % 2 else page.click("#choices button:first-child")
        assert set(asked) == {"Are these the same person?", "Which one is a real photograph?"}
        assert "save your answers" in str(page.text_content("#question"))
        with page.expect_download() as download:
            page.click("#save")
        download.value.save_as(tmp_path / "answers.json")
        browser.close()
    assert outside == [], "nothing is sent anywhere"

    given = json.loads((tmp_path / "answers.json").read_text())
    assert sorted(str(a["id"]) for a in given["answers"]) == sorted(key), "each question once"
    out = tmp_path / "study.json"
    ran = evaluate(
        "study-score", str(tmp_path / "answers.json"), "--key", str(made / "study-key.json"), "--out", str(out)
    )
    assert ran.returncode == 0, ran.stderr
    assert "I-R: one person" in ran.stdout and "100.0 %" in ran.stdout
    shares = json.loads(out.read_text())
    assert [shares[f"study.{kind}.same"] for kind in study.KINDS] == [1.0] * 6
    for kind in ("A", "WR"):
        left = [q["truth"] == "left" for q in key.values() if q["ask"] == "real" and q["kind"] == kind]
        assert shares[f"study.{kind}.more-real"] == sum(left) / len(left), "left was always answered"
    assert keys.unknown(shares) == []
    assert study.scores(out, shares["study.id"].partition("-")[0]) == shares
    with pytest.raises(study.StudyError, match="is a study of the model"):
        study.scores(out, "0" * 64)
    with pytest.raises(study.StudyError, match="not what study-score writes"):
        study.scores(made / "study-key.json", "0" * 64)


def test_answers_to_another_study_are_refused(made: Path, tmp_path: Path) -> None:
    key = json.loads((made / "study-key.json").read_text())
    number = next(iter(key["questions"]))
    for answers, says in (
        ({"study": "another", "answers": []}, "another"),
        ({"study": key["study"], "answers": [{"id": number, "answer": "perhaps"}]}, "no answer"),
        ({"study": key["study"], "answers": [{"id": 10**9, "answer": "yes"}]}, "no answer"),
        ({"study": key["study"], "answers": []}, "has no answers"),
    ):
        with pytest.raises(study.StudyError, match=says):
            study.score(answers, key)
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(study.StudyError, match="not a file of answers"):
        study.merge([tmp_path / "a.json"])
