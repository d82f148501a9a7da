"""The two-stage step: who learns what, and what is asked of whom."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from training.config import RunConfig
from training.data import FaceShards
from training.draws import Draws
from training.pool import ImagePool
from training.samples import from_uint8
from training.step import Trainer, draw_codes


def _batch(config: RunConfig) -> tuple[torch.Tensor, torch.Tensor]:
    batch = FaceShards(config.data.shards, "train").decode(np.arange(4))
    return from_uint8(batch.images), torch.from_numpy(batch.identities)


def _copy(module: torch.nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def _moved(module: torch.nn.Module, before: list[torch.Tensor]) -> bool:
    return any(not torch.equal(p, b) for p, b in zip(module.parameters(), before, strict=True))


def test_a_step_moves_every_player_and_logs_every_term(tiny: RunConfig) -> None:
    trainer = Trainer(tiny, identities=4, device=torch.device("cpu"))
    players = {
        "T": trainer.transformer,
        "Q": trainer.predictor,
        "D": trainer.discriminators,
        "F": trainer.recogniser,
        "head": trainer.head,
    }
    before = {k: _copy(m) for k, m in players.items()}
    log = trainer.step(*_batch(tiny), nimg=0)
    assert [k for k, m in players.items() if not _moved(m, before[k])] == []
    paper = {"auxiliary", "feature", "adversarial", "recovery_class", "recovery", "background", "gan", "d", "f"}
    assert paper <= log.keys()
    assert all(np.isfinite(v) for v in log.values())


def test_a_frozen_recogniser_stays_as_it_was(tiny: RunConfig) -> None:
    frozen = tiny.model_copy(update={"recogniser": tiny.recogniser.model_copy(update={"trainable": False})})
    trainer = Trainer(frozen, identities=4, device=torch.device("cpu"))
    before = _copy(trainer.recogniser)
    log = trainer.step(*_batch(frozen), nimg=0)
    assert not _moved(trainer.recogniser, before)
    assert "f" not in log and "adversarial" in log


def test_a_term_of_weight_zero_is_not_computed(tiny: RunConfig) -> None:
    weights = dict.fromkeys(type(tiny.objective.weights).model_fields, 0.0) | {"recovery": 1.0}
    objective = tiny.objective.model_copy(update={"weights": type(tiny.objective.weights)(**weights)})
    trainer = Trainer(tiny.model_copy(update={"objective": objective}), identities=4, device=torch.device("cpu"))
    log = trainer.step(*_batch(tiny), nimg=0)
    assert log.keys() == {"loss", "recovery"}


def test_without_wrong_recovery_nothing_is_recovered_wrongly(tiny: RunConfig) -> None:
    objective = tiny.objective.model_copy(update={"wrong_recovery": False})
    trainer = Trainer(tiny.model_copy(update={"objective": objective}), identities=4, device=torch.device("cpu"))
    log = trainer.step(*_batch(tiny), nimg=0)
    assert "cos(I,WR)" not in log and "cos(I,A)" in log


def test_a_step_depends_on_seed_and_clock_alone(tiny: RunConfig) -> None:
    logs = []
    for noise in (1, 2):
        trainer = Trainer(tiny, identities=4, device=torch.device("cpu"))
        torch.manual_seed(noise)  # global randomness must not matter once the networks are built
        logs.append(trainer.step(*_batch(tiny), nimg=8))
    assert logs[0] == logs[1]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), bits=st.sampled_from([4, 8, 16]), near=st.sampled_from([0.0, 0.5, 1.0]))
def test_wrong_codes_are_never_right_and_pairs_never_equal(seed: int, bits: int, near: float) -> None:
    codes = draw_codes(bits, near_miss=near, draws=Draws(seed, 0, 64))
    right = -codes.first
    assert not (codes.wrong == right).all(dim=1).any()
    assert not (codes.first == codes.second).all(dim=1).any()
    assert not (codes.wrong == codes.other_wrong).all(dim=1).any()
    assert set(codes.first.unique().tolist()) <= {-0.5, 0.5}
    if near == 1.0:
        assert ((codes.wrong != right).sum(dim=1) <= 3).all()


@pytest.mark.parametrize("size", [0, 5])
def test_the_pool_answers_with_images_it_was_given(size: int) -> None:
    pool, given_so_far = ImagePool(size, (1,), 2), set()
    older = 0
    for i in range(40):
        new = torch.tensor([[float(2 * i)], [float(2 * i + 1)]])
        given_so_far |= set(new.flatten().tolist())
        out = pool.exchange(new, Draws(0, 2 * i, 2 * i + 2))
        assert set(out.flatten().tolist()) <= given_so_far
        older += int((out != new).sum())
    assert (older > 0) == (size > 0)
