"""The gRPC door: ``mien.v1.FaceIdentity`` on the engine of the HTTP one, in the same process and event loop.

See ``serving/proto/mien/v1/face_identity.proto`` for what is promised. Bytes come in as messages bounded by gRPC
itself; everything else (keys, limits, queue, deadlines) is the engine's.
"""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeVar

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from pydantic import SecretStr

from mien.v1 import face_identity_pb2 as pb
from mien.v1 import face_identity_pb2_grpc as stubs
from serving import live, logs
from serving.engine import Call, Codes, Edit, Engine, check_passwords
from serving.options import EditOptions, parse
from serving.problems import (
    InternalError,
    MalformedRequest,
    UploadStalled,
    detail_of,
    problem_of,
    retry_after_of,
)

if TYPE_CHECKING:
    from mien.pictures import FaceGeometry, Geometry, Picture
    from mien.video.live import LiveResult

SERVICE: Final = pb.DESCRIPTOR.services_by_name["FaceIdentity"].full_name
_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")
_MEDIA_TYPES: Final = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
_FORMATS: Final = {
    pb.IMAGE_FORMAT_UNSPECIFIED: "png",
    pb.IMAGE_FORMAT_PNG: "png",
    pb.IMAGE_FORMAT_JPEG: "jpeg",
    pb.IMAGE_FORMAT_WEBP: "webp",
}
_STATES: Final = {
    "detected": pb.TrackedFace.STATE_DETECTED,
    "flow": pb.TrackedFace.STATE_FLOW,
    "held": pb.TrackedFace.STATE_HELD,
}
# Room in a message for what is not the picture.
_ENVELOPE: Final = 64 * 1024
# How often the health service follows the engine, seconds.
_HEALTH_EVERY: Final = 0.2
T = TypeVar("T")
Context = grpc.aio.ServicerContext


class GrpcDoor:
    """The server; made and closed on the event loop that it serves on."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._health = health.aio.HealthServicer()
        self._follow: asyncio.Task[None] | None = None
        self._server: grpc.aio.Server | None = None
        self.port = 0

    async def open(self, host: str, port: int) -> None:
        """Bind and serve.

        Args:
            host, port: where; any free port if 0. :attr:`port` tells.

        Raises:
            OSError: the address cannot be had, or a file of TLS not be read.
        """
        settings = self._engine.settings
        server = grpc.aio.server(
            options=[
                # Two services that share a port by accident would share its callers.
                ("grpc.so_reuseport", 0),
                ("grpc.max_receive_message_length", settings.max_body_bytes + _ENVELOPE),
                ("grpc.max_send_message_length", -1),
                ("grpc.max_metadata_size", 16 * 1024),
                ("grpc.max_concurrent_streams", 256),
                ("grpc.keepalive_time_ms", 30_000),
                ("grpc.keepalive_timeout_ms", 10_000),
                ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
            ],
            # Above what the engine admits, which refuses with a reason and a time; this only bounds messages in memory.
            maximum_concurrent_rpcs=settings.workers
            + settings.queue_size
            + settings.max_streams
            + settings.max_uploads,
        )
        stubs.add_FaceIdentityServicer_to_server(Servicer(self._engine), server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            credentials = self._credentials()
            if credentials is not None:
                self.port = server.add_secure_port(address, credentials)
            else:
                self.port = server.add_insecure_port(address)
        except RuntimeError:
            self.port = 0
        if not self.port:
            raise OSError(f"gRPC cannot have {address} (MIEN_GRPC_PORT); is something else there?")
        await self._tell(health_pb2.HealthCheckResponse.NOT_SERVING)
        await server.start()
        self._server = server
        self._follow = asyncio.ensure_future(self._follow_status())
        self._engine.log.info("grpc_ready", address=host, port=self.port, tls=credentials is not None)

    async def close(self) -> None:
        """Refuse new calls, let those under way finish."""
        if self._follow is not None:
            self._follow.cancel()
        await self._health.enter_graceful_shutdown()
        if self._server is not None:
            await self._server.stop(self._engine.settings.request_timeout)

    def _credentials(self) -> grpc.ServerCredentials | None:
        settings = self._engine.settings
        if settings.grpc_tls_cert is None or settings.grpc_tls_key is None:
            return None
        authorities = settings.grpc_tls_client_ca.read_bytes() if settings.grpc_tls_client_ca else None
        return grpc.ssl_server_credentials(
            [(settings.grpc_tls_key.read_bytes(), settings.grpc_tls_cert.read_bytes())],
            root_certificates=authorities,
            require_client_auth=authorities is not None,
        )

    async def _follow_status(self) -> None:
        said = None
        while True:
            ready = self._engine.status == "ready"
            now = health_pb2.HealthCheckResponse.SERVING if ready else health_pb2.HealthCheckResponse.NOT_SERVING
            if now != said:
                await self._tell(now)
                said = now
            await asyncio.sleep(_HEALTH_EVERY)

    async def _tell(self, status: Any) -> None:
        for name in ("", SERVICE):
            await self._health.set(name, status)


@dataclass(frozen=True)
class _Stream:
    """What a stream's first message settled."""

    operation: Edit
    options: EditOptions
    raw: bool
    fail_without_face: bool
    codes: Codes
    tracking: live.Tracking | None


