"""What a place to keep objects offers, and what can go wrong with it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol

from mien.errors import MienError


class StorageError(MienError):
    """Base of what can go wrong with stored objects."""


class NotFound(StorageError):
    """There is no such object, folder or bucket."""


class NoCredentials(StorageError):
    """S3 needs credentials and none are set."""


class AccessDenied(StorageError):
    """The credentials are wrong, or do not allow this."""


class Unreachable(StorageError):
    """Nothing that speaks S3 answers at the endpoint, or not within the patience."""


class ChecksumMismatch(StorageError):
    """The bytes are not those that were written or asked for."""


class StorageFull(StorageError):
    """The disk or the quota is used up."""


@dataclass(frozen=True)
class Entry:
    """An object in a listing."""

    name: str  # relative to the prefix
    size: int
    version: str = ""  # another one when the object was written again: S3's ETag, a file's time of change


@dataclass(frozen=True)
class Written:
    """What was stored."""

    size: int
    sha256: str  # hex


class Prefix(Protocol):
    """A folder, or the objects of a bucket under a prefix. See :mod:`storage` for the promises.

    All methods raise :class:`StorageError` or one of its kinds, and no other error for anything the store does.
    """

    @property
    def url(self) -> str:
        """Where this is, without secrets."""
        ...

    def check(self) -> None:
        """Ask now whether the place can be used; waits ten seconds at most for an endpoint that does not answer.

        A folder that does not exist yet is in order where it could be created.
        """
        ...

    def exists(self, name: str) -> bool:
        """Whether there is an object of this name."""
        ...

    def size(self, name: str) -> int:
        """Bytes; NotFound where it is missing."""
        ...

    def read(self, name: str, *, start: int = 0, length: int | None = None, sha256: str | None = None) -> bytes:
        """An object, or a range of it (clipped to its end).

        Args:
            name: which.
            start: first byte.
            length: bytes; up to the end where None.
            sha256: hex, of the whole object; only with the whole object.

        Raises:
            NotFound, ChecksumMismatch, ...
        """
        ...

    def download(self, name: str, path: Path, *, sha256: str | None = None) -> Written:
        """Copy an object to a local file, which is written in place (give a temporary one), in constant memory.

        Raises:
            StorageFull: the local disk is full.
            NotFound, ChecksumMismatch, ...
        """
        ...

    def write(self, name: str, source: bytes | Path) -> Written:
        """Store bytes or a local file, atomically; replaces what was there."""
        ...

    def delete(self, name: str) -> None:
        """Remove an object, if it is there."""
        ...

    def list(self, start: str = "") -> Iterator[Entry]:
        """The objects whose names begin with ``start``, sorted by name; an unfinished write is never among them."""
        ...


def checked(name: str) -> str:
    """A name that stays under its prefix; raises :class:`StorageError`."""
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or "\0" in name or name != "/".join(parts):
        raise StorageError(f"{name!r} is not a relative name with forward slashes")
    return name


def join(url: str, name: str) -> str:
    """For messages: the URL of an object."""
    return f"{url.rstrip('/')}/{name}"


def mismatch(where: str, found: str, expected: str) -> ChecksumMismatch:
    """The error for other bytes than expected."""
    return ChecksumMismatch(
        f"{where} has sha256 {found[:12]}..., expected {expected[:12]}...: it is broken or another one"
    )


def of_os(error: OSError, where: str | os.PathLike[str]) -> StorageError:
    """A local error as one of ours."""
    import errno

    text = f"{os.fspath(where)}: {error.strerror or error}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageFull(text)
    if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR):
        return NotFound(text)
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return AccessDenied(text)
    return StorageError(text)
