"""A small set of shards made from one photo that a package carries, for runs that need no data set."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from skimage.data import astronaut

from mien.recognisers import MobileFaceNet
from training.config import RunConfig


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def write_shards(folder: Path, counts: dict[str, int], size: int = 128) -> None:
    """Shards in the format of DESIGN.md: crops around one face, coloured and shifted so that no two are equal."""
    folder.mkdir(parents=True, exist_ok=True)
    face = Image.fromarray(astronaut()[20:230, 120:330])
    rng = np.random.default_rng(0)
    shards = []
    for split, count in counts.items():
        path = folder / f"{split}-000000.tar"
        with tarfile.open(path, "w") as tar:
            for i in range(count):
                x, y = rng.integers(0, 20, 2)
                crop = face.crop((x, y, x + 190, y + 190)).resize((size, size), Image.Resampling.LANCZOS)
                tint = rng.uniform(0.7, 1.0, size=3)
                buffer = io.BytesIO()
                Image.fromarray((np.asarray(crop) * tint).astype(np.uint8)).save(buffer, "JPEG", quality=95)
                label = {"identity": i % 4 if i % 5 else None, "landmarks": [[0, 0]] * 5, "source": "astronaut"}
                for extension, data in (("jpg", buffer.getvalue()), ("json", json.dumps(label).encode())):
                    info = tarfile.TarInfo(f"{i:06d}.{extension}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        shards.append(
            {
                "name": path.name,
                "split": split,
                "samples": count,
                "bytes": path.stat().st_size,
                "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            }
        )
    (folder / "manifest.json").write_text(json.dumps({"crop_size": size, "shards": shards}))


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder, {"train": 24, "val": 4}, size=64)
    return folder


@pytest.fixture(scope="session")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of the smallest recogniser: steps and checkpoints that take next to nothing."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("recogniser") / "untrained.safetensors"
    save_file(MobileFaceNet("casia").state_dict(), path)
    return path


@pytest.fixture
def tiny(shards: Path, untrained: Path, tmp_path: Path) -> RunConfig:
    """A run of every paper term on 64 px crops with a small network and an untrained F: seconds on one core."""
    return RunConfig.model_validate(
        {
            "name": "tiny",
            "runs": str(tmp_path / "runs"),
            "bits": 8,
            "crop_size": 64,
            "architecture": {"name": "unet", "widths": [8, 16], "condition": 16},
            "data": {"shards": str(shards)},
            "recogniser": {"name": "mobilefacenet-casia", "weights": str(untrained), "against_recovered": 0.5},
            "discriminator": {"width": 8, "layers": 2, "pool_size": 6, "augment": True},
            "predictor": {"width": 8},
            "objective": {"save": True, "save_jpeg": 0.3, "save_rescale": 0.3, "near_miss": 0.5},
            "total_images": 12,
            "batch": 2,
            "ema": 20,
            "device": "cpu",
            "threads": 1,
            "timeout": 60,
            "patience": 30,
            "log_every": 2,
            "sample_every": 6,
            "checkpoint_every": 4,
        }
    )


@pytest.fixture
def bare(tiny: RunConfig) -> RunConfig:
    """``tiny`` without the terms that need F, which take nine tenths of a step: for what is about processes, files and
    signals rather than about what is learned."""
    weights = tiny.objective.weights.model_copy(update={"feature": 0.0, "adversarial": 0.0, "recovery_class": 0.0})
    return tiny.model_copy(update={"objective": tiny.objective.model_copy(update={"weights": weights})})
