"""Memory that is free again goes back to the system.

Some of what a request leaves refers to itself and waits for Python's collector. That one looks at everything only when
what is new has grown to a quarter of what has been there, and torch alone is hundreds of thousands of objects. So what
stays is set aside, and what is new is collected every few seconds.

glibc keeps what threads have freed for later use, in an arena a thread; under requests of all sizes the arenas fill
with holes. They are trimmed then. And an arena of a thread is too small for a batch's tensors: each would be new pages
of the system's, a tenth of a pass of the network. So there is one arena, in which they have room.
"""

from __future__ import annotations

import ctypes
import gc
import threading
from typing import Final

SECONDS: Final = 20.0

# mallopt(3): which parameter, and its value. Blocks of up to 32 MiB (the most there may be) come from the arena, and
# what is free at its end stays until it is trimmed.
_PARAMETERS: Final = {-8: 1, -3: 32 << 20, -1: 2**31 - 1}  # M_ARENA_MAX, M_MMAP_THRESHOLD, M_TRIM_THRESHOLD


def one_arena() -> None:
    """Let all threads that begin after this share an arena; nothing where the C library is not glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter, value in _PARAMETERS.items():
            mallopt(parameter, value)


def set_aside() -> None:
    """Let the collector look no more at what is there now; it looks at it once again whenever this is called."""
    gc.unfreeze()
    gc.collect()
    gc.freeze()


class Trimmer:
    """A thread that collects garbage every few seconds and returns free memory (glibc's ``malloc_trim``)."""

    def __init__(self, seconds: float = SECONDS) -> None:
        self._seconds = seconds
        self._ended = threading.Event()
        self._trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        self._thread = threading.Thread(target=self._run, name="mien-memory", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def close(self) -> None:
        """End the thread."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(self._seconds):
            gc.collect()
            if self._trim is not None:  # another C library has none
                self._trim(0)
