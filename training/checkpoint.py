"""Checkpoints: everything needed to go on exactly, in two files that hold data only.

``nimg-000123456/state.safetensors`` has every tensor, ``state.json`` the scalars, the structure and the sha256 of the
tensors. A checkpoint is written beside its place and renamed into it, so it is there whole or not at all; one whose
digest does not hold is passed over with a warning and the one before it is taken.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors

logger = logging.getLogger(__name__)

_TENSORS = "state.safetensors"
_STRUCTURE = "state.json"


def write(folder: Path, nimg: int, state: dict[str, Any], *, keep: int) -> Path:
    """Write the checkpoint of ``nimg`` images, then delete all but the last ``keep``."""
    tensors: dict[str, torch.Tensor] = {}
    structure = _flatten(state, tensors)
    data = save_safetensors(tensors)
    final = folder / f"nimg-{nimg:012d}"
    temporary = folder / f".{final.name}.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    _write_synced(temporary / _TENSORS, data)
    record = {"nimg": nimg, "sha256": hashlib.sha256(data).hexdigest(), "state": structure}
    _write_synced(temporary / _STRUCTURE, json.dumps(record).encode())
    if final.exists():  # the same moment written again after a resume
        shutil.rmtree(final)
    temporary.replace(final)
    _sync_folder(folder)
    for old in _all(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    for left in folder.glob(".nimg-*.tmp"):  # of processes that were killed while writing
        shutil.rmtree(left, ignore_errors=True)
    return final


def latest(folder: Path) -> tuple[int, dict[str, Any]] | None:
    """The newest whole checkpoint as (nimg, state), or None where there is none."""
    for path in reversed(_all(folder)):
        try:
            record = json.loads((path / _STRUCTURE).read_text())
            data = (path / _TENSORS).read_bytes()
            if hashlib.sha256(data).hexdigest() != record["sha256"]:
                raise ValueError("its sha256 does not hold")
            return int(record["nimg"]), _unflatten(record["state"], load_safetensors(data))
        except (OSError, ValueError, KeyError) as error:
            logger.warning("passing over checkpoint %s: %s", path.name, error)
    return None


def _all(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("nimg-*") if p.is_dir())


def _flatten(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """Nested dicts and lists with tensors moved out into ``tensors`` and replaced by {"tensor": name}."""
    if isinstance(value, torch.Tensor):
        name = f"t{len(tensors)}"
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": [[k, _flatten(v, tensors)] for k, v in value.items()]}
    if isinstance(value, list | tuple):
        return {"list": [_flatten(v, tensors) for v in value]}
    if value is None or isinstance(value, bool | int | float | str):
        return {"value": value}
    raise TypeError(f"a checkpoint holds tensors, numbers, text, dicts and lists, not {type(value).__name__}")


def _unflatten(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if "tensor" in value:
        return tensors[value["tensor"]]
    if "dict" in value:
        return {k: _unflatten(v, tensors) for k, v in value["dict"]}
    if "list" in value:
        return [_unflatten(v, tensors) for v in value["list"]]
    return value["value"]


def _write_synced(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
