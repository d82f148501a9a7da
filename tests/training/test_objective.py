"""Every term of the objective against an independent NumPy computation."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from training import objective
from training.predictor import CodePredictor, code_classes

TOLERANCE = 1e-5


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(5)


def _tensors(*arrays: np.ndarray) -> list[torch.Tensor]:
    return [torch.from_numpy(a) for a in arrays]


def _cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.array([x @ y / (np.linalg.norm(x) * np.linalg.norm(y)) for x, y in zip(a, b, strict=True)])


def _cross_entropy(logits: np.ndarray, label: int) -> float:
    shifted = logits - logits.max()
    return float(np.log(np.exp(shifted).sum()) - shifted[label])


def test_eq_8_dissimilarity_is_the_mean_positive_cosine(rng: np.random.Generator) -> None:
    a, b = rng.normal(size=(2, 9, 32))
    expected = np.mean([max(0.0, c) for c in _cosines(a, b)])
    assert expected > 0
    assert objective.dissimilarity(*_tensors(a, b)).item() == pytest.approx(expected, abs=TOLERANCE)


def test_eq_8_with_a_margin_asks_nothing_below_it(rng: np.random.Generator) -> None:
    a, b = rng.normal(size=(2, 50, 8))
    expected = np.mean([max(0.0, c - 0.2) for c in _cosines(a, b)])
    assert objective.dissimilarity(*_tensors(a, b), margin=0.2).item() == pytest.approx(expected, abs=TOLERANCE)


def test_eq_9_weighs_its_three_pairs_two_one_one(rng: np.random.Generator) -> None:
    a1, a2, w1, w2 = rng.normal(size=(4, 7, 16)) + 0.4

    def l_dis(x: np.ndarray, y: np.ndarray) -> float:
        return float(np.mean(np.maximum(0, _cosines(x, y))))

    expected = 2 * l_dis(a1, a2) + l_dis(w1, w2) + l_dis(a1, w1)
    got = objective.feature_dissimilarity(*_tensors(a1, a2, w1, w2)).item()
    assert got == pytest.approx(expected, abs=TOLERANCE)
    without = objective.feature_dissimilarity(*_tensors(a1, a2), None, None).item()
    assert without == pytest.approx(2 * l_dis(a1, a2), abs=TOLERANCE)


def test_eq_10_and_12_cross_entropy_leaves_unlabelled_samples_out(rng: np.random.Generator) -> None:
    groups = rng.normal(size=(3, 6, 11)) * 3
    labels = np.array([4, -1, 0, 10, -1, 7])
    expected = np.mean([[_cross_entropy(g[i], k) for i, k in enumerate(labels) if k >= 0] for g in groups])
    got = objective.classification(_tensors(*groups), torch.from_numpy(labels)).item()
    assert got == pytest.approx(expected, abs=TOLERANCE)


def test_eq_10_without_any_label_is_zero_and_has_a_gradient(rng: np.random.Generator) -> None:
    logits = torch.from_numpy(rng.normal(size=(3, 5))).requires_grad_()
    loss = objective.classification([logits], torch.tensor([-1, -1, -1]))
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None and not logits.grad.any()


def test_eq_11_recovery_is_the_mean_absolute_difference(rng: np.random.Generator) -> None:
    r, i = rng.uniform(-1, 1, size=(2, 3, 3, 8, 8))
    assert objective.recovery(*_tensors(r, i)).item() == pytest.approx(np.abs(r - i).mean(), abs=TOLERANCE)


def test_eq_13_background_sums_over_changed_images_and_can_be_weighted(rng: np.random.Generator) -> None:
    a, w, i = rng.uniform(-1, 1, size=(3, 2, 3, 6, 6))
    expected = np.abs(a - i).mean() + np.abs(w - i).mean()
    ta, tw, ti = _tensors(a, w, i)
    assert objective.background([ta, tw], ti).item() == pytest.approx(expected, abs=TOLERANCE)
    weight = rng.uniform(0, 2, size=(1, 1, 6, 6))
    weighted = (np.abs(a - i) * weight).mean() + (np.abs(w - i) * weight).mean()
    got = objective.background([ta, tw], ti, torch.from_numpy(weight)).item()
    assert got == pytest.approx(weighted, abs=TOLERANCE)


def test_eq_14_15_least_squares_gan_for_both_players(rng: np.random.Generator) -> None:
    real = [[rng.normal(size=(2, 1, 4, 4)), rng.normal(size=(2, 1, 2, 2))] for _ in range(3)]
    fake = [[rng.normal(size=(2, 1, 4, 4)), rng.normal(size=(2, 1, 2, 2))] for _ in range(3)]
    generator = np.mean([sum(((s - 1) ** 2).mean() for s in kind) for kind in fake])
    discriminator = np.mean(
        [
            sum((((r - 1) ** 2).mean() + (f**2).mean()) / 2 for r, f in zip(rs, fs, strict=True))
            for rs, fs in zip(real, fake, strict=True)
        ]
    )
    t_real = [_tensors(*k) for k in real]
    t_fake = [_tensors(*k) for k in fake]
    assert objective.gan_generator(t_fake).item() == pytest.approx(generator, abs=TOLERANCE)
    assert objective.gan_discriminator(t_real, t_fake).item() == pytest.approx(discriminator, abs=TOLERANCE)


def test_eq_18_auxiliary_is_cross_entropy_over_parallel_four_bit_classes(rng: np.random.Generator) -> None:
    logits = rng.normal(size=(5, 4, 16))
    codes = rng.integers(0, 2, size=(5, 16))
    expected = []
    for sample in range(5):
        for head in range(4):
            label = int("".join(map(str, codes[sample, 4 * head : 4 * head + 4])), 2)
            expected.append(_cross_entropy(logits[sample, head], label))
    got = objective.auxiliary([torch.from_numpy(logits)], [torch.from_numpy(codes) - 0.5]).item()
    assert got == pytest.approx(np.mean(expected), abs=TOLERANCE)


def test_the_predictor_has_one_sixteen_way_classifier_for_each_four_bits() -> None:
    q = CodePredictor(64, width=8)
    assert q(torch.zeros(2, 3, 32, 32), torch.zeros(2, 3, 32, 32)).shape == (2, 16, 16)
    assert code_classes(torch.tensor([[0.5, -0.5, -0.5, 0.5, -0.5, -0.5, -0.5, -0.5]])).tolist() == [[9, 0]]


def test_identity_terms_are_cosines_and_their_complement(rng: np.random.Generator) -> None:
    i, a, w = rng.normal(size=(3, 6, 12)) + 0.3
    expected = np.mean([np.mean(np.maximum(0, _cosines(i, x))) for x in (a, w)])
    ti, ta, tw = _tensors(i, a, w)
    assert objective.identity(ti, [ta, tw]).item() == pytest.approx(expected, abs=TOLERANCE)
    complement = 1 - _cosines(i, a).mean()
    assert objective.recovered_identity(ti, ta).item() == pytest.approx(complement, abs=TOLERANCE)


def test_out_of_range_counts_only_what_saving_would_clip() -> None:
    x = torch.tensor([-1.5, -1.0, 0.0, 1.0, 2.0])
    assert objective.out_of_range([x]).item() == pytest.approx((0.5 + 1.0) / 5, abs=TOLERANCE)


def test_roughness_is_the_laplacian_of_the_change_and_prefers_shades_to_lattices() -> None:
    image = torch.zeros(1, 1, 16, 16, dtype=torch.float64)
    change = np.random.default_rng(1).normal(size=(16, 16))
    expected = np.mean(
        [
            abs(4 * change[y, x] - change[y - 1, x] - change[y + 1, x] - change[y, x - 1] - change[y, x + 1])
            for y in range(1, 15)
            for x in range(1, 15)
        ]
    )
    got = objective.roughness([torch.from_numpy(change)[None, None]], image).item()
    assert got == pytest.approx(expected, abs=TOLERANCE)
    shade = torch.linspace(0, 1, 16, dtype=torch.float64).expand(1, 1, 16, 16)
    assert objective.roughness([shade], image).item() == pytest.approx(0, abs=1e-12)
