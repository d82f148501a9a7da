"""The measure itself is measured: on stand-ins whose right answers are known."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from mien.recognisers import Recogniser
from services.evaluate import measure

BITS, SIZE, PEOPLE = 8, 32, 160


class Projection(Recogniser):
    """A recogniser that sees a random projection of the picture: same picture, same person."""

    def __init__(self) -> None:
        super().__init__(name="projection", embedding_size=64, threshold=None, matrix=np.eye(3)[:2], size=(SIZE, SIZE))
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("matrix", torch.randn(3 * SIZE * SIZE, 64, generator=generator))

    def forward(self, crops: Tensor) -> Tensor:
        return self.embed(crops)

    def embed(self, aligned: Tensor) -> Tensor:
        assert isinstance(self.matrix, Tensor)
        return aligned.flatten(1) @ self.matrix


@pytest.fixture(scope="module")
def faces() -> measure.Faces:
    rng = np.random.default_rng(0)
    return measure.Faces(rng.integers(0, 256, size=(PEOPLE, SIZE, SIZE, 3), dtype=np.uint8), list(range(PEOPLE)))


def _mask(code: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """A pattern to XOR a picture with, the same for a code and its inverse: a perfect transformer of noise."""
    canonical = code if code[0] else ~code
    seed = int("".join("1" if b else "0" for b in canonical), 2)
    return np.random.default_rng(seed).integers(0, 256, size=(SIZE, SIZE, 3), dtype=np.uint8)


def _perfect(images: measure.Pixels, codes: NDArray[np.bool_]) -> measure.Pixels:
    return np.stack([x ^ _mask(c) for x, c in zip(images, codes, strict=True)])


def _report(transform: measure.Transform, faces: measure.Faces) -> dict[str, float | int]:
    return measure.report(
        transform,
        faces,
        bits=BITS,
        judges={"j": Projection().eval()},
        distances={"l1": measure.l1, "dssim": measure.dssim, "psnr": measure.psnr},
    )


def test_the_identity_is_reported_as_not_anonymized_and_perfectly_recovered(faces: measure.Faces) -> None:
    figures = _report(lambda images, codes: images, faces)
    assert figures["verification/j/I-A/same"] == 1
    assert figures["verification/j/I-R/same"] == 1
    assert figures["recovery/l1"] == 0 and figures["recovery/psnr"] == 60 and figures["recovery/dssim"] < 1e-9


def test_a_perfect_transformer_is_reported_as_hiding_and_giving_back(faces: measure.Faces) -> None:
    figures = _report(_perfect, faces)
    assert figures["verification/j/I-R/same"] == 1 and figures["recovery/l1"] == 0
    for pair in ("I-A", "I-WR", "A-WR", "A1-A2", "WR1-WR2", "I-WR one bit off"):
        assert figures[f"verification/j/{pair}/same"] <= 0.03, pair


def test_another_random_face_is_reported_as_anonymized_and_not_recovered(faces: measure.Faces) -> None:
    rng = np.random.default_rng(9)

    def forget(images: measure.Pixels, codes: NDArray[np.bool_]) -> measure.Pixels:
        return rng.integers(0, 256, size=images.shape, dtype=np.uint8)

    figures = _report(forget, faces)
    assert figures["verification/j/I-A/same"] <= 0.03 and figures["verification/j/I-R/same"] <= 0.03
    assert figures["recovery/l1"] > 0.4


def test_a_model_that_ignores_the_password_fails_diversity_and_wrong_recovery(faces: measure.Faces) -> None:
    fixed = np.zeros(BITS, dtype=np.bool_)

    def ignore(images: measure.Pixels, codes: NDArray[np.bool_]) -> measure.Pixels:
        return _perfect(images, np.repeat(fixed[None], len(images), axis=0))

    figures = _report(ignore, faces)
    assert figures["verification/j/A1-A2/same"] == 1
    assert figures["verification/j/I-WR/same"] == 1


def test_the_threshold_lets_the_asked_share_of_different_people_pass() -> None:
    rng = np.random.default_rng(1)
    e = rng.normal(size=(400, 16))
    e /= np.linalg.norm(e, axis=1, keepdims=True)
    identities: list[int | None] = [i // 2 for i in range(400)]
    threshold = measure.threshold_at(1e-3, e, identities)
    impostors = [e[i] @ e[j] for i in range(400) for j in range(i) if identities[i] != identities[j]]
    assert np.mean(np.array(impostors) > threshold) == pytest.approx(1e-3, abs=1e-4)
    with pytest.raises(ValueError, match="too few"):
        measure.threshold_at(1e-3, e[:20], identities[:20])


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(2)
    covered = 0
    for trial in range(200):
        low, high = measure.interval(rng.normal(3.0, 1.0, size=60), seed=trial, draws=300)
        covered += low <= 3.0 <= high
    assert 0.88 <= covered / 200 <= 0.99


def test_distances_agree_with_their_definitions() -> None:
    rng = np.random.default_rng(3)
    a, b = rng.integers(0, 256, size=(2, 2, 16, 16, 3), dtype=np.uint8)
    x, y = a.astype(float) / 127.5 - 1, b.astype(float) / 127.5 - 1
    assert measure.l1(a, b) == pytest.approx(np.abs(x - y).mean(axis=(1, 2, 3)))
    from skimage.metrics import peak_signal_noise_ratio

    assert measure.psnr(a, b) == pytest.approx([peak_signal_noise_ratio(p, q) for p, q in zip(a, b, strict=True)])


def test_the_command_says_what_it_would_do() -> None:
    from typer.testing import CliRunner

    from services.evaluate.__main__ import app

    result = CliRunner().invoke(app, ["--model", "m", "--shards", "s", "--dry-run"])
    assert result.exit_code == 0 and "would judge m" in result.output


def test_png_keeps_what_is_measured() -> None:
    from PIL import Image

    pixels = np.random.default_rng(4).integers(0, 256, size=(8, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    assert np.array_equal(np.asarray(Image.open(buffer)), pixels)
