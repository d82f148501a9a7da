"""A run that begins with the weights of a model (fine-tuning)."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from mien import networks, store
from mien.errors import ModelError
from tests.training.launch import Start, finish, launch, weights, write
from training.config import RunConfig
from training.loop import train


@pytest.fixture
def model(bare: RunConfig, tmp_path: Path) -> Path:
    torch.manual_seed(5)
    network = networks.build(bare.architecture, bits=bare.bits, size=bare.crop_size)
    config = store.ModelConfig(architecture=bare.architecture, bits=bare.bits, crop_size=bare.crop_size, images_seen=9)
    store.save(tmp_path / "model", network, config, card="# first\n")
    return tmp_path / "model"


def _state(folder: Path) -> dict[str, torch.Tensor]:
    return store.load(folder)[0].state_dict()


def test_a_run_begins_with_a_model_and_a_restart_does_not_read_it_again(
    bare: RunConfig, model: Path, tmp_path: Path, background: Start
) -> None:
    # A rate of next to nothing: what the run ends with is what it began with.
    still = bare.optimizer.model_copy(update={"lr": 1e-12})
    config = bare.model_copy(update={"start": str(model), "optimizer": still, "total_images": 4, "ema": 0.0})
    assert train(config, stop_at=2).nimg == 2
    theirs = _state(model)
    begun = weights(config, at=2)
    for kind in ("modules/transformer", "ema"):
        assert all(torch.allclose(begun[f"/{kind}/{k}"], v, atol=1e-8) for k, v in theirs.items()), kind
    # Two processes begin alike, ZeRO's copies of the weights too.
    pair = config.model_copy(update={"name": "pair", "strategy": "zero2"})
    log = tmp_path / "log"
    finish(launch(background, 2, ["--config", write(pair, tmp_path / "c.json"), "--stop-at", "2"], log=log), log)
    found = weights(pair, at=2)
    assert all(torch.allclose(found[f"/modules/transformer/{k}"], v, atol=1e-8) for k, v in theirs.items())

    shutil.rmtree(model)
    outcome = train(config)
    assert outcome.finished and outcome.model is not None
    ended = _state(outcome.model)
    assert ended.keys() == theirs.keys() and all(torch.allclose(ended[k], v, atol=1e-8) for k, v in theirs.items())


def test_another_network_or_a_broken_model_ends_the_run_at_its_start(bare: RunConfig, model: Path) -> None:
    other = bare.model_copy(update={"name": "other", "start": str(model), "bits": 12})
    with pytest.raises(ValueError, match="has bits 8, this run 12"):
        train(other)
    weights_file = model / store.WEIGHTS
    data = bytearray(weights_file.read_bytes())
    data[-1] ^= 1
    weights_file.write_bytes(data)
    with pytest.raises(ModelError, match="sha256"):
        train(bare.model_copy(update={"name": "broken", "start": str(model)}))
    with pytest.raises(ModelError, match="no model in"):
        train(bare.model_copy(update={"name": "nowhere", "start": str(model.parent / "nowhere")}))
