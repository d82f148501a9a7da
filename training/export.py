"""A run's averaged transformer as a model folder (mien.store) with its card.

A run writes it when it ends. ``python -m training.export runs/NAME --out FOLDER`` writes one of a run that was stopped
before, from its newest checkpoint.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import nn

import storage
from mien import networks, store
from mien.errors import MienError
from training.checkpoint import latest
from training.config import RunConfig


def git_commit() -> str | None:
    """The commit of the code that is running, with ``-dirty`` where files differ; None outside a checkout."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],  # noqa: S607
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip() or None


def export(
    network: nn.Module,
    config: RunConfig,
    folder: Path,
    *,
    nimg: int,
    data_digest: str,
    figures: dict[str, float],
    card: str | None = None,
) -> store.ModelConfig:
    """Write the model folder.

    Args:
        network: the averaged transformer.
        nimg: images seen.
        data_digest: sha256 of the shards' manifest.
        figures: validation figures for the card.
        card: text that replaces the generated card's introduction.
    """
    model = store.ModelConfig(
        architecture=config.architecture,
        bits=config.bits,
        crop_size=config.crop_size,
        training_commit=git_commit(),
        data_digest=data_digest,
        images_seen=nimg,
    )
    return store.save(folder, network, model, card=card or _card(network, config, nimg, data_digest, figures))


def _card(network: nn.Module, config: RunConfig, nimg: int, data_digest: str, figures: dict[str, Any]) -> str:
    rows = "\n".join(f"| {name} | {value:.4f} |" for name, value in sorted(figures.items()))
    millions = networks.count_parameters(network) / 1e6
    macs = networks.count_macs(network, bits=config.bits, size=config.crop_size) / 1e9
    return f"""# {config.name}

A face identity transformer (password-conditioned anonymization, ECCV 2020) trained by Mien.

- Architecture: `{config.architecture.name}`, {millions:.2f} M parameters, {macs:.2f} GMAC a face
- Code: {config.bits} bits; crop: {config.crop_size} px
- Images seen: {nimg:,}
- Data: shards whose manifest has sha256 `{data_digest}`; the data's terms bind this model
- F: {config.recogniser.name}

| validation figure (identities kept apart, through 8 bits) | value |
| --- | --- |
{rows}

cos(.) are cosines of F, the recogniser in the loss: they flatter. Judge with another one (`services.evaluate`).

The run's whole config:

```json
{json.dumps(config.model_dump(mode="json"), indent=1)}
```
"""


def of_run(run: Path, folder: Path) -> store.ModelConfig:
    """The model of a run's newest whole checkpoint, with the last validation figures before it.

    Raises:
        ValueError: the folder holds no run, or one without a checkpoint.
        storage.StorageError: its checkpoints cannot be read.
    """
    try:
        where = json.loads((run / "config.json").read_text())["checkpoints"] or run / "checkpoints"
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{run} is no folder of a run: {error}") from error
    found = latest(storage.open_prefix(where))
    if found is None:
        raise ValueError(f"{run} has no whole checkpoint in {where}")
    nimg, state = found
    config = RunConfig.model_validate(state["config"])
    network = networks.build(config.architecture, bits=config.bits, size=config.crop_size)
    network.load_state_dict(state["trainer"].get("ema", state["trainer"]["modules"]["transformer"]))
    network.eval()
    digest = state.get("data_digest") or "unknown"  # checkpoints of before the digest was kept in them
    return export(network, config, folder, nimg=nimg, data_digest=digest, figures=_last_figures(run, nimg))


def _last_figures(run: Path, nimg: int) -> dict[str, float]:
    figures: dict[str, float] = {}
    with suppress(OSError):
        for line in (run / "log.jsonl").read_text().splitlines():
            with suppress(ValueError):  # a line that a kill cut off
                entry = json.loads(line)
                if entry.get("nimg", 0) <= nimg:
                    figures |= {k.removeprefix("val/"): v for k, v in entry.items() if k.startswith("val/")}
    return figures


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit codes: 0 the model folder is there, 1 there is no run or no checkpoint of one."""
    parser = argparse.ArgumentParser(
        prog="training.export", description="Write the model of a run's newest checkpoint."
    )
    parser.add_argument("run", type=Path, help="folder of the run: runs/NAME")
    parser.add_argument("--out", required=True, type=Path, help="model folder that is written")
    chosen = parser.parse_args(arguments)
    try:
        model = of_run(chosen.run, chosen.out)
    except (MienError, ValueError) as error:
        sys.stderr.write(f"training.export: {error}\n")
        return 1
    sys.stdout.write(f"{chosen.out}: {model.images_seen} images seen, digest {model.digest}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
