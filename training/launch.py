"""``python -m training.launch``: torchrun, with exit codes that Kubernetes understands.

torchrun ends with 1 on SIGTERM, also when every worker saved and said 143, and with 1 whatever a worker died of. The
operator's ``restartPolicy: ExitCode`` takes 1-127 as permanent, so a drained node would fail the whole job. This calls
torchrun's own main and translates only the end:

=============================================================  =====================================
what happened                                                  exit code
=============================================================  =====================================
all workers finished                                           0
torchrun itself was sent a signal                              128 + signal (SIGTERM: 143, retried)
a failed worker died of a signal or said 128 or more           that code, as 128 + signal (retried)
workers failed with 1-127 only                                 1 (permanent: config, data or code)
=============================================================  =====================================

A worker killed by the kernel takes its peers down with ordinary errors, so one such code among several decides; but not
SIGTERM among ordinary errors, which is how torchrun itself ends the peers of a worker that failed. How often a job is
retried is bounded by its ``backoffLimit``.

``MIEN_METRICS_PORT`` serves the run's last figures to Prometheus there (:mod:`training.exporter`), read from the log in
the folder of runs ``MIEN_RUNS`` (default ``runs``).
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from training import exporter

logger = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run torchrun with ``arguments`` (default: ``sys.argv``); returns the exit code of the table above."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    if port := os.environ.get("MIEN_METRICS_PORT"):
        try:
            exporter.serve(int(port), Path(os.environ.get("MIEN_RUNS", "runs")))
        except (OSError, ValueError) as error:  # a run is worth more than its metrics
            logger.warning("no metrics on port %s: %s", port, error)
    try:
        run.main(list(sys.argv[1:] if arguments is None else arguments))
    except SignalException as stopped:
        logger.warning("torchrun was told to stop by signal %d", stopped.sigval)
        return 128 + int(stopped.sigval)
    except ChildFailedError as error:
        sys.stderr.write(f"{error}\n")
        return exit_code(failure.exitcode for failure in error.failures.values())
    return 0


def exit_code(codes: Iterable[int]) -> int:
    """One code for the failures of several workers; negative codes are signals, as in subprocess."""
    shell = [128 - code if code < 0 else code for code in codes]
    terminated = 128 + signal.SIGTERM
    if terminated in shell and all(code == terminated for code in shell):
        return terminated
    return max((code for code in shell if code >= 128 and code != terminated), default=1)


if __name__ == "__main__":
    sys.exit(main())
