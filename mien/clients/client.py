"""The clients: verbs, pictures in and out, attempts. How bytes travel is :mod:`.http`'s and :mod:`.rpc`'s."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import aclosing
from os import PathLike
from pathlib import Path
from typing import Any, Final, Protocol, Self, TypeVar, Unpack
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mien.clients import requests
from mien.clients.failures import Attempts, Failed
from mien.clients.http import HTTP, AsyncHTTP
from mien.clients.requests import Answer, Edit, Faces, Files, Frame, Operation, Tracking
from mien.detection import Face
from mien.errors import NoFaceFound, ServiceTimeout
from mien.geometry import CROP_SIZE, TEMPLATE_NAME
from mien.pictures import Geometry

T = TypeVar("T")

TIMEOUT: Final = 60.0
ATTEMPTS: Final = 4

# Frames on their way at once where each is a request of its own: enough to meet in a batch, few enough to fit a queue.
_WINDOW: Final = 4


class _Transport(Protocol):
    def edit(self, data: bytes, edit: Edit, timeout: float) -> Answer: ...
    def detect(self, data: bytes, timeout: float) -> list[Face]: ...
    def close(self) -> None: ...


class _AsyncTransport(Protocol):
    async def edit(self, data: bytes, edit: Edit, timeout: float) -> Answer: ...
    async def detect(self, data: bytes, timeout: float) -> list[Face]: ...
    async def close(self) -> None: ...


class Client:
    """A service's verbs, waiting for each answer; safe to use from several threads.

    Args:
        url: ``http://``, ``https://``, ``grpc://`` (cleartext) or ``grpcs://`` (TLS), with host and port.
        api_key: where the service wants one.
        timeout: seconds for one call with all its attempts; between two answers where frames are streamed.
        attempts: most requests for one call; 1 never asks again. See :mod:`mien.clients`.
        ca: certificates to trust instead of the system's, a PEM file.

    Raises:
        ValueError: the URL is not of these kinds, or holds a user, a query or a fragment.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        timeout: float = TIMEOUT,
        attempts: int = ATTEMPTS,
        ca: str | PathLike[str] | None = None,
    ) -> None:
        self.url = check_url(url)
        self._timeout = timeout
        self._attempts = attempts
        authorities = Path(ca) if ca else None
        self._transport: _Transport
        if self.url.startswith("grpc"):
            from mien.clients.rpc import RPC

            self._transport = RPC(self.url, api_key, authorities)
        else:
            self._transport = HTTP(self.url, api_key, authorities)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._transport.close()

    # -- pictures ------------------------------------------------------------------------------------------------

    def anonymize(self, picture: Image.Image, password: str | None = None, **which: Unpack[Faces]) -> Image.Image:
        """Change the faces of a picture, all of them or those that :class:`~mien.clients.requests.Faces` names.

        Returns:
            ``RGB`` or ``RGBA``; saved as PNG it keeps what recovery needs, as a model's.

        Raises:
            NoFaceFound, TooManyFaces, NoSuchFace, InvalidPassword, InvalidImage: as a model.
            ServiceError: what only a service raises; see :mod:`mien.errors`.
        """
        return self._image("anonymize", picture, password, which)

    def recover(self, picture: Image.Image, password: str | None = None, **which: Unpack[Faces]) -> Image.Image:
        """Give the faces of an anonymized picture back; with a wrong password they become third ones.

        Raises:
            WrongModel: another model anonymized the picture; and all that :meth:`anonymize` raises.
        """
        return self._image("recover", picture, password, which)

    def anonymize_bytes(self, data: bytes, password: str | None = None, **options: Unpack[Files]) -> Answer:
        """:meth:`anonymize` from a file's bytes to a file's bytes; see :class:`~mien.clients.requests.Files`."""
        return self._edit(data, Edit("anonymize", password, **options))

    def recover_bytes(self, data: bytes, password: str | None = None, **options: Unpack[Files]) -> Answer:
        """:meth:`recover` from a file's bytes to a file's bytes."""
        return self._edit(data, Edit("recover", password, **options))

    def detect(self, picture: Image.Image | bytes) -> list[Face]:
        """Every face in a picture, largest first; an empty list where there is none."""
        data = picture if isinstance(picture, bytes) else requests.image_to_bytes(picture)
        return self._call(lambda seconds: self._transport.detect(data, seconds))

    # -- aligned crops -------------------------------------------------------------------------------------------

    def anonymize_faces(self, crops: NDArray[np.uint8], password: str) -> NDArray[np.uint8]:
        """Change crops that are aligned already, uint8 ``[B, S, S, 3]``, S being the model's crop size."""
        return self._crops("anonymize", crops, password)

    def recover_faces(self, crops: NDArray[np.uint8], password: str) -> NDArray[np.uint8]:
        """Give aligned crops back, uint8 ``[B, S, S, 3]``."""
        return self._crops("recover", crops, password)

    # -- frames --------------------------------------------------------------------------------------------------

    def stream(
        self,
        frames: Iterable[Frame | NDArray[np.uint8] | bytes],
        password: str | None = None,
        *,
        operation: Operation = "anonymize",
        fail_without_face: bool = False,
        tracking: Tracking | None = None,
        **which: Unpack[Faces],
    ) -> Iterator[Frame]:
        """Change the frames of a video, in order.

        Over gRPC one stream (TransformStream), over HTTP a few requests at once. ``frames`` is read from another thread
        and not faster than the service works. A frame without a face comes back as it went, with an empty geometry,
        unless ``fail_without_face``. Nothing is asked again over gRPC: a stream that broke has lost its place.

        Args:
            frames: uint8 RGB ``[H, W, 3]``, files' bytes, or :class:`Frame` with geometry.
            password, which: as for :meth:`anonymize`; numbers are those of each frame's own faces.
            operation: ``anonymize`` or ``recover``.
            fail_without_face: raise :class:`NoFaceFound` instead.
            tracking: follow faces from frame to frame; over gRPC, anonymizing. ``passwords`` are then those of tracks.

        Yields:
            The changed frames: pixels where pixels were sent.

        Raises:
            What :meth:`anonymize` raises, at the frame it concerns, and what ``frames`` raises.
            ValueError: over HTTP, a frame to be anonymized has a geometry, or ``tracking``: only gRPC has these.
        """
        edit = Edit(operation, password, **which)
        given = (_frame(frame) for frame in frames)
        if self.url.startswith("grpc"):
            rpc: Any = self._transport
            try:
                yield from rpc.stream(given, edit, fail_without_face, self._timeout, tracking)
            except Failed as failed:
                raise failed.error from None
            return
        _refuse(tracking)
        with ThreadPoolExecutor(_WINDOW, thread_name_prefix="mien-frames") as pool:
            under_way: deque[Future[Frame]] = deque()
            try:
                for frame in given:
                    under_way.append(pool.submit(self._one_frame, frame, edit, fail_without_face))
                    if len(under_way) >= _WINDOW:
                        yield under_way.popleft().result()
                while under_way:
                    yield under_way.popleft().result()
            finally:
                for future in under_way:
                    future.cancel()

    def _one_frame(self, frame: Frame, edit: Edit, fail_without_face: bool) -> Frame:
        if (done := _without_request(frame, edit)) is not None:
            return done
        try:
            answer = self._edit(requests.frame_to_bytes(frame), edit)
        except NoFaceFound:
            if fail_without_face:
                raise
            return _unchanged(frame)
        return requests.bytes_to_frame(answer.data, raw=not isinstance(frame.picture, bytes))

    # -- asking --------------------------------------------------------------------------------------------------

    def _image(self, operation: Operation, picture: Image.Image, password: str | None, which: Faces) -> Image.Image:
        edit = Edit(operation, password, **which)
        return requests.bytes_to_image(self._edit(requests.image_to_bytes(picture), edit).data)

    def _crops(self, operation: Operation, crops: NDArray[np.uint8], password: str) -> NDArray[np.uint8]:
        crops = requests.check_crops(crops)
        edit = Edit(operation, password, aligned=True)
        out = np.empty_like(crops)
        for start in range(0, len(crops), requests.CROPS):
            part = crops[start : start + requests.CROPS]
            answer = self._edit(requests.crops_to_bytes(part), edit)
            out[start : start + requests.CROPS] = requests.bytes_to_crops(answer.data, part.shape)
        return out

    def _edit(self, data: bytes, edit: Edit) -> Answer:
        return self._call(lambda seconds: self._transport.edit(data, edit, seconds))

    def _call(self, send: Callable[[float], T]) -> T:
        attempts = Attempts(self._timeout, self._attempts)
        while True:
            try:
                return send(attempts.start())
            except Failed as failed:
                seconds = attempts.pause(failed)
            time.sleep(seconds)


