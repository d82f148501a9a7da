"""Work on several frames at once, answered in order: bounded memory, the same result with any number of threads."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Final, TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

_MOST_WORKERS: Final = 8


def usual_workers() -> int:
    """Threads that fill the cores, each running torch with the threads that it is set to."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(_MOST_WORKERS, cores // torch.get_num_threads()))


@contextmanager
def threads(workers: int) -> Iterator[ThreadPoolExecutor]:
    """A pool that leaves no work behind: an error or an interrupt waits for what runs, and drops what waits."""
    pool = ThreadPoolExecutor(workers, thread_name_prefix="mien-video")
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def in_order(
    pool: ThreadPoolExecutor, function: Callable[[Item], Result], items: Iterable[Item], *, ahead: Callable[[Item], int]
) -> Iterator[tuple[Item, Result]]:
    """Every item with the function's result, in order.

    Args:
        pool: runs the function; items are taken in the caller's own thread.
        function: called once for each item. Its errors are raised in the item's turn.
        items: taken as late as possible.
        ahead: how many items may be under way beyond the one that is waited for, given the newest.
    """
    waiting: deque[tuple[Item, Future[Result]]] = deque()
    for item in items:
        waiting.append((item, pool.submit(function, item)))
        while len(waiting) > ahead(item):
            first, result = waiting.popleft()
            yield first, result.result()
    while waiting:
        first, result = waiting.popleft()
        yield first, result.result()
