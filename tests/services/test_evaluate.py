"""The measure itself is measured: on stand-ins whose right answers are known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mien.recognisers import Recogniser
from services import gates
from services.evaluate import judges
from services.evaluate.distances import Pixels
from services.evaluate.faces import Faces
from services.evaluate.parts import background, diversity, recovery, verification
from tests.services.stand_ins import BITS, context_of, perfect, two_photos_each


@pytest.fixture(scope="module")
def faces() -> Faces:
    return two_photos_each()


def measured(transform: object, faces: Faces) -> dict[str, float]:
    context = context_of(transform, faces, diversity=4, passwords=8, bits=4)
    parts = [part.run(context) for part in (verification, recovery, diversity, background)]
    return {key: value for part in parts for key, value in part.figures.items()}


def failing(figures: dict[str, float]) -> set[str]:
    """Gates that do not hold, those that compare with a champion aside."""
    verdicts = gates.check(gates.load(), {"faces": 600, **figures})
    return {v.gate.key for v in verdicts if not v.passed}


def test_the_identity_is_reported_as_not_anonymized_and_perfectly_recovered(faces: Faces) -> None:
    figures = measured(lambda images, codes: images, faces)
    for pair in ("I-A", "I-R", "A-I2"):
        assert figures[f"verification.dlib.{pair}.same"] == 1, pair
    assert figures["reidentification.dlib.A.rank1"] == 1
    assert figures["recovery.l1"] == figures["recovery.l2"] == 0
    assert figures["recovery.psnr"] == 60 and figures["recovery.dssim"] < 1e-9
    assert figures["background.crop.A.unchanged"] == 1
    assert "verification.dlib.I-A.same" in failing(figures)
    assert not {"verification.dlib.I-R.same", "recovery.l1", "recovery.dssim"} & failing(figures)


def test_a_perfect_transformer_is_reported_as_hiding_and_giving_back(faces: Faces) -> None:
    figures = measured(perfect, faces)
    assert figures["verification.dlib.I-R.same"] == 1 and figures["recovery.l1"] == 0
    assert figures["reidentification.dlib.R.rank1"] == 1 and figures["reidentification.dlib.A.rank1"] <= 0.05
    for pair in ("I-A", "I-WR", "A-WR", "A1-A2", "WR1-WR2", "I-WR-1bit", "I-WR-4bit", "A-I2"):
        assert figures[f"verification.dlib.{pair}.same"] <= 0.03, pair
    assert figures["diversity.dlib.same"] <= 0.05 and figures["diversity.dlib.people"] > 7
    assert failing(figures) == set()
    assert figures["recovery.jpeg75.psnr"] < 20 < figures["recovery.psnr"], "XOR survives no lossy file"


def test_another_random_face_is_reported_as_anonymized_and_not_recovered(faces: Faces) -> None:
    rng = np.random.default_rng(9)

    def forget(images: Pixels, codes: NDArray[np.bool_]) -> Pixels:
        return rng.integers(0, 256, size=images.shape, dtype=np.uint8)

    figures = measured(forget, faces)
    assert figures["verification.dlib.I-A.same"] <= 0.03 and figures["verification.dlib.I-R.same"] <= 0.03
    assert figures["recovery.l1"] > 0.4
    assert failing(figures) == {"verification.dlib.I-R.same", "recovery.l1", "recovery.dssim"}


def test_a_model_that_ignores_the_password_fails_diversity_and_wrong_recovery(faces: Faces) -> None:
    fixed = np.zeros(BITS, dtype=np.bool_)

    def ignore(images: Pixels, codes: NDArray[np.bool_]) -> Pixels:
        return perfect(images, np.repeat(fixed[None], len(images), axis=0))

    figures = measured(ignore, faces)
    assert figures["verification.dlib.A1-A2.same"] == 1
    assert figures["verification.dlib.I-WR.same"] == 1
    assert figures["verification.dlib.I-A.same"] <= 0.03, "it does hide"
    assert figures["diversity.dlib.same"] == figures["diversity.one-bit.dlib.same"] == 1
    assert figures["diversity.dlib.people"] == 1 and figures["diversity.dlib.people.low"] == 1
    assert failing(figures) == {
        "verification.dlib.A1-A2.same", "verification.dlib.I-WR.same", "verification.dlib.I-WR-1bit.same"
    }  # fmt: skip


def test_a_new_judge_is_the_small_class_that_the_docs_show(monkeypatch: pytest.MonkeyPatch, faces: Faces) -> None:
    text = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text()
    code = text.partition("```python\nclass MyNetwork")[2].partition("```")[0]
    network = torch.nn.Sequential(torch.nn.AvgPool2d(8), torch.nn.Flatten(), torch.nn.Linear(3 * 14 * 14, 512))
    names = {"Recogniser": Recogniser, "Tensor": torch.Tensor, "given": network}
    names["TO_MINE"] = np.array([[0.875, 0, 0], [0, 0.875, 0]])
    exec("class MyNetwork" + code.replace("self.network = ...", "self.network = given"), names)
    monkeypatch.setitem(judges.JUDGES, "mine", lambda weights: names["MyNetwork"]().eval())
    loaded, missing = judges.load(["mine"], None)
    embeddings = loaded["mine"].embed(np.repeat(faces.images[:4].repeat(4, 1), 4, 2))
    assert embeddings.shape == (4, 512) and not missing
    assert np.linalg.norm(embeddings, axis=1) == pytest.approx(np.ones(4))
