"""What a run needs of data and storage at 1, 8, 64 and 512 GPUs: ``python -m bench.scale [--write docs/scale.md]``.

Arithmetic from what ``python -m bench.streaming`` measured on one machine (bytes of a sample, samples a core decodes),
and from the code itself (sizes of the networks, shards that each node touches by the canonical order). The one figure
that is assumed is ``--rate``, the images a GPU trains in a second, as long as nobody has measured it.
"""

from __future__ import annotations

import argparse
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from training.order import LANES

ROOT = Path(__file__).resolve().parents[1]
GPUS = (1, 8, 64, 512)
MARKS = ("<!-- python -m bench.scale -->", "<!-- end -->")

# By an AMD EPYC core that others used too, 26 November 2026; --measured takes another run's.
MEASURED: dict[str, Any] = {
    "shard_bytes_per_sample": 8427.2,
    "plain": {"samples_per_cpu_second": 4141.8},
    "warm": {"of_plain_cpu": 0.886},
}
IMAGES = 363_672  # 80 % of CASIA-WebFace
SHARD = 1000  # samples, ingest's default
RANGE = 16 << 20  # bytes that storage asks for at once
NODE = 8  # GPUs
PART = 16  # images a GPU takes of a batch
EVERY = 600.0  # seconds between checkpoints
LINK = 1.25e9  # bytes a second: 10 Gbit/s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measured", type=Path, help="what bench.streaming wrote; else the figures of the module")
    parser.add_argument("--rate", type=float, default=500.0, help="images a second and GPU; assumed")
    parser.add_argument("--write", type=Path, help="put the tables into this document, between the marks")
    asked = parser.parse_args()
    text = tables(json.loads(asked.measured.read_text()) if asked.measured else MEASURED, asked.rate)
    if asked.write is None:
        print(text)  # noqa: T201
        return
    before = asked.write.read_text()
    asked.write.write_text(replaced(before, text))
    print(asked.write)  # noqa: T201


def replaced(document: str, text: str) -> str:
    """A document with the tables between its marks."""
    pattern = re.escape(MARKS[0]) + ".*?" + re.escape(MARKS[1])
    new, count = re.subn(pattern, lambda _: f"{MARKS[0]}\n{text}\n{MARKS[1]}", document, flags=re.DOTALL)
    if count != 1:
        raise SystemExit(f"the document needs {MARKS[0]} and {MARKS[1]} once each")
    return new


@cache
def parameters() -> dict[str, int]:
    """Trained numbers of the paper's run by network."""
    import torch

    from mien import networks
    from mien.recognisers import MobileFaceNet
    from training.classifier import IdentityHead
    from training.config import load
    from training.discriminators import Discriminators
    from training.predictor import CodePredictor

    config = load(ROOT / "training" / "configs" / "paper.yaml")
    with torch.device("meta"):
        made = {
            "T": networks.build(config.architecture, bits=config.bits, size=config.crop_size),
            "Q": CodePredictor(config.bits, width=config.predictor.width),
            "D": Discriminators(config.discriminator, None),
            "F": torch.nn.ModuleList([face := MobileFaceNet("casia"), IdentityHead(face.embedding_size, 8459)]),
        }
    return {name: sum(p.numel() for p in module.parameters()) for name, module in made.items()}


