"""Does anonymizing hold over time? Judged on clips, where some are given; see :mod:`services.evaluate.video`."""

from __future__ import annotations

from importlib import import_module

from services.evaluate.context import Context
from services.evaluate.figures import Result


def run(context: Context) -> Result:
    """Figures ``video.*`` of the clips in the folder ``context.clips``."""
    result = Result()
    if context.clips is None:
        result.skip("video", "no clips were given (--clips FOLDER)")
        return result
    measured: Result = import_module("services.evaluate.video").measure(context)
    return measured
