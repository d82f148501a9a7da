"""What torchrun starts in tests that must look into a run or disturb it: several runs one after another in the same
processes, the samples each used, and losses that are not finite on one process alone.

``worker.py CONFIG... [--indices FILE] [--stop-at N] [--poison RANK:FIRST:LAST ...]``
"""

from __future__ import annotations

import argparse
import json
import logging
import sys

import numpy as np
import torch

from training import distributed, loop
from training.config import load
from training.step import Trainer


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("configs", nargs="+")
    parser.add_argument("--indices")
    parser.add_argument("--stop-at", type=int)
    parser.add_argument(
        "--poison", action="append", default=[], help="RANK:FIRST:LAST, images from nimg FIRST to LAST are NaN there"
    )
    arguments = parser.parse_args()
    configs = [load(path) for path in arguments.configs]
    torch.set_num_threads(1)
    world = distributed.join("cpu", timeout=60, patience=30)
    logging.basicConfig(level=logging.INFO if world.first else logging.WARNING, format="%(message)s", stream=sys.stderr)

    def used(nimg: int, indices: np.ndarray) -> None:
        if arguments.indices:
            with open(f"{arguments.indices}.{world.size}.{world.rank}", "a") as file:
                file.write(json.dumps({"nimg": nimg, "indices": indices.tolist()}) + "\n")

    if arguments.poison:
        ranges = [tuple(map(int, given.split(":"))) for given in arguments.poison]
        step = Trainer.step

        def poisoned(self: Trainer, images: torch.Tensor, identities: torch.Tensor, nimg: int, **more: int):  # type: ignore[no-untyped-def]
            if any(world.rank == rank and first <= nimg < last for rank, first, last in ranges):
                images = images * float("nan")
            return step(self, images, identities, nimg, **more)

        Trainer.step = poisoned  # type: ignore[method-assign]

    for config in configs:
        outcome = loop._train(config, world, arguments.stop_at, frozenset(), used)
        sys.stderr.write(f"process {world.rank} of {world.size}: {config.name} at {outcome.nimg}\n")
    distributed.leave()


if __name__ == "__main__":
    main()
