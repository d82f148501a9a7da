"""``python -m tests.e2e``: chart and jobs against the cluster of the current kubeconfig, with a table at the end.

Needs kubectl, Helm and Python; the images must be where the cluster finds them.

    E2E_SERVE_IMAGE    the serving image [mien-serve:0.1.0]
    E2E_TRAIN_IMAGE    the training image [mien-train:0.1.0]
    E2E_VALUES         values files for every installation, separated by ":" (pull secrets, labels of ServiceMonitors)
    E2E_TRAINING=job   train by plain Jobs even where the Training Operator is installed

Exit codes: 0 all that could be tried held, 1 something did not, 2 wrong usage, 69 there is no cluster.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from tests.e2e.cluster import Cluster, Failed, NoCluster, Skipped
from tests.e2e.steps import STEPS

NO_CLUSTER: Final = 69  # EX_UNAVAILABLE


@dataclass(frozen=True)
class Result:
    """One step's row."""

    step: str
    outcome: Literal["ok", "FAILED", "skipped"]
    seconds: float
    found: str


def attempt(name: str, cluster: Cluster) -> Result:
    """Do one step; whatever it raises of its own is an outcome."""
    began = time.monotonic()
    outcome: Literal["ok", "FAILED", "skipped"] = "ok"
    try:
        found = STEPS[name](cluster)
    except Skipped as reason:
        outcome, found = "skipped", str(reason)
    except (Failed, subprocess.TimeoutExpired) as reason:
        outcome, found = "FAILED", str(reason)
    except Exception as error:  # an answer that no step expected: that is a row too, and not the end of the table
        outcome, found = "FAILED", f"{type(error).__name__}: {error}"
    return Result(name, outcome, time.monotonic() - began, " ".join(found.split()))


def table(results: Sequence[Result]) -> str:
    """Rows in columns, and how many did what."""
    rows = [("step", "", "s", "")]
    rows += [(r.step, r.outcome, f"{r.seconds:.0f}", r.found) for r in results]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [f"{row[0]:<{widths[0]}}  {row[1]:<{widths[1]}}  {row[2]:>{widths[2]}}  {row[3]}".rstrip() for row in rows]
    counts = [f"{sum(r.outcome == o for r in results)} {o}" for o in ("ok", "FAILED", "skipped")]
    return "\n".join([*lines, ", ".join(counts)]) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the steps; the exit code of the module's docstring."""
    parser = argparse.ArgumentParser(prog="tests.e2e", description=(__doc__ or "").partition("\n")[0].strip())
    parser.add_argument(
        "--step", action="append", choices=list(STEPS), help="only this one; may be given several times"
    )
    parser.add_argument("--list", action="store_true", help="say what the steps are, and stop")
    parser.add_argument("--keep", action="store_true", help="leave the namespaces of steps that failed")
    chosen = parser.parse_args(arguments)
    if chosen.list:
        width = max(map(len, STEPS))
        sys.stdout.writelines(f"{name:<{width}}  {step.__doc__}\n" for name, step in STEPS.items())
        return 0
    try:
        cluster = Cluster.connect(keep=chosen.keep)
    except NoCluster as reason:
        sys.stderr.write(f"e2e: no cluster: {reason}\ne2e: nothing was tried (point KUBECONFIG at a cluster)\n")
        return NO_CLUSTER
    results = []
    for name in chosen.step or STEPS:
        sys.stderr.write(f"e2e: {name}: {STEPS[name].__doc__}\n")
        results.append(attempt(name, cluster))
        sys.stderr.write(f"e2e: {name}: {results[-1].outcome}: {results[-1].found}\n")
    sys.stdout.write(table(results))
    return int(any(result.outcome == "FAILED" for result in results))


if __name__ == "__main__":
    sys.exit(main())
