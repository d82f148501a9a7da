"""However a batch is divided over processes, micro-batches and strategies, it is the same step."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch

import storage
from tests.training.launch import Start, figures, finish, launch, wait_for, weights, write
from training import checkpoint
from training.config import RunConfig
from training.loop import train
from training.step import Trainer

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


def _divergence(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> dict[str, float]:
    """How far Adam's first moments of T with Q, D and F differ, by norm; after one step they are the gradients."""
    assert one.keys() == other.keys()
    found = {}
    for player in ("transformer", "discriminators", "recogniser"):
        keys = [k for k in one if k.startswith(f"/optimizers/{player}/") and k.endswith("exp_avg")]
        difference = torch.cat([(one[k] - other[k]).flatten() for k in keys]).norm()
        found[player] = float(difference / torch.cat([one[k].flatten() for k in keys]).norm())
    return found


def test_two_processes_micro_batches_and_deepspeed_give_the_losses_of_one_process(
    tiny: RunConfig, tmp_path: Path, module_background: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny.model_copy(
        update={"batch": 5, "total_images": 15, "log_every": 5, "checkpoint_every": 5, "keep_checkpoints": 4,
                "sample_every": 15}
    )  # fmt: skip
    base = base.model_copy(update={"optimizer": base.optimizer.model_copy(update={"clip": 20.0, "warmup": 20})})
    alone = _variant(base, tmp_path, "alone")
    cut = _variant(base, tmp_path, "cut", accumulate=2)
    pair = {
        "ddp": {},
        "ddp-cut": {"accumulate": 2},
        "zero1": {"strategy": "zero1"},
        "zero2-cut": {"strategy": "zero2", "accumulate": 2},
    }
    divided = [_variant(base, tmp_path, name, **changes) for name, changes in pair.items()]  # 2 + 3 images a step
    log = tmp_path / "log"
    process = launch(
        module_background, 2, [write(c, tmp_path / f"{c.name}.json") for c in divided], log=log, script=True
    )
    for config in (alone, cut):
        train(config)
    # What the bounds below are for: a mean of the means of micro-batches of 2 and 3 images, the classical mistake.
    wrong = _variant(base, tmp_path, "wrong", accumulate=2)
    with monkeypatch.context() as patch:
        cut_into = Trainer._micro_batches
        patch.setattr(Trainer, "_micro_batches", lambda *given: [replace(m, share=0.5) for m in cut_into(*given)])
        train(wrong, stop_at=5)
    text = finish(process, log, timeout=240)
    assert "ninja" not in text and "JIT" not in text and not list(tmp_path.rglob("torch_extensions"))
    # The gradients of the first step. Measured: T 1.1e-4, D 1.2e-6, F 1.2e-4 of their norms, for every variant.
    first = weights(alone, at=5)
    for other in (cut, *divided):
        assert max(_divergence(first, weights(other, at=5)).values()) < 1e-3, other.name
    mistaken = _divergence(first, weights(wrong, at=5))
    assert mistaken["transformer"] > 0.02 and mistaken["discriminators"] > 0.02, mistaken
    # From then on rounding grows with every step of a minimax. Measured after three: T 8e-4, D 8e-7, F 6e-3. ZeRO that
    # trained F from weights that had been set behind its back was off by 235.
    reference = weights(alone)
    for other in (cut, *divided):
        _close(alone, other)
        found = weights(other)
        assert max(_divergence(reference, found).values()) < 0.05, other.name
        for key, value in reference.items():
            if "pools" in key and "images" in key:
                assert (found[key].float() - value.float()).abs().mean() < 0.01, key
            elif value.is_floating_point() and not key.startswith("/optimizers/"):
                # Adam divides by the gradient's size: where that is rounding alone, the direction is too.
                assert torch.allclose(found[key], value, rtol=0.02, atol=4e-4), (other.name, key)


def test_what_is_not_finite_on_one_process_is_skipped_by_all_and_ends_the_run_when_it_stays(
    bare: RunConfig, tmp_path: Path, module_background: Start
) -> None:
    config = _variant(bare, tmp_path, "poisoned", batch=2, total_images=20, log_every=2, max_skipped=2)
    log = tmp_path / "log"
    poisoned = ["--poison", "1:2:4", "--poison", "1:6:20"]
    process = launch(module_background, 2, [write(config, tmp_path / "c.json"), *poisoned], log=log, script=True)
    text = finish(process, log, expected=1)
    lines = figures(config)
    assert [line.get("skipped", 0.0) for line in lines] == [0.0, 1.0, 0.0, 1.0]
    assert "loss" not in lines[1] and all(torch.isfinite(v).all() for v in weights(config).values())
    found = checkpoint.latest(storage.open_prefix(tmp_path / "poisoned" / "checkpoints"))
    assert found is not None and found[0] == 8 and found[1]["trainer"]["skipped"] == {"steps": 2, "in_a_row": 1}
    # Both processes would say so; the launcher may end the second while the first one's words are still on their way.
    assert "not finite in 2 steps in a row, up to image 8" in text


def test_a_signal_to_one_process_makes_all_save_and_go_on_later_past_a_broken_checkpoint(
    bare: RunConfig, tmp_path: Path, module_background: Start
) -> None:
    config = _variant(bare, tmp_path, "stopped", batch=2, total_images=100_000, log_every=2, checkpoint_every=4)
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
