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


def _kill_often(config: RunConfig, tmp_path: Path, start: Start, kills: int) -> None:
    """Start a run of two processes again and again and SIGKILL it at a random moment, every other time while a
    checkpoint is being written: in turn one of them, their launcher, and all at once as when a node dies."""
    chance = random.Random(kills)
    path = write(config, tmp_path / "config.json")
    folder = Path(config.runs) / config.name / "checkpoints"
    for done in range(kills):
        log = tmp_path / f"log-{done}"
        process = launch(start, 2, ["--config", path], log=log)
        if done % 2 == 0:
            # A file of a checkpoint that was not there, whole or temporary: the write is going on.
            before = set(folder.rglob("*"))
            reached = wait_for(lambda before=before: bool(set(folder.rglob("*")) - before), process)  # type: ignore[misc]
            time.sleep(chance.uniform(0, 0.05))
        else:
            reached = wait_for(lambda log=log: "processes on cpu" in log.read_text(), process)  # type: ignore[misc]
            time.sleep(chance.uniform(0, 2))
        assert reached and process.poll() is None, log.read_text()[-2000:]
        workers = psutil.Process(process.pid).children()
        assert len(workers) == 2
        victim = ("one", "launcher", "node")[done % 3]
        if victim == "one":
            os.kill(chance.choice(workers).pid, signal.SIGKILL)
            finish(process, log, expected=137, timeout=90)  # as Kubernetes sees it: retried
        else:
            for dying in [process.pid, *(w.pid for w in workers if victim == "node")]:
                os.kill(dying, signal.SIGKILL)
            process.wait(timeout=30)
        # Nobody is left to write beside the next start: they end with their launcher, and save first where they can.
        assert psutil.wait_procs(workers, timeout=90)[1] == []


def _run(given: RunConfig, tmp_path: Path, start: Start, *, kills: int) -> None:
    # Without an end: however slowly the killer gets to run beside it, the run does not end before its kill. Where it
    # ends is said afterwards, to it and to the one that is left alone.
    config = given.model_copy(
        update={"total_images": 1_000_000, "checkpoint_every": 4, "sample_every": 1_000_000, "batch": 4, "log_every": 4}
    )
    whole = config.model_copy(update={"runs": str(tmp_path / "whole")})
    _kill_often(config, tmp_path, start, kills)
    stop = ["--stop-at", str(int(weights(config)["nimg"]) + 8)]
    both = {}
    for name, one in (("last", config), ("whole", whole)):
        log = tmp_path / f"{name}.log"
        both[log] = launch(start, 2, ["--config", write(one, tmp_path / f"{name}.json"), *stop], log=log)
    for log, process in both.items():
        finish(process, log, timeout=600)
    assert_equal(weights(whole), weights(config))
    assert "going on from" in (tmp_path / "last.log").read_text()
    assert "going on from" not in (tmp_path / "whole.log").read_text()


def test_sigkill_at_three_moments_changes_nothing_of_where_a_run_ends(
    bare: RunConfig, tmp_path: Path, background: Start
) -> None:
    _run(bare, tmp_path, background, kills=3)


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_sigkill_at_twenty_moments_changes_nothing_of_where_a_run_ends(
    tiny: RunConfig, tmp_path: Path, background: Start
) -> None:
    _run(tiny, tmp_path, background, kills=20)


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
