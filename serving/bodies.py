"""A request's body, read into memory and nowhere else.

Starlette's and BentoML's form parsers hand parts over 1 MiB to temporary files, and BentoML's file fields fetch URLs
they are given. So the stream is parsed here: bounded while it is read, field by field, bytes only.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from serving.options import unique
from serving.problems import BodyTooLarge, MalformedRequest, UnsupportedMediaType

MAX_PARTS: Final = 16
MAX_FIELD_BYTES: Final = 8 * 1024
"""Largest text field; a password of the longest kind (1,024 characters) has at most 4 KiB."""


@dataclass(frozen=True)
class Body:
    """What a caller sent: the picture's bytes and the other fields, as text (form) or JSON values."""

    image: bytes = field(repr=False)
    fields: Mapping[str, Any] = field(repr=False)


Parse = Callable[[], Body]


async def read_body(stream: AsyncIterator[bytes], content_type: str | None, *, limit: int) -> Parse:
    """Read a whole body and return what parses it.

    Reading happens here, on the event loop; the returned function does what may take long (JSON and base64 of a large
    picture) and is meant for a worker thread.

    Args:
        stream: the body's chunks.
        content_type: the request's ``Content-Type``.
        limit: most bytes to accept.

    Raises:
        UnsupportedMediaType: neither ``multipart/form-data`` nor ``application/json``.
        BodyTooLarge: more than ``limit`` bytes arrived; the rest was not read.
        MalformedRequest: not well-formed multipart.
    """
    media_type, options = parse_options_header(content_type)
    if media_type == b"multipart/form-data":
        form = _Form(options.get(b"boundary"))
        await _feed(stream, form.write, limit)
        return form.finish
    if media_type == b"application/json":
        document = bytearray()
        await _feed(stream, document.extend, limit)
        return lambda: _parse_json(document)
    raise UnsupportedMediaType("Send multipart/form-data or application/json.")


async def _feed(stream: AsyncIterator[bytes], write: Callable[[bytes], object], limit: int) -> None:
    received = 0
    async for chunk in stream:
        received += len(chunk)
        if received > limit:
            raise too_large(limit)
        write(chunk)


def too_large(limit: int) -> BodyTooLarge:
    """The error for a body over ``limit`` bytes, whether announced or read."""
    return BodyTooLarge(f"A request may have at most {limit:,} bytes.")


class _Form:
    """multipart/form-data (RFC 7578) into memory."""

    def __init__(self, boundary: bytes | None) -> None:
        if not boundary:
            raise MalformedRequest("The multipart content type names no boundary.")
        self._parts: dict[str, bytearray] = {}
        self._name = b""
        self._value = b""
        self._disposition = b""
        self._part = bytearray()
        self._bound = 0
        self._ended = False
        try:
            self._parser = MultipartParser(
                boundary,
                {
                    "on_part_begin": self._begin,
                    "on_header_field": self._header_field,
                    "on_header_value": self._header_value,
                    "on_header_end": self._header_end,
                    "on_headers_finished": self._headers_finished,
                    "on_part_data": self._data,
                    "on_end": self._end,
                },
                max_header_count=8,
                max_header_size=4096,
            )
        except FormParserError:
            raise MalformedRequest("The multipart boundary is not a valid one.") from None

    def write(self, chunk: bytes) -> None:
        try:
            self._parser.write(chunk)
        except FormParserError:
            # Its message quotes the body.
            raise MalformedRequest("The body is not well-formed multipart/form-data.") from None

    def finish(self) -> Body:
        if not self._ended:
            raise MalformedRequest("The multipart body ends before its closing boundary.")
        image = self._parts.pop("image", None)
        if image is None:
            raise MalformedRequest("The field 'image' is missing.")
        try:
            fields = {name: part.decode("utf-8") for name, part in self._parts.items()}
        except UnicodeDecodeError:
            raise MalformedRequest("A text field is not UTF-8.") from None
        return Body(bytes(image), fields)

    def _begin(self) -> None:
        if len(self._parts) >= MAX_PARTS:
            raise MalformedRequest(f"The form has more than {MAX_PARTS} fields.")
        self._disposition = b""

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_end(self) -> None:
        if self._name.lower() == b"content-disposition":
            self._disposition = self._value
        self._name = self._value = b""

    def _headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition.decode("latin-1"))
        name = options.get(b"name", b"").decode("latin-1")
        if not name:
            raise MalformedRequest("A part of the form has no name.")
        if name in self._parts:
            raise MalformedRequest("A field of the form appears twice.")
        self._part = self._parts[name] = bytearray()
        # The picture is bounded by the body's limit alone.
        self._bound = 0 if name == "image" else MAX_FIELD_BYTES

    def _data(self, data: bytes, start: int, end: int) -> None:
        self._part += memoryview(data)[start:end]
        if self._bound and len(self._part) > self._bound:
            raise MalformedRequest(f"A text field is longer than {self._bound:,} bytes.")

    def _end(self) -> None:
        self._ended = True


def _parse_json(document: bytearray) -> Body:
    try:
        fields = json.loads(document, object_pairs_hook=unique)
    except (ValueError, RecursionError):
        raise MalformedRequest("The body is not valid JSON.") from None
    if not isinstance(fields, dict):
        raise MalformedRequest("The body is not a JSON object.")
    text = fields.pop("image", None)
    if not isinstance(text, str):
        raise MalformedRequest("The field 'image' is missing; give the picture's bytes in base64.")
    try:
        return Body(base64.b64decode(text, validate=True), fields)
    except (binascii.Error, ValueError):
        raise MalformedRequest("The field 'image' is not base64 (RFC 4648, no line breaks, no data: prefix).") from None
