"""The processes of a run: who they are, and the few things they tell one another.

torchrun says who is who (``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``, ``MASTER_ADDR``, ``MASTER_PORT``); without it a run
is one process and nothing here touches the network. Gloo carries what lies on CPUs, NCCL what lies on GPUs. Every wait
has a time-out, after which the process fails instead of hanging: the others have died, and the run is started again.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mien.errors import MienError

T = TypeVar("T")

# What is sent at once: large enough for the network, small enough that several are under way.
BUCKET_BYTES = 32 << 20
_PR_SET_PDEATHSIG = 1


class DistributedError(MienError):
    """The first process could not do what all wait for; every process raises this with its message."""


class PeerLost(MienError):
    """Another process of the run died, or did not answer in time: the run goes on when it is started again."""


@dataclass(frozen=True)
class World:
    """All processes of a run as seen from one of them."""

    rank: int
    size: int
    device: torch.device
    # What waits for a store or a file system waits in this group, which has more patience. A peer's death is noticed
    # at once in both.
    patient: dist.ProcessGroup | None = None

    @property
    def first(self) -> bool:
        """Whether this is the process that writes, tracks and decides."""
        return self.rank == 0

    def part(self, batch: int) -> slice:
        """The places of a whole batch that this process works on: contiguous, all used once, sizes differ by one."""
        return slice(batch * self.rank // self.size, batch * (self.rank + 1) // self.size)

    # -- what they tell one another ---------------------------------------------------------------------------------

    def sum(self, *values: float) -> list[float]:
        """The sum over all processes of each value."""
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        with _talking():
            dist.all_reduce(tensor)
        return list(tensor.tolist())

    def any(self, flag: bool) -> bool:
        """Whether the flag is up anywhere."""
        return self.sum(float(flag))[0] > 0

    def sum_(self, tensor: Tensor) -> Tensor:
        """Replace a contiguous tensor by its sum over all processes, in buckets that travel at the same time."""
        if self.size > 1:
            flat = tensor.view(-1)
            step = max(1, BUCKET_BYTES // flat.element_size())
            with _talking():
                works = [dist.all_reduce(flat[i : i + step], async_op=True) for i in range(0, len(flat), step)]
                for work in works:
                    work.wait()
        return tensor

    def broadcast_(self, module: nn.Module) -> None:
        """Give every process the first one's parameters and buffers."""
        if self.size > 1:
            with torch.no_grad(), _talking():
                for tensor in [*module.parameters(), *module.buffers()]:
                    whole = tensor.detach().contiguous()
                    dist.broadcast(whole, src=0)
                    tensor.copy_(whole)

    def broadcast_bytes(self, data: bytes | None) -> bytes:
        """The first process's bytes, everywhere; the others give None."""
        if self.size == 1:
            if data is None:
                raise ValueError("the first process has nothing to give")
            return data
        length = torch.tensor(len(data or b""), dtype=torch.int64)
        with _talking():
            dist.broadcast(length, src=0, group=self.patient)
            buffer = torch.empty(int(length), dtype=torch.uint8)
            if self.first and data:
                buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            for start in range(0, len(buffer), BUCKET_BYTES):
                dist.broadcast(buffer[start : start + BUCKET_BYTES], src=0, group=self.patient)
        return bytes(buffer.numpy().tobytes())

    def on_first(self, action: Callable[[], T]) -> T | None:
        """Let the first process do something; where that fails, all fail alike instead of waiting for it.

        Returns:
            What the action returned, on the first process; None on the others.

        Raises:
            MienError, ValueError: as the first process raised it.
            DistributedError: on the other processes.
        """
        if self.size == 1:
            return action()
        result: T | None = None
        failure: Exception | None = None
        if self.first:
            try:
                result = action()
            except Exception as error:
                failure = error
        message = self.broadcast_bytes(
            json.dumps(f"{type(failure).__name__}: {failure}" if failure else None).encode() if self.first else None
        )
        if failure is not None:
            raise failure
        said = json.loads(message)
        if said is not None:
            raise DistributedError(f"the first process stopped: {said}")
        return result

    def from_first(self, action: Callable[[], Any]) -> Any:
        """As :meth:`on_first`, and what it returns (JSON) goes to all."""
        result = self.on_first(action)
        return json.loads(self.broadcast_bytes(json.dumps(result).encode() if self.first else None))


def alone(device: torch.device) -> World:
    """A run of one process."""
    return World(0, 1, device)


def join(device: str, *, timeout: float, patience: float) -> World:
    """Meet the other processes that torchrun started.

    Args:
        device: ``cpu``, ``cuda`` or ``auto`` (CUDA where there is one).
        timeout: seconds after which a process that waits for another gives up.
        patience: seconds more where the other may be waiting for a store.

    Raises:
        DistributedError: they did not meet.
    """
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    local = int(os.environ.get("LOCAL_RANK", "0"))
    chosen = torch.device(kind, local) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(chosen)
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return alone(chosen)
    _end_with_launcher()
    # Without this a peer that died leaves NCCL's collectives waiting; with it they raise after `timeout`.
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo",
            timeout=timedelta(seconds=timeout),
            device_id=chosen if kind == "cuda" else None,
        )
    except (RuntimeError, ValueError) as error:
        where = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
        raise DistributedError(f"the processes of this run did not meet at {where}: {error}") from error
    with _talking():
        patient = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout + patience))
    return World(dist.get_rank(), dist.get_world_size(), chosen, patient)


def _end_with_launcher() -> None:
    """SIGTERM when torchrun dies, also of SIGKILL (Linux): it ends nobody then, and its processes would go on training
    and writing checkpoints beside those of the next start."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


@contextmanager
def _talking() -> Iterator[None]:
    """What the backends raise when a peer is gone, as :class:`PeerLost`."""
    try:
        yield
    except RuntimeError as error:  # gloo raises no other; NCCL and the store raise kinds of it
        raise PeerLost(
            f"another process of this run is gone or does not answer: {str(error).splitlines()[0]}"
        ) from error


def leave() -> None:
    """Part from the others; harmless where there are none."""
    if dist.is_initialized():
        with suppress(RuntimeError):
            dist.destroy_process_group()
