"""A run's averaged transformer as a model folder (mien.store) with its card."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from torch import nn

from mien import networks, store
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
