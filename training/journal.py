"""An append-only file of what is still to be delivered somewhere else, and how far delivery has come.

``journal.jsonl`` has one JSON object a line; ``journal.position`` the number of its bytes that were delivered, and
what the receiver needs to know to go on. Appending costs a write to the page cache. A line that a killed process left
torn is skipped; one that was delivered but not yet noted is delivered again, so receivers must bear seeing an entry
twice.
"""

from __future__ import annotations

import json
import logging
import threading
from pathlib import Path
from typing import Any

from mien import store

logger = logging.getLogger(__name__)


class Journal:
    """One writer and one reader, in any threads of one process.

    Args:
        folder: where the two files lie.
    """

    def __init__(self, folder: Path) -> None:
        self._path, self._position = folder / "journal.jsonl", folder / "journal.position"
        self._new = threading.Condition()
        folder.mkdir(parents=True, exist_ok=True)
        if self._path.exists():
            with open(self._path, "rb+") as file:
                if file.seek(0, 2) and file.seek(-1, 2) >= 0 and file.read(1) != b"\n":
                    file.write(b"\n")

    def append(self, entry: dict[str, Any]) -> None:
        """Add an entry; raises OSError where the disk is full."""
        line = json.dumps(entry) + "\n"
        with self._new:
            with open(self._path, "a") as file:
                file.write(line)
            self._new.notify_all()

    def wait(self, seconds: float) -> None:
        """Until something is appended, so many seconds at most."""
        with self._new:
            self._new.wait(seconds)

    def state(self) -> tuple[int, dict[str, Any]]:
        """Bytes delivered, and what was noted with them."""
        try:
            noted = json.loads(self._position.read_text())
            return int(noted.pop("offset")), noted
        except (OSError, ValueError, KeyError):
            return 0, {}

    def note(self, offset: int, **more: Any) -> None:
        """Everything before ``offset`` is delivered."""
        store.write_atomically(self._position, json.dumps({"offset": offset, **more}).encode())

    def entries(self, offset: int, limit: int = 500) -> list[tuple[int, dict[str, Any]]]:
        """Entries from ``offset`` on, each with the offset behind it; an entry that cannot be read is an empty dict."""
        if not self._path.exists():
            return []
        found: list[tuple[int, dict[str, Any]]] = []
        with open(self._path, "rb") as file:
            file.seek(offset)
            for line in file:
                if not line.endswith(b"\n") or len(found) == limit:
                    break
                offset += len(line)
                try:
                    entry = json.loads(line)
                except ValueError:
                    logger.warning("%s: a line that was cut off by a crash is left out", self._path)
                    entry = {}
                found.append((offset, entry if isinstance(entry, dict) else {}))
        return found

    def delivered(self) -> bool:
        """Whether nothing is left to deliver."""
        size = self._path.stat().st_size if self._path.exists() else 0
        return self.state()[0] >= size