class Servicer(stubs.FaceIdentityServicer):
    """The methods; see the .proto."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def Anonymize(self, request: pb.EditRequest, context: Context) -> pb.EditResponse:  # noqa: N802
        return await self._edit("anonymize", request, context)

    async def Recover(self, request: pb.EditRequest, context: Context) -> pb.EditResponse:  # noqa: N802
        return await self._edit("recover", request, context)

    async def _edit(self, operation: Edit, request: pb.EditRequest, context: Context) -> pb.EditResponse:
        async def answer(entry: _Entry) -> pb.EditResponse:
            with entry.call(operation) as call:
                call.facts["bytes_in"] = len(request.image)
                options = _options(request.options, frames=False)
                edited = await self._engine.run(call, lambda: self._engine.edit(call, request.image, options))
                call.facts["bytes_out"] = len(edited.data)
                return pb.EditResponse(
                    image=edited.data,
                    media_type=_MEDIA_TYPES[edited.format],
                    faces=[_face(face) for face in edited.faces],
                    model_digest=edited.digest,
                    request_id=call.request_id,
                )

        return await self._guarded(context, answer)

    async def Detect(self, request: pb.DetectRequest, context: Context) -> pb.DetectResponse:  # noqa: N802
        async def answer(entry: _Entry) -> pb.DetectResponse:
            with entry.call("detect") as call:
                call.facts["bytes_in"] = len(request.image)
                found = await self._engine.run(call, lambda: self._engine.detect(call, request.image))
                return pb.DetectResponse(
                    faces=[
                        pb.DetectedFace(
                            box=_box(face.box.tolist()),
                            landmarks=[pb.Point(x=x, y=y) for x, y in face.landmarks.tolist()],
                            confidence=face.confidence,
                        )
                        for face in found.faces
                    ],
                    width=found.size[0],
                    height=found.size[1],
                    model_digest=found.digest,
                    request_id=call.request_id,
                )

        return await self._guarded(context, answer)

    async def TransformStream(  # noqa: N802
        self, requests: AsyncIterator[pb.TransformStreamRequest], context: Context
    ) -> AsyncIterator[pb.TransformStreamResponse]:
        entry = _Entry(self._engine, context)
        await entry.open()
        try:
            async for response in self._frames(entry, requests):
                yield response
        except (asyncio.CancelledError, GeneratorExit):
            raise
        except Exception as error:
            await self._abort(context, error, entry)

    async def _frames(
        self, entry: _Entry, requests: AsyncIterator[pb.TransformStreamRequest]
    ) -> AsyncIterator[pb.TransformStreamResponse]:
        engine = self._engine
        first = await _next(requests, engine.settings.request_timeout)
        if first is None or first.WhichOneof("message") != "options":
            raise MalformedRequest("The first message of a stream holds its options.")
        operation = _operation(first.options)
        with engine.stream(), entry.call(operation, "grpc-stream", endless=True) as call:
            call.facts.update(bytes_in=0, bytes_out=0, faces=0, frames=0)
            stream = await self._begin(call, operation, first.options)
            async with aclosing(
                self._each(call, stream, requests)
                if stream.tracking is None
                else self._followed(call, stream, stream.tracking, requests)
            ) as responses:
                async for response in responses:
                    call.facts["frames"] += 1
                    call.facts["faces"] += len(response.geometry.faces)
                    call.facts["bytes_out"] += response.ByteSize()
                    engine.metrics.frames.labels(operation).inc()
                    yield response

    async def _begin(self, call: Call, operation: Edit, options: pb.StreamOptions) -> _Stream:
        raw = options.edit.format == pb.IMAGE_FORMAT_RAW
        edit = _options(options.edit, frames=True)
        tracking = _tracking(options, operation, edit) if options.HasField("tracking") else None
        check_passwords(edit)
        codes = await self._engine.run_frame(call, lambda: self._engine.codes(call, edit))
        return _Stream(operation, edit, raw, options.fail_without_face, codes, tracking)

    async def _each(
        self, call: Call, stream: _Stream, requests: AsyncIterator[pb.TransformStreamRequest]
    ) -> AsyncGenerator[pb.TransformStreamResponse]:
        """Every frame by itself, some at once."""
        # Its size is the window: the reader stops when that many frames wait for their answers.
        pending: asyncio.Queue[asyncio.Task[pb.TransformStreamResponse] | None] = asyncio.Queue(
            self._engine.settings.stream_window
        )
        reader = asyncio.ensure_future(self._read(call, stream, requests, pending))
        try:
            while (frame := await live.first_of(pending, reader)) is not None:
                yield await frame
            await reader
        finally:
            call.abandoned.set()
            reader.cancel()
            while not pending.empty():
                left = pending.get_nowait()
                if left is not None:
                    left.cancel()

    def _followed(
        self,
        call: Call,
        stream: _Stream,
        tracking: live.Tracking,
        requests: AsyncIterator[pb.TransformStreamRequest],
    ) -> AsyncGenerator[pb.TransformStreamResponse]:
        """Faces followed from frame to frame; see :mod:`serving.live`."""

        def finish(frame: live.Incoming, picture: Picture, result: LiveResult) -> pb.TransformStreamResponse:
            return self._tracked(call, stream, frame, picture, result)

        followed = live.Stream(self._engine, call, stream.codes, tracking, finish)
        return followed.answers(self._incoming(call, stream, requests))

    async def _incoming(
        self, call: Call, stream: _Stream, requests: AsyncIterator[pb.TransformStreamRequest]
    ) -> AsyncIterator[live.Incoming]:
        async for frame in self._sent(call, requests):
            if frame.HasField("geometry"):
                raise MalformedRequest("The frames of a stream that follows faces carry no geometry of their own.")
            seconds = frame.time if frame.HasField("time") else None
            if seconds is not None and not abs(seconds) < 1e12:
                raise MalformedRequest("The time of a frame is a number of seconds.")
            yield live.Incoming(frame.id, seconds, lambda frame=frame: self._picture(frame, stream.options))  # type: ignore[misc]

    def _tracked(
        self, call: Call, stream: _Stream, frame: live.Incoming, picture: Picture, result: LiveResult
    ) -> pb.TransformStreamResponse:
        """The answer to a frame whose faces were followed, on a worker thread."""
        from mien.errors import NoFaceFound
        from mien.pictures import FaceGeometry, Geometry

        if stream.fail_without_face and not result.faces:
            raise NoFaceFound("No face was found in the frame.")
        model = call.model
        geometry = Geometry(
            width=picture.width,
            height=picture.height,
            crop_size=model.crop_size,
            template=model.config.template,
            model=model.digest,
            faces=tuple(
                FaceGeometry.model_validate({"box": face.box.tolist(), "matrix": face.matrix.tolist()})
                for face in result.faces
                if not face.masked
            ),
        )
        done = picture.with_pixels(result.pixels, geometry if geometry.faces else None)
        response = self._response(call, stream, frame.id, done, geometry.faces, source=picture, received=0)
        response.tracked.extend(
            pb.TrackedFace(
                track=face.track, box=_box(face.box.tolist()), state=_STATES[face.state.name], masked=face.masked
            )
            for face in result.faces
        )
        response.dropped.extend(frame.dropped)
        return response

    async def _sent(self, call: Call, requests: AsyncIterator[pb.TransformStreamRequest]) -> AsyncIterator[pb.Frame]:
        while (message := await _next(requests, self._engine.settings.request_timeout)) is not None:
            if message.WhichOneof("message") != "frame":
                raise MalformedRequest("After its options a stream has frames only.")
            call.facts["bytes_in"] += len(message.frame.encoded) + len(message.frame.raw.rgb)
            yield message.frame

    async def _read(
        self,
        call: Call,
        stream: _Stream,
        requests: AsyncIterator[pb.TransformStreamRequest],
        pending: asyncio.Queue[asyncio.Task[pb.TransformStreamResponse] | None],
    ) -> None:
        async for frame in self._sent(call, requests):
            task = asyncio.ensure_future(
                self._engine.run_frame(call, lambda frame=frame: self._frame(call, stream, frame))
            )
            # An error is raised where its frame's turn is, or not at all when another one came first.
            task.add_done_callback(lambda done: done.cancelled() or done.exception())
            await pending.put(task)
        await pending.put(None)

    def _frame(self, call: Call, stream: _Stream, frame: pb.Frame) -> pb.TransformStreamResponse:
        """One frame, on a worker thread."""
        from mien.errors import NoFaceFound

        picture = self._picture(frame, stream.options)
        geometry = None
        if frame.HasField("geometry"):
            geometry = _geometry(frame.geometry, picture, call, stream.operation, self._engine.limits.max_faces)
            if stream.options.aligned:
                crops = call.model.find_aligned(picture, stream.operation, limits=self._engine.limits)
                if not set(geometry.faces) <= set(crops.faces):
                    raise MalformedRequest("The frames are aligned crops, and a frame's geometry is another one.")
        try:
            if geometry is not None and not geometry.faces:
                raise NoFaceFound("The frame's geometry has no face.")
            if geometry is not None and stream.operation == "recover":
                picture = picture.with_pixels(picture.pixels, geometry)
            done, plan = self._engine.transform(
                call, picture, stream.operation, stream.options, lambda: stream.codes, geometry=geometry
            )
            changed = plan.faces
        except NoFaceFound:
            if stream.fail_without_face:
                raise
            done, changed = picture.with_pixels(picture.pixels, None), ()
        return self._response(call, stream, frame.id, done, changed, source=picture, received=len(frame.encoded))

    def _response(
        self,
        call: Call,
        stream: _Stream,
        number: int,
        done: Picture,
        changed: Sequence[FaceGeometry],
        *,
        source: Picture,
        received: int,
    ) -> pb.TransformStreamResponse:
        response = pb.TransformStreamResponse(
            id=number,
            model_digest=call.model.digest,
            geometry=pb.Geometry(
                width=done.width,
                height=done.height,
                crop_size=call.model.crop_size,
                template=call.model.config.template,
                model_digest=call.model.digest,
                faces=[_face(face) for face in changed],
            ),
        )
        if stream.raw:
            response.raw.width, response.raw.height = done.width, done.height
            response.raw.rgb = done.pixels.tobytes()
        else:
            response.encoded = self._engine.encode(
                call, done, changed, stream.options, source=source, received=received
            )
        return response

    def _picture(self, frame: pb.Frame, options: EditOptions) -> Picture:
        import numpy as np

        from mien import pictures
        from mien.errors import ImageTooLarge

        limits = self._engine.limits
        kind = frame.WhichOneof("picture")
        if kind == "encoded":
            return pictures.decode(frame.encoded, limits=limits, keep_metadata=options.keep_metadata)
        if kind != "raw":
            raise MalformedRequest("A frame has no picture.")
        width, height, rgb = frame.raw.width, frame.raw.height, frame.raw.rgb
        if max(width, height) > limits.max_side or width * height > limits.max_pixels:
            raise ImageTooLarge(f"The frame is {width} x {height} pixels, which is more than is accepted.")
        if min(width, height) < limits.min_side or len(rgb) != width * height * 3:
            raise MalformedRequest("A raw frame has width * height * 3 bytes of RGB, and 16 pixels a side at least.")
        return pictures.Picture(np.frombuffer(rgb, np.uint8).reshape(height, width, 3))

    async def _guarded(self, context: Context, answer: Callable[[_Entry], Awaitable[T]]) -> T:
        entry = _Entry(self._engine, context)
        await entry.open()
        try:
            return await answer(entry)
        except asyncio.CancelledError:
            raise
        except Exception as error:
            await self._abort(context, error, entry)

    async def _abort(self, context: Context, error: Exception, entry: _Entry) -> NoReturn:
        problem = problem_of(error)
        if problem.status == 500 and not isinstance(error, InternalError):
            self._engine.log.error("unexpected", request_id=entry.request_id, **logs.describe(error))
        metadata = [("mien-problem", problem.slug)]
        if (seconds := retry_after_of(error)) is not None:
            metadata += [("retry-after", str(seconds)), ("grpc-retry-pushback-ms", str(seconds * 1000))]
        await context.abort(grpc.StatusCode[problem.grpc], detail_of(error), tuple(metadata))
        raise AssertionError("abort raises")


class _Entry:
    """Who called, and how the engine is told."""

    def __init__(self, engine: Engine, context: Context) -> None:
        self._engine = engine
        self._context = context
        metadata = {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
        given = metadata.get("x-request-id", "")
        self.request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        self._authorization = metadata.get("authorization")

    async def open(self) -> None:
        """Say the request's id, before anything can go wrong."""
        await self._context.send_initial_metadata((("x-request-id", self.request_id),))

    def call(self, operation: Any, transport: str = "grpc", *, endless: bool = False) -> Any:
        return _Opened(self, operation, transport, endless)

    def request(self, operation: Any, transport: str) -> Any:
        return self._engine.request(
            operation,
            transport,
            self.request_id,
            authorization=self._authorization,
            peer=_address(self._context.peer()),
        )

    def deadline(self) -> float:
        remaining = self._context.time_remaining()
        return float("inf") if remaining is None else time.monotonic() + remaining


