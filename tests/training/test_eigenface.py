"""The eigenface transformer fitted to a few synthetic faces, and through its command."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mien import networks, store
from mien.networks.eigenface import EigenfaceConfig, EigenfaceTransformer, stretch
from tests.training.conftest import write_shards
from training.data import FaceShards
from training.eigenface import fit
from training.samples import from_uint8

SMALL = EigenfaceConfig(
    leading_luma=(2, 1), leading_colour=(1, 1), turned=(20, 12), robust=(16, 9), colour=(8, 6), grain=(120, 140),
    likenesses=16, widths=(8, 16), features=32,
)  # fmt: skip


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("eigenface") / "faces"
    write_shards(folder, {"train": 96, "val": 24}, size=64)
    return folder


@pytest.fixture(scope="module")
def fitted(shards: Path) -> tuple[EigenfaceTransformer, dict[str, float], FaceShards]:
    train, val = FaceShards(shards, "train"), FaceShards(shards, "val")
    network = EigenfaceTransformer(SMALL, bits=16, size=64)
    figures = fit(network, train, val, steps=20, batch=16, seed=0, device=torch.device("cpu"), eigenfaces=(24, 16))
    return network, figures, val


def test_axes_are_orthonormal_and_strongest_first(
    fitted: tuple[EigenfaceTransformer, dict[str, float], FaceShards],
) -> None:
    network = fitted[0]
    for side, deviation in zip(network._sides(), network.deviation.split(SMALL.turned), strict=True):
        gram = side.luma.T @ side.luma + side.axes.T @ side.axes
        assert torch.allclose(gram, torch.eye(len(gram)), atol=1e-4)
        assert (deviation.diff() <= 1e-5).all() and deviation[0] > 0
        spanned = side.colour.T @ side.grain()
        assert spanned.abs().max() < 1e-4 and side.grain().shape[1] == SMALL.grain[network._sides().index(side)]
    assert network.share.min() > 0 and network.share.max() == 1


def test_faces_come_back_and_every_password_gives_another(
    fitted: tuple[EigenfaceTransformer, dict[str, float], FaceShards],
) -> None:
    network, figures, val = fitted
    assert figures.keys() == {"explained", "energy", "grain"} and figures["energy"] > 0
    images = from_uint8(val.decode(torch.arange(8).numpy()).images, torch.device("cpu"))
    codes = networks.codes_to_tensor(torch.randint(0, 2, (8, 16), generator=torch.Generator().manual_seed(1)))
    with torch.inference_mode():
        changed = network(images, codes)
        recovered = network(changed, -codes)
        wrong = network(changed, -codes.roll(1, dims=0))
    assert (changed - images).abs().mean() > 0.02
    assert (recovered - images).abs().mean() < 1e-3
    assert (wrong - images).abs().mean() > 0.02 and stretch(changed).isfinite().all()


def test_the_command_writes_a_model_that_loads(shards: Path, tmp_path: Path) -> None:
    def run(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "training.eigenface", "--out", str(tmp_path / "model"), *more],
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip

    dry = run("--shards", str(shards), "--dry-run")
    assert dry.returncode == 0 and "would fit" in dry.stdout and not (tmp_path / "model").exists()
    missing = run("--shards", str(tmp_path / "nothing"))
    assert missing.returncode == 1 and "manifest.json" in missing.stderr
    network = EigenfaceTransformer(SMALL, bits=16, size=64)
    config = store.ModelConfig(architecture=SMALL, bits=16, crop_size=64)
    store.save(tmp_path / "model", network, config, card="x")
    loaded, again = store.load(tmp_path / "model")
    assert again.architecture == SMALL and isinstance(loaded, EigenfaceTransformer)
