"""Photos where they lie: a folder or a tar, in the layouts of the usual data sets.

| layout | looks like | identity |
| --- | --- | --- |
| people, lfw, casia-webface | ``.../PERSON/photo.jpg`` | the folder a photo lies in |
| unlabelled, ffhq | any | none |
"""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final

import numpy as np

from mien.geometry import Points
from services.ingest.config import IngestError, Source

EXTENSIONS: Final = frozenset({".jpg", ".jpeg", ".png", ".webp", ".avif"})


@dataclass(frozen=True)
class Landmarks:
    """A line of a landmarks file."""

    points: Points  # float [5, 2], pixels of the photo
    size: tuple[int, int] | None = None  # (width, height) of the photo they were found in, where the file says
    confidence: float | None = None  # the detector's, in [0, 1], where the file says


@dataclass(frozen=True)
class Photo:
    """A file of a source, not yet read. Cheap to send to another process."""

    source: str
    name: str  # inside the source, with forward slashes
    identity: str | None  # namespace/folder, unique over all sources
    file: Path
    offset: int | None  # of the bytes inside a tar; None for a file of its own
    size: int
    regular: bool = True

    def read(self) -> bytes:
        """The file's bytes; raises OSError."""
        with open(self.file, "rb") as file:
            if self.offset is not None:
                file.seek(self.offset)
                return file.read(self.size)
            return file.read()


def photos(source: Source) -> list[Photo]:
    """Every file of a source, sorted by name.

    Raises:
        IngestError: the source is missing, unreadable, or a compressed tar.
    """
    found = list(_in_folder(source) if source.path.is_dir() else _in_tar(source))
    if not found:
        raise IngestError(f"{source.path} holds no files")
    return sorted(found, key=lambda photo: photo.name)


def _in_folder(source: Source) -> Iterator[Photo]:
    def stop(error: OSError) -> None:
        # os.walk would pass over an unreadable folder in silence.
        raise IngestError(f"cannot read the folder {error.filename}: {error.strerror}") from error

    for folder, _, files in os.walk(source.path, onerror=stop):
        for file in files:
            path = Path(folder, file)
            name = path.relative_to(source.path).as_posix()
            regular = path.is_file()
            size = path.stat().st_size if regular else 0
            yield Photo(source.name, name, _identity(source, name), path, None, size, regular)


def _in_tar(source: Source) -> Iterator[Photo]:
    try:
        with tarfile.open(source.path, "r:") as tar:
            for member in tar:
                if member.isdir():
                    continue
                name = PurePosixPath(member.name).as_posix()
                identity = _identity(source, name)
                # Nothing is ever extracted, so a name like ../../x can do no harm.
                yield Photo(
                    source.name, name, identity, source.path, member.offset_data, member.size, regular=member.isreg()
                )
    except OSError as error:
        raise IngestError(f"cannot read {source.path}: {error.strerror or error}") from error
    except tarfile.TarError as error:
        raise IngestError(
            f"{source.path} is neither a folder nor an uncompressed tar ({error}). Photos are read in any order,"
            " which a compressed tar does not allow: unpack it or decompress it first."
        ) from error


def _identity(source: Source, name: str) -> str | None:
    folder = PurePosixPath(name).parent.as_posix()
    return f"{source.namespace or source.name}/{folder}" if source.labelled and folder != "." else None


def read_landmarks(path: Path) -> dict[str, Landmarks | None]:
    """A landmarks file: one json object a line with ``file``, ``landmarks`` [[x, y] * 5], perhaps ``size`` [w, h]
    and ``prob``.

    Returns:
        Name to landmarks; None where the file says that there are none.

    Raises:
        IngestError: the file is unreadable, or a line is malformed (named by its number).
    """
    found: dict[str, Landmarks | None] = {}
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
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
    except OSError as error:
        raise IngestError(f"cannot read {path}: {error.strerror}") from error
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