class _Opened:
    """``engine.request`` with the caller's deadline."""

    def __init__(self, entry: _Entry, operation: Any, transport: str, endless: bool) -> None:
        self._entry = entry
        self._request = entry.request(operation, transport)
        self._endless = endless

    def __enter__(self) -> Call:
        call: Call = self._request.__enter__()
        usual = float("inf") if self._endless else call.deadline
        call.deadline = min(usual, self._entry.deadline())
        return call

    def __exit__(self, *error: Any) -> Any:
        return self._request.__exit__(*error)


async def _next(
    requests: AsyncIterator[pb.TransformStreamRequest], patience: float
) -> pb.TransformStreamRequest | None:
    """The next message, None at the end; a stream that stands still gives its place up."""
    try:
        return await asyncio.wait_for(anext(requests), patience)
    except StopAsyncIteration:
        return None
    except TimeoutError:
        raise UploadStalled(f"The stream stood still for {patience:g} seconds.") from None


def _tracking(options: pb.StreamOptions, operation: Edit, edit: EditOptions) -> live.Tracking:
    """What a stream that follows faces asks for.

    Raises:
        MalformedRequest: out of range, or together with what such a stream has not.
    """
    if operation != "anonymize":
        raise MalformedRequest("Faces are followed to anonymize them; recovering takes each frame's geometry.")
    if edit.aligned or options.edit.selection != pb.FaceSelection():
        raise MalformedRequest("A stream that follows faces takes neither a selection nor aligned crops.")
    asked = options.tracking
    return live.Tracking(
        lookahead=asked.lookahead if asked.HasField("lookahead") else live.DEFAULT_LOOKAHEAD,
        rate=asked.rate if asked.HasField("rate") else live.DEFAULT_RATE,
        drop=asked.drop,
    )


