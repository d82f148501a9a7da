"""Photos where they lie: folders, tars, RecordIO pairs and S3 prefixes, in the layouts of the usual data sets.

| layout | looks like | identity |
| --- | --- | --- |
| people, lfw, casia-webface | ``.../PERSON/photo.jpg`` | the folder a photo lies in |
| unlabelled, ffhq | any | none |

A ``.rec`` looks like a folder a person: picture 17 of person 3 is ``000003/00000017``.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, Final

import numpy as np

import storage
from mien.geometry import Points
from services.ingest import recordio
from services.ingest.config import IngestError, Location, Source

EXTENSIONS: Final = frozenset({".jpg", ".jpeg", ".png", ".webp", ".avif"})

# Read at once from a tar or rec in S3 while it is listed.
_WINDOW: Final = 8 << 20


@dataclass(frozen=True)
class Landmarks:
    """A line of a landmarks file."""

    points: Points  # float [5, 2], pixels of the photo
    size: tuple[int, int] | None = None  # (width, height) of the photo they were found in, where the file says
    confidence: float | None = None  # the detector's, in [0, 1], where the file says


@dataclass(frozen=True, slots=True)
class Photo:
    """A file of a source, not yet read. Cheap to send to another process."""

    source: str
    name: str  # inside the source, with forward slashes
    identity: str | None  # namespace/folder, unique over all sources
    place: str  # the folder, or s3:// prefix, that the next lies in
    object: str
    version: str  # of the object: another one when it was written again
    offset: int | None  # of the bytes inside a tar or rec; None for an object of its own
    size: int
    record: bool = False  # the bytes are a RecordIO record
    refused: str = ""  # why it is not even read


def photos(source: Source) -> list[Photo]:
    """Every file of a source, sorted by name.

    Raises:
        IngestError: the source is missing, unreadable, a compressed tar, or no RecordIO pair.
        storage.StorageError: it is in S3, which does not answer or refuses.
    """
    path = source.path
    if path.endswith(".rec"):
        found = list(_in_record_file(source))
    elif storage.is_s3(path) and not path.endswith(".tar"):
        found = list(_in_bucket(source))
    elif not storage.is_s3(path) and Path(path).is_dir():
        found = list(_in_folder(source))
    else:
        found = list(_in_tar(source))
    if not found:
        raise IngestError(f"{path} holds no files")
    # A tar can hold a name twice; unpacked, the later one would be there.
    return sorted({photo.name: photo for photo in found}.values(), key=lambda photo: photo.name)


def _photo(source: Source, name: str, place: str, key: str, version: str, **where: Any) -> Photo:
    folder = PurePosixPath(name).parent.as_posix()
    person = f"{source.namespace or source.name}/{folder}" if source.labelled and folder != "." else None
    return Photo(source.name, name, person, place, key, version, **where)


def _by_name(name: str) -> str:
    return "" if name.lower().endswith(tuple(EXTENSIONS)) else "by its name"


def _in_folder(source: Source) -> Iterator[Photo]:
    def stop(error: OSError) -> None:
        # os.walk would pass over an unreadable folder in silence.
        raise IngestError(f"cannot read the folder {error.filename}: {error.strerror}") from error

    for folder, _, files in os.walk(source.path, onerror=stop):
        for file in files:
            path = Path(folder, file)
            name = path.relative_to(source.path).as_posix()
            if path.is_file():
                status = path.stat()
                size, version, refused = status.st_size, str(status.st_mtime_ns), _by_name(name)
            else:
                size, version, refused = 0, "", "a link or another special file"
            yield _photo(source, name, source.path, name, version, offset=None, size=size, refused=refused)


def _in_bucket(source: Source) -> Iterator[Photo]:
    place = storage.open_prefix(source.path)
    place.check()
    for entry in place.list(""):
        refused = _by_name(entry.name)
        try:
            storage.base.checked(entry.name)
        except storage.StorageError as error:
            refused = str(error)
        yield _photo(
            source, entry.name, source.path, entry.name, entry.version, offset=None, size=entry.size, refused=refused
        )


def _in_tar(source: Source) -> Iterator[Photo]:
    place, key, entry = _object(source.path)
    try:
        with _opened(place, key, entry.size) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if member.isdir():
                    continue
                name = PurePosixPath(member.name).as_posix()
                refused = _by_name(name) if member.isreg() else "a link or another special file"
                # Nothing is ever extracted, so a name like ../../x can do no harm.
                yield _photo(
                    source, name, place.url, key, entry.version,
                    offset=member.offset_data, size=member.size, refused=refused,
                )  # fmt: skip
                tar.members = []  # tarfile keeps a kilobyte of each member otherwise
    except OSError as error:
        raise IngestError(f"cannot read {source.path}: {error.strerror or error}") from error
    except tarfile.TarError as error:
        raise IngestError(
            f"{source.path} is neither a folder nor an uncompressed tar ({error}). Photos are read in any order,"
            " which a compressed tar does not allow: unpack it or decompress it first."
        ) from error


def _in_record_file(source: Source) -> Iterator[Photo]:
    place, key, entry = _object(source.path)
    _, index_key, index = _object(source.path.removesuffix(".rec") + ".idx")
    windowed = _Windowed(place, key, entry.size)

    def in_order(offset: int, length: int) -> bytes:
        windowed.seek(offset)
        return windowed.read(length)

    try:
        found = recordio.entries(
            place.read(index_key).decode("ascii", "replace"),
            entry.size,
            lambda offset, length: place.read(key, start=offset, length=length),
            whole=in_order if storage.is_s3(source.path) else None,
        )
    except recordio.RecordError as error:
        raise IngestError(f"{source.path} and its .idx are not a RecordIO pair of InsightFace: {error}") from error
    version = f"{entry.version} {index.version}"
    for picture in found:
        name = f"{picture.person:06d}/{picture.number:08d}"
        yield _photo(
            source, name, place.url, key, version, offset=picture.offset, size=picture.size, record=True
        )  # fmt: skip


def _object(path: str) -> tuple[storage.Prefix, str, storage.Entry]:
    """A file or object that is a source by itself: the place it lies in, its name there, and its entry."""
    url, _, name = path.rpartition("/")
    if not storage.is_s3(path):
        url, name = str(Path(path).parent), Path(path).name
    place = storage.open_prefix(url)
    if storage.is_s3(path):
        place.check()
        found = next((entry for entry in place.list(name) if entry.name == name), None)
        if found is None:
            raise IngestError(f"cannot read {path}: there is no such object")
        return place, name, found
    try:
        status = Path(path).stat()
    except OSError as error:
        raise IngestError(f"cannot read {path}: {error.strerror}") from error
    return place, name, storage.Entry(name, status.st_size, str(status.st_mtime_ns))


def _opened(place: storage.Prefix, key: str, size: int) -> IO[bytes]:
    if isinstance(place, storage.Folder):
        return open(place.path / key, "rb")
    return io.BufferedReader(_Windowed(place, key, size), 4096)


class _Windowed(io.RawIOBase):
    """An object of a store as a file that is read forwards, a large range at a time."""

    def __init__(self, place: storage.Prefix, key: str, size: int) -> None:
        self._place, self._key, self._size = place, key, size
        self._position, self._start, self._window = 0, 0, b""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def tell(self) -> int:
        return self._position

    def read(self, size: int = -1) -> bytes:
        size = self._size - self._position if size < 0 else size
        inside = self._position - self._start
        if inside < 0 or inside + size > len(self._window):
            self._start = self._position
            length = min(max(size, _WINDOW), max(0, self._size - self._position))
            self._window = self._place.read(self._key, start=self._start, length=length) if length else b""
            inside = 0
        data = self._window[inside : inside + size]
        self._position += len(data)
        return data

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def read_landmarks(path: Location | os.PathLike[str]) -> dict[str, Landmarks | None]:
    """A landmarks file: one json object a line with ``file``, ``landmarks`` [[x, y] * 5], perhaps ``size`` [w, h]
    and ``prob``.

    Returns:
        Name to landmarks; None where the file says that there are none.

    Raises:
        IngestError: the file is unreadable, or a line is malformed (named by its number).
        storage.StorageError: it is in S3, which does not answer or refuses.
    """
    place, key, _ = _object(os.fspath(path))
    found: dict[str, Landmarks | None] = {}
    for number, line in enumerate(place.read(key).decode("utf-8").split("\n"), start=1):
        if line.strip():
            try:
                name, landmarks = _parse(json.loads(line))
            except (ValueError, KeyError, TypeError) as error:
                raise IngestError(
                    f"{path}, line {number}: expected file and landmarks [[x, y] * 5]: {error!r}"
                ) from error
            if name in found:
                raise IngestError(f"{path}, line {number}: {name} has landmarks twice")
            found[name] = landmarks
    return found


def _parse(row: dict[str, Any]) -> tuple[str, Landmarks | None]:
    name = str(row["file"])
    if row.get("landmarks") is None:
        return name, None
    points = np.array(row["landmarks"], dtype=np.float64)
    if points.shape != (5, 2) or not np.isfinite(points).all():
        raise ValueError("not five finite points")
    size = row.get("size")
    confidence = row.get("prob")
    return name, Landmarks(
        points,
        (int(size[0]), int(size[1])) if size is not None else None,
        float(confidence) if confidence is not None else None,
    )
