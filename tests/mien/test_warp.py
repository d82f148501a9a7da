from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mien import geometry
from mien.warp import supersampling_for, warp


def similarity(angle: float, scale: float, x: float, y: float) -> NDArray[np.float64]:
    c, s = scale * np.cos(np.radians(angle)), scale * np.sin(np.radians(angle))
    return np.array([[c, -s, x], [s, c, y]])


@pytest.mark.parametrize("angle", [0, 13, 90, -121])
@pytest.mark.parametrize("scale", [0.7, 1.0, 2.3])
def test_bilinear_warps_agree_with_scikit_image(angle: float, scale: float, astronaut: NDArray[np.uint8]) -> None:
    from skimage import transform

    picture = astronaut[50:180, 150:300].astype(np.float64) / 255
    matrix = geometry.compose(similarity(angle, scale, 48.3, 40.9), np.array([[1.0, 0, -70], [0, 1.0, -60]]))
    theirs = transform.warp(
        picture,
        transform.AffineTransform(matrix=np.vstack([matrix, [0, 0, 1]])).inverse,
        output_shape=(80, 96),
        order=1,
    )
    tensor = torch.from_numpy(picture).permute(2, 0, 1)[None]
    ours = warp(tensor, matrix, (80, 96))[0].permute(1, 2, 0).numpy()
    # At the picture's edge the two fade to black over different half pixels.
    solid = (
        transform.warp(
            np.ones_like(picture),
            transform.AffineTransform(matrix=np.vstack([matrix, [0, 0, 1]])).inverse,
            output_shape=(80, 96),
            order=1,
            cval=0,
        )
        > 1 - 1e-9
    )
    inner = np.minimum.reduce([np.roll(solid, (dy, dx), (0, 1)) for dy in (-2, 0, 2) for dx in (-2, 0, 2)])
    assert inner.mean() > 0.3
    np.testing.assert_allclose(ours[inner], theirs[inner], atol=1e-9)


def test_the_identity_changes_no_bit() -> None:
    images = torch.rand(2, 3, 37, 53, dtype=torch.float64)
    assert torch.allclose(warp(images, np.eye(3)[:2], (37, 53)), images, atol=1e-12)


def test_every_image_of_a_batch_gets_its_own_transform() -> None:
    images = torch.rand(2, 1, 20, 20)
    matrices = np.stack([similarity(0, 1, 3, 0), similarity(0, 1, 0, -2)])
    both = warp(images, matrices, (20, 20))
    for i in range(2):
        assert torch.allclose(both[i : i + 1], warp(images[i : i + 1], matrices[i], (20, 20)), atol=1e-6)


def test_supersampling_averages_what_a_shrunk_pixel_covers() -> None:
    checkers = ((torch.arange(64)[:, None] + torch.arange(64)[None]) % 2).float()[None, None]
    quarter = similarity(0, 0.25, -0.375, -0.375)
    assert supersampling_for(quarter) == 4
    assert torch.allclose(warp(checkers, quarter, (16, 16), supersample=4), torch.full((1, 1, 16, 16), 0.5), atol=1e-6)


def test_gradients_reach_the_images() -> None:
    images = torch.rand(1, 1, 8, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: warp(x, similarity(20, 0.8, 1, 1), (6, 6), supersample=2), images)
