"""The baselines hide what they say they hide; what undoes them is trained, kept, bounded in time, and compared."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from skimage.data import astronaut
from skimage.transform import resize
from typer.testing import CliRunner

from services.evaluate import baselines, deanonymizer, keys, paper, training_runs
from services.evaluate.cli import app
from services.evaluate.deanonymizer import Budget
from services.evaluate.distances import Pixels, l1
from services.evaluate.parts import baselines as part
from services.evaluate.progress import Progress
from tests.services.small_shards import small_shards
from tests.services.stand_ins import SIZE, context_of, two_photos_each

TINY = Budget(images=16, batch=4, width=8, blocks=1)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def portraits() -> Pixels:
    """One face, shifted and tinted, uint8 [6, 128, 128, 3]."""
    rng = np.random.default_rng(0)
    crops = [resize(astronaut()[y : y + 200, 120 + x : 320 + x], (128, 128)) for x, y in rng.integers(0, 20, (6, 2))]
    return np.stack([(255 * c * rng.uniform(0.7, 1, 3)).astype(np.uint8) for c in crops])


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_shards(tmp_path_factory.mktemp("baseline-shards"), {"train": 16}, size=32)


def smooth(count: int) -> Pixels:
    coarse = np.random.default_rng(1).uniform(0.2, 0.8, size=(count, 4, 4, 3))
    return np.stack([(255 * resize(c, (SIZE, SIZE, 3), order=1, mode="edge")).astype(np.uint8) for c in coarse])


@pytest.mark.parametrize("name", baselines.FIXED)
def test_a_baseline_changes_pictures_repeats_itself_and_does_not_depend_on_the_batch(
    name: str, portraits: Pixels
) -> None:
    hide = baselines.FIXED[name]
    hidden = hide(portraits)
    assert hidden.shape == portraits.shape and hidden.dtype == np.uint8
    assert np.array_equal(hidden, hide(portraits)) and np.array_equal(hidden[2:3], hide(portraits[2:3]))
    assert (l1(portraits, hidden) > 0.02).all()


def test_what_each_baseline_keeps_is_what_it_says(portraits: Pixels) -> None:
    assert set(np.unique(baselines.edge(portraits))) == {0, 255}
    for face in baselines.superpixel(portraits):
        assert 100 < len(np.unique(face.reshape(-1, 3), axis=0)) <= 300
    masked = baselines.mask(portraits)
    changed = (masked == 127).all(axis=(0, 3))
    assert changed.mean() == pytest.approx(0.36, abs=0.01) and np.array_equal(
        masked[:, ~changed], portraits[:, ~changed]
    )
    difference = (baselines.noise(np.full((1, 128, 128, 3), 128, np.uint8)).astype(float) - 128) / 127.5
    assert difference.std() == pytest.approx(0.63, abs=0.03), "variance 0.5, less what the file clips"
    assert np.abs(difference).max() <= 128 / 127.5
    # All that a blurred face is made of are 8 x 8 colours.
    blurred = baselines.blur(portraits)
    again = baselines.blur(blurred)
    assert l1(blurred, again).mean() < l1(portraits, blurred).mean()


def test_a_deanonymizer_learns_to_undo_what_can_be_undone_and_nothing_else() -> None:
    faces = smooth(40)
    budget = Budget(images=160, batch=8, width=8, blocks=1)
    quiet = lambda done: None  # noqa: E731
    train, test = faces[:32], faces[32:]
    undone = deanonymizer.train_deanonymizer(255 - train, train, budget, quiet).apply_to(255 - test)
    gone = np.full_like(faces, 127)
    guessed = deanonymizer.train_deanonymizer(gone[:32], train, budget, quiet).apply_to(gone[32:])
    mean = np.repeat(train.mean(axis=0)[None].astype(np.uint8), len(test), axis=0)
    assert l1(test, undone).mean() < 0.6 * l1(test, 255 - test).mean()
    assert l1(test, undone).mean() < l1(test, guessed).mean()
    assert l1(test, guessed).mean() > 0.8 * l1(test, mean).mean(), "nobody beats the mean face with nothing to go by"


def test_training_keeps_each_whole_baseline_and_goes_on_with_the_others(shards: Path, tmp_path: Path) -> None:
    def train(names: list[str], budget: Budget = TINY, seconds: float = 60) -> list[str]:
        return training_runs.train_baselines(
            str(shards), tmp_path, weights=None, names=names, budget=budget, progress=Progress(), seconds=seconds
        )

    assert train(["blur"]) == []
    written = (tmp_path / "blur" / deanonymizer.WEIGHTS).stat().st_mtime_ns
    late = train(["blur", "mask", "noise"], seconds=0)
    assert [p.partition(":")[0] for p in late] == ["mask", "noise"] and "goes on" in late[0]
    assert not (tmp_path / "mask").exists(), "half a baseline would be taken for a whole one"
    problems = train(["blur", "mask", "ren"])
    assert len(problems) == 1 and "mobilefacenet_casia.safetensors" in problems[0]
    assert (tmp_path / "mask" / deanonymizer.WEIGHTS).exists()
    assert (tmp_path / "blur" / deanonymizer.WEIGHTS).stat().st_mtime_ns == written, "it was there"
    assert train(["blur"], Budget(images=20, batch=4, width=8, blocks=1)) == []
    assert (tmp_path / "blur" / deanonymizer.WEIGHTS).stat().st_mtime_ns != written, "another budget"
    assert json.loads((tmp_path / "blur" / "budget.json").read_text())["images"] == 20


def test_the_learned_anonymizer_trains_against_a_recogniser_and_is_judged_with_its_deanonymizer(
    shards: Path, shared: Path, tmp_path: Path
) -> None:
    problems = training_runs.train_baselines(
        str(shards), tmp_path, weights=shared / "weights", names=["ren"], budget=TINY, progress=Progress()
    )
    assert problems == []
    hide = deanonymizer.anonymizer("ren", tmp_path / "ren")
    pictures = smooth(3)
    assert hide(pictures).shape == pictures.shape and not np.array_equal(hide(pictures), pictures)


def test_the_command_trains_them_and_says_when_time_is_over(shards: Path, tmp_path: Path) -> None:
    arguments = ["train-baselines", "--data", str(shards), "--out", str(tmp_path), "--only", "edge", "--images", "8"]
    late = CliRunner().invoke(app, [*arguments, "--minutes", "0"])
    assert late.exit_code == 1 and "not trained: edge: no time was left" in late.output
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0 and str(tmp_path) in done.output
    assert (tmp_path / "edge" / deanonymizer.WEIGHTS).exists()
    wrong = CliRunner().invoke(app, ["train-baselines", "--only", "pixelate"])
    assert wrong.exit_code == 2 and "pixelate" in wrong.output


def test_the_part_compares_what_is_trained_with_table_2_and_says_how_to_train_the_rest(
    shards: Path, tmp_path: Path
) -> None:
    names = ["superpixel", "blur", "mask", "noise"]
    training_runs.train_baselines(str(shards), tmp_path, weights=None, names=names, budget=TINY, progress=Progress())
    context = context_of(lambda images, codes: images, two_photos_each(), baseline_faces=12)
    context.baselines = tmp_path
    result = part.run(context)
    assert keys.unknown(result.figures) == []
    assert set(result.skipped) == {"baselines.ren", "baselines.edge"}
    assert all("train-baselines" in why for why in result.skipped.values())
    for name in names:
        assert result.figures[f"baselines.{name}.l1.n"] == 12 and 0 <= result.figures[f"baselines.{name}.I-A.same"] <= 1
    assert sorted(result.series["baselines.order"]) == sorted(names) == sorted(result.series["baselines.order.paper"])
    assert -1 <= result.figures["baselines.order.spearman"] <= 1
    assert result.pictures["baselines"]
    # Trained again: the figures are those of the new weights, not remembered ones.
    shuffled = tmp_path / "blur" / deanonymizer.WEIGHTS
    shuffled.write_bytes((tmp_path / "mask" / deanonymizer.WEIGHTS).read_bytes())
    assert part.run(context).figures["baselines.blur.l1"] != result.figures["baselines.blur.l1"]


def test_every_baseline_has_its_row_of_table_2() -> None:
    assert set(baselines.NAMES) == set(paper.BASELINES)