def touched(nodes: int, lanes: int) -> int:
    """Shards that all nodes together fetch for an epoch, from nothing: each reads the lanes of its ranks."""
    edges = np.arange(lanes + 1) * IMAGES // lanes  # a node's lanes lie side by side
    cuts = edges[np.arange(nodes + 1) * lanes // nodes]
    return int((-(-cuts[1:] // SHARD) - cuts[:-1] // SHARD).sum())


def needs(measured: dict[str, Any], gpus: int, rate: float) -> dict[str, float]:
    """Everything the tables say of one size."""
    sizes = parameters()
    nodes = -(-gpus // NODE)
    batch = PART * gpus
    # The first multiple of the processes that divides the batch; ranks then read lanes of their own.
    lanes = max(LANES, gpus)
    images = gpus * rate
    fetched = touched(nodes, lanes)
    shard = SHARD * measured["shard_bytes_per_sample"]
    epoch = IMAGES / images
    # Weights, two moments, and T's average; float32. Pools of 500 images for each discriminator are uint8.
    checkpoint = 4 * (3 * sum(sizes.values()) + sizes["T"]) + 4 * 500 * 3 * 128 * 128
    step = batch / images
    gradients = 4 * sum(sizes.values())
    return {
        "nodes": nodes,
        "batch": batch,
        "lanes": lanes,
        "images": images,
        "epoch_seconds": epoch,
        "steps": IMAGES / batch,
        "shards": -(-IMAGES // SHARD),
        "fetched": fetched,
        "requests": fetched * -(-shard // RANGE) / epoch,
        "bandwidth": fetched * shard / epoch,
        "node_bandwidth": fetched * shard / epoch / nodes,
        "cores": rate / measured["plain"]["samples_per_cpu_second"] / measured["warm"]["of_plain_cpu"],
        "checkpoint": checkpoint,
        "checkpoint_images": EVERY * images,
        "checkpoint_bandwidth": checkpoint / EVERY,
        "reduce": 2 * gradients * (gpus - 1) / gpus / step,
    }


def tables(measured: dict[str, Any], rate: float) -> str:
    """Markdown."""
    found = [needs(measured, gpus, rate) for gpus in GPUS]
    sizes = parameters()
    per_core = measured["plain"]["samples_per_cpu_second"] * measured["warm"]["of_plain_cpu"]
    rows: list[tuple[str, list[str]]] = [
        ("nodes of 8", [f"{row['nodes']:.0f}" for row in found]),
        (f"batch, {PART} a GPU", [f"{row['batch']:,.0f}" for row in found]),
        ("`lanes`", [f"{row['lanes']:,.0f}" for row in found]),
        ("images/s", [f"{row['images']:,.0f}" for row in found]),
        ("an epoch takes", [seconds(row["epoch_seconds"]) for row in found]),
        ("steps in an epoch", [f"{row['steps']:,.0f}" for row in found]),
        (f"shards of {SHARD:,} samples, at least", [f"{row['nodes']:.0f}" for row in found]),
        ("shards there are", [f"{row['shards']:,.0f}" for row in found]),
        ("shards fetched in the first epoch, all nodes", [f"{row['fetched']:,.0f}" for row in found]),
        ("GETs/s from S3, first epoch", [f"{row['requests']:.2f}" for row in found]),
        ("from S3, first epoch", [megabytes(row["bandwidth"]) for row in found]),
        ("into a node, first epoch", [megabytes(row["node_bandwidth"]) for row in found]),
        ("cores that decode, a GPU", [f"{row['cores']:.2f}" for row in found]),
        ("a checkpoint", [f"{row['checkpoint'] / 1e6:,.0f} MB" for row in found]),
        ("`checkpoint_every` for one in ten minutes", [f"{row['checkpoint_images']:,.0f}" for row in found]),
        ("checkpoints to S3, mean", [megabytes(row["checkpoint_bandwidth"]) for row in found]),
        ("gradients out of each GPU (ring)", [megabytes(row["reduce"]) for row in found]),
    ]
    head = "| | " + " | ".join(f"{gpus} GPU{'s' if gpus > 1 else ''}" for gpus in GPUS) + " |"
    lines = [head, "| --- |" + " ---: |" * len(GPUS)]
    lines += [f"| {name} | " + " | ".join(cells) + " |" for name, cells in rows]
    said = ", ".join(f"{name} {count / 1e6:.1f} M" for name, count in sizes.items())
    largest = found[-1]
    stop = LINK / (2 * 4 * sum(sizes.values())) * PART
    whole = IMAGES * measured["shard_bytes_per_sample"] / 1e9
    nodes = largest["nodes"]
    return "\n".join(
        [
            f"Measured: {measured['shard_bytes_per_sample'] / 1e3:.1f} kB of shard a sample, {per_core:,.0f} samples a"
            f" second and core from the cache. Counted: {said} parameters. Assumed: {rate:,.0f} images/s a GPU.",
            "",
            *lines,
            "",
            f"With 10 Gbit/s a GPU between nodes, gradients alone allow {stop:,.0f} images/s a GPU at {PART} images a"
            f" GPU and step. The whole set is {whole:.1f} GB, which a node's cache (16 GiB) can hold; {nodes:.0f} nodes"
            f" find {100 * kept(nodes, 3):.0f} % of their fourth epoch there and {100 * kept(nodes, 100):.0f} % of"
            f" their hundred-and-first, since each epoch gives them other shards.",
        ]
    )


def kept(nodes: float, epochs: int) -> float:
    """Part of a node's reading that is in its cache after so many epochs; each epoch gives it other shards."""
    return 1 - (1 - 1 / nodes) ** epochs


def seconds(value: float) -> str:
    return f"{value / 60:.0f} min" if value >= 120 else f"{value:.1f} s"


def megabytes(value: float) -> str:
    return f"{value / 1e6:,.1f} MB/s"


if __name__ == "__main__":
    main()
