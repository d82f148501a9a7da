"""Progress that is worth reading on a terminal and in a log file: a bar there, a line for each part here."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

# Seconds between the lines of a long stage in a log file.
_SAY_EVERY: Final = 20.0


class Progress:
    """Parts of a run, and stages of a part."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, quiet=True)
        self._bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
            transient=True,
        )

    @contextmanager
    def run(self) -> Iterator[None]:
        """Draw bars while inside."""
        with self._bars:
            yield

    @contextmanager
    def part(self, name: str, number: int, total: int, left: float | None = None) -> Iterator[None]:
        """One part; says how long it took, and before it how long all that is to come takes (``left`` seconds)."""
        start = time.perf_counter()
        until = "" if left is None else f" (all: about {_duration(left)} left)"
        self._print(f"[{number}/{total}] {name} ...{until}")
        yield
        self._print(f"[{number}/{total}] {name} done in {time.perf_counter() - start:.0f} s")

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[Callable[[int], None]]:
        """A stage of ``total`` steps; call what it yields with the steps just done."""
        task = self._bars.add_task(name, total=total)
        start = said = time.perf_counter()
        done = 0

        def advance(steps: int) -> None:
            nonlocal done, said
            self._bars.advance(task, steps)
            done, now = done + steps, time.perf_counter()
            if not self.console.is_terminal and now - said >= _SAY_EVERY and 0 < done < total:
                said = now
                self._print(f"    {name}: {done} of {total}, {_duration((now - start) / done * (total - done))} left")

        try:
            yield advance
        finally:
            self._bars.remove_task(task)

    def _print(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
