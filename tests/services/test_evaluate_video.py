"""The part `video` counts what slips, on clips whose truth is known; its arithmetic against answers known by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from skimage import data

import mien
from mien.detection import Face
from mien.model import Model
from mien.video import synthetic
from services.evaluate import keys, video
from services.evaluate.figures import Result
from services.evaluate.video import Material, Remembering, Sights
from tests.services.stand_ins import context_of, perfect, two_photos_each

ROOT = Path(__file__).parents[2]
FRAMES = 5


@pytest.fixture(scope="module")
def model() -> Model:
    return mien.load(str(ROOT / "models" / "mien-128"))


class Blind:
    def detect(self, pixels: np.ndarray) -> list[Face]:
        return []


def measured(model: Model, folder: Path, *, blind: bool) -> Result:
    context = context_of(perfect, two_photos_each(20))
    context.judges = {}
    picture = data.astronaut()
    (face,) = model.detector.detect(picture)
    shots = list(synthetic.shots(picture, face.landmarks, "move", frames=FRAMES))
    synthetic.write(folder / "clip.mkv", (s.pixels for s in shots))
    clip = Material("clip", folder / "clip.mkv", [s.landmarks for s in shots])
    result = Result()
    detector = Blind() if blind else model.detector
    video._over_time(context, model, [clip], Remembering(detector), folder, result)
    return result


def test_frames_that_show_the_face_as_it_was_are_counted(model: Model, tmp_path: Path) -> None:
    seen = measured(model, tmp_path, blind=False).figures
    assert seen["video.unchanged-frames"] == seen["video.unchanged"] == seen["video.masked"] == 0
    assert seen["video.faces"] == seen["video.frames"] == FRAMES
    assert seen["video.flicker.l1"] > 0 and keys.unknown(seen) == []
    slipped = measured(model, tmp_path, blind=True).figures
    assert slipped["video.unchanged-frames"] == FRAMES and slipped["video.unchanged"] == 1


def sights(tracks: list[int], frames: list[int]) -> Sights:
    crops = np.zeros((len(tracks), 128, 128, 3), np.uint8)
    return Sights(np.array(tracks), np.array(frames), crops, crops.copy())


def test_neighbours_are_of_one_track_and_of_frames_that_follow_each_other() -> None:
    a, b = video._neighbours(sights([0, 1, 0, 1, 0], [0, 0, 1, 2, 2]))
    assert sorted(zip(a.tolist(), b.tolist(), strict=True)) == [(0, 2), (2, 4)]
    assert video._first(sights([0, 1, 0, 1, 0], [0, 0, 1, 2, 2])).tolist() == [0, 1, 0, 1, 0]


def test_what_was_masked_is_not_asked_back() -> None:
    kept = video._without(sights([0, 0, 1, -1], [0, 1, 1, 1]), {0: [1]})
    assert (kept.tracks.tolist(), kept.frames.tolist()) == ([0, 1], [0, 1])


def test_a_change_outside_the_face_hides_nobody() -> None:
    before = sights([0, 0], [0, 1])
    before.after[0, :40] = 255
    before.after[1, 60:90, 40:88] = 40
    assert video._changed(before).tolist() == [False, True]


def test_every_codec_of_the_table_is_one_of_ours_and_known_to_the_report() -> None:
    assert set(video.SETTINGS) == set(keys.WORDS["setting"])
    figures = {
        f"video.codec.{name}.{end}": 1.0 for name in video.SETTINGS for end in ("psnr", "same", "kbit", "psnr.n")
    }
    table = video.table(figures, "ab" * 32, "dlib")
    assert table.count("\n| lib") == len(video.SETTINGS) and "`h264 --crf 23`" in table and "| `h264` |" in table
