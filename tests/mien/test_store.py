from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mien import networks, store
from mien.errors import ModelError, ModelIntegrityError
from mien.networks import ResNetConfig, UNetConfig


@pytest.mark.parametrize("architecture", [ResNetConfig(width=8, blocks=1), UNetConfig(widths=(16, 32), condition=16)])
def test_a_model_comes_back_as_it_was_saved(architecture: networks.ArchitectureConfig, tmp_path: Path) -> None:
    network = networks.build(architecture, bits=8, size=64).eval()
    written = store.save(
        tmp_path, network, store.ModelConfig(architecture=architecture, bits=8, crop_size=64), card="x"
    )
    again, config = store.load(tmp_path)
    assert config == written and len(config.digest) == 64
    images, codes = torch.rand(2, 3, 64, 64), torch.full((2, 8), 0.5)
    with torch.no_grad():
        assert torch.equal(network(images, codes), again(images, codes))
    assert {p.name for p in tmp_path.iterdir()} == {"model.safetensors", "config.json", "README.md"}


@pytest.fixture
def copy(model_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_folder, tmp_path / "model"))


def test_a_swapped_or_broken_weight_file_is_refused(copy: Path) -> None:
    weights = copy / store.WEIGHTS
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ModelIntegrityError, match="sha256"):
        store.load(copy)


def test_a_config_that_names_another_digest_is_refused(copy: Path) -> None:
    config = json.loads((copy / store.CONFIG).read_text())
    (copy / store.CONFIG).write_text(json.dumps({**config, "digest": "0" * 64}))
    with pytest.raises(ModelIntegrityError, match="000000000000"):
        store.load(copy)


@pytest.mark.parametrize(
    "change",
    [{"format": 2}, {"unknown": 1}, {"bits": 15}, {"architecture": {"name": "none"}}, {"template": "other"}],
    ids=lambda change: next(iter(change)),
)
def test_configs_this_version_does_not_know_are_refused(copy: Path, change: dict[str, object]) -> None:
    config = json.loads((copy / store.CONFIG).read_text())
    (copy / store.CONFIG).write_text(json.dumps({**config, **change}))
    with pytest.raises(ModelError):
        store.load(copy)


@pytest.mark.parametrize("missing", [store.CONFIG, store.WEIGHTS])
def test_an_incomplete_folder_is_refused(copy: Path, missing: str) -> None:
    (copy / missing).unlink()
    with pytest.raises(ModelError, match="cannot read"):
        store.load(copy)


_FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from mien.store import write_atomically
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    write_atomically(Path(sys.argv[1]), b"n" * 5000)
except OSError as error:
    sys.exit(7)
"""


def test_a_write_that_runs_out_of_room_leaves_the_old_file_and_no_rubbish(tmp_path: Path) -> None:
    target = tmp_path / "picture.png"
    target.write_bytes(b"old")
    done = subprocess.run([sys.executable, "-c", _FULL_DISK, str(target)], check=False, timeout=120)
    assert done.returncode == 7
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]
