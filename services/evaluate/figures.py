"""What a part gives back: flat figures with their intervals, what could not be measured and why, series, pictures."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from PIL import Image

from mien.store import write_atomically
from services.evaluate.distances import Pixels
from services.evaluate.intervals import interval

# Last words of keys whose values are distances or counts, of which all may be 0 or 1 without being yes and no.
_NO_SHARES: Final = frozenset(
    {
        "lpips",
        "dssim",
        "l1",
        "l2",
        "psnr",
        "levels",
        "people",
        "box",
        "landmarks",
        "evaluations",
        "bits-wrong",
        "cosine",
    }
)


@dataclass
class Result:
    """See the module's docstring. ``series`` feeds plots, ``pictures`` the report, neither goes into report.json.

    ``sizes``: the sizes it was measured at, filled in by the run.
    """

    figures: dict[str, float] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    series: dict[str, Any] = field(default_factory=dict)
    pictures: dict[str, str] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)

    def mean(self, key: str, values: Any, groups: Sequence[object] | None = None, *, share: bool | None = None) -> None:
        """The mean of ``values`` ``[M]`` with ``.low``, ``.high`` (95 % bootstrap, by group) and ``.n``.

        ``share``: they are yes and no (see :func:`~services.evaluate.intervals.interval`); by default where the key
        does not end in the name of a distance or a count.
        """
        if share is None:
            share = key.rpartition(".")[2] not in _NO_SHARES
        array = np.asarray(values, dtype=np.float64)
        self.figures[key] = float(array.mean())
        self.figures[f"{key}.low"], self.figures[f"{key}.high"] = interval(array, groups, share=share)
        self.figures[f"{key}.n"] = len(array)

    def number(self, key: str, value: float, n: int | None = None) -> None:
        """A figure without an interval: a threshold, a chance level, a duration."""
        self.figures[key] = float(value)
        if n is not None:
            self.figures[f"{key}.n"] = n

    def skip(self, key: str, why: str) -> None:
        """A row that has no figure, and why."""
        self.skipped[key] = why

    def picture(self, name: str, pixels: Pixels) -> None:
        """A picture for the report, uint8 ``[H, W, 3]``."""
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
        self.pictures[name] = base64.b64encode(buffer.getvalue()).decode()

    def write(self, path: Path, fingerprint: str) -> None:
        """Keep it so that a later run with the same ``fingerprint`` need not measure again."""
        record = {"fingerprint": fingerprint, **self.__dict__}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(record).encode())

    @classmethod
    def read(cls, path: Path, fingerprint: str) -> Result | None:
        """What :meth:`write` kept; None where there is nothing, or it was measured otherwise."""
        try:
            record = json.loads(path.read_text())
        except (OSError, ValueError):
            return None
        if record.pop("fingerprint", None) != fingerprint:
            return None
        return cls(**record)


def grid(rows: Sequence[Sequence[Pixels]], gap: int = 2) -> Pixels:
    """Pictures of one size in rows, on white."""
    height, width = rows[0][0].shape[:2]
    columns = max(len(row) for row in rows)
    out = np.full((len(rows) * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, dtype=np.uint8)
    for y, row in enumerate(rows):
        for x, cell in enumerate(row):
            top, left = y * (height + gap), x * (width + gap)
            out[top : top + height, left : left + width] = cell
    return out
