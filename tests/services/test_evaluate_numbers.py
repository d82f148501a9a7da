"""Thresholds, intervals, distances and files, each against an independent implementation or a known truth."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from services.evaluate import distances, files, intervals
from services.evaluate.faces import Faces, draw


def test_the_threshold_lets_the_asked_share_of_different_people_pass() -> None:
    rng = np.random.default_rng(1)
    e = rng.normal(size=(400, 16))
    e /= np.linalg.norm(e, axis=1, keepdims=True)
    identities: list[int | None] = [i // 2 for i in range(400)]
    threshold = intervals.threshold_at(1e-3, intervals.impostors(e, identities))
    different = [e[i] @ e[j] for i in range(400) for j in range(i) if identities[i] != identities[j]]
    assert np.mean(np.array(different) > threshold) == pytest.approx(1e-3, abs=1e-4)
    with pytest.raises(ValueError, match="too few"):
        intervals.threshold_at(1e-3, intervals.impostors(e[:20], identities[:20]))


def test_people_without_a_name_are_nobodys_impostors() -> None:
    e = np.eye(4)
    assert len(intervals.impostors(e, [0, None, 1, None])) == 1


def test_equal_error_of_two_gaussians_is_the_textbooks() -> None:
    rng = np.random.default_rng(2)
    genuine, impostor = rng.normal(2, 1, size=20_000), rng.normal(0, 1, size=50_000)
    threshold, error = intervals.equal_error(genuine, impostor)
    assert threshold == pytest.approx(1.0, abs=0.03)
    assert error == pytest.approx(0.1587, abs=0.005)  # 1 - Phi(1)


@pytest.mark.parametrize(
    ("draw_values", "truth"),
    [
        (lambda rng: rng.normal(3.0, 1.0, size=60), 3.0),
        (lambda rng: (rng.random(60) < 0.3).astype(float), 0.3),
    ],
    ids=["mean of a normal", "share of 0.3"],
)
def test_the_interval_covers_the_truth_about_as_often_as_it_says(draw_values: object, truth: float) -> None:
    rng = np.random.default_rng(2)
    covered = 0
    for trial in range(200):
        low, high = intervals.interval(draw_values(rng), seed=trial, draws=300)  # type: ignore[operator]
        covered += low <= truth <= high
    assert 0.88 <= covered / 200 <= 0.99


def test_the_interval_of_what_hangs_together_covers_the_truth_only_by_groups() -> None:
    rng = np.random.default_rng(3)
    by_group = by_value = 0
    for trial in range(150):
        groups = np.repeat(np.arange(40), 10)
        values = rng.normal(0, 1, size=40)[groups] + rng.normal(0, 0.1, size=400)
        low, high = intervals.interval(values, groups.tolist(), seed=trial, draws=200)
        by_group += low <= 0 <= high
        low, high = intervals.interval(values, seed=trial, draws=200)
        by_value += low <= 0 <= high
    assert by_group / 150 >= 0.88 and by_value / 150 <= 0.6


def test_no_event_in_a_sample_does_not_mean_never() -> None:
    low, high = intervals.interval(np.zeros(100))
    assert low == 0 and high == pytest.approx(0.0362, abs=1e-3)  # scipy: binomtest(0, 100).proportion_ci()
    from scipy.stats import binomtest

    exact = binomtest(100, 100).proportion_ci(method="exact")
    assert intervals.interval(np.ones(100)) == pytest.approx((exact.low, exact.high))


def test_area_under_the_curve_agrees_with_counting() -> None:
    rng = np.random.default_rng(4)
    a, b = rng.integers(0, 6, size=40).astype(float), rng.integers(0, 5, size=30).astype(float)
    counted = np.mean([(x > y) + 0.5 * (x == y) for x in a for y in b])
    assert intervals.area_under_curve(a, b) == pytest.approx(counted)


def test_distances_agree_with_their_definitions() -> None:
    rng = np.random.default_rng(3)
    a, b = rng.integers(0, 256, size=(2, 2, 16, 16, 3), dtype=np.uint8)
    x, y = a.astype(float) / 127.5 - 1, b.astype(float) / 127.5 - 1
    assert distances.l1(a, b) == pytest.approx(np.abs(x - y).mean(axis=(1, 2, 3)))
    assert distances.l2(a, b) == pytest.approx(((x - y) ** 2).mean(axis=(1, 2, 3)))
    from skimage.metrics import peak_signal_noise_ratio

    assert distances.psnr(a, b) == pytest.approx([peak_signal_noise_ratio(p, q) for p, q in zip(a, b, strict=True)])


def test_dssim_agrees_with_its_formula_written_out_with_scipy() -> None:
    from scipy.ndimage import gaussian_filter
    from skimage import data

    a = data.astronaut()[:64, 200:264]
    b = np.clip(a.astype(int) + np.random.default_rng(5).integers(-30, 31, size=a.shape), 0, 255).astype(np.uint8)
    scores = []
    for channel in range(3):
        x, y = a[..., channel].astype(float), b[..., channel].astype(float)

        def mean(z: np.ndarray) -> np.ndarray:
            return gaussian_filter(z, 1.5, truncate=3.5)

        mx, my = mean(x), mean(y)
        vx, vy, cov = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
        c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
        s = (2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
        scores.append(s[5:-5, 5:-5].mean())
    assert distances.dssim(a[None], b[None])[0] == pytest.approx((1 - np.mean(scores)) / 2, abs=1e-6)


def test_lpips_of_two_pictures_is_that_of_the_features_it_is_defined_by(shared: Path) -> None:
    """Written out from the paper (Zhang et al. 2018, eq. 1) with torch alone, from the same file."""
    import torch
    import torch.nn.functional as F
    from safetensors.torch import load_file
    from skimage import data

    a = data.astronaut()[:128, 160:288]
    b = data.astronaut()[10:138, 164:292]
    file = shared / "weights" / "lpips_alex.safetensors"
    state = load_file(str(file))

    def features(pixels: np.ndarray) -> list[torch.Tensor]:
        x = torch.from_numpy(pixels.astype(np.float32) / 127.5 - 1).permute(2, 0, 1)[None]
        x = (x - torch.tensor([-0.030, -0.088, -0.188])[:, None, None]) / torch.tensor([0.458, 0.448, 0.450])[
            :, None, None
        ]
        layers = ("slice1.0", "slice2.3", "slice3.6", "slice4.8", "slice5.10")
        out = []
        for i, name in enumerate(layers):
            x = F.max_pool2d(x, 3, 2) if i in (1, 2) else x
            stride, padding = (4, 2) if i == 0 else (1, 2 if i == 1 else 1)
            x = F.relu(F.conv2d(x, state[f"net.{name}.weight"], state[f"net.{name}.bias"], stride, padding))
            out.append(x)
        return out

    expected = 0.0
    for i, (x, y) in enumerate(zip(features(a), features(b), strict=True)):
        x, y = (z / z.norm(dim=1, keepdim=True).clamp(min=1e-10) for z in (x, y))
        expected += float(F.conv2d((x - y) ** 2, state[f"lin{i}.model.1.weight"]).mean())
    measured = distances.lpips_distance(file)(a[None], b[None])[0]
    assert measured == pytest.approx(expected, rel=1e-4) and measured > 0.05


def test_frechet_distance_agrees_with_scipys_matrix_root() -> None:
    from scipy.linalg import sqrtm

    rng = np.random.default_rng(6)
    a, b = rng.normal(size=(300, 8)), rng.normal(0.5, 2, size=(300, 8)) @ rng.normal(size=(8, 8))
    ca, cb = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(ca + cb - 2 * np.real(sqrtm(ca @ cb)))
    assert distances.frechet(a, b) == pytest.approx(expected, rel=1e-6)
    assert distances.frechet(a, a) == pytest.approx(0, abs=1e-8)


def test_png_keeps_every_bit_and_the_others_do_not() -> None:
    pixels = np.random.default_rng(4).integers(0, 256, size=(2, 32, 32, 3), dtype=np.uint8)
    assert np.array_equal(files.save(pixels), pixels)
    losses = {codec: distances.l1(pixels, files.save(pixels, codec)).mean() for codec in files.LOSSY}
    assert 0 < losses["jpeg95"] < losses["jpeg90"] < losses["jpeg75"] and losses["half"] > 0


def test_a_sample_has_one_photo_a_person_and_never_their_other_one() -> None:
    people: list[int | None] = [i for i in range(30) for _ in range(1 + i % 3)] + [None] * 5
    images = np.arange(len(people), dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), dtype=np.uint8)
    faces = Faces(images, people, [str(i) for i in range(len(people))])
    sample = draw(faces, 24, seed=1)
    shown = [i for i in sample.faces.identities if i is not None]
    assert len(sample.faces) == 24 and len(set(shown)) == len(shown)
    assert [sample.faces.identities[i] for i in sample.mate_of] == sample.mates.identities
    assert len(sample.mates) == 20, "everybody with two photos comes first"
    assert not set(sample.faces.sources) & set(sample.mates.sources)
    assert not set(shown) & {i for i in sample.rest.identities if i is not None}
    everything = draw(faces, 1000, seed=1)
    assert len(everything.faces) + len(everything.mates) == len(faces) and len(everything.rest) == 0


def test_thresholds_and_rates_agree_with_sklearns_roc_curve() -> None:
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed")
    rng = np.random.default_rng(7)
    genuine, impostor = rng.normal(0.6, 0.15, size=700), rng.normal(0.05, 0.12, size=30_000)
    fpr, tpr, _ = metrics.roc_curve(np.repeat([1, 0], [700, 30_000]), np.concatenate([genuine, impostor]))
    threshold = intervals.threshold_at(1e-3, impostor)
    assert (genuine >= threshold).mean() == pytest.approx(np.interp(1e-3, fpr, tpr), abs=0.005)
    crossing = np.argmin(np.abs(fpr - (1 - tpr)))
    _, error = intervals.equal_error(genuine, impostor)
    assert error == pytest.approx((fpr[crossing] + 1 - tpr[crossing]) / 2, abs=0.001)
    assert intervals.area_under_curve(genuine, impostor) == pytest.approx(metrics.auc(fpr, tpr), abs=1e-6)


def test_lfws_protocol_agrees_with_trying_every_threshold() -> None:
    from services.evaluate.parts.pairs import cross_validated

    rng = np.random.default_rng(8)
    same = rng.random(60) < 0.5
    cosines, folds = rng.normal(0.4 * same, 0.3), np.repeat([0, 1, 2], 20)
    expected = np.zeros(60)
    for fold in range(3):
        others = [i for i in range(60) if folds[i] != fold]
        tried = [min(cosines[others]) - 1, *sorted(cosines[others])]
        best = max(sum((cosines[i] > t) == same[i] for i in others) for t in tried)
        lowest = next(t for t in tried if sum((cosines[i] > t) == same[i] for i in others) == best)
        above = min((cosines[i] for i in others if cosines[i] > lowest), default=lowest)
        for i in range(60):
            if folds[i] == fold:  # between two values of the others any threshold is as good; ours is in the middle
                expected[i] = (cosines[i] >= (lowest + above) / 2) == same[i]
    assert cross_validated(cosines, same, folds).tolist() == expected.tolist()


def test_lfws_list_of_pairs_is_read_as_it_is_meant(shared: Path) -> None:
    from services.evaluate.parts.pairs import read_pairs

    pairs = read_pairs(shared / "data" / "lfw-pairs-folds1-5.txt")
    assert len(pairs) == 5 * 600 and {fold for fold, *_ in pairs} == {0, 1, 2, 3, 4}
    for fold in range(5):
        assert [is_same for f, is_same, _, _ in pairs if f == fold] == [True] * 300 + [False] * 300
    assert pairs[0][2:] == ("Abel_Pacheco_0001.jpg", "Abel_Pacheco_0004.jpg"), "the first line of LFW's pairs.txt"
    for _, is_same, a, b in pairs:
        assert is_same == (a[:-9] == b[:-9]) and a != b
