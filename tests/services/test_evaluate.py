"""The measure itself is measured: on stand-ins whose right answers are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from mien.recognisers import Recogniser
from services.evaluate.chain import Chain, Subject
from services.evaluate.context import Context, Sizes
from services.evaluate.distances import Pixels
from services.evaluate.faces import Faces, draw
from services.evaluate.figures import Result
from services.evaluate.judges import Judge
from services.evaluate.parts import recovery, verification
from services.evaluate.progress import Progress

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
def faces() -> Faces:
    """Two slightly different photos of each of many people."""
    rng = np.random.default_rng(0)
    first = rng.integers(0, 256, size=(PEOPLE, SIZE, SIZE, 3), dtype=np.uint8)
    second = np.clip(first.astype(int) + rng.integers(-20, 21, size=first.shape), 0, 255).astype(np.uint8)
    people = list(range(PEOPLE))
    return Faces(np.concatenate([first, second]), [*people, *people], [f"photo {i}" for i in range(2 * PEOPLE)])


def _mask(code: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """A pattern to XOR a picture with, the same for a code and its inverse: a perfect transformer of noise."""
    canonical = code if code[0] else ~code
    seed = int("".join("1" if b else "0" for b in canonical), 2)
    return np.random.default_rng(seed).integers(0, 256, size=(SIZE, SIZE, 3), dtype=np.uint8)


def perfect(images: Pixels, codes: NDArray[np.bool_]) -> Pixels:
    return np.stack([x ^ _mask(c) for x, c in zip(images, codes, strict=True)])


def context_of(transform: object, faces: Faces, **sizes: int) -> Context:
    subject = Subject(transform=transform, bits=BITS)  # type: ignore[arg-type]
    sample = draw(faces, PEOPLE, seed=0)
    progress = Progress()
    return Context(
        subject=subject,
        sample=sample,
        judges={"j": Judge("j", Projection().eval())},
        missing_judges={},
        chain=Chain(subject, sample.faces.images, seed=0, progress=progress),
        progress=progress,
        sizes=Sizes(lossy=8, gallery=200, **sizes),
        everyone=faces,
    )


def measured(transform: object, faces: Faces) -> dict[str, float]:
    context = context_of(transform, faces)
    parts: list[Result] = [verification.run(context), recovery.run(context)]
    return {key: value for part in parts for key, value in part.figures.items()}


def test_the_identity_is_reported_as_not_anonymized_and_perfectly_recovered(faces: Faces) -> None:
    figures = measured(lambda images, codes: images, faces)
    for pair in ("I-A", "I-R", "A-I2"):
        assert figures[f"verification.j.{pair}.same"] == 1, pair
    assert figures["reidentification.j.A.rank1"] == 1
    assert figures["recovery.l1"] == figures["recovery.l2"] == 0
    assert figures["recovery.psnr"] == 60 and figures["recovery.dssim"] < 1e-9


def test_a_perfect_transformer_is_reported_as_hiding_and_giving_back(faces: Faces) -> None:
    figures = measured(perfect, faces)
    assert figures["verification.j.I-R.same"] == 1 and figures["recovery.l1"] == 0
    assert figures["reidentification.j.R.rank1"] == 1 and figures["reidentification.j.A.rank1"] <= 0.05
    for pair in ("I-A", "I-WR", "A-WR", "A1-A2", "WR1-WR2", "I-WR-1bit", "I-WR-4bit", "A-I2"):
        assert figures[f"verification.j.{pair}.same"] <= 0.03, pair
    assert figures["recovery.jpeg75.psnr"] < 20 < figures["recovery.psnr"], "XOR survives no lossy file"


def test_another_random_face_is_reported_as_anonymized_and_not_recovered(faces: Faces) -> None:
    rng = np.random.default_rng(9)

    def forget(images: Pixels, codes: NDArray[np.bool_]) -> Pixels:
        return rng.integers(0, 256, size=images.shape, dtype=np.uint8)

    figures = measured(forget, faces)
    assert figures["verification.j.I-A.same"] <= 0.03 and figures["verification.j.I-R.same"] <= 0.03
    assert figures["recovery.l1"] > 0.4


def test_a_model_that_ignores_the_password_fails_diversity_and_wrong_recovery(faces: Faces) -> None:
    fixed = np.zeros(BITS, dtype=np.bool_)

    def ignore(images: Pixels, codes: NDArray[np.bool_]) -> Pixels:
        return perfect(images, np.repeat(fixed[None], len(images), axis=0))

    figures = measured(ignore, faces)
    assert figures["verification.j.A1-A2.same"] == 1
    assert figures["verification.j.I-WR.same"] == 1
    assert figures["verification.j.I-A.same"] <= 0.03, "it does hide"
