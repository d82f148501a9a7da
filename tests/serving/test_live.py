"""Streams that follow faces: a door on a real engine of this process, asked over gRPC; its detector goes blind."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Collection, Iterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import numpy as np
import pytest
from numpy.typing import NDArray

import mien
from mien.clients import Tracking
from mien.v1 import face_identity_pb2 as pb
from mien.v1.face_identity_pb2_grpc import FaceIdentityStub
from mien.video import synthetic
from serving.live import Incoming, _Inbox
from tests.mien.video_parts import Blind, Remembering, differ

Pixels = NDArray[np.uint8]
FRAMES = 10
FACE = np.s_[60:180, 80:240]
State = pb.TrackedFace


@pytest.fixture(scope="module")
def seeing(engine: Any) -> Remembering:
    return Remembering(engine.model.detector)


@pytest.fixture(scope="module")
def shots(seeing: Remembering) -> list[Pixels]:
    from skimage import data

    picture = data.astronaut()
    (face,) = seeing.detect(picture)
    return [shot.pixels for shot in synthetic.shots(picture, face.landmarks, "turn", frames=FRAMES)]


@pytest.fixture
def blind(engine: Any, seeing: Remembering) -> Iterator[Callable[[Collection[int]], None]]:
    """Make the service's detector see nothing in chosen frames of the next stream."""
    usual = engine.model.detector

    def in_frames(missed: Collection[int]) -> None:
        engine.model.detector = Blind(seeing, missed)

    in_frames(())
    yield in_frames
    engine.model.detector = usual


