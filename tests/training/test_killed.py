"""A run whose processes are killed ends with the very weights of one that was left alone."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import psutil
import pytest

from tests.training.launch import Start, assert_equal, finish, launch, wait_for, weights, write
from training.config import RunConfig
from training.launch import exit_code


def _kill_often(config: RunConfig, tmp_path: Path, start: Start, kills: int, seed: int) -> None:
    """Start a run of two processes again and again; SIGKILL one of them (or all at once, as a node does) at a random
    moment, every other time while a checkpoint is being written; then let it end."""
    chance = random.Random(seed)
    path = write(config, tmp_path / "config.json")
    folder = Path(config.runs) / config.name / "checkpoints"
    done = 0
    while done < kills:
        log = tmp_path / f"log-{done}"
        process = launch(start, 2, ["--config", path], log=log)
        if done % 2 == 0:
            # A file of a checkpoint that was not there, whole or temporary: the write is going on.
            before = set(folder.rglob("*"))
            reached = wait_for(lambda before=before: bool(set(folder.rglob("*")) - before), process)  # type: ignore[misc]
            time.sleep(chance.uniform(0, 0.05))
        else:
            reached = wait_for(lambda log=log: "processes on cpu" in log.read_text(), process)  # type: ignore[misc]
            time.sleep(chance.uniform(0, 4))
        if not reached or process.poll() is not None:
            text = finish(process, log)  # it ended well before its kill: then this run is over
            raise AssertionError(f"the run is too short for {kills} kills; it ended at number {done}:\n{text[-500:]}")
        workers = psutil.Process(process.pid).children()
        victim = chance.choice([*(w.pid for w in workers), None])
        if victim is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(timeout=30)
        else:
            os.kill(victim, signal.SIGKILL)
            finish(process, log, expected=137, timeout=90)  # as Kubernetes sees it: retried
        done += 1
    finish(launch(start, 2, ["--config", path], log=tmp_path / "last"), tmp_path / "last", timeout=240)


def _run(tiny: RunConfig, tmp_path: Path, start: Start, *, kills: int, images: int) -> None:
    config = tiny.model_copy(
        update={"total_images": images, "checkpoint_every": 4, "sample_every": images, "batch": 4, "log_every": 4}
    )
    whole = config.model_copy(update={"runs": str(tmp_path / "whole")})
    reference = launch(start, 2, ["--config", write(whole, tmp_path / "whole.json")], log=tmp_path / "whole.log")
    _kill_often(config, tmp_path, start, kills, seed=kills)
    finish(reference, tmp_path / "whole.log", timeout=240)
    assert_equal(weights(whole), weights(config))


def test_sigkill_at_three_moments_changes_nothing_of_where_a_run_ends(
    tiny: RunConfig, tmp_path: Path, background: Start
) -> None:
    _run(tiny, tmp_path, background, kills=3, images=64)


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_sigkill_at_twenty_moments_changes_nothing_of_where_a_run_ends(
    tiny: RunConfig, tmp_path: Path, background: Start
) -> None:
    _run(tiny, tmp_path, background, kills=20, images=400)


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ([1], 1),
        ([1, 2], 1),
        ([-9], 137),
        ([-9, 1], 137),  # the kernel took one, and with it the other
        ([-15, -15], 143),
        ([143, 143], 143),
        ([1, -15], 1),  # torchrun ends the peers of a worker that failed
        ([-11, -15], 139),
    ],
)
def test_the_launcher_says_what_kubernetes_should_do(codes: list[int], expected: int) -> None:
    assert exit_code(codes) == expected
