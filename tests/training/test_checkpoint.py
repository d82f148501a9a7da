"""Checkpoints hold data only, are whole or absent, and broken ones are passed over."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from training import checkpoint


def _state(value: float) -> dict[str, object]:
    return {"a": {"weights": torch.full((3, 2), value), 0: [1, 2.5, None, True, "x"]}, "b": torch.tensor(7)}


def test_what_is_written_is_read_back_with_its_structure(tmp_path: Path) -> None:
    checkpoint.write(tmp_path, 80, _state(0.25), keep=2)
    found = checkpoint.latest(tmp_path)
    assert found is not None
    nimg, state = found
    assert nimg == 80
    assert torch.equal(state["a"]["weights"], torch.full((3, 2), 0.25))
    assert state["a"][0] == [1, 2.5, None, True, "x"] and int(state["b"]) == 7


def test_a_folder_without_checkpoints_has_none(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path / "nothing") is None


def test_only_the_last_few_are_kept(tmp_path: Path) -> None:
    for nimg in (1, 2, 3, 4):
        checkpoint.write(tmp_path, nimg, _state(nimg), keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["nimg-000000000003", "nimg-000000000004"]


@pytest.mark.parametrize("damage", ["flip", "truncate", "no structure"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint.write(tmp_path, 1, _state(1), keep=2)
    newest = checkpoint.write(tmp_path, 2, _state(2), keep=2)
    path = newest / "state.safetensors"
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[-1] ^= 1
        path.write_bytes(data)
    elif damage == "truncate":
        path.write_bytes(data[: len(data) // 2])
    else:
        (newest / "state.json").write_text("{")
    found = checkpoint.latest(tmp_path)
    assert found is not None and found[0] == 1
    assert "nimg-000000000002" in caplog.text


def test_a_write_that_was_killed_leaves_nothing_that_counts(tmp_path: Path) -> None:
    (tmp_path / ".nimg-000000000009.1.tmp").mkdir()
    assert checkpoint.latest(tmp_path) is None
    checkpoint.write(tmp_path, 1, _state(1), keep=2)
    assert [p.name for p in tmp_path.iterdir()] == ["nimg-000000000001"]


def test_an_object_that_is_not_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="function"):
        checkpoint.write(tmp_path, 1, {"f": lambda: None}, keep=1)
