"""Checkpoints: everything needed to go on exactly, in two files that hold data only, in a folder or in object storage.

``nimg-000123456/state.safetensors`` has every tensor; ``nimg-000123456/state.json`` the scalars, the structure, and
the sha256 of the tensors. The second is written last and atomically, so a checkpoint is there whole or not at all; one
whose digest does not hold is passed over with a warning and the one before it is taken.

Writing happens in a thread, from a copy of the state in main memory, while training goes on. One write is under way at
most. The newest few are kept, and the best one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as Waited
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors

import storage
from storage import StorageError
from training.distributed import World

logger = logging.getLogger(__name__)

_TENSORS = "state.safetensors"
_RECORD = "state.json"


@dataclass(frozen=True)
class Snapshot:
    """A state copied to main memory, so that training may change the original."""

    nimg: int
    structure: Any
    tensors: dict[str, torch.Tensor]
    score: float | None


def snapshot(nimg: int, state: dict[str, Any], score: float | None = None) -> Snapshot:
    """Copy a state of nested dicts, lists, numbers, text and tensors; raises TypeError at anything else."""
    tensors: dict[str, torch.Tensor] = {}
    return Snapshot(nimg, _flatten(state, tensors), tensors, score)


class Checkpoints:
    """The checkpoints of a run.

    Args:
        place: where they lie.
        keep: so many of the newest are kept, and the one with the lowest score where scores are given.
    """

    def __init__(self, place: storage.Prefix, *, keep: int) -> None:
        self._place, self._keep = place, keep
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._under_way: Future[None] | None = None
        self._failed = 0

    # -- writing ----------------------------------------------------------------------------------------------------

    def save(self, taken: Snapshot, *, patience: float = 15.0) -> bool:
        """Write in the background. A checkpoint that comes while the one before is still being written, ``patience``
        seconds later too, is left out: training waits for no store. A failure is logged, and the next one is tried.

        Returns:
            Whether this one is being written.
        """
        if not self._settle(patience):
            logger.warning(
                "no checkpoint at %d images: the one before is still being written to %s", taken.nimg, self._place.url
            )
            return False
        self._under_way = self._thread.submit(self.write, taken)
        return True

    def save_now(self, taken: Snapshot) -> None:
        """Write and wait for it, and for the one before; raises :class:`storage.StorageError`."""
        self._settle(None)
        self.write(taken)

    def close(self) -> None:
        """Wait for what is under way."""
        self._settle(None)
        self._thread.shutdown()

    def write(self, taken: Snapshot) -> None:
        """Write, then delete what need not be kept."""
        began = time.perf_counter()
        name = _name(taken.nimg)
        data, record = _encode(taken)
        # The record of an older checkpoint of this moment would not fit the new tensors: it goes first.
        self._place.delete(f"{name}/{_RECORD}")
        self._place.write(f"{name}/{_TENSORS}", data)
        self._place.write(f"{name}/{_RECORD}", record)
        seconds = time.perf_counter() - began
        logger.info("checkpoint %s written, %.1f MB in %.1f s", name, len(data) / 1e6, seconds)
        self._prune(taken.nimg)

    def _settle(self, patience: float | None) -> bool:
        """Whether nothing is under way any more, after so many seconds at most."""
        if self._under_way is None:
            return True
        try:
            self._under_way.result(timeout=patience)
            self._failed = 0
        except Waited:
            if not self._under_way.done():
                return False
        except StorageError as error:
            self._failed += 1
            logger.error("a checkpoint could not be written (%d in a row): %s", self._failed, error)
        self._under_way = None
        return True

    def _prune(self, current: int) -> None:
        whole, parts = self._listing()
        keep = set(whole[-self._keep :])
        scores: dict[int, float] = {}
        for nimg in whole:
            with suppress(StorageError, ValueError, KeyError, TypeError):
                scores[nimg] = float(json.loads(self._place.read(f"{_name(nimg)}/{_RECORD}"))["score"])
        if scores:
            keep.add(min(scores, key=lambda nimg: (scores[nimg], -nimg)))
        for nimg in whole + [p for p in parts if p != current]:
            if nimg not in keep:
                self._place.delete(f"{_name(nimg)}/{_RECORD}")
                self._place.delete(f"{_name(nimg)}/{_TENSORS}")
        if isinstance(self._place, storage.Folder):  # what processes that were killed while writing have left
            for left in self._place.path.glob("nimg-*/.*.tmp"):
                left.unlink(missing_ok=True)

    # -- reading ----------------------------------------------------------------------------------------------------

    def resume(self, world: World) -> tuple[int, dict[str, Any]] | None:
        """The newest whole checkpoint as (nimg, state), or None where there is none.

        The first process chooses and reads it and gives its bytes to the others: they cannot disagree, and object
        storage is read once.
        """
        found = world.on_first(self._newest)
        record = world.broadcast_bytes((found[0] if found else b"") if world.first else None)
        if not record:
            return None
        tensors = world.broadcast_bytes(found[1] if found else None)
        parsed = json.loads(record)
        return int(parsed["nimg"]), _unflatten(parsed["state"], load_safetensors(tensors))

    def _newest(self) -> tuple[bytes, bytes] | None:
        whole, _ = self._listing()
        for nimg in reversed(whole):
            try:
                record = self._place.read(f"{_name(nimg)}/{_RECORD}")
                parsed = json.loads(record)
                tensors = self._place.read(f"{_name(nimg)}/{_TENSORS}", sha256=parsed["sha256"])
                _unflatten(parsed["state"], load_safetensors(tensors))
                return record, tensors
            except (
                storage.NotFound,
                storage.ChecksumMismatch,
                ValueError,
                KeyError,
                TypeError,
                SafetensorError,
            ) as error:
                # Only what is broken is passed over. A store that does not answer must not make a run begin anew.
                logger.warning("passing over checkpoint %s: %s", _name(nimg), error)
        return None

    def _listing(self) -> tuple[list[int], list[int]]:
        """The moments of whole checkpoints, and of parts without a record; ascending."""
        found: dict[int, set[str]] = {}
        for entry in self._place.list("nimg-"):
            moment, _, file = entry.name.partition("/")
            if file in (_TENSORS, _RECORD) and moment.removeprefix("nimg-").isdigit():
                found.setdefault(int(moment.removeprefix("nimg-")), set()).add(file)
        whole = sorted(nimg for nimg, files in found.items() if _RECORD in files)
        return whole, sorted(found.keys() - set(whole))


def latest(place: storage.Prefix) -> tuple[int, dict[str, Any]] | None:
    """The newest whole checkpoint as (nimg, state), for tools that run in one process."""
    checkpoints = Checkpoints(place, keep=1)
    return checkpoints.resume(World(0, 1, torch.device("cpu")))


def light(place: storage.Prefix, *, whole: bool) -> list[tuple[str, bytes]]:
    """The newest whole checkpoint made small, as files (name, bytes) that :class:`Checkpoints` reads; none where there
    is none.

    Left out are Adam's moments and D's buffers, which begin anew when the run goes on; matrices are in half precision,
    but for what is the same in T and in its average: that was not trained, and may have been fitted exactly.

    Args:
        place: where the checkpoints lie.
        whole: with all networks; otherwise T alone, and D, Q and F begin anew too.
    """
    found = latest(place)
    if found is None:
        return []
    nimg, state = found
    trainer = state["trainer"]
    modules = {k: m for k, m in trainer["modules"].items() if whole or k == "transformer"}
    small = {"modules": {k: {n: _half(v) for n, v in m.items()} for k, m in modules.items()}}
    if state["config"]["ema"]:  # a plain copy otherwise
        mine, average = trainer["modules"]["transformer"], trainer["ema"]
        small["ema"] = {n: _half(v) for n, v in average.items()}
        for name, value in average.items():
            if isinstance(value, torch.Tensor) and torch.equal(value, mine[name]):
                small["ema"][name] = small["modules"]["transformer"][name] = value
    kept = {k: v for k, v in state.items() if k != "trainer"}
    data, record = _encode(snapshot(nimg, kept | {"light": True, "trainer": small}))
    return [(f"{_name(nimg)}/{_TENSORS}", data), (f"{_name(nimg)}/{_RECORD}", record)]


def _half(value: Any) -> Any:
    # float16 and not bfloat16: weights are small numbers, and it keeps eight times as much of them.
    if isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() > 1:
        half = value.half()
        return half if bool(torch.isfinite(half).all()) else value
    return value


def _encode(taken: Snapshot) -> tuple[bytes, bytes]:
    """The two files of a checkpoint."""
    data = save_safetensors(taken.tensors)
    record = {
        "nimg": taken.nimg,
        "sha256": hashlib.sha256(data).hexdigest(),
        "score": taken.score,
        "time": round(time.time(), 3),
        "state": taken.structure,
    }
    return data, json.dumps(record).encode()


def _name(nimg: int) -> str:
    return f"nimg-{nimg:012d}"


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