class AsyncClient:
    """:class:`Client` for an event loop: the same arguments, verbs, answers and errors. To be used in one loop."""

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        timeout: float = TIMEOUT,
        attempts: int = ATTEMPTS,
        ca: str | PathLike[str] | None = None,
    ) -> None:
        self.url = check_url(url)
        self._timeout = timeout
        self._attempts = attempts
        authorities = Path(ca) if ca else None
        self._transport: _AsyncTransport
        if self.url.startswith("grpc"):
            from mien.clients.rpc import AsyncRPC

            self._transport = AsyncRPC(self.url, api_key, authorities)
        else:
            self._transport = AsyncHTTP(self.url, api_key, authorities)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._transport.close()

    async def anonymize(self, picture: Image.Image, password: str | None = None, **which: Unpack[Faces]) -> Image.Image:
        """See :meth:`Client.anonymize`."""
        return await self._image("anonymize", picture, password, which)

    async def recover(self, picture: Image.Image, password: str | None = None, **which: Unpack[Faces]) -> Image.Image:
        """See :meth:`Client.recover`."""
        return await self._image("recover", picture, password, which)

    async def anonymize_bytes(self, data: bytes, password: str | None = None, **options: Unpack[Files]) -> Answer:
        """See :meth:`Client.anonymize_bytes`."""
        return await self._edit(data, Edit("anonymize", password, **options))

    async def recover_bytes(self, data: bytes, password: str | None = None, **options: Unpack[Files]) -> Answer:
        """See :meth:`Client.recover_bytes`."""
        return await self._edit(data, Edit("recover", password, **options))

    async def detect(self, picture: Image.Image | bytes) -> list[Face]:
        """See :meth:`Client.detect`."""
        data = picture if isinstance(picture, bytes) else await asyncio.to_thread(requests.image_to_bytes, picture)
        return await self._call(lambda seconds: self._transport.detect(data, seconds))

    async def anonymize_faces(self, crops: NDArray[np.uint8], password: str) -> NDArray[np.uint8]:
        """See :meth:`Client.anonymize_faces`."""
        return await self._crops("anonymize", crops, password)

    async def recover_faces(self, crops: NDArray[np.uint8], password: str) -> NDArray[np.uint8]:
        """See :meth:`Client.recover_faces`."""
        return await self._crops("recover", crops, password)

    async def stream(
        self,
        frames: AsyncIterable[Frame | NDArray[np.uint8] | bytes] | Iterable[Frame | NDArray[np.uint8] | bytes],
        password: str | None = None,
        *,
        operation: Operation = "anonymize",
        fail_without_face: bool = False,
        tracking: Tracking | None = None,
        **which: Unpack[Faces],
    ) -> AsyncIterator[Frame]:
        """:meth:`Client.stream` with ``async for``; ``frames`` may be an asynchronous iterable or a plain one.

        Left before its end, close it: ``async with contextlib.aclosing(client.stream(...)) as answers``.
        """
        edit = Edit(operation, password, **which)
        given = _frames(frames)
        if self.url.startswith("grpc"):
            rpc: Any = self._transport
            async with aclosing(rpc.stream(given, edit, fail_without_face, self._timeout, tracking)) as answers:
                try:
                    async for answer in answers:
                        yield answer
                except Failed as failed:
                    raise failed.error from None
            return
        _refuse(tracking)
        under_way: deque[asyncio.Task[Frame]] = deque()
        try:
            async for frame in given:
                under_way.append(asyncio.create_task(self._one_frame(frame, edit, fail_without_face)))
                if len(under_way) >= _WINDOW:
                    yield await under_way.popleft()
            while under_way:
                yield await under_way.popleft()
        finally:
            for task in under_way:
                task.cancel()
            await asyncio.gather(*under_way, return_exceptions=True)

    async def _one_frame(self, frame: Frame, edit: Edit, fail_without_face: bool) -> Frame:
        if (done := _without_request(frame, edit)) is not None:
            return done
        try:
            answer = await self._edit(await asyncio.to_thread(requests.frame_to_bytes, frame), edit)
        except NoFaceFound:
            if fail_without_face:
                raise
            return _unchanged(frame)
        raw = not isinstance(frame.picture, bytes)
        return await asyncio.to_thread(requests.bytes_to_frame, answer.data, raw=raw)

    async def _image(
        self, operation: Operation, picture: Image.Image, password: str | None, which: Faces
    ) -> Image.Image:
        edit = Edit(operation, password, **which)
        # Encoding a large picture takes long enough to hold up a loop.
        answer = await self._edit(await asyncio.to_thread(requests.image_to_bytes, picture), edit)
        return await asyncio.to_thread(requests.bytes_to_image, answer.data)

    async def _crops(self, operation: Operation, crops: NDArray[np.uint8], password: str) -> NDArray[np.uint8]:
        crops = requests.check_crops(crops)
        edit = Edit(operation, password, aligned=True)
        out = np.empty_like(crops)
        for start in range(0, len(crops), requests.CROPS):
            part = crops[start : start + requests.CROPS]
            answer = await self._edit(await asyncio.to_thread(requests.crops_to_bytes, part), edit)
            out[start : start + requests.CROPS] = requests.bytes_to_crops(answer.data, part.shape)
        return out

    async def _edit(self, data: bytes, edit: Edit) -> Answer:
        return await self._call(lambda seconds: self._transport.edit(data, edit, seconds))

    async def _call(self, send: Callable[[float], Awaitable[T]]) -> T:
        attempts = Attempts(self._timeout, self._attempts)
        while True:
            try:
                remaining = attempts.start()
                async with asyncio.timeout(remaining):
                    return await send(remaining)
            except TimeoutError:
                raise ServiceTimeout(f"The service did not answer within {self._timeout:g} seconds.") from None
            except Failed as failed:
                seconds = attempts.pause(failed)
            await asyncio.sleep(seconds)


