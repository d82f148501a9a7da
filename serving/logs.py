"""Structured logs: one JSON object a line on standard output, made of named fields only.

A request's line has its id, operation, sizes, faces, duration, outcome and the model's digest. There is no free text
of a request in it, so that a password, a picture or a code has no way in.
"""

from __future__ import annotations

import sys
import traceback
from typing import Any

import structlog


def configure() -> structlog.typing.FilteringBoundLogger:
    """The service's logger."""
    logger: structlog.typing.FilteringBoundLogger = structlog.wrap_logger(
        structlog.PrintLogger(sys.stdout),
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger("info"),
    )
    return logger


def describe(error: BaseException) -> dict[str, Any]:
    """An unexpected error for the log: its kind and where it happened.

    Its message and the frames' local variables stay out: either may hold a part of the request.
    """
    frames = traceback.extract_tb(error.__traceback__)
    cause = error.__cause__ or error.__context__
    return {
        "error": f"{type(error).__module__}.{type(error).__qualname__}",
        "where": [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames[-8:]],
        **({"cause": f"{type(cause).__module__}.{type(cause).__qualname__}"} if cause else {}),
    }
