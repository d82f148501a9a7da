"""Progress that is worth reading on a terminal and in a log file: a bar there, a line for each part here."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars


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
    def part(self, name: str, number: int, total: int) -> Iterator[None]:
        """One part; says how long it took."""
        start = time.perf_counter()
        self.console.print(f"[{number}/{total}] {name} ...", highlight=False, markup=False)
        yield
        took = time.perf_counter() - start
        self.console.print(f"[{number}/{total}] {name} done in {took:.0f} s", highlight=False, markup=False)

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[Callable[[int], None]]:
        """A stage of ``total`` steps; call what it yields with the steps just done."""
        task = self._bars.add_task(name, total=total)
        try:
            yield lambda done: self._bars.advance(task, done)
        finally:
            self._bars.remove_task(task)
