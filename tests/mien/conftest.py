"""A model that can be undone exactly, the picture that a package carries, one detector for all tests."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from numpy.typing import NDArray
from PIL import Image

from mien import cli, networks, store
from mien.detection import MTCNNDetector
from mien.model import Model, load
from mien.networks import CouplingConfig
from tests.mien.command import Command, Ran
from tests.mien.video_parts import Remembering

# Deadlines measure the machine, and this one may be busy.
settings.register_profile("mien", deadline=None)
settings.load_profile("mien")

CONFIG = CouplingConfig(widths=(16, 32), condition=32)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def astronaut() -> NDArray[np.uint8]:
    """512 x 512 RGB; one face, 88 px wide."""
    from skimage import data

    pixels: NDArray[np.uint8] = data.astronaut()
    pixels.setflags(write=False)
    return pixels


@pytest.fixture(scope="session")
def photo(astronaut: NDArray[np.uint8]) -> Image.Image:
    return Image.fromarray(astronaut)


@pytest.fixture(scope="session")
def detector() -> MTCNNDetector:
    return MTCNNDetector()


@pytest.fixture(scope="module")
def remembering(detector: MTCNNDetector) -> Remembering:
    return Remembering(detector)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A coupling network with small random weights: it changes faces visibly, and T(-p) T(p) I = I holds exactly."""
    generator = torch.Generator().manual_seed(7)
    network = networks.build(CONFIG, bits=16, size=128)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith("head.weight"):
                parameter.normal_(0, 0.01, generator=generator)
            elif "affine" not in name:
                parameter.normal_(0, 0.1, generator=generator)
            elif name.endswith("weight"):
                parameter.normal_(0, 0.5, generator=generator)
    folder = tmp_path_factory.mktemp("model")
    store.save(folder, network, store.ModelConfig(architecture=CONFIG, bits=16), card="A test model.")
    return folder


@pytest.fixture(scope="session")
def model(model_folder: Path, detector: MTCNNDetector) -> Model:
    return load(model_folder, device="cpu", detector=detector)


@pytest.fixture
def mien(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """The command, run in this process."""

    def run(*arguments: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["mien", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        code = stopped.value.code
        return Ran(code if isinstance(code, int) else 0, captured.out, captured.err)

    return run
