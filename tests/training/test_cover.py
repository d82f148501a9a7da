"""What a cover transformer's painter stands on, fitted to a few crops of one photo."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mien.networks.cover import CoverConfig, CoverTransformer, planes_of, stretch
from mien.networks.painter import PainterConfig
from tests.training.conftest import write_shards
from training.cover import fit
from training.data import FaceShards
from training.samples import from_uint8

SMALL = CoverConfig(
    leading_luma=3, leading_colour=2, landmarks=2, luma=40, colour=12, robust=(30, 8), likenesses=16, carriers=300,
    widths=(8, 16), features=32, painter=PainterConfig(widths=(8, 16)),
)  # fmt: skip
Fit = tuple[CoverTransformer, dict[str, float], FaceShards, FaceShards]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cover") / "faces"
    write_shards(folder, {"train": 96, "val": 24}, size=64)
    return folder


def _fit(shards: Path, *, steps: int, config: CoverConfig = SMALL, seed: int = 0) -> Fit:
    train, val = FaceShards(shards, "train"), FaceShards(shards, "val")
    torch.manual_seed(3)
    network = CoverTransformer(config, bits=16, size=64)
    figures = fit(network, train, val, steps=steps, batch=32, seed=seed, device=torch.device("cpu"))
    return network, figures, train, val


@pytest.fixture(scope="module")
def fitted(shards: Path) -> Fit:
    return _fit(shards, steps=60)


def _coordinates(network: CoverTransformer, faces: FaceShards, *, mirrored: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Of luma and of colour, those of mirrored pictures after them where they are asked for."""
    images = from_uint8(faces.decode(np.arange(len(faces))).images)
    stretched = stretch(torch.cat([images, images.flip(3)]) if mirrored else images)
    luma, colour = network.inside(torch.nn.functional.avg_pool2d(planes_of(stretched), 2) - network.mean)
    return luma @ network.luma, colour @ network.colour


def test_eigenfaces_are_orthonormal_and_strongest_first_and_coordinates_average_nothing(fitted: Fit) -> None:
    network, _, train, _ = fitted
    both, straight = (_coordinates(network, train, mirrored=m) for m in (True, False))
    for basis, coordinates in zip((network.luma, network.colour), both, strict=True):
        assert (basis.T @ basis - torch.eye(basis.shape[1])).abs().max() < 1e-4
        assert coordinates.mean(dim=0).abs().max() < 0.02 * coordinates.std(dim=0).max()
    # Leading ones, those that tell landmarks (as strong as they are), and the others.
    for part in (both[0][:, :3], straight[0][:, 5:], both[1]):
        strength = part.square().mean(dim=0)
        assert (strength.diff() <= 1e-4 * strength.max()).all() and strength.min() > 0
    # Uncorrelated, as principal axes are.
    moments = straight[0][:, 5:].T @ straight[0][:, 5:]
    assert (moments - moments.diag().diag()).abs().max() < 1e-3 * moments.max()


def test_eigenfaces_go_on_beyond_the_inner_radius(fitted: Fit) -> None:
    network, _, _, val = fitted
    images = from_uint8(val.decode(np.arange(len(val))).images)
    stretched = stretch(images)
    seen = network.observe(stretched)
    low = network.plan(seen, network.coordinates(stretched, seen))
    real = torch.nn.functional.avg_pool2d(planes_of(stretched), 2)
    for blocks, most in ((network.inner, 0.02), (network.ring, 0.25)):
        missed, there = (x.flatten(2)[..., blocks] for x in (low - real, real - network.mean))
        assert missed.square().sum() < most * there.square().sum()  # 0.6 % and 10 %


def test_a_fit_learns_the_context_and_scales_what_is_left_to_one(fitted: Fit, shards: Path) -> None:
    network, figures, train, _ = fitted
    assert figures.keys() == {"explained", "energy"}
    # Of tinted crops of one photo the context tells much; the less, the shorter the fit.
    assert figures["explained"] > _fit(shards, steps=2)[1]["explained"] + 0.3
    images = stretch(from_uint8(train.decode(np.arange(len(train))).images))
    with torch.no_grad():
        seen = network.observe(images)
        own = network.coordinates(images, seen)
        robust, fine = network.secrets(images, seen)
    assert own.std(dim=0).sub(1).abs().max() < 0.05
    # What is hidden is of mean square 1, so that it fills the grey levels it is given.
    assert 0.7 < robust.square().mean() < 2.5 and 0.7 < fine.square().mean() < 1.5  # 1.7 and 1.0
    assert not network.training and not any(p.requires_grad for p in network.context.parameters())


def test_the_same_seed_fits_the_same_network_and_another_seed_another(fitted: Fit, shards: Path) -> None:
    def differ(other: CoverTransformer) -> set[str]:
        mine, theirs = fitted[0].state_dict(), other.state_dict()
        return {name.split(".")[0] for name in mine if not torch.equal(mine[name], theirs[name])}

    assert differ(_fit(shards, steps=60)[0]) == set()
    others = differ(_fit(shards, steps=60, seed=1)[0])
    # Eigenfaces are a decomposition; the regression and the choice of likenesses are drawn.
    assert {"context", "likenesses"} <= others and not {"mean", "luma", "colour", "luma_ring"} & others


def test_the_painter_is_left_alone_and_without_one_the_context_learns_on(fitted: Fit, shards: Path) -> None:
    network = fitted[0]
    torch.manual_seed(3)
    before = CoverTransformer(SMALL, bits=16, size=64).painter
    assert network.painter is not None and before is not None
    for mine, theirs in zip(network.painter.parameters(), before.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    plain = _fit(shards, steps=2, config=SMALL.model_copy(update={"painter": None}))[0]
    assert plain.painter is None and all(p.requires_grad for p in plain.context.parameters())


def test_likenesses_are_blends_as_strong_as_faces_and_no_two_alike(fitted: Fit) -> None:
    network = fitted[0]
    faces = network.likenesses.faces
    assert faces.shape == (16, 52)
    # Means of two that are alike, drawn out: of mean square 1 are faces.
    assert 0.3 < faces.square().mean() < 3
    assert torch.pdist(faces).min() > 1
