"""Training a painter on what was fitted: its terms, how it begins, and what a light checkpoint keeps whole."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import storage
from mien import networks, store
from mien.networks import CoverConfig, CoverTransformer
from training import checkpoint
from training.config import RunConfig, WeightsConfig
from training.data import FaceShards
from training.loop import train
from training.samples import from_uint8
from training.step import Trainer

ARCHITECTURE = {
    "name": "cover", "leading_luma": 3, "leading_colour": 2, "landmarks": 0, "luma": 40, "colour": 12,
    "robust": [30, 8], "likenesses": 16, "carriers": 300, "widths": [8, 16], "features": 32,
    "painter": {"widths": [8, 16]},
}  # fmt: skip


@pytest.fixture
def painting(tiny: RunConfig) -> RunConfig:
    weights = dict.fromkeys(WeightsConfig.model_fields, 0.0) | {"gan": 1.0, "own": 10.0, "steady": 20.0}
    weights |= {"identity": 1.0, "feature": 1.0}
    return RunConfig.model_validate(
        tiny.model_dump()
        | {
            "architecture": ARCHITECTURE,
            "recogniser": tiny.recogniser.model_dump() | {"trainable": False, "against_recovered": 0.0},
            "discriminator": tiny.discriminator.model_dump() | {"on_recovered": False, "on_wrong": False},
            "objective": tiny.objective.model_dump() | {"weights": weights, "wrong_recovery": False},
            "optimizer": tiny.optimizer.model_dump() | {"lr": 1e-3},
            "total_images": 4,
        }
    )


def test_a_step_teaches_the_painter_and_nothing_that_was_fitted(painting: RunConfig) -> None:
    trainer = Trainer(painting, identities=4, device=torch.device("cpu"))
    before = {k: v.clone() for k, v in trainer.transformer.state_dict().items()}
    batch = FaceShards(painting.data.shards, "train").decode(np.arange(4))
    logs = [trainer.step(from_uint8(batch.images), torch.from_numpy(batch.identities), nimg=n) for n in (0, 4)]
    assert {"own", "steady", "gan", "identity", "feature"} <= logs[0].keys()
    assert logs[0]["own"] > 0 and logs[0]["steady"] >= 0 and all(np.isfinite(v) for v in logs[1].values())
    moved = {k for k, v in trainer.transformer.state_dict().items() if not torch.equal(v, before[k])}
    assert moved and all(name.startswith("painter.") for name in moved)


def test_its_own_face_is_learnt(painting: RunConfig) -> None:
    """``own`` alone: painting a face's own likeness comes nearer to the face."""
    weights = WeightsConfig(**(dict.fromkeys(WeightsConfig.model_fields, 0.0) | {"own": 10.0}))
    objective = painting.objective.model_copy(update={"weights": weights})
    config = painting.model_copy(update={"objective": objective})
    trainer = Trainer(config, identities=4, device=torch.device("cpu"))
    batch = FaceShards(config.data.shards, "train").decode(np.arange(4))
    images, identities = from_uint8(batch.images), torch.from_numpy(batch.identities)
    own = [trainer.step(images, identities, nimg=4 * n)["own"] for n in range(12)]
    assert own[-1] < 0.9 * own[0]


def test_terms_of_a_painter_are_refused_for_other_networks(painting: RunConfig, tiny: RunConfig) -> None:
    config = painting.model_copy(update={"architecture": tiny.architecture})
    trainer = Trainer(config, identities=4, device=torch.device("cpu"))
    batch = FaceShards(config.data.shards, "train").decode(np.arange(2))
    with pytest.raises(ValueError, match="cover"):
        trainer.step(from_uint8(batch.images), torch.from_numpy(batch.identities), nimg=0)


def test_a_run_begins_with_a_fit_that_has_no_painter_and_keeps_it_exactly(painting: RunConfig, tmp_path: Path) -> None:
    assert isinstance(painting.architecture, CoverConfig)
    plain = painting.architecture.model_copy(update={"painter": None})
    torch.manual_seed(5)
    fitted = networks.build(plain, bits=painting.bits, size=painting.crop_size)
    store.save(
        tmp_path / "fitted", fitted,
        store.ModelConfig(architecture=plain, bits=painting.bits, crop_size=painting.crop_size), card="# fitted\n",
    )  # fmt: skip
    outcome = train(painting.model_copy(update={"start": str(tmp_path / "fitted")}))
    assert outcome.model is not None
    ended, _ = store.load(outcome.model)
    assert isinstance(ended, CoverTransformer) and ended.painter is not None
    state = ended.state_dict()
    assert all(torch.equal(state[k], v) for k, v in fitted.state_dict().items())
    # What comes back from a lent machine: the fit as it was, the painter in half precision.
    folder = Path(painting.runs) / painting.name / "checkpoints"
    for name, data in checkpoint.light(storage.open_prefix(folder), whole=False):
        path = tmp_path / "light" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    found = checkpoint.latest(storage.open_prefix(tmp_path / "light"))
    assert found is not None
    kept = found[1]["trainer"]["ema"]
    assert all(torch.equal(kept[k].float(), v) for k, v in fitted.state_dict().items())
    assert kept["painter.stem.weight"].dtype == torch.float16


def test_likenesses_move_where_they_are_told_to_and_keep_their_strength(painting: RunConfig) -> None:
    config = painting.model_copy(update={"optimizer": painting.optimizer.model_copy(update={"lr_likenesses": 0.01})})
    trainer = Trainer(config, identities=4, device=torch.device("cpu"))
    assert isinstance(trainer.transformer, CoverTransformer)
    before = trainer.transformer.likenesses.faces.detach().clone()
    batch = FaceShards(config.data.shards, "train").decode(np.arange(4))
    for n in (0, 4):
        trainer.step(from_uint8(batch.images), torch.from_numpy(batch.identities), nimg=n)
    faces = trainer.transformer.likenesses.faces
    moved = (faces - before).norm(dim=1)
    assert (moved > 0).any()
    assert torch.allclose(faces.norm(dim=1), before.norm(dim=1), rtol=1e-5)
    # The average that is exported goes with them.
    assert isinstance(trainer.ema.network, CoverTransformer)
    assert not torch.equal(trainer.ema.network.likenesses.faces, before)


def test_likenesses_are_of_the_cover_transformer_and_of_whole_processes(painting: RunConfig, tiny: RunConfig) -> None:
    optimizer = painting.optimizer.model_dump() | {"lr_likenesses": 0.01}
    other = RunConfig.model_validate(tiny.model_dump() | {"optimizer": optimizer})
    with pytest.raises(ValueError, match="cover"):
        Trainer(other, identities=4, device=torch.device("cpu"))
    with pytest.raises(ValueError, match="ddp"):
        RunConfig.model_validate(painting.model_dump() | {"optimizer": optimizer, "strategy": "zero1"})
