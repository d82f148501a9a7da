"""Training in several processes, for tests: how they are started, and what is read from what they leave behind."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file

import storage
from training import checkpoint
from training.config import RunConfig

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("worker.py")
Start = Callable[..., "subprocess.Popen[bytes]"]


_NOT_INHERITED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "PYTHONDONTWRITEBYTECODE")


def environment(**more: str) -> dict[str, str]:
    """Of a process whose threads do not fight for this machine's few cores, and which finds torch compiled to bytecode
    also where the environment forbids to write any: that is 5 of the 7 s of CPU that a trainer takes to begin."""
    kept = {k: v for k, v in os.environ.items() if k not in _NOT_INHERITED}
    kept.setdefault("PYTHONPYCACHEPREFIX", str(ROOT / ".cache" / "pycache"))
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"} | more


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def launch(
    start: Start,
    processes: int,
    arguments: list[str],
    *,
    log: Path,
    script: bool = False,
    env: Mapping[str, str] | None = None,
) -> subprocess.Popen[bytes]:
    """``python -m training`` (or, with ``script``, the worker of these tests) in so many processes of one host."""
    what = [str(WORKER)] if script else ["-m", "training"]
    return start(
        [
            *(sys.executable, "-m", "training.launch", "--nproc-per-node", str(processes)),
            *("--master-addr", "127.0.0.1", "--master-port", str(free_port()), *what, *arguments),
        ],
        log=log,
        env=environment(**(env or {})),
    )


def finish(process: subprocess.Popen[bytes], log: Path, expected: int = 0, timeout: float = 120) -> str:
    """Wait for it, check its exit code, give its output."""
    code = process.wait(timeout=timeout)
    text = log.read_text(errors="replace")
    assert code == expected, f"exit code {code}:\n{text[-4000:]}"
    return text


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes], timeout: float = 90) -> bool:
    """Until it holds; False where the process ended first."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if condition():
            return True
        if process.poll() is not None:
            return condition()
        time.sleep(0.005)
    raise AssertionError("what was waited for did not happen")


def write(config: RunConfig, path: Path) -> str:
    path.write_text(config.model_dump_json())
    return str(path)


def figures(config: RunConfig) -> list[dict[str, float]]:
    """The lines of a run's log that tell of training."""
    lines = (Path(config.runs) / config.name / "log.jsonl").read_text().splitlines()
    return [x for x in map(json.loads, lines) if "loss" in x or "skipped" in x]


def weights(config: RunConfig, at: int | None = None) -> dict[str, torch.Tensor]:
    """Every tensor of a run's checkpoint ``at`` so many images, or its newest: networks, averages, optimizers,
    buffers."""
    folder = Path(config.runs) / config.name / "checkpoints"
    if at is None:
        found = checkpoint.latest(storage.open_prefix(folder))
    else:
        there = folder / f"nimg-{at:012d}"
        record = json.loads((there / "state.json").read_text())
        found = at, checkpoint._unflatten(record["state"], load_file(there / "state.safetensors"))
    assert found is not None
    flat: dict[str, torch.Tensor] = {"nimg": torch.tensor(found[0])}

    def walk(prefix: str, value: object) -> None:
        if isinstance(value, torch.Tensor):
            flat[prefix] = value
        elif isinstance(value, dict):
            for key, child in value.items():
                walk(f"{prefix}/{key}", child)

    walk("", found[1]["trainer"])
    return flat


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    """Bit for bit."""
    assert one.keys() == other.keys()
    assert [k for k in one if not torch.equal(one[k], other[k])] == []
