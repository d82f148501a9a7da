"""InsightFace's RecordIO pairs: ``faces.rec`` holds records, ``faces.idx`` says where each begins.

The form in which CASIA-WebFace, MS1M and others are passed around. MXNet, which wrote it, is retired; so it is read
here.

- ``.idx``: a line a record, ``number TAB offset``.
- ``.rec``: records one after another, each ``magic uint32``, ``length uint32`` (three bits flag, 29 bits length), data,
  and padding to four bytes; all little-endian. Data that contain the magic at a multiple of four bytes were cut there:
  the parts have flags 1 (first), 2 (middle), 3 (last), and the magic belongs between them.
- Data: ``flag uint32, label float32, id uint64, id2 uint64``, then ``flag`` float32 labels in place of the one where
  ``flag`` is not 0, then the picture.
- InsightFace's record 0 is no picture: its two labels are the numbers of the first *identity record* and of the one
  after the last. Identity record k has no picture either: its two labels are the first picture of person k and the one
  after the last. Pictures are the records 1 to the first identity record. Where record 0 has one label, every record is
  a picture with its person's number as (first) label.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

MAGIC: Final = 0xCED7230A
_FRAME: Final = struct.Struct("<II")
_HEADER: Final = struct.Struct("<IfQQ")
_MARK: Final = struct.pack("<I", MAGIC)
# Bytes that are enough for a frame, a header and the labels of any record but one with hundreds of labels.
HEAD: Final = 64

Read = Callable[[int, int], bytes]
"""``read(offset, length)``: bytes of the ``.rec``, clipped to its end."""


class RecordError(ValueError):
    """The bytes are no record."""


@dataclass(frozen=True)
class Entry:
    """Where a picture's record lies, and whom it shows."""

    number: int  # in the .idx
    person: int
    offset: int
    size: int  # of the whole record, padding included


def payload(record: bytes) -> bytes:
    """A record's data, from its bytes: frame, data, padding, perhaps in several parts.

    Raises:
        RecordError: no record begins here, or it is cut off.
    """
    parts: list[bytes] = []
    position = 0
    while True:
        if position + _FRAME.size > len(record):
            raise RecordError("the record is cut off")
        magic, word = _FRAME.unpack_from(record, position)
        flag, length = word >> 29, word & ((1 << 29) - 1)
        if magic != MAGIC or flag > 3 or (flag in (2, 3)) != bool(parts):
            raise RecordError("no record begins here")
        position += _FRAME.size
        if position + length > len(record):
            raise RecordError("the record is cut off")
        parts.append(record[position : position + length])
        position += -(-length // 4) * 4
        if flag in (0, 3):
            return _MARK.join(parts)


def split(data: bytes) -> tuple[tuple[float, ...], bytes]:
    """Labels and picture of a record's data; raises :class:`RecordError`."""
    if len(data) < _HEADER.size:
        raise RecordError("the record has no header")
    flag, label, _, _ = _HEADER.unpack_from(data)
    end = _HEADER.size + 4 * flag
    if end > len(data):
        raise RecordError(f"the record says that it has {flag} labels, for which it is too short")
    labels = struct.unpack_from(f"<{flag}f", data, _HEADER.size) if flag else (label,)
    return labels, data[end:]


def picture(record: bytes) -> bytes:
    """The encoded picture in a record's bytes; raises :class:`RecordError`."""
    return split(payload(record))[1]


def entries(index: str, size: int, read: Read, *, whole: Read | None = None) -> list[Entry]:
    """The pictures of a pair.

    Args:
        index: the text of the ``.idx``.
        size: bytes of the ``.rec``.
        read: reads the ``.rec``.
        whole: the same for one pass over all heads in the order of the file; ``read`` where None.

    Raises:
        RecordError: the two do not belong together, or are not what the module describes.
    """
    offsets: dict[int, int] = {}
    for line, text in enumerate(index.splitlines(), start=1):
        fields = text.split("\t")
        if len(fields) != 2 or not fields[0].strip().isdecimal() or not fields[1].strip().isdecimal():
            raise RecordError(f"line {line} of the .idx is not a number, a tab and an offset")
        offsets[int(fields[0])] = int(fields[1])
    if not offsets:
        raise RecordError("the .idx is empty")
    starts = sorted(offsets.values())
    if starts[-1] + _FRAME.size + _HEADER.size > size or len(set(starts)) != len(starts):
        raise RecordError(f"the .idx names offsets that a .rec of {size} bytes does not have, or one twice")
    ends = dict(zip(starts, [*starts[1:], size], strict=True))

    def labels(number: int, by: Read) -> tuple[float, ...]:
        start = offsets[number]
        head = by(start, min(HEAD, ends[start] - start))
        if len(head) < _FRAME.size + _HEADER.size or _FRAME.unpack_from(head)[0] != MAGIC:
            raise RecordError(f"no record begins where the .idx says that number {number} does")
        flag = _HEADER.unpack_from(head, _FRAME.size)[0]
        if 4 * flag > len(head) - _FRAME.size - _HEADER.size:
            head = by(start, ends[start] - start)
            return split(payload(head))[0]
        return split(head[_FRAME.size :])[0]

    first = labels(0, read) if 0 in offsets else ()
    if len(first) >= 2:
        persons = _ranges(int(first[0]), int(first[1]), offsets, ends, read)
    else:
        whole = whole or read
        by_offset = sorted(offsets, key=lambda number: offsets[number])
        persons = {number: int(labels(number, whole)[0]) for number in by_offset}
    return [
        Entry(number, person, offsets[number], ends[offsets[number]] - offsets[number])
        for number, person in sorted(persons.items())
    ]


def _ranges(begin: int, end: int, offsets: dict[int, int], ends: dict[int, int], read: Read) -> dict[int, int]:
    """Picture to person, by the identity records ``begin`` .. ``end - 1``."""
    missing = next((number for number in range(begin, end) if number not in offsets), None)
    if begin >= end or missing is not None:
        raise RecordError(f"record 0 names identity records {begin} to {end - 1}; the .idx has no {missing or begin}")
    low = min(offsets[number] for number in range(begin, end))
    high = max(ends[offsets[number]] for number in range(begin, end))
    block = read(low, high - low)  # they lie side by side, so this is one read of some hundred kilobytes
    persons: dict[int, int] = {}
    for number in range(begin, end):
        start = offsets[number] - low
        of, _ = split(payload(block[start : ends[offsets[number]] - low]))
        if len(of) < 2:
            raise RecordError(f"identity record {number} names no range of pictures")
        for picture in range(int(of[0]), int(of[1])):
            if picture in persons or picture not in offsets or picture == 0:
                raise RecordError(f"identity record {number} names picture {picture}, which is another's or missing")
            persons[picture] = number - begin
    unnamed = next((n for n in offsets if 0 < n < begin and n not in persons), None)
    if unnamed is not None:
        raise RecordError(f"picture {unnamed} is in no identity record")
    return persons
