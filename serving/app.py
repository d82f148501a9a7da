"""The HTTP door: paths, negotiation, headers. Everything a request costs happens in :mod:`serving.engine`."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractContextManager
from importlib import resources
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from serving import metrics, openapi
from serving.bodies import Body, Parse, read_body, too_large
from serving.engine import Call, Edited, Engine, Operation
from serving.http_frame import Frame, body_stream, disconnected
from serving.options import DetectOptions, EditOptions, parse
from serving.problems import MalformedRequest, NotAcceptable, NotFound, NotReady

_MEDIA_TYPES: Final = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}

_PAGE: Final = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/app.js": ("app.js", "text/javascript; charset=utf-8"),
    "/style.css": ("style.css", "text/css; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
    "/handle.svg": ("handle.svg", "image/svg+xml"),
}
_PAGE_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
    "form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)


def build(engine: Engine) -> ASGIApp:
    """The ASGI application on an engine."""
    door = _Door(engine)
    routes = [
        Route("/v1/anonymize", door.edit("anonymize"), methods=["POST"]),
        Route("/v1/recover", door.edit("recover"), methods=["POST"]),
        Route("/v1/detect", door.detect, methods=["POST"]),
        Route("/v1/model", door.model, methods=["GET"]),
        Route("/healthz", door.healthz, methods=["GET"]),
        Route("/readyz", door.readyz, methods=["GET"]),
        Route("/metrics", door.metrics, methods=["GET"]),
        Route("/openapi.json", door.openapi, methods=["GET"]),
        *(Route(path, _page(*content), methods=["GET"]) for path, content in _PAGE.items()),
    ]
    return Frame(Router(routes, redirect_slashes=False, default=_nothing_here), engine.log)


async def _nothing_here(scope: Scope, receive: Receive, send: Send) -> None:
    raise NotFound("See /openapi.json for what there is.")


class _Door:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    # -- faces -----------------------------------------------------------------------------------------------------

    def edit(self, operation: Operation) -> Callable[[Request], Awaitable[Response]]:
        """The endpoint of ``anonymize`` or ``recover``."""

        async def endpoint(request: Request) -> Response:
            with self._call(operation, request) as call:
                as_json = _prefers_json(request.headers.get("accept"))
                read = await self._read(request, call)

                def work() -> tuple[bytes, Edited]:
                    body = read()
                    options = parse(EditOptions, body.fields)
                    edited = self._engine.edit(call, body.image, options)
                    return (_edited_json(edited, call) if as_json else edited.data), edited

                content, edited = await self._engine.run(call, work, lambda: disconnected(request.receive))
                call.facts["bytes_out"] = len(content)
            media_type = _MEDIA_TYPES[edited.format]
            return Response(
                content,
                media_type="application/json" if as_json else media_type,
                headers={
                    "X-Mien-Faces": str(len(edited.faces)),
                    "X-Mien-Model-Digest": edited.digest,
                    "Vary": "Accept",
                },
            )

        return endpoint

    async def detect(self, request: Request) -> Response:
        with self._call("detect", request) as call:
            read = await self._read(request, call)

            def work() -> tuple[bytes, str]:
                body = read()
                parse(DetectOptions, body.fields)
                found = self._engine.detect(call, body.image)
                faces = [
                    {
                        "box": face.box.tolist(),
                        "landmarks": face.landmarks.tolist(),
                        "confidence": face.confidence,
                    }
                    for face in found.faces
                ]
                document = {
                    "faces": faces,
                    "size": list(found.size),
                    "model_digest": found.digest,
                    "request_id": call.request_id,
                }
                return json.dumps(document).encode(), found.digest

            content, digest = await self._engine.run(call, work, lambda: disconnected(request.receive))
            call.facts["bytes_out"] = len(content)
        return Response(content, media_type="application/json", headers={"X-Mien-Model-Digest": digest})

    def _call(self, operation: Operation, request: Request) -> AbstractContextManager[Call]:
        return self._engine.request(
            operation,
            "http",
            request.state.request_id,
            authorization=request.headers.get("authorization"),
            peer=_peer(request),
            uploading=True,
        )

    async def _read(self, request: Request, call: Call) -> Parse:
        """The request's body, in memory and within the limit."""
        limit = self._engine.settings.max_body_bytes
        announced = request.headers.get("content-length", "0")
        if not announced.isascii() or not announced.isdigit():
            raise MalformedRequest("The content length is not a number.")
        if int(announced) > limit:
            raise too_large(limit)
        settings = self._engine.settings
        stream = body_stream(
            request.receive, stall=settings.stall_timeout, rate=settings.min_upload_rate, deadline=call.deadline
        )
        stream = self._counted(call, stream)
        read = await read_body(stream, request.headers.get("content-type"), limit=limit)

        def counted() -> Body:
            body = read()
            call.facts["bytes_in"] = len(body.image)
            return body

        return counted

    async def _counted(self, call: Call, stream: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        async for chunk in stream:
            self._engine.receive(call, len(chunk))
            yield chunk

    # -- service ---------------------------------------------------------------------------------------------------

    async def model(self, request: Request) -> Response:
        self._engine.gate.identify(request.headers.get("authorization"), _peer(request))
        served, settings = self._engine.models.current, self._engine.settings
        if served is None:
            raise NotReady("No model is loaded.")
        model = served.model
        return _json(
            {
                "digest": model.digest,
                "version": self._engine.version,
                "model_version": served.version,
                "source": served.source,
                "since": served.since.isoformat(timespec="seconds"),
                "follows": self._engine.models.follows,
                "failure": self._engine.models.failure,
                "architecture": model.config.architecture.name,
                "bits": model.bits,
                "crop_size": model.config.crop_size,
                "images_seen": model.config.images_seen,
                "realm": settings.realm,
                "limits": {
                    "body_bytes": settings.max_body_bytes,
                    "pixels": settings.max_pixels,
                    "faces": settings.max_faces,
                },
            }
        )

    async def healthz(self, _: Request) -> Response:
        failed = self._engine.status == "failed"
        return PlainTextResponse(f"{self._engine.status}\n", status_code=503 if failed else 200)

    async def readyz(self, _: Request) -> Response:
        ready = self._engine.status == "ready"
        return PlainTextResponse(f"{self._engine.status}\n", status_code=200 if ready else 503)

    async def metrics(self, _: Request) -> Response:
        return Response(self._engine.metrics.render(), headers={"Content-Type": metrics.CONTENT_TYPE})

    async def openapi(self, _: Request) -> Response:
        return _json(openapi.document(self._engine.settings, self._engine.version))


def _peer(request: Request) -> str:
    return request.client.host if request.client else ""


def _json(document: Any) -> Response:
    return Response(json.dumps(document).encode(), media_type="application/json")


def _edited_json(edited: Edited, call: Call) -> bytes:
    return json.dumps(
        {
            "image": base64.b64encode(edited.data).decode(),
            "media_type": _MEDIA_TYPES[edited.format],
            "faces": [{"box": face.box} for face in edited.faces],
            "model_digest": edited.digest,
            "request_id": call.request_id,
        }
    ).encode()


def _prefers_json(accept: str | None) -> bool:
    """Whether ``Accept`` (RFC 9110, section 12.5.1) ranks JSON above a picture; a tie goes to the one named outright.

    Raises:
        NotAcceptable: it allows neither.
    """
    if not accept or not accept.strip():
        return False
    picture = document = 0.0
    named = False
    for item in accept.split(","):
        media_range, *parameters = (part.strip().lower() for part in item.split(";"))
        weight = 1.0
        for parameter in parameters:
            if parameter.startswith("q="):
                try:
                    weight = min(1.0, max(0.0, float(parameter[2:])))
                except ValueError:
                    weight = 0.0
        if media_range == "*/*" or media_range.startswith("image/"):
            picture = max(picture, weight)
        elif media_range in ("application/json", "application/*"):
            document = max(document, weight)
            named = named or media_range == "application/json"
    if not picture and not document:
        raise NotAcceptable("The answer can be a picture (image/*) or application/json.")
    return document > picture or (document == picture and named and "image/" not in accept.lower())


def _page(name: str, media_type: str) -> Callable[[Request], Awaitable[Response]]:
    """One file of the web page, read once and kept in memory."""
    content = resources.files("serving").joinpath("page", name).read_bytes()
    tag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
    headers = {
        "Cache-Control": "no-cache",
        "Content-Security-Policy": _PAGE_POLICY,
        "Cross-Origin-Opener-Policy": "same-origin",
        "ETag": tag,
        "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
    }

    async def endpoint(request: Request) -> Response:
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(content, media_type=media_type, headers=headers)

    return endpoint
