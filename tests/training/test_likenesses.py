"""Likenesses are chosen and moved until a recogniser tells them apart."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mien.networks.cover import CoverConfig, CoverTransformer
from tests.training.conftest import write_shards
from training import likenesses
from training.cover import fit
from training.data import FaceShards
from training.samples import from_uint8

COUNT = 8
SMALL = CoverConfig(
    leading_luma=3, leading_colour=2, landmarks=2, luma=40, colour=12, robust=(30, 8), likenesses=COUNT, carriers=300,
    widths=(8, 16), features=32, painter=None,
)  # fmt: skip


class Projection(nn.Module):
    """Tells pictures apart by random projections of their coarse view."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(3 * 16 * 16, 48, generator=torch.Generator().manual_seed(0)))

    def forward(self, images: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(images, 16).flatten(1) @ self.matrix


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("likenesses") / "faces"
    write_shards(folder, {"train": 96, "val": 24}, size=64)
    return folder


def _fitted(shards: Path, recogniser: nn.Module | None) -> CoverTransformer:
    torch.manual_seed(3)
    network = CoverTransformer(SMALL, bits=16, size=64)
    fit(
        network, FaceShards(shards, "train"), FaceShards(shards, "val"), steps=10, batch=16, seed=0,
        device=torch.device("cpu"), recogniser=recogniser, apart=15,
    )  # fmt: skip
    return network


def _alike(network: CoverTransformer, shards: Path, recogniser: nn.Module) -> float:
    """Mean cosine of two likenesses in the same picture."""
    images = from_uint8(FaceShards(shards, "train").decode(torch.arange(4).numpy()).images)
    shown = likenesses._Pictures.of(network, images)
    with torch.no_grad():
        found = []
        for i in range(4):
            pictures = shown[torch.full((COUNT,), i)]
            embedding = F.normalize(recogniser(pictures.with_faces(network, network.likenesses.faces)), dim=1)
            found.append((embedding @ embedding.T)[~torch.eye(COUNT, dtype=torch.bool)].mean().item())
    return sum(found) / len(found)


def test_a_recogniser_tells_apart_what_was_moved_for_it_and_the_same_seed_moves_the_same(shards: Path) -> None:
    recogniser = Projection()
    fallen, chosen = _fitted(shards, None), _fitted(shards, recogniser)
    assert torch.equal(fallen.deviation, chosen.deviation)  # all else is fitted alike
    assert _alike(chosen, shards, recogniser) < _alike(fallen, shards, recogniser) - 0.005
    strengths = [network.likenesses.faces.norm(dim=1).mean() for network in (fallen, chosen)]
    assert 0.5 * strengths[0] < strengths[1] < 2 * strengths[0]
    assert all(parameter.requires_grad for parameter in recogniser.parameters())  # as it was given
    assert torch.equal(_fitted(shards, recogniser).likenesses.faces, chosen.likenesses.faces)
