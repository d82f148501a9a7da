"""Discriminators, the averaged weights, F's head and LPIPS against the package."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from training.classifier import IdentityHead, augment_view
from training.config import DiscriminatorConfig
from training.discriminators import KINDS, Discriminators, diff_augment
from training.draws import Draws
from training.ema import EMA
from training.perceptual import AlexFeatures


def test_the_coarse_discriminator_is_shared_and_the_fine_ones_are_not() -> None:
    d = Discriminators(DiscriminatorConfig(width=8, layers=2), None)
    x = torch.rand(2, 3, 64, 64) * 2 - 1
    scores, _ = d(dict.fromkeys(KINDS, x))
    coarse, fine = [s[0] for s in scores], [s[1] for s in scores]
    assert torch.allclose(coarse[0], coarse[1], atol=1e-6) and torch.allclose(coarse[1], coarse[2], atol=1e-6)
    assert not torch.allclose(fine[0], fine[1]) and not torch.allclose(fine[1], fine[2])


def test_one_image_is_judged_the_same_alone_beside_real_ones_and_in_a_batch() -> None:
    d = Discriminators(DiscriminatorConfig(width=8, layers=2), None)
    x, real = (torch.rand(5, 3, 64, 64) * 2 - 1 for _ in range(2))
    (together,), (of_real,) = d({"wrong": x}, real)
    (alone,), nothing = d({"wrong": x[2:3]})
    (real_alone,), _ = d({"wrong": real[4:5]})
    assert nothing == []
    for a, b in ((alone, [s[2:3] for s in together]), (real_alone, [s[4:5] for s in of_real])):
        assert all(torch.allclose(x, y, atol=1e-5) for x, y in zip(a, b, strict=True))


def test_augmentation_keeps_shape_and_gradient_and_repeats_by_its_draws() -> None:
    for augment in (diff_augment, augment_view):
        x = (torch.rand(4, 3, 32, 32) * 2 - 1).requires_grad_()
        one = augment(x, Draws(3, 0, 4))
        other = augment(x, Draws(3, 0, 4))
        assert one.shape == x.shape and torch.equal(one, other) and not torch.allclose(one, x)
        one.sum().backward()
        assert x.grad is not None and (x.grad != 0).float().mean() > 0.5


def test_the_average_follows_with_its_half_life() -> None:
    network = torch.nn.Linear(1, 1, bias=False)
    network.weight.data.fill_(0.0)
    ema = EMA(network, half_life=100)
    network.weight.data.fill_(1.0)
    for step in range(10):
        ema.update(network, images=10, nimg=1_000_000 + step)
    assert ema.network.weight.item() == pytest.approx(0.5, abs=1e-6)


def test_a_half_life_of_zero_copies() -> None:
    network = torch.nn.Linear(2, 2)
    ema = EMA(network, half_life=0)
    network.weight.data.add_(1)
    ema.update(network, images=1, nimg=1)
    assert torch.equal(ema.network.weight, network.weight)


def test_a_head_centred_on_embeddings_classifies_them() -> None:
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(6, 32))
    labels = np.repeat(np.arange(6), 5)
    labels[3] = -1
    embeddings = torch.from_numpy(centres[np.maximum(labels, 0)] + rng.normal(size=(30, 32)) * 0.2).float()
    head = IdentityHead(32, 6)
    head.centre_on(embeddings, torch.from_numpy(labels))
    known = labels >= 0
    assert (head(embeddings).argmax(dim=1).numpy()[known] == labels[known]).all()


@pytest.mark.shared
def test_the_perceptual_distance_equals_the_lpips_packages(shared: Path) -> None:
    lpips = pytest.importorskip("lpips")
    from safetensors.torch import load_file

    weights = shared / "weights" / "lpips_alex.safetensors"
    reference = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    reference.load_state_dict(load_file(str(weights)))
    ours = AlexFeatures(weights)
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.rand(3, 3, 128, 128, generator=generator) * 2 - 1 for _ in range(2))
    b[1] = a[1] * 0.8
    with torch.no_grad():
        expected = reference.eval()(a, b).flatten()
        got = ours.distance(ours(a), ours(b))
    assert torch.allclose(got, expected, atol=1e-5)
    assert expected[1] < expected[0]