def _options(options: pb.EditOptions, *, frames: bool) -> EditOptions:
    """A message's options as the HTTP door's, validated alike."""
    if options.format == pb.IMAGE_FORMAT_RAW:
        if not frames:
            raise MalformedRequest("Raw pixels are for frames; a picture's format is PNG, JPEG or WebP.")
        form = "png"
    else:
        named = _FORMATS.get(options.format)
        if named is None:
            raise MalformedRequest("There is no such image format.")
        form = named
    selection = options.selection
    fields: dict[str, Any] = {
        "password": SecretStr(options.password) if options.password else None,
        "passwords": {n: SecretStr(word) for n, word in options.passwords.items()} or None,
        "faces": list(selection.faces) or None,
        "boxes": _tuples(selection.boxes),
        "exclude_faces": list(selection.exclude_faces) or None,
        "exclude_boxes": _tuples(selection.exclude_boxes),
        "aligned": options.aligned,
        "format": form,
        "quality": options.quality or 95,
        "keep_metadata": options.keep_metadata,
    }
    return parse(EditOptions, fields)


def _tuples(boxes: Sequence[pb.Box]) -> list[tuple[float, float, float, float]] | None:
    return [(box.left, box.top, box.right, box.bottom) for box in boxes] or None


def _operation(options: pb.StreamOptions) -> Edit:
    if options.operation == pb.OPERATION_ANONYMIZE:
        return "anonymize"
    if options.operation == pb.OPERATION_RECOVER:
        return "recover"
    raise MalformedRequest("The options of a stream name no operation.")


