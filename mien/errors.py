"""Everything Mien raises on purpose.

One small hierarchy, mapped once to HTTP and gRPC by the serving package and to exit codes by the CLI. Messages say
what was wrong, what was expected and what to do; they never contain a password, a code or pixels.
"""

from __future__ import annotations


class MienError(Exception):
    """Base of every error a caller can act on."""


class InvalidImage(MienError):
    """The bytes are not a picture Mien can read, or it is broken, animated or of an impossible size."""


class ImageTooLarge(InvalidImage):
    """The picture's header announces more pixels than the limit; nothing was decoded."""


class NoFaceFound(MienError):
    """The picture is sound, and no face was found in it."""


class TooManyFaces(MienError):
    """More faces were found than the limit allows."""


class InvalidPassword(MienError):
    """The password is empty or longer than the limit, or a raw code is malformed."""


class ModelError(MienError):
    """The model folder is missing, incomplete or of a format this version does not know."""


class ModelIntegrityError(ModelError):
    """The weights do not have the digest their config names: a broken download or a swapped file."""


class NoSuchFace(MienError):
    """A face was asked for by an index the picture does not have."""


class WrongModel(MienError):
    """The picture says that another model than the loaded one changed its faces."""


class ServiceError(MienError):
    """A client's: the service could not do what it was asked, and not for a reason that lies in the picture."""


class ServiceUnavailable(ServiceError):
    """The service cannot be reached, is full, not ready, or asks to come back later than the time-out allows."""


class ServiceTimeout(ServiceUnavailable):
    """No answer in time."""


class AccessDenied(ServiceError):
    """The service wants an API key, or does not know the one it was given."""
