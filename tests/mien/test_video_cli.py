"""Clips through the `mien` command; run in this process but for what only a real process shows."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import typer
from numpy.typing import NDArray
from PIL import Image

from mien import cli
from mien.detection import MTCNNDetector
from mien.video import synthetic
from mien.video.codecs import CODECS
from tests.mien.command import Command
from tests.mien.video_parts import differ, frames

SECRET = "hunter-two-and-a-half"
FRAMES = 6


@pytest.fixture(scope="module")
def pictures(astronaut: NDArray[np.uint8], detector: MTCNNDetector) -> list[NDArray[np.uint8]]:
    """Two people side by side: the left one moves, the right one turns."""
    (face,) = detector.detect(astronaut)
    left, right = (
        synthetic.shots(astronaut, face.landmarks, motion, frames=FRAMES, size=(180, 200), eyes=28)
        for motion in ("move", "turn")
    )
    return [np.hstack([a.pixels, b.pixels]) for a, b in zip(left, right, strict=True)]


@pytest.fixture
def folder(
    tmp_path: Path, pictures: list[NDArray[np.uint8]], model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    synthetic.write(tmp_path / "clip.mp4", pictures, sound=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MIEN_MODEL", str(model_folder))
    monkeypatch.setenv("MIEN_PASSWORD", SECRET)
    return tmp_path


def apart(a: Path, b: Path, side: str = "both") -> float:
    """Mean difference of two clips in 8-bit levels, in one half of the picture or in both."""
    place = {"left": np.s_[:, :200], "right": np.s_[:, 200:], "both": np.s_[:]}[side]
    return float(np.mean([differ(x.pixels[place], y.pixels[place]) for x, y in zip(frames(a), frames(b), strict=True)]))


def test_a_clip_goes_there_and_back(folder: Path, mien: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    there = mien("anonymize", "clip.mp4")
    assert there.code == 0
    assert there.out == f"2 tracks in {FRAMES} frames anonymized, lossless: clip.anon.mp4\n"
    back = mien("recover", "clip.anon.mp4")
    assert back.out == f"2 tracks in {FRAMES} frames recovered, h264: clip.recovered.mp4\n"
    monkeypatch.setenv("MIEN_PASSWORD", "another")
    wrong = mien("recover", "clip.anon.mp4", "-o", "wrong.mp4")
    # Nothing in what is said tells the wrong password from the right one.
    assert (wrong.code, wrong.out) == (0, back.out.replace("clip.recovered", "wrong")) and wrong.err == back.err
    clip, anonymized = folder / "clip.mp4", folder / "clip.anon.mp4"
    right, third = (apart(clip, folder / name) for name in ("clip.recovered.mp4", "wrong.mp4"))
    assert right < 0.6 * apart(clip, anonymized) and right < 0.6 * third
    assert SECRET.encode() not in anonymized.read_bytes()


def test_detect_lists_tracks_and_draws_them_and_single_ones_can_be_chosen(folder: Path, mien: Command) -> None:
    listed = mien("detect", "clip.mp4")
    assert listed.code == 0
    assert listed.out.splitlines()[0] == f"clip.mp4: 2 tracks in {FRAMES} frames, 400x180, 25 frames/s"
    assert "clip.tracks.png" in listed.out.splitlines()[-1]
    with Image.open(folder / "clip.tracks.png") as sheet:
        assert sheet.size == (200, 114)
        assert np.asarray(sheet)[2:98, 2:98].std() > 20
    (folder / "clip.tracks.png").unlink()
    record = json.loads(mien("detect", "clip.mp4", "--json").out)
    assert [t["track"] for t in record["tracks"]] == [0, 1] and record["frames"] == FRAMES
    assert not (folder / "clip.tracks.png").exists()

    for option, name in (("--faces", "one.mp4"), ("--except", "other.mp4")):
        assert mien("anonymize", "clip.mp4", "-o", name, option, "0").code == 0
    changed = [
        [apart(folder / "clip.mp4", folder / name, side) for side in ("left", "right")]
        for name in ("one.mp4", "other.mp4")
    ]
    assert sorted(row.index(0.0) for row in changed) == [0, 1], "each leaves another half bit for bit as it was"
    assert all(max(row) > 1 for row in changed)

    unknown = mien("anonymize", "clip.mp4", "-o", "no.mp4", "--faces", "7")
    assert unknown.code == cli.NO_FACE and "no track 7; its tracks are 0, 1" in unknown.err
    assert not (folder / "no.mp4").exists()


def test_people_can_have_passwords_of_their_own(folder: Path, mien: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "passwords").write_text("1 second person\n")
    assert mien("anonymize", "clip.mp4", "--track-passwords", "passwords").code == 0
    # The second person's file is all that is needed to give the second person back.
    monkeypatch.delenv("MIEN_PASSWORD")
    half = mien("recover", "clip.anon.mp4", "-o", "half.mp4", "--track-passwords", "passwords")
    assert half.out == f"1 track in {FRAMES} frames recovered, lossless: half.mp4\n", half.err
    clip, anonymized, recovered = (folder / name for name in ("clip.mp4", "clip.anon.mp4", "half.mp4"))
    sides = [apart(anonymized, recovered, side) for side in ("left", "right")]
    assert sides.count(0.0) == 1
    side = "left" if sides[0] else "right"
    assert apart(clip, recovered, side) < 0.5 * apart(clip, anonymized, side)
    (folder / "broken").write_text("correct-horse-battery\n")
    broken = mien("recover", "clip.anon.mp4", "-o", "x.mp4", "--track-passwords", "broken")
    assert broken.code == cli.BAD_PASSWORD and "correct-horse" not in broken.err


def test_what_cannot_be_is_said_before_any_work(folder: Path, mien: Command) -> None:
    (folder / "there.mp4").write_bytes(b"x")
    exists = mien("anonymize", "clip.mp4", "-o", "there.mp4")
    assert exists.code == cli.FILE_TROUBLE and "--overwrite" in exists.err
    assert (folder / "there.mp4").read_bytes() == b"x"
    assert "pictures" in mien("anonymize", "clip.mp4", "--url", "http://127.0.0.1:9", "-o", "y.mp4").err
    odd = mien("anonymize", "clip.mp4", "-o", "y.webm")
    assert odd.code == cli.BAD_PICTURE and ".mkv" in odd.err
    crf = mien("anonymize", "clip.mp4", "-o", "y.mp4", "--crf", "20")
    assert crf.code == cli.BAD_PICTURE and "loses nothing" in crf.err
    (folder / "text.mp4").write_text("no clip")
    assert mien("anonymize", "text.mp4", "-o", "y.mp4").code == cli.BAD_PICTURE
    assert not (folder / "y.mp4").exists()
    dry = mien("anonymize", "clip.mp4", "--dry-run")
    assert dry.out.splitlines()[0] == "clip.mp4 -> clip.anon.mp4" and not (folder / "clip.anon.mp4").exists()


def test_the_page_about_clips_names_commands_and_options_that_there_are() -> None:
    page = (Path(__file__).parents[2] / "docs" / "video.md").read_text()
    blocks = re.findall(r"```sh\n(.*?)```", page, flags=re.DOTALL)
    lines = [
        found for block in blocks for found in re.findall(r"^(?:MIEN_PASSWORD=\S+ )?mien (\w+) (.*)$", block, re.M)
    ]
    commands = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
    assert {command for command, _ in lines} == {"anonymize", "detect", "live", "recover"}
    for command, rest in lines:
        known = {name for parameter in commands[command].params for name in parameter.opts}
        arguments = rest.partition(" #")[0].split()
        assert {a for a in arguments if a.startswith("-")} <= known, (command, rest)
    for name in re.findall(r"`(--[a-z-]+)", page):
        if name not in ("--clips", "--frames"):  # of services.evaluate
            assert any(name in p.opts for command in commands.values() for p in command.params), name
    for codec in re.findall(r"--codec ([a-z0-9-]+)", page):
        assert codec in CODECS


@pytest.mark.parametrize(
    "kind", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.soak)], ids=["SIGTERM", "SIGINT"]
)
def test_a_command_that_is_stopped_leaves_no_half_file(
    kind: signal.Signals,
    folder: Path,
    pictures: list[NDArray[np.uint8]],
    background: Callable[..., subprocess.Popen[bytes]],
) -> None:
    # The faces stand still while they are looked for, and there are many frames to change.
    synthetic.write(folder / "long.mp4", pictures[:1] * 400)
    process = background(
        [sys.executable, "-m", "mien", "anonymize", "long.mp4", "--detect-every", "200"],
        log=folder / "log",
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=folder,
    )
    for _ in range(1200):
        half = list(folder.glob(".long.anon.mp4.*.tmp"))
        if half and half[0].stat().st_size:
            break
        assert process.poll() is None, (folder / "log").read_text()
        time.sleep(0.05)
    process.send_signal(kind)
    assert process.wait(60) == cli.INTERRUPTED, (folder / "log").read_text()
    assert sorted(p.name for p in folder.iterdir()) == ["clip.mp4", "log", "long.mp4"]
    assert "Interrupted" in (folder / "log").read_text()
