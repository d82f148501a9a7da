"""Face crops of all callers, gathered into batches for one network.

One thread runs the network; callers block until their crops come back. The networks have no batch statistics, so what
a caller gets does not depend on whose crops are beside theirs, and a batch that fails is run again caller by caller.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    Transform = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class _Item:
    transform: Transform
    crops: Tensor = field(repr=False)
    codes: Tensor = field(repr=False)
    result: Future[Tensor] = field(default_factory=Future, repr=False)


class Batcher:
    """Runs ``transform(crops, codes)`` in batches.

    Args:
        size: most crops in one pass; a caller with more gets several.
        wait: seconds a batch that is not full waits for others.
        company: whether other callers are at work, so that waiting makes sense.
        observe: told the number of crops of every pass.
    """

    def __init__(
        self, *, size: int, wait: float, company: Callable[[], bool], observe: Callable[[int], object]
    ) -> None:
        self._size = size
        self._wait = wait
        self._company = company
        self._observe = observe
        # Unbounded, and never longer than the engine's workers: each blocks on its own item.
        self._items: queue.SimpleQueue[_Item | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="mien-batches", daemon=True)
        self._thread.start()

    def transform(self, transform: Transform, crops: Tensor, codes: Tensor) -> Tensor:
        """Transform crops in company; blocks, and is called from many threads.

        Args:
            transform: float ``[B, 3, S, S]`` and codes ``[B, N]`` to float ``[B, 3, S, S]``; batches hold crops of
                one transform only, so that a model can be exchanged between two of them.
            crops: float ``[F, 3, S, S]`` in [-1, 1], F >= 1.
            codes: ``[F, N]``.

        Returns:
            float ``[F, 3, S, S]``.

        Raises:
            Whatever the transform raises for these crops; ``ArithmeticError`` where its output is not finite.
        """
        item = _Item(transform, crops, codes)
        self._items.put(item)
        return item.result.result()

    def close(self) -> None:
        """Finish what is queued and end the thread."""
        self._items.put(None)
        self._thread.join()

    def _run(self) -> None:
        held: _Item | None = None
        while True:
            first = held or self._items.get()
            held = None
            if first is None:
                return
            batch, held, closing = self._gather(first)
            self._pass(batch)
            # Nothing of a caller stays referenced while the thread waits for the next one.
            del first, batch
            if closing:
                self._items.put(None)

    def _gather(self, first: _Item) -> tuple[list[_Item], _Item | None, bool]:
        batch, total = [first], len(first.crops)
        deadline = time.monotonic() + self._wait
        while total < self._size:
            try:
                if self._company():
                    item = self._items.get(timeout=max(0.0, deadline - time.monotonic()))
                else:
                    item = self._items.get_nowait()
            except queue.Empty:
                break
            if item is None:
                return batch, None, True
            if item.transform != first.transform or total + len(item.crops) > self._size:
                return batch, item, False
            batch.append(item)
            total += len(item.crops)
        return batch, None, False

    def _pass(self, batch: list[_Item]) -> None:
        try:
            self._transform(batch)
        except Exception as error:
            if len(batch) == 1:
                batch[0].result.set_exception(error)
                return
            for item in batch:
                self._pass([item])

    def _transform(self, batch: list[_Item]) -> None:
        import torch

        crops = torch.cat([item.crops for item in batch])
        codes = torch.cat([item.codes for item in batch])
        outputs = []
        for start in range(0, len(crops), self._size):
            part = slice(start, start + self._size)
            outputs.append(batch[0].transform(crops[part], codes[part]))
            self._observe(len(crops[part]))
        output = torch.cat(outputs)
        # What is not finite makes the sum so too; looking at every number takes twenty times as long.
        if output.shape != crops.shape or not torch.isfinite(output.sum()):
            # A face that came out as something else than numbers must not go back into a picture.
            raise ArithmeticError("the network's output is not a finite picture of the input's shape")
        start = 0
        for item in batch:
            item.result.set_result(output[start : start + len(item.crops)].clone())
            start += len(item.crops)
