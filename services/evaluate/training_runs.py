"""Trains what the model is compared with: the baselines here, the ablations through ``python -m training``."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Final

from mien import recognisers
from mien.errors import ModelError
from services.evaluate import baselines, deanonymizer
from services.evaluate.deanonymizer import Budget
from services.evaluate.faces import read_shards
from services.evaluate.progress import Progress

CONFIGS: Final = Path("training/configs/ablations")


def train_baselines(
    data: str, out: Path, *, weights: Path | None, names: Sequence[str], budget: Budget, progress: Progress
) -> list[str]:
    """Train what is not there yet with this budget; gives the names of those that could not be, with the reason.

    Raises:
        ShardError, ValueError: there are no training faces at ``data``.
    """
    left = [name for name in names if not _done(out / name, budget)]
    problems: list[str] = []
    if not left:
        return problems
    faces = read_shards(data, "train", min(4000, 4 * budget.images))
    for number, name in enumerate(left, start=1):
        folder = out / name
        with progress.part(name, number, len(left)):
            if name == baselines.LEARNED:
                if weights is None:
                    problems.append(f"{name}: needs mobilefacenet_casia.safetensors in --weights")
                    continue
                try:
                    against = recognisers.load("mobilefacenet-casia", weights)
                except ModelError as error:
                    problems.append(f"{name}: {error}")
                    continue
                with progress.stage(f"{name}: anonymizer", budget.images) as advance:
                    learned = deanonymizer.train_anonymizer(faces, against, budget, advance)
                deanonymizer.save(folder, deanonymizer.ANONYMIZER, learned, budget)
                hide: baselines.Anonymizer = learned.apply_to
            else:
                hide = baselines.FIXED[name]
            used = faces.images[: budget.images]
            hidden = used.copy()
            with progress.stage(f"{name}: hiding", len(used)) as advance:
                for start in range(0, len(used), 32):
                    hidden[start : start + 32] = hide(used[start : start + 32])
                    advance(len(used[start : start + 32]))
            with progress.stage(f"{name}: deanonymizer", budget.images) as advance:
                network = deanonymizer.train_deanonymizer(hidden, used, budget, advance)
            deanonymizer.save(folder, deanonymizer.WEIGHTS, network, budget)
    return problems


def _done(folder: Path, budget: Budget) -> bool:
    import json

    try:
        known = json.loads((folder / "budget.json").read_text())
    except (OSError, ValueError):
        return False
    return (folder / deanonymizer.WEIGHTS).exists() and known == asdict(replace(budget))


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
