"""A folder of copies of stored objects, by what they contain.

An object's name in the cache is its sha256, so a copy can be of nothing else, is shared by every run and prefix with
the same bytes, and goes stale never. Any number of processes use one cache folder at once (locks of the file system;
the folder must be on a local disk):

- one process fetches an object while the others wait for it;
- a copy that is being read is never evicted, others go, longest unused first, when room is needed;
- a copy is hashed by each process that opens it, once: a disk that forgets is noticed and the object fetched again.

Where there is no room (the disk is full of other things, or everything in the cache is in use) the object is kept in
memory instead, and a warning says so: slower, and nothing is lost.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from storage.base import ChecksumMismatch, Prefix, StorageError, StorageFull, join, of_os

logger = logging.getLogger(__name__)

_OBJECT: Final = ".object"
_PART: Final = ".part"  # SHA256.SIZE.part: on its way; the size is reserved
_LOCK: Final = ".lock"


class Copy:
    """An object's bytes at hand. Close it, so that it can be evicted; usable from several threads."""

    def __init__(self, source: int | bytes, size: int) -> None:
        self._source, self.size = source, size

    @property
    def in_memory(self) -> bool:
        """Whether there was no room on the disk."""
        return isinstance(self._source, bytes)

    def read(self, start: int, length: int) -> bytes:
        """A range, clipped to the end."""
        if isinstance(self._source, bytes):
            return self._source[start : start + length]
        return os.pread(self._source, length, start)

    def close(self) -> None:
        """Give it back; twice is no error."""
        if isinstance(self._source, int) and self._source >= 0:
            os.close(self._source)  # and with it the lock
            self._source = -1

    def __del__(self) -> None:
        self.close()

    def __enter__(self) -> Copy:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Cache:
    """See the module.

    Args:
        folder: created where missing.
        limit: bytes that it may hold; the disk's room where None.
    """

    def __init__(self, folder: Path, limit: int | None = None) -> None:
        self.folder, self.limit = folder, limit
        self._sound: dict[str, tuple[int, int, int]] = {}
        self._warned = False

    def open(self, place: Prefix, name: str, *, sha256: str, size: int) -> Copy:
        """An object, from the cache or through it.

        Args:
            place: where it is fetched from.
            name: its name there.
            sha256: hex, of its bytes.
            size: its bytes.

        Raises:
            ChecksumMismatch: what is stored is not what ``sha256`` says, also when it was fetched again.
            StorageError: it cannot be fetched.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            held = self._held(sha256)
            if held is not None:
                return held
            with self._locked(sha256 + _LOCK):
                held = self._held(sha256)  # somebody else fetched it meanwhile
                return held if held is not None else self._fetch(place, name, sha256, size)
        except OSError as error:
            if isinstance(of_os(error, self.folder), StorageFull):  # not even room for a lock
                return self._in_memory(place, name, sha256, size, str(error))
            # Never NotFound or AccessDenied, which would be taken for the object's.
            raise StorageError(f"the cache {self.folder} cannot be used: {error.strerror or error}") from error

    def bytes(self) -> int:
        """What it holds and has reserved."""
        with self._locked("cache" + _LOCK):
            return sum(size for _, size, _ in self._entries())

    def _held(self, sha256: str) -> Copy | None:
        path = self.folder / (sha256 + _OBJECT)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            status = os.fstat(descriptor)
            if not status.st_nlink:  # evicted between our opening and locking it
                os.close(descriptor)
                return None
            identity = (status.st_ino, status.st_mtime_ns, status.st_size)
            if self._sound.get(sha256) != identity:
                with open(os.dup(descriptor), "rb") as file:
                    found = hashlib.file_digest(file, "sha256").hexdigest()
                if found != sha256:
                    logger.warning("the copy %s in the cache is broken; fetching it again", path.name[:12])
                    path.unlink(missing_ok=True)
                    os.close(descriptor)
                    return None
                self._sound[sha256] = identity
            os.utime(path, ns=(time.time_ns(), status.st_mtime_ns))
        except FileNotFoundError:
            pass  # evicting needs our lock, so somebody emptied the folder by hand; the open file stays good
        except BaseException:
            os.close(descriptor)
            raise
        return Copy(descriptor, status.st_size)

    def _fetch(self, place: Prefix, name: str, sha256: str, size: int) -> Copy:
        part = self.folder / f"{sha256}.{size}{_PART}"
        for attempt in range(2):
            if not self._reserve(part, size):
                return self._in_memory(place, name, sha256, size, "everything in it is in use")
            try:
                place.download(name, part, sha256=sha256)
                # Locked before it has its name: from then on others may evict it.
                descriptor = os.open(part, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_SH)
                    with self._locked("cache" + _LOCK):  # or who sums up might count it under both names
                        part.replace(self.folder / (sha256 + _OBJECT))
                    status = os.fstat(descriptor)
                except BaseException:
                    os.close(descriptor)
                    raise
                self._sound[sha256] = (status.st_ino, status.st_mtime_ns, status.st_size)
                return Copy(descriptor, status.st_size)
            except ChecksumMismatch as error:
                if attempt:
                    raise
                logger.warning("%s; fetching it once more", error)
            except StorageFull as error:
                return self._in_memory(place, name, sha256, size, str(error))
            finally:
                part.unlink(missing_ok=True)
        raise AssertionError("unreachable")

    def _in_memory(self, place: Prefix, name: str, sha256: str, size: int, why: str) -> Copy:
        log = logger.debug if self._warned else logger.warning
        log("no room for %s in the cache %s (%s): kept in memory, like others from now on", name, self.folder, why)
        self._warned = True
        try:
            data = place.read(name, sha256=sha256)
        except ChecksumMismatch as error:
            logger.warning("%s; fetching it once more", error)
            data = place.read(name, sha256=sha256)
        if len(data) != size:
            raise StorageError(f"{join(place.url, name)} has {len(data)} bytes, {size} expected")
        return Copy(data, len(data))

    def _reserve(self, part: Path, size: int) -> bool:
        """Evict until there is room, and take it; False where what is in use leaves none."""
        with self._locked("cache" + _LOCK):
            entries = sorted(self._entries(), key=lambda entry: entry[2])
            total = sum(entry_size for _, entry_size, _ in entries)
            free = shutil.disk_usage(self.folder).free
            for path, entry_size, _ in entries:
                if (self.limit is None or total + size <= self.limit) and size <= free:
                    break
                if self._evicted(path):
                    total, free = total - entry_size, free + entry_size
            if self.limit is not None and total + size > self.limit:
                return False
            try:
                part.touch()
            except OSError as error:
                if isinstance(of_os(error, part), StorageFull):
                    return False
                raise
            return True

    def _evicted(self, path: Path) -> bool:
        # A part belongs to who holds the object's lock; without one its process has died.
        lock = path if path.name.endswith(_OBJECT) else self.folder / (path.name.partition(".")[0] + _LOCK)
        try:
            descriptor = os.open(lock, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
            return True
        except BlockingIOError:
            return False
        finally:
            os.close(descriptor)

    def _entries(self) -> Iterator[tuple[Path, int, int]]:
        """Objects and reservations: path, bytes, when last used."""
        for entry in os.scandir(self.folder):
            with suppress(FileNotFoundError):
                if entry.name.endswith(_OBJECT):
                    status = entry.stat()
                    yield Path(entry.path), status.st_size, status.st_atime_ns
                elif entry.name.endswith(_PART):
                    yield Path(entry.path), int(entry.name.split(".")[1]), entry.stat().st_mtime_ns

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        descriptor = os.open(self.folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)