def check_url(url: str) -> str:
    """The URL without a trailing slash.

    Raises:
        ValueError: see :class:`Client`.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https", "grpc", "grpcs") or not parts.hostname:
        raise ValueError("expected a URL like http://host:3000, https://host, grpc://host:3001 or grpcs://host:443")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ValueError("the service's URL takes no user, query or fragment; give an API key by api_key")
    if parts.scheme.startswith("grpc") and parts.path.strip("/"):
        raise ValueError("a gRPC address has no path")
    return url.rstrip("/")


def _frame(given: Frame | NDArray[np.uint8] | bytes) -> Frame:
    return given if isinstance(given, Frame) else Frame(given)


async def _frames(
    given: AsyncIterable[Frame | NDArray[np.uint8] | bytes] | Iterable[Frame | NDArray[np.uint8] | bytes],
) -> AsyncIterator[Frame]:
    if isinstance(given, AsyncIterable):
        async for frame in given:
            yield _frame(frame)
    else:
        for frame in given:
            yield _frame(frame)


def _refuse(tracking: Tracking | None) -> None:
    if tracking is not None:
        raise ValueError("only gRPC follows faces; over HTTP every frame is a request of its own")


def _without_request(frame: Frame, edit: Edit) -> Frame | None:
    """The answer to a frame that says itself that it has no face."""
    if frame.geometry is None:
        return None
    if not frame.geometry.faces:
        return frame
    if edit.operation == "anonymize":
        raise ValueError("only gRPC takes the geometry of a frame that is to be anonymized")
    return None


def _unchanged(frame: Frame) -> Frame:
    """A frame in which no face was found, as it went; its empty geometry says so to who recovers it."""
    if frame.geometry is not None:
        return frame
    height, width = requests.size_of(frame)
    empty = Geometry(
        width=width,
        height=height,
        crop_size=CROP_SIZE,
        template=TEMPLATE_NAME,
        model="0" * 64,  # none changed it
        faces=(),
    )
    return Frame(frame.picture, empty)
