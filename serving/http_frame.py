"""The frame around every HTTP exchange: request ids, safe headers, one error format, no half-read uploads."""

from __future__ import annotations

import asyncio
import json
import re
import time
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Final

import structlog
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving import logs
from serving.problems import (
    PROBLEM_TYPE,
    CallerGone,
    InternalError,
    MethodNotAllowed,
    NotFound,
    UploadStalled,
    detail_of,
    problem_of,
    retry_after_of,
)

REQUEST_ID_HEADER: Final = "X-Request-Id"
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")

_SAFE_HEADERS: Final[dict[bytes, bytes]] = {
    b"cache-control": b"no-store",
    b"content-security-policy": b"default-src 'none'; frame-ancestors 'none'",
    b"cross-origin-resource-policy": b"same-origin",
    b"referrer-policy": b"no-referrer",
    b"x-content-type-options": b"nosniff",
}

# How much of an upload is read and thrown away after it was refused; see Frame.
_DRAIN_BYTES: Final = 64 * 1024 * 1024
_DRAIN_SECONDS: Final = 5.0


def problem_response(error: Exception, request_id: str) -> Response:
    """The answer to an error: ``application/problem+json`` (RFC 9457), nothing quoted from the request."""
    problem = problem_of(error)
    document = {
        "type": problem.type,
        "title": problem.title,
        "status": problem.status,
        "detail": detail_of(error),
        "request_id": request_id,
    }
    retry_after = retry_after_of(error)
    headers = {"Retry-After": str(retry_after)} if retry_after is not None else {}
    if problem.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return Response(json.dumps(document).encode(), status_code=problem.status, media_type=PROBLEM_TYPE, headers=headers)


class Frame:
    """ASGI middleware, outermost of ours.

    Gives every request an id (the caller's ``X-Request-Id`` where it is a plain one), adds headers that keep answers
    out of caches and frames, turns exceptions into problems, and lets none reach the server, whose traceback would
    print their messages.

    An answer that is sent before the upload was read (413, 415, 429, ...) would be lost: the server closes the
    connection on unread bytes and the caller sees a reset instead of the answer. So the rest is read and thrown away
    first, within bounds, while the answer is already on its way.
    """

    def __init__(self, app: ASGIApp, log: structlog.typing.FilteringBoundLogger) -> None:
        self._app = app
        self._log = log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        unread = b"transfer-encoding" in headers or headers.get(b"content-length", b"0") != b"0"
        if b"expect" in headers:
            unread = False  # the caller waits for leave to send, and gets the answer instead
        started = False

        async def receive_counted() -> Message:
            nonlocal unread
            message = await receive()
            if message["type"] == "http.disconnect" or not message.get("more_body", False):
                unread = False
            return message

        async def send_framed(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                present = {name.lower() for name, _ in message["headers"]}
                message["headers"] = [
                    *message["headers"],
                    (REQUEST_ID_HEADER.lower().encode(), request_id.encode()),
                    *((name, value) for name, value in _SAFE_HEADERS.items() if name not in present),
                ]
            elif message["type"] == "http.response.body" and not message.get("more_body", False) and unread:
                await send({**message, "more_body": True})
                await _drain(receive_counted, lambda: unread)
                message = {"type": "http.response.body", "body": b""}
            await send(message)

        try:
            await self._app(scope, receive_counted, send_framed)
        except Exception as error:
            if started:
                # The answer is under way and cannot be taken back; ending the connection is all that is left to say.
                self._log.error("answer_broken", request_id=request_id, **logs.describe(error))
                raise ConnectionAbortedError("answer broken off") from None
            shown, extra = _translate(error)
            if problem_of(shown).status == 500 and not isinstance(shown, InternalError):
                self._log.error("unexpected", request_id=request_id, **logs.describe(error))
            response = problem_response(shown, request_id)
            response.headers.update(extra)
            await response(scope, receive_counted, send_framed)


def _translate(error: Exception) -> tuple[Exception, dict[str, str]]:
    """Starlette's own errors as ours, with the headers they carry."""
    if isinstance(error, HTTPException):
        extra = dict(error.headers or {})
        if error.status_code == 405:
            return MethodNotAllowed(f"Use one of: {extra.get('Allow', 'another method')}."), extra
        if error.status_code == 404:
            return NotFound("See /openapi.json for what there is."), extra
    return error, {}


async def _drain(receive: Receive, unread: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _DRAIN_SECONDS
    left = _DRAIN_BYTES
    while unread() and left > 0:
        try:
            message = await asyncio.wait_for(receive(), max(0.0, deadline - time.monotonic()))
        except TimeoutError:
            return
        left -= len(message.get("body", b""))


async def body_stream(receive: Receive, *, stall: float, rate: int, deadline: float) -> AsyncIterator[bytes]:
    """The chunks of a request's body.

    Args:
        receive: of the ASGI request.
        stall: seconds without a byte after which the upload is given up.
        rate: bytes a second that it must have averaged whenever it is at least ``stall`` seconds old: a byte now and
            then keeps no upload alive.
        deadline: ``time.monotonic()`` at which it must be complete.

    Raises:
        UploadStalled: it was not in time.
        CallerGone: the connection was closed before the end.
    """
    began, received = time.monotonic(), 0
    while True:
        enough_until = began + max(stall, (received + 1) / rate) if rate else deadline
        patience = min(stall, deadline - time.monotonic(), enough_until - time.monotonic())
        try:
            message = await asyncio.wait_for(receive(), max(0.0, patience))
        except TimeoutError:
            raise UploadStalled("The upload stood still, was too slow or took too long.") from None
        if message["type"] == "http.disconnect":
            raise CallerGone("The connection was closed during the upload.")
        chunk = message.get("body", b"")
        received += len(chunk)
        yield chunk
        if not message.get("more_body", False):
            return


async def disconnected(receive: Receive) -> None:
    """Returns when the caller has closed the connection; for use after the body was read."""
    while (await receive())["type"] != "http.disconnect":
        pass
