"""Over gRPC (``mien.v1.FaceIdentity``), by grpcio: the ``grpc`` extra. One call, its failures named."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import queue
import threading
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal
from urllib.parse import urlsplit

import numpy as np

from mien import __version__, errors
from mien.clients.failures import Failed, refused
from mien.clients.requests import Answer, Box, Edit, Frame, TrackedFace, Tracking, check_frame
from mien.detection import Face
from mien.pictures import MEDIA_TYPES, FaceGeometry, Format, Geometry

try:
    import grpc

    from mien.v1 import face_identity_pb2 as pb
    from mien.v1 import face_identity_pb2_grpc
except ImportError as missing:  # pragma: no cover - the tests have it
    raise ImportError('grpc:// needs the grpc extra: pip install "mien[grpc]"') from missing

_FORMATS: Final[Mapping[str, Format]] = {media_type: name for name, media_type in MEDIA_TYPES.items()}
_STATES: Final[Mapping[int, Literal["detected", "flow", "held"]]] = {
    pb.TrackedFace.STATE_DETECTED: "detected",
    pb.TrackedFace.STATE_FLOW: "flow",
    pb.TrackedFace.STATE_HELD: "held",
}
# Answers that wait in the client for who takes them slowly; then the service is slowed down.
_WAITING: Final = 8
_PORTS: Final = {"grpc": 3001, "grpcs": 443}
_OPTIONS: Final = [
    ("grpc.max_receive_message_length", -1),  # the answer to a large picture is large; the service bounds requests
    ("grpc.max_send_message_length", -1),
    ("grpc.enable_retries", 0),  # we know better when asking again is safe
    ("grpc.enable_http_proxy", 0),  # see mien.clients, "Secrets"
    ("grpc.primary_user_agent", f"mien/{__version__}"),
]
# As HTTP says it, for what a service of ours did not explain itself.
_STATUS: Final = {
    grpc.StatusCode.UNAUTHENTICATED: 401,
    grpc.StatusCode.PERMISSION_DENIED: 403,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
    grpc.StatusCode.UNAVAILABLE: 503,
}


def _target(url: str) -> str:
    parts = urlsplit(url)
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
    return f"{host}:{parts.port or _PORTS[parts.scheme]}"


def _credentials(url: str, ca: Path | None) -> Any:
    if urlsplit(url).scheme == "grpc":
        return None
    return grpc.ssl_channel_credentials(ca.read_bytes() if ca else None)


def _metadata(api_key: str | None) -> list[tuple[str, str]]:
    return [] if api_key is None else [("authorization", f"Bearer {api_key}")]


# -- messages ---------------------------------------------------------------------------------------------------------


def _boxes(boxes: Sequence[Box] | None) -> list[Any]:
    return [pb.Box(left=b[0], top=b[1], right=b[2], bottom=b[3]) for b in boxes or ()]


def _edit_options(edit: Edit, *, raw: bool = False) -> Any:
    if edit.faces is not None and not len(edit.faces):
        # An empty list and none at all are one thing to protobuf, and mean opposite things.
        raise errors.NoSuchFace("No face was asked for: `faces` is empty.")
    form = pb.IMAGE_FORMAT_RAW if raw else getattr(pb, f"IMAGE_FORMAT_{edit.format}")
    return pb.EditOptions(
        password=edit.password or "",
        passwords=dict(edit.passwords or {}),
        selection=pb.FaceSelection(
            faces=list(edit.faces or ()),
            boxes=_boxes(edit.boxes),
            exclude_faces=list(edit.exclude_faces or ()),
            exclude_boxes=_boxes(edit.exclude_boxes),
        ),
        aligned=edit.aligned,
        format=form,
        quality=edit.quality,
        keep_metadata=edit.keep_metadata,
    )


def _answer(response: Any) -> Answer:
    return Answer(
        response.image,
        _FORMATS[response.media_type],
        len(response.faces),
        response.model_digest,
        response.request_id,
    )


def _faces(response: Any) -> list[Face]:
    return [
        Face(
            np.array([face.box.left, face.box.top, face.box.right, face.box.bottom]),
            face.confidence,
            np.array([[point.x, point.y] for point in face.landmarks]),
        )
        for face in response.faces
    ]


def _geometry_message(geometry: Geometry) -> Any:
    return pb.Geometry(
        width=geometry.width,
        height=geometry.height,
        crop_size=geometry.crop_size,
        template=geometry.template,
        model_digest=geometry.model,
        faces=[
            pb.FaceGeometry(box=_boxes([face.box])[0], matrix=[v for row in face.matrix for v in row])
            for face in geometry.faces
        ],
    )


def _geometry(message: Any) -> Geometry:
    return Geometry(
        width=message.width,
        height=message.height,
        crop_size=message.crop_size,
        template=message.template,
        model=message.model_digest,
        faces=tuple(
            FaceGeometry(
                box=(face.box.left, face.box.top, face.box.right, face.box.bottom),
                matrix=(tuple(face.matrix[:3]), tuple(face.matrix[3:])),
            )
            for face in message.faces
        ),
    )


def _stream_options(edit: Edit, fail_without_face: bool, tracking: Tracking | None, *, raw: bool) -> Any:
    operation = pb.OPERATION_RECOVER if edit.operation == "recover" else pb.OPERATION_ANONYMIZE
    options = pb.StreamOptions(
        operation=operation, edit=_edit_options(edit, raw=raw), fail_without_face=fail_without_face
    )
    if tracking is not None:
        options.tracking.lookahead = tracking.lookahead
        options.tracking.rate = tracking.rate
        options.tracking.drop = tracking.drop
    return pb.TransformStreamRequest(options=options)


def _frame_message(number: int, frame: Frame, *, raw: bool) -> Any:
    message = pb.Frame(id=number)
    if isinstance(frame.picture, bytes):
        if raw:
            raise ValueError("the frames of one stream are all pixels or all files; this one is a file")
        message.encoded = frame.picture
    else:
        if not raw:
            raise ValueError("the frames of one stream are all pixels or all files; this one is pixels")
        pixels = check_frame(frame.picture)
        message.raw.width, message.raw.height, message.raw.rgb = pixels.shape[1], pixels.shape[0], pixels.tobytes()
    if frame.geometry is not None:
        message.geometry.CopyFrom(_geometry_message(frame.geometry))
    if frame.time is not None:
        message.time = frame.time
    return pb.TransformStreamRequest(frame=message)


def _frame(response: Any) -> Frame:
    picture: Any = response.encoded
    if response.WhichOneof("picture") == "raw":
        picture = np.frombuffer(response.raw.rgb, np.uint8).reshape(response.raw.height, response.raw.width, 3)
    tracked = tuple(
        TrackedFace(
            track=face.track,
            box=(face.box.left, face.box.top, face.box.right, face.box.bottom),
            # What a newer service may say more is a guess to us.
            state=_STATES.get(face.state, "held"),
            masked=face.masked,
        )
        for face in response.tracked
    )
    return Frame(
        picture, _geometry(response.geometry), number=response.id, tracked=tracked, dropped=tuple(response.dropped)
    )


# -- failures ---------------------------------------------------------------------------------------------------------


def _failed(error: Any, url: str) -> Failed:
    code, detail = error.code(), error.details() or "The service gave no reason."
    slug, after = _details(error.trailing_metadata() or ())
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return Failed(errors.ServiceTimeout("The service did not answer in time."))
    if slug:
        return refused(_STATUS.get(code, 400), slug, detail, after)
    if code is grpc.StatusCode.UNAVAILABLE:
        # No answer of a service: no connection, or one that broke; grpcio does not say which, so as for the latter.
        return Failed(errors.ServiceUnavailable(f"The service at {url} cannot be reached."), again=True, broken=True)
    return refused(_STATUS.get(code, 400), "", detail, after)


def _details(trailers: Iterable[tuple[str, Any]]) -> tuple[str, float | None]:
    """The problem's slug and the seconds to wait, from a call's trailing metadata; see face_identity.proto."""
    named = dict(trailers)
    wait = str(named.get("retry-after", ""))
    return str(named.get("mien-problem", "")), float(wait) if wait.isascii() and wait.isdigit() else None


# -- transports -------------------------------------------------------------------------------------------------------


class RPC:
    """Waiting calls; safe to use from several threads."""

    def __init__(self, url: str, api_key: str | None, ca: Path | None) -> None:
        self._url = url
        credentials = _credentials(url, ca)
        target = _target(url)
        self._channel: Any = (
            grpc.secure_channel(target, credentials, _OPTIONS)
            if credentials
            else grpc.insecure_channel(target, _OPTIONS)
        )
        self._stub: Any = face_identity_pb2_grpc.FaceIdentityStub(self._channel)  # type: ignore[no-untyped-call]
        self._metadata = _metadata(api_key)

    def edit(self, data: bytes, edit: Edit, timeout: float) -> Answer:
        method = self._stub.Recover if edit.operation == "recover" else self._stub.Anonymize
        return _answer(self._send(method, pb.EditRequest(image=data, options=_edit_options(edit)), timeout))

    def detect(self, data: bytes, timeout: float) -> list[Face]:
        return _faces(self._send(self._stub.Detect, pb.DetectRequest(image=data), timeout))

    def _send(self, method: Any, request: Any, timeout: float) -> Any:
        try:
            return method(request, timeout=timeout, metadata=self._metadata)
        except grpc.RpcError as error:
            raise _failed(error, self._url) from None

    def stream(
        self,
        frames: Iterator[Frame],
        edit: Edit,
        fail_without_face: bool,
        timeout: float,
        tracking: Tracking | None = None,
    ) -> Iterator[Frame]:
        """TransformStream; ``timeout`` seconds may pass between two answers while frames are under way."""
        if (first := next(frames, None)) is None:
            return
        sending = _Sending(first, frames, edit, fail_without_face, tracking)
        call = self._stub.TransformStream(sending, metadata=self._metadata)
        answers: queue.Queue[Any] = queue.Queue(_WAITING)

        def put(answer: Any) -> None:
            while not sending.stopped:
                with contextlib.suppress(queue.Full):
                    answers.put(answer, timeout=0.25)
                    return

        def read() -> None:
            # A thread of its own, because reading cannot be given a time-out.
            try:
                for response in call:
                    put(response)
                put(None)
            except Exception as error:
                put(error)

        threading.Thread(target=read, name="mien-answers", daemon=True).start()
        try:
            while True:
                answer = _next_answer(answers, sending, timeout)
                if answer is None:
                    break
                if isinstance(answer, grpc.RpcError):
                    raise _failed(answer, self._url) from None
                if isinstance(answer, Exception):
                    raise answer
                sending.answered += 1 + len(answer.dropped)
                yield _frame(answer)
            # A stream ends in good order only when every frame was answered; what `frames` raised comes first.
            if sending.error is not None:
                raise sending.error
            if sending.answered < sending.sent:
                raise Failed(errors.ServiceError("The stream ended before every frame was answered."))
        finally:
            sending.stop()
            call.cancel()

    def close(self) -> None:
        self._channel.close()


def _next_answer(answers: queue.Queue[Any], sending: _Sending, timeout: float) -> Any:
    """The next answer; the time runs only while the service owes one, not while the sender has no frame."""
    waited = 0.0
    while True:
        try:
            answer = answers.get(timeout=0.25)
        except queue.Empty:
            waited = waited + 0.25 if sending.sent > sending.answered + sending.kept or sending.done else 0.0
            if waited >= timeout:
                raise Failed(errors.ServiceTimeout(f"No frame was answered for {timeout:g} seconds.")) from None
            continue
        if isinstance(answer, grpc.RpcError) and sending.error is not None:
            raise sending.error
        return answer


class _Sending(Iterator[Any]):
    """The requests of a stream, taken by grpcio's thread; remembers what it sent and what the frames raised."""

    def __init__(
        self,
        first: Frame,
        frames: Iterator[Frame],
        edit: Edit,
        fail_without_face: bool,
        tracking: Tracking | None,
    ) -> None:
        self._frames = itertools.chain([first], frames)
        # Whether pixels or files are sent, and so wanted back.
        self._raw = not isinstance(first.picture, bytes)
        self._options: Any = _stream_options(edit, fail_without_face, tracking, raw=self._raw)
        self.stopped = False
        self.sent = 0
        self.answered = 0
        self.kept = tracking.lookahead if tracking is not None else 0
        """Frames that the service may keep back."""
        self.done = False
        self.error: BaseException | None = None

    def stop(self) -> None:
        self.stopped = True

    def __next__(self) -> Any:
        if self.stopped or self.done:
            raise StopIteration
        if (options := self._options) is not None:
            self._options = None
            return options
        try:
            message = _frame_message(self.sent, next(self._frames), raw=self._raw)
        except StopIteration:
            self.done = True
            raise
        except BaseException as error:
            self.done = True
            self.error = error
            raise
        self.sent += 1
        return message