def _geometry(message: pb.Geometry, picture: Picture, call: Call, operation: Edit, most: int) -> Geometry:
    """A frame's geometry, as untrusted as that in a file.

    Raises:
        MalformedRequest: it is malformed, or of another size.
        WrongModel: recovering what another model changed.
        TooManyFaces: more than the limit.
    """
    from pydantic import ValidationError

    from mien.errors import TooManyFaces, WrongModel
    from mien.pictures import Geometry

    model = call.model
    if (message.width, message.height) != (picture.width, picture.height) or message.crop_size != model.crop_size:
        raise MalformedRequest("A frame's geometry is for another size of frame or crop.")
    if operation == "recover" and not message.model_digest:
        raise MalformedRequest("A frame's geometry must name the model that changed it, when it is to be recovered.")
    if operation == "recover" and message.model_digest != model.digest:
        raise WrongModel("Another model changed this frame. Load that one to recover it.")
    try:
        found = Geometry.model_validate(
            {
                "width": message.width,
                "height": message.height,
                "crop_size": message.crop_size,
                "template": message.template or model.config.template,
                "model": model.digest,
                "faces": [
                    {
                        "box": (face.box.left, face.box.top, face.box.right, face.box.bottom),
                        "matrix": (tuple(face.matrix[:3]), tuple(face.matrix[3:])),
                    }
                    for face in message.faces
                ],
            }
        )
    except (ValidationError, ValueError):
        raise MalformedRequest("A frame's geometry is not valid.") from None
    if len(found.faces) > most:
        raise TooManyFaces(f"The frame has {len(found.faces)} faces; at most {most} are accepted.")
    return found


def _face(face: FaceGeometry) -> pb.FaceGeometry:
    return pb.FaceGeometry(box=_box(face.box), matrix=[value for row in face.matrix for value in row])


def _box(box: Sequence[float]) -> pb.Box:
    return pb.Box(left=box[0], top=box[1], right=box[2], bottom=box[3])


def _address(peer: str) -> str:
    """The address in gRPC's ``ipv4:127.0.0.1:5000`` or ``ipv6:[::1]:5000``."""
    address = peer.partition(":")[2].rpartition(":")[0]
    return address.replace("%5B", "").replace("%5D", "").strip("[]") or peer
