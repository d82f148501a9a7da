"""How near reading shards from S3 comes to plain JPEG decoding: ``python -m bench.streaming``.

A real S3 server (SeaweedFS) on this machine, one process that reads, the same decoder threads everywhere, one epoch of
the same samples each time:

- *plain*: JPEG bytes that are in memory already, decoded into batches; nothing can be faster,
- *warm*: what training reads, from shards that are in the cache,
- *cold*: the same with an empty cache, each shard from the server, checked, and kept,
- *memory*: a folder that was read whole when it was opened, as training reads folders.

They take turns, and each ratio is the median over the turns: a machine that is shared is seldom as fast now as it was a
minute ago. *cpu* are the same ratios by the processor time of the reading process, which is what is left of them where
others use the machine; of *cold* it lacks what the server takes, which on a cluster other machines do.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import PIL

import storage
from storage.cache import Cache
from storage.local_s3 import Server, free_ports
from training.data import Batches, FaceShards, StreamedShards, _decoded

ROOT = Path(__file__).resolve().parents[1]
AIMS = {"warm": 0.9, "cold": 0.75}
BATCH = 48


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shards", type=Path, default=ROOT / "shards" / "faces", help="a folder; `make shards`")
    parser.add_argument("--count", type=int, default=8, help="shards of it that are read")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2, help="that decode")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "streaming.json")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = measure(asked, Path(folder))
    asked.out.write_text(json.dumps(report, indent=2) + "\n")
    print(table(report))  # noqa: T201
    print(asked.out)  # noqa: T201


def measure(asked: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All figures of one run."""
    some = subset(asked.shards, folder / "shards", asked.count)
    memory = FaceShards(some, "train")
    jpegs, threads = [sample.jpeg for sample in memory.samples], asked.threads
    turns: dict[str, list[tuple[float, float]]] = {"plain": [], "memory": [], "warm": [], "cold": []}
    with server(folder / "s3") as url:
        place = storage.open_prefix(url)
        for path in sorted(some.iterdir(), key=lambda path: path.suffix == ".json"):
            place.write(path.name, path)
        epoch(StreamedShards(place, "train", Cache(folder / "warm")), threads)  # fills it, and warms everything up
        with ThreadPoolExecutor(threads) as pool:
            for turn in range(asked.turns):
                with timed(turns["plain"]):
                    for start in range(0, len(jpegs), BATCH):
                        part = jpegs[start : start + BATCH]
                        _decoded(part, [-1] * len(part), pool)
                with timed(turns["memory"]):
                    epoch(memory, threads)
                for name, cache in (("warm", folder / "warm"), ("cold", folder / f"cold-{turn}")):
                    with timed(turns[name]):
                        epoch(StreamedShards(place, "train", Cache(cache)), threads)
                shutil.rmtree(folder / f"cold-{turn}")
    rows = {}
    for name, found in turns.items():
        walls = [plain[0] / mine[0] for plain, mine in zip(turns["plain"], found, strict=True)]
        cpus = [plain[1] / mine[1] for plain, mine in zip(turns["plain"], found, strict=True)]
        rows[name] = {
            "samples_per_second": len(jpegs) / statistics.median(wall for wall, _ in found),
            "samples_per_cpu_second": len(jpegs) / statistics.median(cpu for _, cpu in found),
            "of_plain": statistics.median(walls),
            "of_plain_cpu": statistics.median(cpus),
        }
    return {
        "machine": {"cpus": os.cpu_count(), "processor": platform.processor() or platform.machine()},
        "versions": {"pillow": PIL.__version__, "numpy": np.__version__, "python": platform.python_version()},
        "aims": AIMS,
        "samples": len(jpegs),
        "mean_jpeg_bytes": statistics.fmean(map(len, jpegs)),
        "shard_bytes_per_sample": sum(path.stat().st_size for path in some.glob("*.tar")) / len(jpegs),
        "threads": threads,
        **rows,
    }


def epoch(faces: FaceShards | StreamedShards, threads: int) -> None:
    """Every sample once, as training reads them."""
    steps = len(faces) // BATCH
    with Batches(faces, seed=0, nimg=0, size=BATCH, part=slice(0, BATCH), threads=threads) as batches:
        for _ in range(steps):
            next(batches)
    if isinstance(faces, StreamedShards):
        faces.close()


@contextmanager
def timed(into: list[tuple[float, float]]) -> Iterator[None]:
    wall, cpu = time.perf_counter(), time.process_time()
    yield
    into.append((time.perf_counter() - wall, time.process_time() - cpu))


def subset(shards: Path, folder: Path, count: int) -> Path:
    """The first training shards of a folder, with a manifest of their own."""
    folder.mkdir(parents=True)
    manifest = json.loads((shards / "manifest.json").read_text())
    manifest["shards"] = [shard for shard in manifest["shards"] if shard["split"] == "train"][:count]
    for shard in manifest["shards"]:
        shutil.copy(shards / shard["name"], folder)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@contextmanager
def server(folder: Path) -> Iterator[str]:
    """A running S3 server and an empty prefix in it; the AWS variables are set for it."""
    local = Server(folder, free_ports(1)[0])
    command = local.command()
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        local.ready(process)
        local.create_bucket("bench")
        os.environ.update(local.environment)
        yield "s3://bench/faces"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=30)


def table(report: dict[str, Any]) -> str:
    """The report for people."""
    lines = [f"{'':8} {'samples/s':>10} {'of plain':>9} {'by cpu':>8}   aim"]
    for name in ("plain", "memory", "warm", "cold"):
        row, aim = report[name], report["aims"].get(name)
        wanted = f"{aim:.0%}" if aim else ""
        rates = f"{row['samples_per_second']:10.0f} {row['of_plain']:9.0%} {row['of_plain_cpu']:8.0%}"
        lines.append(f"{name:8} {rates}   {wanted}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
