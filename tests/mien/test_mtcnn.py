"""Our MTCNN against facenet-pytorch's own: the same boxes and landmarks, from pictures of all shapes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from facenet_pytorch import MTCNN
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mien import mtcnn
from mien.detection import MTCNNDetector

Pixels = NDArray[np.uint8]


@pytest.fixture(scope="module")
def theirs() -> Any:
    return MTCNN(keep_all=True, min_face_size=20, post_process=False).eval()


@pytest.fixture(scope="module")
def ours(detector: MTCNNDetector) -> Any:
    return detector.load()


def shrunk(picture: Pixels, factor: int) -> Pixels:
    return np.ascontiguousarray(picture[::factor, ::factor])


def pictures(astronaut: Pixels) -> dict[str, Pixels]:
    from skimage import data

    noise = np.random.default_rng(0).integers(0, 256, (200, 211, 3)).astype(np.uint8)
    four = np.hstack([shrunk(astronaut, 2), np.roll(shrunk(astronaut, 2), 40, axis=0), shrunk(astronaut[:, ::-1], 2)])
    return {
        "a face": astronaut,
        "odd sides": np.ascontiguousarray(astronaut[:333, 100:401]),
        "cut by the edge": np.ascontiguousarray(astronaut[:, 200:]),
        "all edge": np.ascontiguousarray(astronaut[80:160, 195:260]),
        "several": four,
        "small ones": np.tile(shrunk(astronaut, 4)[:90, 20:100], (2, 3, 1)),
        "no face, much of a face": data.chelsea(),
        "noise": noise,
        "a strip": np.zeros((21, 700, 3), np.uint8),
        "gray as the border": np.full((90, 120, 3), 127, np.uint8),
    }


def test_what_is_found_is_what_facenet_pytorch_finds(theirs: Any, ours: Any, astronaut: Pixels) -> None:
    counts = {}
    for name, picture in pictures(astronaut).items():
        border = max(20, round(max(picture.shape[:2]) / 8))
        padded = np.pad(picture, ((border, border), (border, border), (0, 0)), constant_values=127)
        boxes, confidences, landmarks = theirs.detect(padded, landmarks=True)
        found = mtcnn.find(ours, picture, border)
        counts[name] = len(found[0])
        if boxes is None:
            assert not len(found[0]), name
            continue
        assert len(boxes) == len(found[0]), name
        np.testing.assert_allclose(found[0], boxes.astype(float) - border, atol=2e-3, err_msg=name)
        np.testing.assert_allclose(found[1], confidences.astype(float), atol=1e-4, err_msg=name)
        np.testing.assert_allclose(found[2], landmarks.astype(float) - border, atol=2e-3, err_msg=name)
    assert counts["a face"] == 1 and counts["several"] == 3 and counts["small ones"] >= 4 and counts["noise"] == 0


@settings(max_examples=40)
@given(st.data())
def test_means_over_areas_are_adaptive_poolings_to_the_last_bit(data: st.DataObject) -> None:
    sides = st.integers(1, 40)
    height, width, rows, columns, border = (data.draw(s) for s in (sides, sides, sides, sides, st.integers(0, 9)))
    assume(
        rows * columns > 1
    )  # torch takes the mean of a whole picture in another order; no network asks for one pixel
    pixels = np.random.default_rng(height * width + rows).integers(0, 256, (height, width, 3)).astype(np.uint8)
    padded = np.pad(pixels, ((border, border), (border, border), (0, 0)), constant_values=127)
    whole = (torch.from_numpy(padded).permute(2, 0, 1)[None].float(), (rows, columns))
    expected = (F.interpolate(whole[0], size=whole[1], mode="area") - 127.5) * 0.0078125
    table = mtcnn._Table(pixels, border)
    down = mtcnn._bins(np.array([0]), np.array([height + 2 * border]), rows)
    across = mtcnn._bins(np.array([0]), np.array([width + 2 * border]), columns)
    assert torch.equal(table.level((down[0][0], down[1][0]), (across[0][0], across[1][0])), expected)
    if rows == columns:
        assert torch.equal(table.crops(down, across), expected)


@pytest.mark.parametrize("side", [2, 3])
def test_max_pooling_by_slices_is_torchs_own(side: int) -> None:
    for shape in [(2, 3, 22, 22), (1, 4, 23, 10), (1, 1, 5, 4), (1, 2, side, side)]:
        x = torch.randn(shape)
        assert torch.equal(mtcnn._MaxPool(side)(x), F.max_pool2d(x, side, 2, ceil_mode=True))


def test_windows_over_the_border_alone_hold_no_face(theirs: Any) -> None:
    """Which is why they may be left out."""
    with torch.inference_mode():
        _, chances = theirs.pnet(torch.full((1, 3, 12, 12), (127 - 127.5) * 0.0078125))
    assert float(chances[0, 1, 0, 0]) < 0.1 < theirs.thresholds[0]
