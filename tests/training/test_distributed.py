"""However a batch is divided over processes, micro-batches and strategies, it is the same step."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import psutil
import pytest
import torch

import storage
from tests.training.launch import Start, figures, finish, launch, wait_for, weights, write
from training import checkpoint
from training.config import RunConfig
from training.loop import train

_NOT_COMPARED = {"time", "images_per_second", "data_wait"}


def _variant(config: RunConfig, runs: Path, name: str, **changes: object) -> RunConfig:
    return config.model_copy(update={"name": name, "runs": str(runs), **changes})


def _close(one: RunConfig, other: RunConfig) -> None:
    """Losses of every step within float rounding, which Adam's first steps enlarge."""
    left, right = figures(one), figures(other)
    assert len(left) == len(right) > 0
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for key in a.keys() - _NOT_COMPARED:
            assert a[key] == pytest.approx(b[key], rel=2e-3, abs=2e-3), (a["nimg"], key)


def test_two_processes_micro_batches_and_deepspeed_give_the_losses_of_one_process(
    tiny: RunConfig, tmp_path: Path, module_background: Start
) -> None:
    base = tiny.model_copy(
        update={"batch": 5, "total_images": 20, "log_every": 5, "checkpoint_every": 10, "sample_every": 20}
    )
    base = base.model_copy(update={"optimizer": base.optimizer.model_copy(update={"clip": 20.0, "warmup": 20})})
    alone = _variant(base, tmp_path, "alone")
    cut = _variant(base, tmp_path, "cut", accumulate=2)
    pair = {
        "ddp": {},
        "ddp-cut": {"accumulate": 2},
        "zero1": {"strategy": "zero1"},
        "zero2": {"strategy": "zero2"},
        "zero2-cut": {"strategy": "zero2", "accumulate": 2},
    }
    divided = [_variant(base, tmp_path, name, **changes) for name, changes in pair.items()]  # 2 + 3 images a step
    log = tmp_path / "log"
    process = launch(
        module_background, 2, [write(c, tmp_path / f"{c.name}.json") for c in divided], log=log, script=True
    )
    for config in (alone, cut):
        train(config)
    text = finish(process, log, timeout=240)
    assert "ninja" not in text and "JIT" not in text and not list(tmp_path.rglob("torch_extensions"))
    for other in (cut, *divided):
        _close(alone, other)
    # Checkpoints have one form whatever wrote them, and hold the same numbers.
    reference = weights(alone)
    for other in divided:
        found = weights(other)
        assert found.keys() == reference.keys()
        for key, value in reference.items():
            if "pools" in key and "images" in key:
                assert (found[key].float() - value.float()).abs().mean() < 0.01, key
            elif key.startswith("/optimizers/") and value.is_floating_point():
                # Moments are gradients, of a minimax whose rounding grows with every step: measured after four, they
                # differ by up to 8 % of a tensor's norm between one process and two. A stale weight makes it 235 times.
                difference = (found[key].float() - value.float()).norm()
                assert difference <= 0.15 * value.float().norm() + 1e-6, (other.name, key)
            elif value.is_floating_point():
                # Adam divides by the gradient's size: where that is rounding alone, the direction is too.
                assert torch.allclose(found[key], value, rtol=0.02, atol=4e-4), (other.name, key)


def test_what_is_not_finite_on_one_process_is_skipped_by_all(
    tiny: RunConfig, tmp_path: Path, module_background: Start
) -> None:
    config = _variant(tiny, tmp_path, "poisoned", batch=2, total_images=8, log_every=2, max_skipped=2)
    log = tmp_path / "log"
    process = launch(
        module_background, 2, [write(config, tmp_path / "c.json"), "--poison", "1:2:4"], log=log, script=True
    )
    finish(process, log)
    lines = figures(config)
    assert [line.get("skipped", 0.0) for line in lines] == [0.0, 1.0, 0.0, 0.0]
    assert "loss" not in lines[1] and all(torch.isfinite(v).all() for v in weights(config).values())
    assert (
        int(
            checkpoint.latest(storage.open_prefix(tmp_path / "poisoned" / "checkpoints"))[1]["trainer"]["skipped"][
                "steps"
            ]
        )
        == 1
    )  # type: ignore[index]

    config = _variant(tiny, tmp_path, "ruined", batch=2, total_images=12, log_every=2, max_skipped=2)
    log = tmp_path / "log2"
    process = launch(
        module_background, 2, [write(config, tmp_path / "c.json"), "--poison", "1:4:12"], log=log, script=True
    )
    text = finish(process, log, expected=1)
    assert text.count("not finite in 2 steps in a row, up to image 6") >= 2  # both say so


def test_a_signal_to_one_process_makes_all_save_and_go_on_later_past_a_broken_checkpoint(
    tiny: RunConfig, tmp_path: Path, module_background: Start
) -> None:
    config = _variant(tiny, tmp_path, "stopped", batch=2, total_images=100_000, log_every=2, checkpoint_every=4)
    path, log = write(config, tmp_path / "c.json"), tmp_path / "log"
    process = launch(module_background, 2, ["--config", path], log=log)
    assert wait_for(lambda: "8/100000" in log.read_text(), process)
    workers = psutil.Process(process.pid).children()
    assert len(workers) == 2
    os.kill(workers[1].pid, signal.SIGTERM)
    text = finish(process, log, expected=143)
    assert "stopped at" in text
    place = storage.open_prefix(tmp_path / "stopped" / "checkpoints")
    found = checkpoint.latest(place)
    assert found is not None
    newest = tmp_path / "stopped" / "checkpoints" / f"nimg-{found[0]:012d}" / "state.safetensors"
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(data)
    earlier = checkpoint.latest(place)
    assert earlier is not None and earlier[0] < found[0]
    log = tmp_path / "log2"
    process = launch(
        module_background, 2, [path, "--stop-at", str(found[0]), "--indices", str(tmp_path / "used")],
        log=log, script=True,
    )  # fmt: skip
    text = finish(process, log)
    assert f"passing over checkpoint nimg-{found[0]:012d}" in text
    first = [(tmp_path / f"used.2.{rank}").read_text().splitlines()[0] for rank in (0, 1)]
    assert all(f'"nimg": {earlier[0]},' in line for line in first)