class AsyncRPC:
    """:class:`RPC` for an event loop."""

    def __init__(self, url: str, api_key: str | None, ca: Path | None) -> None:
        self._url = url
        self._credentials = _credentials(url, ca)
        self._metadata = _metadata(api_key)
        self._channel: Any = None
        self._stub: Any = None

    def _connected(self) -> Any:
        # In the loop that it is used in, which need not run yet when the client is made.
        if self._stub is None:
            target = _target(self._url)
            self._channel = (
                grpc.aio.secure_channel(target, self._credentials, _OPTIONS)
                if self._credentials
                else grpc.aio.insecure_channel(target, _OPTIONS)
            )
            self._stub = face_identity_pb2_grpc.FaceIdentityStub(self._channel)  # type: ignore[no-untyped-call]
        return self._stub

    async def edit(self, data: bytes, edit: Edit, timeout: float) -> Answer:
        stub = self._connected()
        method = stub.Recover if edit.operation == "recover" else stub.Anonymize
        return _answer(await self._send(method, pb.EditRequest(image=data, options=_edit_options(edit)), timeout))

    async def detect(self, data: bytes, timeout: float) -> list[Face]:
        return _faces(await self._send(self._connected().Detect, pb.DetectRequest(image=data), timeout))

    async def _send(self, method: Any, request: Any, timeout: float) -> Any:
        try:
            return await method(request, timeout=timeout, metadata=self._metadata)
        except grpc.RpcError as error:
            raise _failed(error, self._url) from None

    async def stream(
        self,
        frames: AsyncIterator[Frame],
        edit: Edit,
        fail_without_face: bool,
        timeout: float,
        tracking: Tracking | None = None,
    ) -> AsyncIterator[Frame]:
        """See :meth:`RPC.stream`."""
        try:
            first = await anext(frames)
        except StopAsyncIteration:
            return
        raw = not isinstance(first.picture, bytes)
        call = self._connected().TransformStream(metadata=self._metadata)
        sent = answered = 0
        kept = tracking.lookahead if tracking is not None else 0
        error: BaseException | None = None

        async def send() -> None:
            nonlocal sent, error
            try:
                await call.write(_stream_options(edit, fail_without_face, tracking, raw=raw))
                await call.write(_frame_message(0, first, raw=raw))
                sent = 1
                async for frame in frames:
                    await call.write(_frame_message(sent, frame, raw=raw))
                    sent += 1
                await call.done_writing()
            except (grpc.RpcError, asyncio.InvalidStateError):
                pass  # the stream has ended; reading says why
            except Exception as raised:
                error = raised
                call.cancel()

        sender = asyncio.create_task(send())
        try:
            while True:
                reading = asyncio.ensure_future(call.read())
                while not reading.done():
                    owed = sent > answered + kept or sender.done()
                    done, _ = await asyncio.wait({reading}, timeout=timeout)
                    # The time runs while the service owes an answer, not while the sender has no frame.
                    if not done and owed:
                        raise Failed(errors.ServiceTimeout(f"No frame was answered for {timeout:g} seconds."))
                response = await reading
                if response is grpc.aio.EOF:
                    break
                answered += 1 + len(response.dropped)
                yield _frame(response)
            if error is not None:
                raise error
            if (code := await call.code()) is not grpc.StatusCode.OK:
                raise grpc.aio.AioRpcError(
                    code, await call.initial_metadata(), await call.trailing_metadata(), await call.details()
                )
            if answered < sent:
                raise Failed(errors.ServiceError("The stream ended before every frame was answered."))
        except grpc.RpcError as broken:
            if error is not None:
                raise error from None
            raise _failed(broken, self._url) from None
        except asyncio.CancelledError:
            if error is not None:  # a call that was cancelled by us raises this from read()
                raise error from None
            raise
        finally:
            sender.cancel()
            call.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await sender

    async def close(self) -> None:
        if self._channel is not None:
            await self._channel.close()
