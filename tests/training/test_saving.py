"""The differentiable save against the real thing."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.data import astronaut

from training import saving
from training.samples import from_uint8, to_uint8


@pytest.fixture(scope="module")
def face() -> np.ndarray:
    return astronaut()[0:256, 96:352]


def _through_pillow(pixels: np.ndarray, quality: int) -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality, subsampling=0)
    return np.asarray(Image.open(buffer))


def test_rounding_gives_exactly_the_levels_of_a_png() -> None:
    x = torch.rand(2, 3, 16, 16) * 2.4 - 1.2
    saved = saving.round_8bit(x)
    assert torch.allclose(saved, from_uint8(to_uint8(x)), atol=1e-6)


def test_rounding_passes_the_gradient_inside_the_range_and_stops_it_outside() -> None:
    x = torch.tensor([-1.3, -0.2, 0.7, 1.1], requires_grad=True)
    saving.round_8bit(x).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0, 1, 1, 0]


@pytest.mark.parametrize("quality", [50, 75, 90, 98])
def test_jpeg_does_what_libjpeg_does_to_a_photo(face: np.ndarray, quality: int) -> None:
    ours = to_uint8(saving.jpeg(from_uint8(face[None]), quality))[0].astype(int)
    real = _through_pillow(face, quality).astype(int)
    damage = np.abs(real - face).mean()
    # libjpeg rounds its DCT to integers, so a level or so of difference is its arithmetic, not the standard's.
    assert np.abs(ours - real).mean() < 1.0
    assert abs(np.abs(ours - face).mean() - damage) < 0.35


def test_jpeg_and_rescale_let_gradients_through(face: np.ndarray) -> None:
    for operation in (lambda x: saving.jpeg(x, 85), lambda x: saving.rescale(x, 0.6)):
        x = (from_uint8(face[None, 64:128, 64:128]) * 0.9).requires_grad_()
        operation(x).square().mean().backward()
        assert x.grad is not None and torch.isfinite(x.grad).all() and (x.grad != 0).float().mean() > 0.9


def test_a_save_keeps_shape_and_eight_bit_levels(face: np.ndarray) -> None:
    x = from_uint8(face[None, :128, :128])
    generator = torch.Generator().manual_seed(1)
    for _ in range(6):
        out = saving.save(x + 0.3, jpeg_share=0.4, rescale_share=0.3, generator=generator)
        assert out.shape == x.shape
        levels = (out + 1) * 127.5
        assert torch.allclose(levels, levels.round(), atol=1e-3)
