"""Models on disk: a folder with ``model.safetensors``, ``config.json`` and ``README.md``.

The weights are the transformer T alone. ``config.json`` says how to build it and which sha256 (the model's *digest*)
the weights must have. Nothing here is a pickle, so loading a model runs no code of whoever made it.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import nn

from mien import geometry, networks
from mien.errors import ModelError, ModelIntegrityError
from mien.files import write_atomically as write_atomically  # where it used to live

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
CARD = "README.md"


class ModelConfig(BaseModel):
    """Everything about a model but its weights; ``config.json``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    architecture: networks.ArchitectureConfig
    bits: int = Field(16, gt=0, multiple_of=4, description="N, the length of a code")
    crop_size: int = Field(geometry.CROP_SIZE, gt=0, description="side of the square crop, pixels")
    template: Literal["mien-v1"] = "mien-v1"
    training_commit: str | None = Field(None, description="git commit of the code that trained it")
    data_digest: str | None = Field(None, description="sha256 of the shard manifest it was trained on")
    images_seen: int = Field(0, ge=0, description="training images seen (nimg)")
    digest: str = Field("", description="sha256 of model.safetensors; filled in by save()")


def save(folder: str | os.PathLike[str], network: nn.Module, config: ModelConfig, *, card: str) -> ModelConfig:
    """Write a model folder; files appear whole or not at all.

    Args:
        folder: created where missing.
        network: the transformer; its ``state_dict`` is stored as float32.
        config: its ``digest`` is replaced by that of the weights written.
        card: text of the model card.

    Returns:
        The config as written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {k: v.detach().to("cpu", torch.float32).contiguous() for k, v in network.state_dict().items()}
    weights = save_safetensors(state, metadata={"format": "pt"})
    config = config.model_copy(update={"digest": hashlib.sha256(weights).hexdigest()})
    # Weights last: a folder whose config is new and whose weights are old fails its digest check instead of loading.
    write_atomically(folder / CARD, card.encode())
    write_atomically(folder / CONFIG, (config.model_dump_json(indent=2) + "\n").encode())
    write_atomically(folder / WEIGHTS, weights)
    return config


def load(folder: str | os.PathLike[str]) -> tuple[nn.Module, ModelConfig]:
    """Read a model folder, verify its digest, build the network in evaluation mode on the CPU.

    Raises:
        ModelError: a file is missing, or the config is not one this version knows.
        ModelIntegrityError: the weights are not those the config names.
    """
    folder = Path(folder)
    config = load_config(folder)
    try:
        weights = (folder / WEIGHTS).read_bytes()
    except OSError as error:
        raise ModelError(f"cannot read {folder / WEIGHTS}: {error.strerror}") from error
    digest = hashlib.sha256(weights).hexdigest()
    if digest != config.digest:
        raise ModelIntegrityError(
            f"{folder / WEIGHTS} has sha256 {digest[:12]}..., its config.json names {config.digest[:12] or 'none'}..."
            " Fetch the model again."
        )
    network = networks.build(config.architecture, bits=config.bits, size=config.crop_size)
    try:
        network.load_state_dict(load_safetensors(weights))
    except (SafetensorError, RuntimeError) as error:
        raise ModelError(f"the weights in {folder} do not fit the architecture in its config.json") from error
    return network.eval(), config


def load_config(folder: str | os.PathLike[str]) -> ModelConfig:
    """Read ``config.json`` alone; raises :class:`ModelError` where it is missing or malformed."""
    path = Path(folder) / CONFIG
    try:
        return ModelConfig.model_validate(json.loads(path.read_text()))
    except OSError as error:
        raise ModelError(f"no model in {folder}: cannot read {CONFIG} ({error.strerror})") from error
    except (ValidationError, ValueError) as error:
        raise ModelError(f"{path} is not a model config this version knows: {error}") from error
