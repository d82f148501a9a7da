"""Does anonymizing hold over time? Judged on clips; see :mod:`services.evaluate.video`."""

from __future__ import annotations

from importlib import import_module

from services.evaluate.context import Context
from services.evaluate.figures import Result


def run(context: Context) -> Result:
    """Figures ``video.*`` of the clips in the folder ``context.clips``, or of clips made of the faces."""
    from mien.video import VideoExtraMissing, require_extra

    try:
        require_extra()
    except VideoExtraMissing as error:
        result = Result()
        result.skip("video", str(error))
        return result
    measured: Result = import_module("services.evaluate.video").measure(context)
    return measured
