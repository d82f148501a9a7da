"""Frames under way at once: in order, bounded, the same with any number of threads, and nothing left after an error."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mien.detection import MTCNNDetector
from mien.model import Model
from mien.video import clips, synthetic
from mien.video.stages import in_order, threads, usual_workers
from mien.video.tracking import WEAK, TrackerConfig
from tests.mien.video_parts import Remembering, frames


@pytest.fixture(scope="module")
def clip(astronaut: NDArray[np.uint8], remembering: Remembering, tmp_path_factory: pytest.TempPathFactory) -> Path:
    (face,) = remembering.detect(astronaut)
    path = tmp_path_factory.mktemp("clip") / "clip.mkv"
    shots = synthetic.shots(astronaut, face.landmarks, "leave", frames=20, size=(120, 160), eyes=24)
    synthetic.write(path, (shot.pixels for shot in shots))
    return path


@pytest.mark.parametrize("every", [1, 4])
def test_the_same_faces_are_found_with_any_number_of_threads(clip: Path, detector: MTCNNDetector, every: int) -> None:
    seeing = detector.with_confidence(WEAK)
    config = TrackerConfig(every=every)
    one, three = (clips.find_tracks(clip, seeing, config=config, workers=n) for n in (1, 3))
    assert one.detections == three.detections >= 20 // every
    assert len(one.trajectories) == len(three.trajectories) > 0
    for a, b in zip(one.trajectories, three.trajectories, strict=True):
        assert (a.number, a.first, a.last) == (b.number, b.first, b.last)
        np.testing.assert_array_equal(a.transforms, b.transforms)
        np.testing.assert_array_equal(a.states, b.states)


def test_the_same_clip_is_written_with_any_number_of_threads(
    clip: Path, model: Model, remembering: Remembering, tmp_path: Path
) -> None:
    code = model.code_for("anonymize", "x")
    pictures = []
    for workers in (1, 3):
        target = tmp_path / f"{workers}.mkv"
        clips.anonymize(model, clip, target, code, detector=remembering, workers=workers)
        pictures.append([frame.pixels for frame in frames(target)])
    for a, b in zip(*pictures, strict=True):
        np.testing.assert_array_equal(a, b)


def test_results_come_in_the_order_of_items_and_so_many_are_taken_ahead() -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for number in range(12):
            taken.append(number)
            yield number

    def work(number: int) -> int:
        time.sleep(0.002 * (number % 3))
        return number * number

    with threads(3) as pool:
        for item, result in in_order(pool, work, items(), ahead=lambda _: 4):
            assert result == item * item
            assert len(taken) <= item + 5
    assert taken == list(range(12))


def test_an_error_comes_in_its_turn_and_what_waits_is_dropped() -> None:
    done: list[int] = []
    go = threading.Event()

    def work(number: int) -> int:
        if number == 2:
            raise ValueError("the third")
        if number > 2:
            go.wait(20)
        done.append(number)
        return number

    seen = []

    def all_of_them() -> None:
        with threads(2) as pool:
            for item, _ in in_order(pool, work, range(40), ahead=lambda _: 30):
                seen.append(item)
                if item == 1:
                    go.set()

    with pytest.raises(ValueError, match="third"):
        all_of_them()
    assert seen == [0, 1]
    assert not [t for t in threading.enumerate() if t.name.startswith("mien-video")]


def test_threads_fill_the_cores_and_no_more() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        most = usual_workers()
        torch.set_num_threads(64)
        assert usual_workers() == 1 <= most <= 8
    finally:
        torch.set_num_threads(before)