@asynccontextmanager
async def door(engine: Any) -> AsyncIterator[str]:
    from serving.grpc_door import GrpcDoor

    opened = GrpcDoor(engine)
    await opened.open("127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{opened.port}"
    finally:
        await opened.close()


def first(operation: int = pb.OPERATION_ANONYMIZE, **tracking: Any) -> pb.TransformStreamRequest:
    edit = pb.EditOptions(password="p", format=pb.IMAGE_FORMAT_RAW)
    options = pb.StreamOptions(operation=operation, edit=edit)  # type: ignore[arg-type]
    if operation == pb.OPERATION_ANONYMIZE:
        options.tracking.CopyFrom(pb.Tracking(**tracking))
    return pb.TransformStreamRequest(options=options)


def message(pixels: Pixels, number: int, geometry: pb.Geometry | None = None) -> pb.TransformStreamRequest:
    raw = pb.RawImage(width=pixels.shape[1], height=pixels.shape[0], rgb=pixels.tobytes())
    return pb.TransformStreamRequest(frame=pb.Frame(id=number, raw=raw, geometry=geometry))


def ask(engine: Any, messages: list[pb.TransformStreamRequest]) -> list[pb.TransformStreamResponse]:
    async def go() -> list[pb.TransformStreamResponse]:
        async with door(engine) as address, grpc.aio.insecure_channel(address) as channel:
            call = FaceIdentityStub(channel).TransformStream(iter(messages), timeout=60)
            return [answer async for answer in call]  # type: ignore[attr-defined]

    return asyncio.run(go())


def refusal(engine: Any, messages: list[pb.TransformStreamRequest]) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        ask(engine, messages)
    error: Any = caught.value
    return error.code(), error.details()


def pixels_of(answer: pb.TransformStreamResponse) -> Pixels:
    return np.frombuffer(answer.raw.rgb, np.uint8).reshape(answer.raw.height, answer.raw.width, 3)


def hidden(answers: list[pb.TransformStreamResponse], shots: list[Pixels]) -> list[bool]:
    return [differ(pixels_of(a)[FACE], shot[FACE]) > 0.5 for a, shot in zip(answers, shots, strict=True)]


def test_a_face_that_the_detector_misses_is_changed_all_the_same_and_comes_back(
    engine: Any, shots: list[Pixels], blind: Callable[[Collection[int]], None]
) -> None:
    missed = (0, 1, 5, 6)
    blind(missed)
    answers = ask(engine, [first(lookahead=3), *(message(s, 10 + n) for n, s in enumerate(shots))])
    assert [answer.id for answer in answers] == list(range(10, 10 + FRAMES))
    assert all(hidden(answers, shots))
    states = [[(face.track, face.state, face.masked) for face in answer.tracked] for answer in answers]
    assert states == [[(0, State.STATE_FLOW if n in missed else State.STATE_DETECTED, False)] for n in range(FRAMES)]
    assert all(len(a.geometry.faces) == 1 and a.geometry.model_digest == engine.digest for a in answers)
    back = ask(engine, [first(pb.OPERATION_RECOVER), *(message(pixels_of(a), a.id, a.geometry) for a in answers)])
    for answer, safe, shot in zip(back, answers, shots, strict=True):
        assert differ(pixels_of(answer)[FACE], shot[FACE]) < differ(pixels_of(safe)[FACE], shot[FACE]) / 2


def test_without_keeping_frames_back_the_first_ones_leave_unchanged(
    engine: Any, shots: list[Pixels], blind: Callable[[Collection[int]], None]
) -> None:
    """As the .proto says; and the counter-proof that the test above can fail."""
    blind(range(3))
    answers = ask(engine, [first(lookahead=0), *(message(s, n) for n, s in enumerate(shots))])
    assert hidden(answers, shots) == [False] * 3 + [True] * (FRAMES - 3)
    assert not answers[0].tracked and not answers[0].geometry.faces


def test_a_face_that_the_network_does_not_change_is_masked_and_not_in_the_geometry(
    engine: Any, shots: list[Pixels], blind: Callable[[Collection[int]], None]
) -> None:
    import dataclasses

    usual = engine.models.current
    for broken in (lambda crops, codes: crops.clone(), lambda crops, codes: crops * float("nan")):
        engine.models.current = dataclasses.replace(usual, run=broken)
        try:
            answers = ask(engine, [first(lookahead=0), *(message(s, n) for n, s in enumerate(shots[:3]))])
        finally:
            engine.models.current = usual
        assert all(hidden(answers, shots[:3]))
        assert all([face.masked for face in a.tracked] == [True] and not a.geometry.faces for a in answers)


def test_what_such_a_stream_has_not_is_refused(engine: Any, shots: list[Pixels]) -> None:
    recovering = first(pb.OPERATION_RECOVER)
    recovering.options.tracking.lookahead = 1
    chosen = first()
    chosen.options.edit.selection.faces.append(0)
    aligned = first()
    aligned.options.edit.aligned = True
    single = first()
    single.options.edit.password = ""
    single.options.edit.passwords[0] = "p"
    carrying = message(shots[0], 1, pb.Geometry(width=320, height=240, crop_size=128))
    timed = message(shots[0], 1)
    timed.frame.time = float("inf")
    late = message(shots[0], 2)
    late.frame.time = 1.0
    for messages in (
        [recovering],
        [chosen],
        [aligned],
        [single, message(shots[0], 1)],
        [first(lookahead=251)],
        [first(rate=float("nan"))],
        [first(), carrying],
        [first(), timed],
        [first(), message(shots[0], 1), late],
        [first(lookahead=0), message(shots[0], 1), message(shots[0][:200].copy(), 2)],
    ):
        code, told = refusal(engine, messages)
        assert code == grpc.StatusCode.INVALID_ARGUMENT and told


def test_what_is_kept_back_counts_and_is_given_free(
    engine: Any, shots: list[Pixels], blind: Callable[[Collection[int]], None]
) -> None:
    usual = engine.settings
    # Four stages of four frames may be under way.
    engine.settings = usual.model_copy(update={"max_buffered_bytes": 18 * shots[0].nbytes})
    many = [message(shots[n % 4], n) for n in range(28)]
    try:
        assert len(ask(engine, [first(lookahead=0), *many])) == 28
        code, _ = refusal(engine, [first(lookahead=25), *many])
        assert code == grpc.StatusCode.RESOURCE_EXHAUSTED
    finally:
        engine.settings = usual
    assert engine._buffered == 0


def test_a_caller_who_takes_no_answers_stops_the_reading_or_has_frames_dropped_and_named(
    engine: Any, shots: list[Pixels], blind: Callable[[Collection[int]], None]
) -> None:
    from serving.grpc_door import Servicer

    class Entry:
        def call(self, operation: Any, transport: str, *, endless: bool) -> Any:
            return engine.request(operation, transport, "1")

    async def go(*, drop: bool, frames: int) -> tuple[int, list[pb.TransformStreamResponse]]:
        read = 0

        async def requests() -> AsyncIterator[pb.TransformStreamRequest]:
            nonlocal read
            yield first(lookahead=2, drop=drop)
            for number in range(frames):
                read += 1
                yield message(shots[number % 4], number)
                await asyncio.sleep(0.02 if drop else 0)  # as a camera sends; all at once, all but two are dropped

        answers = Servicer(engine)._frames(Entry(), requests())  # type: ignore[arg-type]
        got = [await anext(answers)]
        await asyncio.sleep(1.5)
        before = read
        got += [answer async for answer in answers]
        return before, got

    read, got = asyncio.run(go(drop=False, frames=60))
    # Waiting in three places of four frames each, kept back, and in the hands of who moves them on.
    assert read <= 5 * engine.settings.stream_window + 2
    assert [answer.id for answer in got] == list(range(60)) and not any(answer.dropped for answer in got)

    read, got = asyncio.run(go(drop=True, frames=60))
    assert read == 60, "a live sender is not slowed down"
    told = [number for answer in got for number in (*answer.dropped, answer.id)]
    assert told == list(range(60)), "each frame is answered or named, in order"
    assert 3 < len(got) < 40 and got[-1].id == 59
    assert b"mien_frames_dropped_total %d.0" % (60 - len(got)) in engine.metrics.render()


def test_a_cancelled_call_and_a_passed_deadline_leave_nothing_behind(
    engine: Any, shots: list[Pixels], blind: Callable[[Collection[int]], None]
) -> None:
    async def go() -> None:
        async with door(engine) as address, grpc.aio.insecure_channel(address) as channel:
            stub: Any = FaceIdentityStub(channel)

            async def endless() -> AsyncIterator[pb.TransformStreamRequest]:
                yield first(lookahead=1)
                number = 0
                while True:
                    yield message(shots[number % 4], number)
                    number += 1

            call = stub.TransformStream(endless())
            assert (await call.read()).id == 0
            call.cancel()
            late = stub.TransformStream(timeout=1.0)
            for request in (first(lookahead=1), *(message(shots[n], n) for n in range(3))):
                await late.write(request)
            with pytest.raises(grpc.RpcError) as caught:
                async for _ in late:
                    pass
            assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED  # type: ignore[attr-defined]
            for _ in range(200):
                if not (engine._streams or engine._running or engine._waiting or engine._buffered):
                    return
                await asyncio.sleep(0.05)
            raise AssertionError((engine._streams, engine._running, engine._waiting, engine._buffered))

    asyncio.run(go())
    assert threading.active_count() < 60


def test_an_inbox_that_drops_remembers_whom_and_not_without_bound() -> None:
    async def go() -> None:
        inbox = _Inbox(2, drop=True)
        for number in range(4099):
            await asyncio.wait_for(inbox.put(Incoming(number, None, lambda: None)), 5)  # type: ignore[arg-type, return-value]
            if number == 4097:
                break
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(inbox.put(Incoming(9999, None, lambda: None)), 0.05)  # type: ignore[arg-type, return-value]
        frames = await inbox.take()
        assert frames is not None
        assert [number for frame in frames for number in (*frame.dropped, frame.id)] == list(range(4098))

    asyncio.run(go())


def test_the_client_follows_faces(engine: Any, shots: list[Pixels], blind: Callable[[Collection[int]], None]) -> None:
    async def go(asynchronous: bool) -> list[Any]:
        async with door(engine) as address:
            blind((0, 4))
            tracking = Tracking(lookahead=2)
            if asynchronous:
                async with mien.AsyncClient(f"grpc://{address}") as client:
                    return [frame async for frame in client.stream(shots, "p", tracking=tracking)]

            def wait() -> list[Any]:
                with mien.Client(f"grpc://{address}") as client:
                    return list(client.stream(shots, "p", tracking=tracking))

            return await asyncio.to_thread(wait)

    for asynchronous in (False, True):
        frames = asyncio.run(go(asynchronous))
        assert [frame.number for frame in frames] == list(range(FRAMES))
        assert all(differ(f.picture[FACE], shot[FACE]) > 0.5 for f, shot in zip(frames, shots, strict=True))
        assert [frame.tracked[0].state for frame in frames[:5]] == ["flow", "detected", "detected", "detected", "flow"]
    with mien.Client("http://127.0.0.1:9") as client, pytest.raises(ValueError, match="gRPC"):
        next(client.stream(shots, "p", tracking=Tracking()))
