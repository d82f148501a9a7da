"""A run goes on with another number of processes, and every sample of every epoch is used exactly once."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tests.training.launch import Start, finish, launch, write
from training import loop
from training.config import RunConfig


def test_two_processes_then_one_then_three_use_every_sample_of_every_epoch_once(
    bare: RunConfig, tmp_path: Path, background: Start
) -> None:
    # 24 samples an epoch; the world changes in the middle of the first and of the second.
    config = bare.model_copy(update={"batch": 6, "total_images": 48, "checkpoint_every": 6, "log_every": 6})
    path, used = write(config, tmp_path / "config.json"), str(tmp_path / "used")

    def note(nimg: int, indices: NDArray[np.int64]) -> None:
        with open(f"{used}.1.0", "a") as file:
            file.write(json.dumps({"nimg": nimg, "indices": indices.tolist()}) + "\n")

    for processes, stop in ((2, 18), (1, 30), (3, 48)):
        log = tmp_path / f"log-{processes}"
        arguments = [path, "--indices", used, "--stop-at", str(stop)]
        if processes == 1:
            assert loop.train(config, stop_at=stop, on_batch=note).nimg == stop
        else:
            finish(launch(background, processes, arguments, log=log, script=True), log)
    lines = [json.loads(x) for p in sorted(tmp_path.glob("used.*")) for x in p.read_text().splitlines()]
    assert len(list(tmp_path.glob("used.*"))) == 2 + 1 + 3
    epochs: dict[int, list[int]] = {}
    for line in lines:
        epochs.setdefault(line["nimg"] // 24, []).extend(line["indices"])
    assert epochs.keys() == {0, 1}
    assert all(sorted(samples) == list(range(24)) for samples in epochs.values())
