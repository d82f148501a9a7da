from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from mien import geometry
from mien.detection import Face, MTCNNDetector, plausible
from mien.errors import TooManyFaces

# Of the astronaut, read off the picture by eye to a few pixels.
LANDMARKS = np.array([[205, 102], [247, 104], [226, 128], [202, 140], [246, 142]], dtype=np.float64)


def distance(face: Face, shift: tuple[float, float] = (0, 0), scale: float = 1.0) -> float:
    """Largest distance of a landmark from where it should be, in pixels of the original picture."""
    return float(np.linalg.norm((face.landmarks + shift) / scale - LANDMARKS, axis=1).max())


def test_landmarks_come_in_image_order(detector: MTCNNDetector, astronaut: NDArray[np.uint8]) -> None:
    (face,) = detector.detect(astronaut)
    assert distance(face) < 4 and face.confidence > 0.99
    x0, y0, x1, y1 = face.box
    assert x0 < 205 < 247 < x1 and y0 < 102 < 142 < y1


@pytest.mark.parametrize("cut", [170, 181, 190, 200])
def test_a_face_cut_by_the_edge_is_still_found_in_place(
    detector: MTCNNDetector, astronaut: NDArray[np.uint8], cut: int
) -> None:
    """facenet-pytorch alone puts these landmarks up to 30 px off."""
    (face,) = detector.detect(np.ascontiguousarray(astronaut[:, cut:]))
    assert distance(face, (cut, 0)) < 6


def test_large_pictures_are_searched_small_and_answered_in_their_own_pixels(
    detector: MTCNNDetector, photo: Image.Image
) -> None:
    (face,) = detector.detect(np.asarray(photo.resize((3000, 3000))))
    assert distance(face, (0.5, 0.5), 3000 / 512) < 4


@pytest.mark.parametrize(
    "pixels",
    [
        np.zeros((64, 64, 3), np.uint8),
        np.full((300, 200, 3), 128, np.uint8),
        np.zeros((16, 16, 3), np.uint8),
        np.zeros((17, 900, 3), np.uint8),
        np.random.default_rng(0).integers(0, 256, (200, 200, 3)).astype(np.uint8),
    ],
    ids=["black", "gray", "tiny", "a strip", "noise"],
)
def test_pictures_without_faces_give_an_empty_list(detector: MTCNNDetector, pixels: NDArray[np.uint8]) -> None:
    assert detector.detect(pixels) == []


def collage(photo: Image.Image, sides: list[int]) -> NDArray[np.uint8]:
    head = photo.crop((110, 10, 340, 240))
    canvas = Image.new("RGB", (sum(sides), max(sides)), (120, 130, 140))
    x = 0
    for side in sides:
        canvas.paste(head.resize((side, side)), (x, 0))
        x += side
    return np.asarray(canvas)


def test_every_face_is_found_and_the_largest_comes_first(detector: MTCNNDetector, photo: Image.Image) -> None:
    faces = detector.detect(collage(photo, [90, 260, 150]))
    assert len(faces) == 3
    widths = [face.box[2] - face.box[0] for face in faces]
    assert widths == sorted(widths, reverse=True)


def test_more_faces_than_allowed_are_an_error(detector: MTCNNDetector, photo: Image.Image) -> None:
    few = MTCNNDetector(max_faces=2)
    few._network = detector.load()
    with pytest.raises(TooManyFaces, match="3 faces"):
        few.detect(collage(photo, [90, 90, 90]))


def test_threads_see_the_same_faces(detector: MTCNNDetector, astronaut: NDArray[np.uint8]) -> None:
    pictures = [astronaut, np.ascontiguousarray(astronaut[:, 100:400]), np.ascontiguousarray(astronaut[:300])]
    alone = [detector.detect(p)[0].landmarks for p in pictures]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(detector.detect, pictures * 4))
    for i, faces in enumerate(together):
        np.testing.assert_array_equal(faces[0].landmarks, alone[i % 3])


def test_other_arrays_than_rgb_bytes_are_refused(detector: MTCNNDetector) -> None:
    for wrong in (np.zeros((64, 64), np.uint8), np.zeros((64, 64, 4), np.uint8), np.zeros((64, 64, 3), np.float32)):
        with pytest.raises(ValueError, match="expected uint8"):
            detector.detect(wrong)


BOX = np.array([180.0, 62, 268, 173])


@pytest.mark.parametrize(
    "landmarks",
    [
        np.full((5, 2), 200.0),
        LANDMARKS[[1, 0, 2, 4, 3]],
        LANDMARKS + 400,
        LANDMARKS * 20,
        np.full((5, 2), np.nan),
    ],
    ids=["one spot", "mirrored", "elsewhere", "scattered", "not numbers"],
)
def test_landmarks_that_cannot_be_a_face_are_dropped(landmarks: NDArray[np.float64]) -> None:
    assert plausible(LANDMARKS, BOX, (512, 512))
    assert not plausible(landmarks, BOX, (512, 512))


def test_a_turned_head_is_plausible() -> None:
    for angle in (-40, 40):
        c, s = np.cos(np.radians(angle)), np.sin(np.radians(angle))
        turn = np.array([[c, -s, 0], [s, c, 0]])
        turned = geometry.apply(turn, LANDMARKS - BOX.reshape(2, 2).mean(axis=0)) + BOX.reshape(2, 2).mean(axis=0)
        assert plausible(turned, BOX, (512, 512))
