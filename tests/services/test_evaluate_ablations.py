"""Section 5.6 and appendix D: each config is the reference but for its ablation, trains on a CPU, and is judged."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import mien
from mien.recognisers import MobileFaceNet
from services.evaluate import keys, report
from services.evaluate.cli import app
from services.evaluate.faces import Faces
from services.evaluate.parts import ablations as part
from services.evaluate.training_runs import CONFIGS
from tests.services.small_shards import small_shards
from tests.services.stand_ins import SIZE, context_of, two_photos_each
from training.config import load
from training.loop import train

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / CONFIGS

# What each may differ in from `full`, and nothing else.
DIFFERS = {
    "full": {},
    "without-dissimilarity": {"objective.weights.feature": 0},
    "without-wrong-recovery": {"objective.wrong_recovery": False},
    "without-predictor": {"objective.weights.auxiliary": 0},
    "without-recovery-class": {"objective.weights.recovery_class": 0},
    "fixed-recogniser": {"recogniser.trainable": False, "recogniser.against_recovered": 0},
    "eight-bits": {"bits": 8},
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides that make any of them a run of seconds: few small crops, narrow networks, an F that knows nothing."""
    folder = tmp_path_factory.mktemp("ablations")
    small_shards(folder / "shards", {"train": 12, "val": 4}, size=SIZE)
    torch.manual_seed(0)
    save_file(MobileFaceNet("casia").state_dict(), folder / "untrained.safetensors")
    return [
        f"data.shards={folder / 'shards'}", f"recogniser.weights={folder / 'untrained.safetensors'}",
        f"crop_size={SIZE}", "architecture.width=8", "architecture.blocks=1", "predictor.width=8",
        "discriminator.width=8", "discriminator.layers=2", "total_images=2", "batch=2", "device=cpu", "threads=1",
    ]  # fmt: skip


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in config.items():
        out.update(flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return out


def test_there_is_a_config_for_every_row_of_the_report_and_no_other() -> None:
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(part.NAMES) == set(DIFFERS) == set(report._ABLATIONS)


@pytest.mark.parametrize("name", part.NAMES)
def test_an_ablation_differs_from_the_reference_in_what_it_says_alone(name: str) -> None:
    reference, config = (flat(load(FOLDER / f"{n}.yaml").model_dump()) for n in ("full", name))
    differs = {k: v for k, v in config.items() if v != reference[k] and k != "name"}
    assert differs == DIFFERS[name] and config["name"] == name
    marked = [line for line in (FOLDER / f"{name}.yaml").read_text().splitlines() if "<- the ablation" in line]
    assert len(marked) == (name != "full")


@pytest.mark.parametrize("name", part.NAMES)
def test_an_ablation_trains_exports_and_is_loaded(name: str, small: list[str], tmp_path: Path) -> None:
    config = load(FOLDER / f"{name}.yaml", [*small, f"runs={tmp_path / 'runs'}", f"export={tmp_path / 'model'}"])
    outcome = train(config)
    assert outcome.finished and outcome.nimg == 2
    assert mien.load(tmp_path / "model").bits == DIFFERS[name].get("bits", 16)


def test_the_command_trains_them_and_the_part_judges_those_that_are_there(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = next(o for o in small if o.startswith("data.shards=")).partition("=")[2]
    overrides = [o for o in small if not o.startswith(("data.shards=", "total_images="))]
    arguments = ["--data", shards, "--out", str(tmp_path), "--only", "eight-bits", "--images", "2", *overrides]
    monkeypatch.chdir(ROOT)
    done = CliRunner().invoke(app, ["train-ablations", *arguments])
    assert done.exit_code == 0 and done.output.splitlines()[-1] == str(tmp_path)
    wrong = CliRunner().invoke(app, ["train-ablations", "--only", "without-face"])
    assert wrong.exit_code == 2 and "without-face" in wrong.output

    context = context_of(lambda images, codes: images, two_photos_each(), ablation_faces=8)
    context.ablations = tmp_path
    result = part.run(context)
    assert keys.unknown(result.figures) == []
    assert result.figures["ablations.eight-bits.images-seen"] == 2
    for pair in ("I-A", "I-R", "A1-A2"):
        assert 0 <= result.figures[f"ablations.eight-bits.{pair}.same"] <= 1
    assert result.figures["ablations.eight-bits.l1"] > 0
    assert set(result.skipped) == {f"ablations.{name}" for name in part.NAMES if name != "eight-bits"}
    assert all("train-ablations" in why for why in result.skipped.values())
    assert result.figures["ablations.eight-bits.crop"] == SIZE

    # Faces of the model that the report is about are larger: they are made as small, here into just those of before.
    faces = two_photos_each()
    for times, size in ((2, 2 * SIZE), (2, SIZE + 8)):
        images = faces.images.repeat(times, axis=1).repeat(times, axis=2)[:, :size, :size]
        larger = context_of(
            lambda images, codes: images, Faces(images, faces.identities, faces.sources), ablation_faces=8
        )
        larger.ablations = tmp_path
        again = part.run(larger)
        if size == 2 * SIZE:
            assert again.figures == result.figures
        else:
            assert "does not divide" in again.skipped["ablations.eight-bits"] and again.figures == {}
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "config.json").write_text("{}")
    assert "config.json" in part.run(context).skipped["ablations.full"], "a broken model is a row with its reason"
