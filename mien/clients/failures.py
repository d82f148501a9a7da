"""From what a service says to :mod:`mien.errors`, and when to ask again."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, field
from typing import Final

from mien import errors

# The slugs of serving's problems (`urn:mien:problem:SLUG`); gRPC's ErrorInfo says the same in capitals.
_BY_SLUG: Final[dict[str, type[errors.MienError]]] = {
    "invalid-image": errors.InvalidImage,
    "image-too-large": errors.ImageTooLarge,
    "no-face-found": errors.NoFaceFound,
    "too-many-faces": errors.TooManyFaces,
    "no-such-face": errors.NoSuchFace,
    "wrong-model": errors.WrongModel,
    "invalid-password": errors.InvalidPassword,
    "timeout": errors.ServiceTimeout,
    "upload-stalled": errors.ServiceTimeout,
}

# The service worked for as long as it may: the same request would take as long again.
_NOT_AGAIN: Final = frozenset({"timeout"})

_FIRST_PAUSE: Final = 0.2
_LONGEST_PAUSE: Final = 5.0


class Failed(Exception):
    """One attempt failed.

    Args:
        error: what the caller gets to see if this was the last one.
        again: whether asking again is safe and may help.
        after: seconds the service asked to wait.
        broken: the connection broke after the request was sent; worth one more attempt and not many.
    """

    def __init__(
        self, error: errors.MienError, *, again: bool = False, after: float | None = None, broken: bool = False
    ) -> None:
        super().__init__(str(error))
        self.error = error
        self.again = again
        self.after = after
        self.broken = broken


def refused(status: int, slug: str, detail: str, after: float | None) -> Failed:
    """A service's refusal, by its problem's slug and where that is unknown (a proxy's page) by the HTTP status."""
    if kind := _BY_SLUG.get(slug):
        return Failed(kind(detail), again=False)
    if status in (401, 403):
        return Failed(errors.AccessDenied(detail))
    if status in (429, 503):
        again = slug not in _NOT_AGAIN and after is not None
        return Failed(errors.ServiceUnavailable(detail), again=again, after=after)
    if status in (502, 504):  # a gateway's: whether the service worked is unknown
        return Failed(errors.ServiceUnavailable(detail), again=True, broken=True)
    return Failed(errors.ServiceError(detail))


@dataclass
class Attempts:
    """The attempts of one call: how many, and until when."""

    timeout: float
    left: int
    made: int = 0
    breaks: int = 0
    began: float = field(default_factory=time.monotonic)

    @property
    def remaining(self) -> float:
        """Seconds left of the time-out."""
        return self.timeout - (time.monotonic() - self.began)

    def start(self) -> float:
        """Count an attempt; seconds that it may take.

        Raises:
            ServiceTimeout: there are none.
        """
        self.left -= 1
        self.made += 1
        if (remaining := self.remaining) <= 0:
            raise errors.ServiceTimeout(f"The service did not answer within {self.timeout:g} seconds.")
        return remaining

    def pause(self, failed: Failed) -> float:
        """Seconds to wait before the next attempt.

        Raises:
            MienError: the failure's, where there is to be none.
        """
        self.breaks += failed.broken
        if not failed.again or self.left <= 0 or self.breaks > 1:
            raise failed.error from None
        # Jitter, so that callers who were refused together do not come back together.
        if failed.after is not None:
            seconds = failed.after * random.uniform(1, 1.25)  # noqa: S311
        else:
            seconds = random.uniform(0.5, 1) * min(_LONGEST_PAUSE, _FIRST_PAUSE * 2.0**self.made)  # noqa: S311
        if seconds >= self.remaining:
            raise failed.error from None
        return seconds
