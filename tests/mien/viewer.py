"""Watches a stream until it ends: ``python -m tests.mien.viewer URL OUT.npz KEY=VALUE...``; a process of its own.

PyAV holds Python's lock while it connects, so that the two sides of one connection do not meet in one process.
"""

from __future__ import annotations

import sys
from contextlib import suppress

import av
import numpy as np


def main(url: str, out: str, *options: str) -> None:
    pictures, times = [], []
    # To who watches, the end of a live stream is an error or silence.
    with (
        suppress(av.error.FFmpegError),
        av.open(url, options=dict(o.split("=", 1) for o in options), timeout=(60.0, 25.0)) as stream,
    ):
        for frame in stream.decode(video=0):
            pictures.append(frame.to_ndarray(format="rgb24"))
            times.append(float(frame.time or 0))
    np.savez(out, pictures=np.array(pictures), times=np.array(times))


if __name__ == "__main__":
    main(*sys.argv[1:])
