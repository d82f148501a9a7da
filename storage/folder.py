"""A folder as a place to keep objects."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO

from storage.base import AccessDenied, Entry, StorageError, Written, checked, mismatch, of_os

_CHUNK = 1 << 20
_TEMPORARY = ".tmp"  # ends the names of unfinished writes, which begin with a dot


class Folder:
    """See :class:`storage.Prefix`. The folder is created by the first write."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __repr__(self) -> str:
        return f"Folder({str(self.path)!r})"

    @property
    def url(self) -> str:
        return str(self.path)

    def check(self) -> None:
        nearest = self.path
        while not nearest.exists() and nearest != nearest.parent:
            nearest = nearest.parent
        if not nearest.is_dir():
            raise StorageError(f"{self.path} cannot be a folder: {nearest} is a file")
        if not os.access(nearest, os.R_OK | os.X_OK):
            raise AccessDenied(f"{nearest}: permission denied")

    def exists(self, name: str) -> bool:
        return (self.path / checked(name)).is_file()

    def size(self, name: str) -> int:
        path = self.path / checked(name)
        try:
            return path.stat().st_size
        except OSError as error:
            raise of_os(error, path) from error

    def read(self, name: str, *, start: int = 0, length: int | None = None, sha256: str | None = None) -> bytes:
        path = self.path / checked(name)
        try:
            with open(path, "rb") as file:
                file.seek(start)
                data = file.read(-1 if length is None else length)
        except OSError as error:
            raise of_os(error, path) from error
        if sha256 is not None:
            found = hashlib.sha256(data).hexdigest()
            if found != sha256:
                raise mismatch(str(path), found, sha256)
        return data

    def download(self, name: str, path: Path, *, sha256: str | None = None) -> Written:
        origin = self.path / checked(name)
        try:
            source = open(origin, "rb")  # noqa: SIM115 - an error here is the origin's, one below the copy's
        except OSError as error:
            raise of_os(error, origin) from error
        try:
            with source, open(path, "wb") as target:
                written = _copy(source, target)
        except OSError as error:
            raise of_os(error, path) from error
        if sha256 is not None and written.sha256 != sha256:
            raise mismatch(str(origin), written.sha256, sha256)
        return written

    def write(self, name: str, source: bytes | Path) -> Written:
        path = self.path / checked(name)
        temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}{_TEMPORARY}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as target:
                if isinstance(source, Path):
                    with open(source, "rb") as file:
                        written = _copy(file, target)
                else:
                    target.write(source)
                    written = Written(len(source), hashlib.sha256(source).hexdigest())
                target.flush()
                os.fsync(target.fileno())
            temporary.replace(path)
            _sync_folder(path.parent)
        except OSError as error:
            raise of_os(error, path) from error
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
        return written

    def delete(self, name: str) -> None:
        path = self.path / checked(name)
        try:
            path.unlink(missing_ok=True)
            # Object storage knows no empty folders, so neither do we.
            for parent in path.parents:
                if parent == self.path or not parent.is_relative_to(self.path):
                    break
                parent.rmdir()
        except OSError as error:
            if path.exists():
                raise of_os(error, path) from error

    def list(self, start: str = "") -> Iterator[Entry]:
        found: list[Entry] = []
        for folder, _, files in os.walk(self.path):
            for file in files:
                path = Path(folder, file)
                name = path.relative_to(self.path).as_posix()
                if name.startswith(start) and not (file.startswith(".") and file.endswith(_TEMPORARY)):
                    with suppress(FileNotFoundError):  # deleted since it was listed
                        status = path.stat()
                        found.append(Entry(name, status.st_size, str(status.st_mtime_ns)))
        yield from sorted(found, key=lambda entry: entry.name)


def _copy(source: IO[bytes], target: IO[bytes]) -> Written:
    hasher, size = hashlib.sha256(), 0
    while block := source.read(_CHUNK):
        hasher.update(block)
        target.write(block)
        size += len(block)
    return Written(size, hasher.hexdigest())


def _sync_folder(path: Path) -> None:
    """Make a rename survive a power cut; some file systems cannot sync a folder, and need not."""
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
