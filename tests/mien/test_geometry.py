from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from mien import geometry

coordinates = st.floats(-2000, 2000, allow_nan=False, width=32)
five_points = arrays(np.float64, (5, 2), elements=coordinates).filter(lambda p: p.var(axis=0).sum() > 1)


@given(five_points, five_points)
def test_the_fit_is_the_least_squares_solution(source: NDArray[np.float64], target: NDArray[np.float64]) -> None:
    """Against the linear system in (a, b, x, y) of [a -b x; b a y], solved by LAPACK."""
    zero, one = np.zeros(5), np.ones(5)
    system = np.vstack(
        [
            np.stack([source[:, 0], -source[:, 1], one, zero], axis=1),
            np.stack([source[:, 1], source[:, 0], zero, one], axis=1),
        ]
    )
    a, b, x, y = np.linalg.lstsq(system, target.T.reshape(-1), rcond=None)[0]
    ours = geometry.fit_similarity(source, target)
    np.testing.assert_allclose(
        geometry.apply(ours, source), geometry.apply(np.array([[a, -b, x], [b, a, y]]), source), atol=1e-6
    )


@given(arrays(np.float64, (5, 2), elements=st.floats(-4, 4)), st.floats(-3.1, 3.1), st.floats(0.1, 10))
def test_the_crop_transform_agrees_with_scikit_image(noise: NDArray[np.float64], angle: float, scale: float) -> None:
    from skimage.transform import SimilarityTransform

    c, s = scale * np.cos(angle), scale * np.sin(angle)
    landmarks = geometry.apply(np.array([[c, -s, 300.0], [s, c, 200.0]]), geometry.MIEN_128 + noise)
    theirs = SimilarityTransform.from_estimate(landmarks, geometry.MIEN_128)
    np.testing.assert_allclose(geometry.crop_transform(landmarks), theirs.params[:2], atol=1e-6)


@given(five_points, st.floats(-3.1, 3.1), st.floats(0.05, 20), coordinates, coordinates)
def test_a_similarity_is_found_again_from_points_moved_by_it(
    source: NDArray[np.float64], angle: float, scale: float, x: float, y: float
) -> None:
    c, s = scale * np.cos(angle), scale * np.sin(angle)
    matrix = np.array([[c, -s, x], [s, c, y]])
    found = geometry.fit_similarity(source, geometry.apply(matrix, source))
    np.testing.assert_allclose(found, matrix, atol=1e-6 * (1 + 2000 * scale))
    assert geometry.scale_of(found) == pytest.approx(scale, rel=1e-6)


@given(st.floats(-3.1, 3.1), st.floats(0.05, 20), coordinates, coordinates, five_points)
def test_inverse_and_composition_undo_each_other(
    angle: float, scale: float, x: float, y: float, points: NDArray[np.float64]
) -> None:
    c, s = scale * np.cos(angle), scale * np.sin(angle)
    matrix = np.array([[c, -s, x], [s, c, y]])
    back = geometry.apply(geometry.invert(matrix), geometry.apply(matrix, points))
    np.testing.assert_allclose(back, points, atol=1e-5)
    identity = geometry.compose(geometry.invert(matrix), matrix)
    np.testing.assert_allclose(identity, [[1, 0, 0], [0, 1, 0]], atol=1e-5)


@pytest.mark.parametrize("size", [64, 128, 256])
def test_landmarks_on_the_template_need_no_transform(size: int) -> None:
    matrix = geometry.crop_transform(geometry.template(size), size)
    np.testing.assert_allclose(matrix, [[1, 0, 0], [0, 1, 0]], atol=1e-9)


def test_recogniser_crops_through_the_square_equal_crops_from_the_photo() -> None:
    landmarks = np.array([[205.0, 101.7], [246.8, 103.7], [224.7, 129.0], [201.7, 139.2], [245.3, 141.9]])
    through = geometry.compose(geometry.TO_112, geometry.crop_transform(landmarks))
    direct = geometry.fit_similarity(landmarks, geometry.RECOGNISER_112)
    np.testing.assert_allclose(through, direct, atol=1e-9)


@pytest.mark.parametrize(
    "points",
    [np.zeros((5, 2)), np.full((5, 2), np.nan), np.zeros((5, 3)), np.zeros((1, 2))],
    ids=["all in one spot", "not a number", "three dimensions", "one point"],
)
def test_degenerate_landmarks_are_refused(points: NDArray[np.float64]) -> None:
    with pytest.raises(ValueError, match=r"landmarks|points"):
        geometry.fit_similarity(points, geometry.MIEN_128)
