"""Run configs: every shipped one loads, unknown keys and bad values are refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from training.config import load

CONFIGS = sorted((Path(__file__).parents[2] / "training" / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_shipped_config_loads(path: Path) -> None:
    assert load(path).name == path.stem


def test_the_papers_config_has_the_papers_numbers() -> None:
    paper = load(next(p for p in CONFIGS if p.stem == "paper"))
    w = paper.objective.weights
    assert (w.auxiliary, w.feature, w.adversarial, w.recovery_class) == (1, 2, 2, 2)
    assert (w.recovery, w.background, w.gan) == (100, 10, 1)
    assert (paper.optimizer.lr, paper.optimizer.lr_recogniser, paper.batch, paper.bits) == (1e-4, 1e-5, 48, 16)
    assert (paper.architecture.name, paper.discriminator.pool_size, paper.objective.margin) == ("resnet", 500, 0)
    ours = (w.identity, w.recovered_identity, w.perceptual, w.likeness, w.range)
    assert ours == (0, 0, 0, 0, 0) and not paper.objective.save and paper.ema == 0


def test_overrides_reach_into_sections_and_architectures_change_by_one_line(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("name: x\ndata: {shards: s}\ntotal_images: 8\n")
    config = load(path, ["optimizer.lr=2e-4", "architecture.name=unet", "data.shards=elsewhere"])
    assert (config.optimizer.lr, config.architecture.name, config.data.shards) == (2e-4, "unet", "elsewhere")


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("optimizer.learning_rate=1", "learning_rate"),
        ("bits=6", "bits"),
        ("architecture.name=vgg", "architecture"),
        ("objective.near_miss=2", "near_miss"),
        ("objective.weights.perceptual=1", "perceptual_weights"),
        ("novalue", "key=value"),
        ("name.x=1", "not a section"),
    ],
)
def test_what_is_wrong_with_a_config_is_named(tmp_path: Path, override: str, named: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("name: x\ndata: {shards: s}\ntotal_images: 8\n")
    with pytest.raises(ValueError, match=named):
        load(path, [override])


def test_a_missing_config_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot read config"):
        load(tmp_path / "none.yaml")
