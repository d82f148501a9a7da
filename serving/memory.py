"""Memory that is free again goes back to the system.

glibc keeps what threads have freed for later use, in an arena a thread; under requests of all sizes the arenas fill
with holes, and the resident size creeps upwards (docs/serving.md says what is left of that).
"""

from __future__ import annotations

import ctypes
import threading
from typing import Final

SECONDS: Final = 20.0


class Trimmer:
    """A thread that returns free memory every few seconds, where the C library can (glibc's ``malloc_trim``)."""

    def __init__(self, seconds: float = SECONDS) -> None:
        self._seconds = seconds
        self._ended = threading.Event()
        self._trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        self._thread = threading.Thread(target=self._run, name="mien-memory", daemon=True)

    def start(self) -> None:
        """Does nothing with another C library."""
        if self._trim is not None:
            self._thread.start()

    def close(self) -> None:
        """End the thread."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(self._seconds):
            self._trim(0)
