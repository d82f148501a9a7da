"""``python -m training --config training/configs/NAME.yaml [key=value ...]``; see ``--help``."""

from __future__ import annotations

import argparse
import logging
import os
import sys

from training.config import load


def main() -> int:
    """Exit codes: 0 finished; 1 the config or the data is wrong, or training diverged; 143 (Kubernetes retries)
    interrupted and saved, or another process of the run was lost."""
    parser = argparse.ArgumentParser(
        prog="training", description="Train a transformer; goes on from the last checkpoint where the run exists."
    )
    parser.add_argument("--config", required=True, help="YAML or JSON file")
    parser.add_argument("--dry-run", action="store_true", help="print the whole config and what would run, and stop")
    parser.add_argument("--stop-at", type=int, help="save and stop once so many images are seen")
    parser.add_argument(
        "--allow-change",
        action="append",
        default=[],
        metavar="SECTION",
        help="go on although this section of the config differs from the run's (a curriculum)",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example optimizer.lr=2e-4")
    arguments = parser.parse_intermixed_args()
    rank = os.environ.get("RANK", "0")
    logging.basicConfig(
        level=logging.INFO if rank == "0" else logging.WARNING,
        format="%(asctime)s %(message)s" if rank == "0" else f"%(asctime)s [process {rank}] %(message)s",
        stream=sys.stderr,
    )
    try:
        config = load(arguments.config, arguments.overrides)
    except ValueError as error:
        parser.error(str(error))
    if arguments.dry_run:
        sys.stdout.write(config.model_dump_json(indent=2) + "\n")
        return 0
    from mien.errors import MienError
    from training.data import ShardError
    from training.distributed import PeerLost
    from training.loop import train

    try:
        outcome = train(config, stop_at=arguments.stop_at, allow_change=frozenset(arguments.allow_change))
    except PeerLost as error:
        sys.stderr.write(f"training: {error}; the same command goes on from the last checkpoint\n")
        return 143
    except (MienError, ShardError, ValueError) as error:
        sys.stderr.write(f"training: {error}\n")
        return 1
    if rank == "0":
        stopped = f"{config.runs}/{config.name} stopped at {outcome.nimg} images"
        sys.stdout.write(f"{outcome.model or stopped}\n")
    if outcome.finished:
        return 0
    return 0 if arguments.stop_at is not None and outcome.nimg >= arguments.stop_at else 143


if __name__ == "__main__":
    sys.exit(main())
