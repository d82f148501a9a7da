"""The bytes of photos, a chunk at a time: neighbours in a tar or rec by one read, objects in S3 side by side."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Final

import storage
from services.ingest import recordio
from services.ingest.sources import Photo

# Reading this many bytes that nobody wants costs less than another request.
_GAP: Final = 64 << 10
_LONGEST: Final = 16 << 20
_AT_ONCE: Final = 16  # requests; a store answers after milliseconds, whatever it is asked

Bytes = bytes | Exception
"""A photo's bytes, or why it has none: OSError where its file cannot be read, RecordError where it is no record."""


def read(photos: Sequence[Photo]) -> list[Bytes]:
    """The bytes of some photos, in their order.

    Raises:
        storage.StorageError: a store does not give what it listed. Unlike a file that cannot be read, this is no
            property of a photo, and must not become one: the run stops, and goes on when it is started again.
    """
    results: list[Bytes] = [b""] * len(photos)
    jobs: list[Callable[[], None]] = []
    inside: dict[tuple[str, str], list[int]] = defaultdict(list)
    for i, photo in enumerate(photos):
        if photo.offset is None:
            jobs.append(lambda i=i: _whole(photos, i, results))  # type: ignore[misc]
        else:
            inside[photo.place, photo.object].append(i)
    for members in inside.values():
        jobs += [lambda group=group: _range(photos, group, results) for group in _groups(photos, members)]  # type: ignore[misc]
    if photos and storage.is_s3(photos[0].place):
        list(_requests().map(lambda job: job(), jobs))  # raises what one of them raised
    else:
        for job in jobs:
            job()
    return results


def _groups(photos: Sequence[Photo], members: list[int]) -> list[list[int]]:
    """Photos of one object, in groups whose bytes lie close together."""
    groups: list[list[int]] = []
    begin = end = 0
    for i in sorted(members, key=lambda i: photos[i].offset or 0):
        start = photos[i].offset or 0
        if not groups or start > end + _GAP or start + photos[i].size - begin > _LONGEST:
            groups.append([])
            begin = start
        groups[-1].append(i)
        end = start + photos[i].size
    return groups


def _whole(photos: Sequence[Photo], i: int, results: list[Bytes]) -> None:
    photo = photos[i]
    if storage.is_s3(photo.place):
        results[i] = _place(photo.place).read(photo.object)
        return
    try:
        results[i] = Path(photo.place, photo.object).read_bytes()
    except OSError as error:
        results[i] = error


def _range(photos: Sequence[Photo], group: list[int], results: list[Bytes]) -> None:
    first, last = photos[group[0]], photos[group[-1]]
    start = first.offset or 0
    length = (last.offset or 0) + last.size - start
    if storage.is_s3(first.place):
        data = _place(first.place).read(first.object, start=start, length=length)
    else:
        try:
            with open(Path(first.place, first.object), "rb") as file:
                file.seek(start)
                data = file.read(length)
        except OSError as error:
            for i in group:
                results[i] = error
            return
    for i in group:
        at = (photos[i].offset or 0) - start
        part = data[at : at + photos[i].size]
        try:
            results[i] = recordio.picture(part) if photos[i].record else part
        except recordio.RecordError as error:
            results[i] = error


@cache
def _place(url: str) -> storage.Prefix:
    return storage.open_prefix(url)


@cache
def _requests() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="read")
