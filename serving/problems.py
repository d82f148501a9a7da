"""One table from what can go wrong to what a caller is told: RFC 9457 over HTTP, a status over gRPC.

Statuses follow one rule: 400 where the request itself cannot be understood, 422 where it was understood and its picture
or password cannot be used, 413 for anything too large, 429 and 503 where trying again later helps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from mien import errors

PROBLEM_TYPE: Final = "application/problem+json"


class ServingError(errors.MienError):
    """Base of what only a service raises; the message is shown to the caller and holds nothing of the request.

    Args:
        message: for the caller.
        retry_after: seconds, where it is known better than the table knows it.
    """

    def __init__(self, message: str = "", *, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class MalformedRequest(ServingError):
    """The body is not the multipart form or JSON object it says it is, or a field is missing, unknown or invalid."""


class UnsupportedMediaType(ServingError):
    """The body's content type is neither multipart/form-data nor application/json."""


class NotAcceptable(ServingError):
    """``Accept`` allows neither a picture nor JSON."""


class BodyTooLarge(ServingError):
    """The body is larger than the limit; reading stopped there."""


class UploadStalled(ServingError):
    """The body did not arrive in time."""


class NotFound(ServingError):
    """No such path."""


class MethodNotAllowed(ServingError):
    """The path exists, for other methods."""


class Unauthenticated(ServingError):
    """API keys are on, and the request has none or one that is not known."""


class RateLimited(ServingError):
    """The caller asks more often than its limit allows."""


class Overloaded(ServingError):
    """All workers are busy and the queue is full."""


class NotReady(ServingError):
    """The model is not loaded (yet)."""


class NotInstalled(ServingError):
    """The service was installed without what the request needs."""


class TookTooLong(ServingError):
    """The work did not finish within the request timeout."""


class CallerGone(ServingError):
    """The caller closed the connection before the answer; nobody reads this problem."""


class InternalError(ServingError):
    """Something failed that nobody foresaw; it is in the log already."""


@dataclass(frozen=True)
class Problem:
    """What a caller is told about one kind of error."""

    status: int
    slug: str
    title: str
    grpc: str
    """Name of the gRPC status code."""
    retry_after: int | None = None
    """Seconds after which trying again makes sense."""

    @property
    def type(self) -> str:
        return f"urn:mien:problem:{self.slug}"


PROBLEMS: Final[dict[type[Exception], Problem]] = {
    MalformedRequest: Problem(400, "malformed-request", "The request could not be understood", "INVALID_ARGUMENT"),
    Unauthenticated: Problem(401, "unauthenticated", "An API key is needed", "UNAUTHENTICATED"),
    NotFound: Problem(404, "not-found", "There is nothing at this address", "UNIMPLEMENTED"),
    MethodNotAllowed: Problem(405, "method-not-allowed", "This address takes another method", "UNIMPLEMENTED"),
    NotAcceptable: Problem(
        406, "not-acceptable", "None of the accepted media types can be produced", "INVALID_ARGUMENT"
    ),
    UploadStalled: Problem(408, "upload-stalled", "The request did not arrive in time", "DEADLINE_EXCEEDED"),
    BodyTooLarge: Problem(413, "body-too-large", "The request is too large", "RESOURCE_EXHAUSTED"),
    errors.ImageTooLarge: Problem(413, "image-too-large", "The picture has too many pixels", "INVALID_ARGUMENT"),
    UnsupportedMediaType: Problem(
        415, "unsupported-media-type", "The request has an unsupported content type", "INVALID_ARGUMENT"
    ),
    errors.InvalidImage: Problem(422, "invalid-image", "The picture cannot be read", "INVALID_ARGUMENT"),
    errors.NoFaceFound: Problem(422, "no-face-found", "No face was found in the picture", "NOT_FOUND"),
    errors.TooManyFaces: Problem(422, "too-many-faces", "There are too many faces in the picture", "OUT_OF_RANGE"),
    errors.NoSuchFace: Problem(422, "no-such-face", "The picture has no face of this number", "OUT_OF_RANGE"),
    errors.WrongModel: Problem(422, "wrong-model", "Another model anonymized this picture", "FAILED_PRECONDITION"),
    errors.InvalidPassword: Problem(422, "invalid-password", "The password cannot be used", "INVALID_ARGUMENT"),
    RateLimited: Problem(429, "rate-limited", "Too many requests", "RESOURCE_EXHAUSTED", retry_after=1),
    Overloaded: Problem(429, "overloaded", "The service is busy", "RESOURCE_EXHAUSTED", retry_after=2),
    CallerGone: Problem(499, "caller-gone", "The caller closed the connection", "CANCELLED"),
    NotInstalled: Problem(501, "not-installed", "The service was installed without this", "UNIMPLEMENTED"),
    NotReady: Problem(503, "not-ready", "The service is not ready", "UNAVAILABLE", retry_after=5),
    TookTooLong: Problem(503, "timeout", "The picture took too long", "DEADLINE_EXCEEDED", retry_after=10),
    Exception: Problem(500, "internal-error", "Something went wrong on our side", "INTERNAL"),
}
INTERNAL_DETAIL: Final = "Nothing was returned. The log names the request by its request id."


def problem_of(error: BaseException) -> Problem:
    """The table's row for an error: that of its nearest base class; anything unknown is an internal error."""
    for kind in type(error).__mro__:
        if kind in PROBLEMS:
            return PROBLEMS[kind]
    return PROBLEMS[Exception]


def retry_after_of(error: BaseException) -> int | None:
    """Whole seconds after which trying again makes sense, at least 1; None where it never does."""
    usual = problem_of(error).retry_after
    known = getattr(error, "retry_after", None)
    return usual if usual is None or known is None else max(1, math.ceil(known))


def detail_of(error: BaseException) -> str:
    """What may be shown of an error: our own messages, and nothing of anything else's."""
    if isinstance(error, errors.MienError) and problem_of(error).status != 500:
        return str(error)
    return INTERNAL_DETAIL
