"""Checkpoints hold data only, are whole or absent, and broken ones are passed over."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest
import torch

import storage
from training.checkpoint import Checkpoints, latest, snapshot
from training.distributed import alone
from training.strategies.ddp import SummedGradients


def _state(value: float) -> dict[str, object]:
    return {"a": {"weights": torch.full((3, 2), value), 0: [1, 2.5, None, True, "x"]}, "b": torch.tensor(7)}


def _checkpoints(folder: Path, keep: int = 2) -> Checkpoints:
    return Checkpoints(storage.open_prefix(folder), keep=keep)


def _names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_what_is_written_is_read_back_with_its_structure(tmp_path: Path) -> None:
    _checkpoints(tmp_path).save_now(snapshot(80, _state(0.25)))
    found = latest(storage.open_prefix(tmp_path))
    assert found is not None
    nimg, state = found
    assert nimg == 80
    assert torch.equal(state["a"]["weights"], torch.full((3, 2), 0.25))
    assert state["a"][0] == [1, 2.5, None, True, "x"] and int(state["b"]) == 7


def test_a_folder_without_checkpoints_has_none(tmp_path: Path) -> None:
    assert latest(storage.open_prefix(tmp_path / "nothing")) is None


def test_the_last_few_and_the_best_are_kept(tmp_path: Path) -> None:
    checkpoints = _checkpoints(tmp_path)
    for nimg, score in ((1, 0.9), (2, 0.3), (3, 0.5), (4, None), (5, 0.4)):
        checkpoints.save_now(snapshot(nimg, _state(nimg), score))
    assert _names(tmp_path) == [f"nimg-{n:012d}" for n in (2, 4, 5)]


@pytest.mark.parametrize("damage", ["flip", "truncate", "no structure", "no tensors"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    for nimg in (1, 2):
        _checkpoints(tmp_path).save_now(snapshot(nimg, _state(nimg)))
    path = tmp_path / "nimg-000000000002" / "state.safetensors"
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[-1] ^= 1
        path.write_bytes(data)
    elif damage == "truncate":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "no tensors":
        path.unlink()
    else:
        path.with_name("state.json").write_text("{")
    found = latest(storage.open_prefix(tmp_path))
    assert found is not None and found[0] == 1
    assert "nimg-000000000002" in caplog.text


def test_a_write_that_was_killed_leaves_nothing_that_counts_and_is_cleared_away(tmp_path: Path) -> None:
    _checkpoints(tmp_path).save_now(snapshot(9, _state(9)))
    (tmp_path / "nimg-000000000009" / "state.json").unlink()  # killed between the two files
    (tmp_path / "nimg-000000000009" / ".state.json.1.tmp").write_text("torn")
    assert latest(storage.open_prefix(tmp_path)) is None
    _checkpoints(tmp_path).save_now(snapshot(1, _state(1)))
    assert _names(tmp_path)[0] == "nimg-000000000001"
    assert list((tmp_path).rglob("state.*")) == list((tmp_path / "nimg-000000000001").iterdir())


def test_an_object_that_is_not_data_is_refused() -> None:
    with pytest.raises(TypeError, match="function"):
        snapshot(1, {"f": lambda: None})


class _Slow(storage.Folder):
    """A folder whose disk takes its time, or breaks."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.go, self.broken, self.threads = threading.Event(), False, set()

    def write(self, name: str, source: bytes | Path) -> storage.Written:
        self.threads.add(threading.current_thread())
        assert self.go.wait(30)
        if self.broken:
            raise storage.StorageFull("no space left")
        return super().write(name, source)


def test_training_goes_on_while_a_checkpoint_of_an_earlier_moment_is_written(tmp_path: Path) -> None:
    place = _Slow(tmp_path)
    checkpoints = Checkpoints(place, keep=5)
    weights = torch.zeros(3)
    assert checkpoints.save(snapshot(1, {"w": weights}))
    weights += 1  # what training does meanwhile is not in the checkpoint
    began = time.monotonic()
    assert not checkpoints.save(snapshot(2, {"w": weights}), patience=0.2)  # one at most is under way
    assert time.monotonic() - began < 5
    place.go.set()
    assert checkpoints.save(snapshot(3, {"w": weights}))
    checkpoints.close()
    assert threading.current_thread() not in place.threads
    assert _names(tmp_path) == ["nimg-000000000001", "nimg-000000000003"]
    record = json.loads((tmp_path / "nimg-000000000001" / "state.json").read_text())
    assert record["nimg"] == 1
    (tmp_path / "nimg-000000000003" / "state.json").unlink()
    found = latest(storage.open_prefix(tmp_path))
    assert found is not None and torch.equal(found[1]["w"], torch.zeros(3))


def test_a_checkpoint_that_cannot_be_written_stops_nothing_but_the_last_one_is_an_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = _Slow(tmp_path)
    place.go.set()
    place.broken = True
    checkpoints = Checkpoints(place, keep=2)
    assert checkpoints.save(snapshot(1, _state(1)))
    assert checkpoints.save(snapshot(2, _state(2)))
    assert "no space left" in caplog.text
    with pytest.raises(storage.StorageFull):
        checkpoints.save_now(snapshot(3, _state(3)))
    place.broken = False
    checkpoints.save_now(snapshot(4, _state(4)))
    assert _names(tmp_path) == ["nimg-000000000004"]


def test_moments_get_the_memory_format_of_their_parameters_back() -> None:
    """A GPU's fused Adam refuses others: a run with channels_last could not go on."""
    parameter = torch.nn.Parameter(torch.randn(4, 3, 3, 3).to(memory_format=torch.channels_last))

    def player() -> SummedGradients:
        return SummedGradients(torch.optim.Adam([parameter]), alone(torch.device("cpu")), clip=None)

    first = player()
    first.begin()
    first.backward(lambda: parameter.square().sum(), last=True)
    assert first.update()
    state = first.state_dict()
    for moments in state["state"].values():
        for name in ("exp_avg", "exp_avg_sq"):
            moments[name] = moments[name].contiguous()
    second = player()
    second.load_state_dict(state)
    (moments,) = second.optimizer.state.values()
    for name in ("exp_avg", "exp_avg_sq"):
        assert moments[name].stride() == parameter.stride()
        assert torch.equal(moments[name], first.optimizer.state[parameter][name])
