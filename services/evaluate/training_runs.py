"""Trains what the model is compared with: the baselines here, the ablations through ``python -m training``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Final

from mien import recognisers
from mien.errors import ModelError
from services.evaluate import baselines, deanonymizer
from services.evaluate.attackers import Advance
from services.evaluate.deanonymizer import Budget
from services.evaluate.faces import Faces, read_shards
from services.evaluate.progress import Progress

CONFIGS: Final = Path("training/configs/ablations")


class _OutOfTime(Exception):
    """The time for all of it is over."""


def train_baselines(
    data: str,
    out: Path,
    *,
    weights: Path | None,
    names: Sequence[str],
    budget: Budget,
    progress: Progress,
    seconds: float = float("inf"),
) -> list[str]:
    """Train what is not there yet with this budget; gives the names of those that could not be, with the reason.

    Each baseline is kept as soon as it is whole, so a run that was cut off goes on with the one it was in. After
    ``seconds`` it stops, in the middle of a baseline if need be.

    Raises:
        ShardError, ValueError: there are no training faces at ``data``.
    """
    left = [name for name in names if not _done(out / name, budget)]
    problems: list[str] = []
    if not left:
        return problems
    end = time.monotonic() + seconds
    faces = read_shards(data, "train", min(4000, 4 * budget.images))
    for number, name in enumerate(left, start=1):
        try:
            with progress.part(name, number, len(left)):
                _train_baseline(name, faces, out / name, weights, budget, progress, end)
        except ModelError as error:
            problems.append(f"{name}: {error}")
        except _OutOfTime:
            problems += [f"{n}: no time was left; the same command goes on with it" for n in left[number - 1 :]]
            break
    return problems


def _train_baseline(
    name: str, faces: Faces, folder: Path, weights: Path | None, budget: Budget, progress: Progress, end: float
) -> None:
    def bounded(advance: Advance) -> Advance:
        def step(done: int) -> None:
            advance(done)
            if time.monotonic() > end:
                raise _OutOfTime

        return step

    if name == baselines.LEARNED:
        if weights is None:
            raise ModelError("needs mobilefacenet_casia.safetensors in --weights")
        against = recognisers.load("mobilefacenet-casia", weights)
        with progress.stage(f"{name}: anonymizer", budget.images) as advance:
            learned = deanonymizer.train_anonymizer(faces, against, budget, bounded(advance))
        hide: baselines.Anonymizer = learned.apply_to
    else:
        hide = baselines.FIXED[name]
    used = faces.images[: budget.images]
    hidden = used.copy()
    with progress.stage(f"{name}: hiding", len(used)) as advance:
        for start in range(0, len(used), 32):
            hidden[start : start + 32] = hide(used[start : start + 32])
            bounded(advance)(len(used[start : start + 32]))
    with progress.stage(f"{name}: deanonymizer", budget.images) as advance:
        network = deanonymizer.train_deanonymizer(hidden, used, budget, bounded(advance))
    if name == baselines.LEARNED:
        deanonymizer.save(folder, deanonymizer.ANONYMIZER, learned, budget)
    # Last: its presence says that the baseline is whole.
    deanonymizer.save(folder, deanonymizer.WEIGHTS, network, budget)


def _done(folder: Path, budget: Budget) -> bool:
    try:
        known = json.loads((folder / "budget.json").read_text())
    except (OSError, ValueError):
        return False
    return (folder / deanonymizer.WEIGHTS).exists() and known == asdict(budget)


def train_ablations(data: str, out: Path, *, images: int | None, names: Sequence[str], overrides: Sequence[str]) -> int:
    """Run ``python -m training`` on every ablation's config; a run that was cut off goes on. Gives an exit status.

    A subprocess each: services and training may not import one another, and what a run needs is its command line.
    """
    for name in names:
        config = CONFIGS / f"{name}.yaml"
        extra = [f"total_images={images}"] if images else []
        command = [
            sys.executable, "-m", "training", "--config", str(config),
            f"data.shards={data}", f"export={out / name}", f"runs={out / 'runs'}", *extra, *overrides,
        ]  # fmt: skip
        status = subprocess.run(command, env=os.environ.copy(), check=False).returncode
        if status:
            return status
    return 0
