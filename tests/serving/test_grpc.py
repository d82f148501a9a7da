"""The gRPC door, against a real service, and where that cannot show it, in this process."""

from __future__ import annotations

import asyncio
import datetime
import io
import ipaddress
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from PIL import Image

from mien.v1 import face_identity_pb2 as pb
from mien.v1.face_identity_pb2_grpc import FaceIdentityStub

ROOT = Path(__file__).resolve().parents[2]
PASSWORD = "correct horse"
FACE = np.s_[75:170, 185:265]
"""The astronaut's."""


@pytest.fixture(scope="module")
def channel(service: Any) -> Iterator[grpc.Channel]:
    options = [("grpc.max_receive_message_length", -1)]
    with grpc.insecure_channel(service.grpc, options) as channel:
        grpc.channel_ready_future(channel).result(20)
        yield channel


@pytest.fixture(scope="module")
def stub(channel: grpc.Channel) -> FaceIdentityStub:
    return FaceIdentityStub(channel)


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


def request(image: bytes, **options: Any) -> pb.EditRequest:
    return pb.EditRequest(image=image, options=pb.EditOptions(**{"password": PASSWORD, **options}))


def failure(call: Callable[[], Any]) -> tuple[grpc.StatusCode, dict[str, str], str]:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    error: Any = caught.value
    return error.code(), dict(error.trailing_metadata() or ()), error.details()


# -- single pictures ----------------------------------------------------------------------------------------------


def test_what_grpc_answers_is_what_http_answers(
    service: Any, client: httpx.Client, stub: FaceIdentityStub, astronaut: bytes
) -> None:
    over_http = client.post("/v1/anonymize", files={"image": astronaut}, data={"password": PASSWORD})
    safe, call = stub.Anonymize.with_call(request(astronaut), metadata=[("x-request-id", "grpc-1")])
    assert np.abs(pixels(safe.image) - pixels(over_http.content)).max() <= 1
    assert safe.media_type == "image/png"
    assert safe.model_digest == over_http.headers["x-mien-model-digest"]
    assert safe.request_id == "grpc-1"
    assert dict(call.initial_metadata())["x-request-id"] == "grpc-1"
    assert len(safe.faces) == 1 and len(safe.faces[0].matrix) == 6

    back = stub.Recover(request(safe.image))
    wrong = stub.Recover(request(safe.image, password="another"))
    original = pixels(astronaut)[FACE]
    error = [np.abs(pixels(answer.image)[FACE] - original).mean() for answer in (safe, back, wrong)]
    assert error[1] < error[0] / 2 and error[2] > 2 * error[1]
    log = next(line for line in service.printed().splitlines() if '"grpc-1"' in line)
    assert '"transport": "grpc"' in log and '"outcome": "ok"' in log


def test_detection_gives_what_http_gives(client: httpx.Client, stub: FaceIdentityStub, astronaut: bytes) -> None:
    over_http = client.post("/v1/detect", files={"image": astronaut}).json()
    found = stub.Detect(pb.DetectRequest(image=astronaut))
    (face,) = found.faces
    assert [face.box.left, face.box.top, face.box.right, face.box.bottom] == over_http["faces"][0]["box"]
    assert [[p.x, p.y] for p in face.landmarks] == over_http["faces"][0]["landmarks"]
    assert [found.width, found.height] == over_http["size"]


@pytest.mark.parametrize(
    ("message", "code", "problem"),
    [
        (request(b"no picture"), grpc.StatusCode.INVALID_ARGUMENT, "invalid-image"),
        (pb.EditRequest(image=b"x"), grpc.StatusCode.INVALID_ARGUMENT, "malformed-request"),
        (request(b"x", quality=200), grpc.StatusCode.INVALID_ARGUMENT, "malformed-request"),
        (request(b"x", format=pb.IMAGE_FORMAT_RAW), grpc.StatusCode.INVALID_ARGUMENT, "malformed-request"),
        (request(b"x", format=77), grpc.StatusCode.INVALID_ARGUMENT, "malformed-request"),
        (request(b"x", password="x" * 1025), grpc.StatusCode.INVALID_ARGUMENT, "invalid-password"),
    ],
)
def test_bad_requests_are_told_by_status_and_slug(
    stub: FaceIdentityStub, message: pb.EditRequest, code: grpc.StatusCode, problem: str
) -> None:
    got, trailing, details = failure(lambda: stub.Anonymize(message))
    assert (got, trailing["mien-problem"]) == (code, problem)
    assert "retry-after" not in trailing
    assert details and "xxx" not in details


def test_a_picture_without_a_face_and_a_face_that_is_not_there(
    stub: FaceIdentityStub, astronaut: bytes, encode: Callable[..., bytes]
) -> None:
    empty = encode(np.full((64, 64, 3), 90, np.uint8))
    assert failure(lambda: stub.Anonymize(request(empty)))[0] == grpc.StatusCode.NOT_FOUND
    assert not stub.Detect(pb.DetectRequest(image=empty)).faces
    away = pb.FaceSelection(boxes=[pb.Box(left=0, top=400, right=80, bottom=480)])
    code, trailing, _ = failure(lambda: stub.Anonymize(request(astronaut, selection=away)))
    assert (code, trailing["mien-problem"]) == (grpc.StatusCode.OUT_OF_RANGE, "no-such-face")


def test_a_message_that_is_too_large_is_refused_by_its_size(stub: FaceIdentityStub) -> None:
    code, _, _ = failure(lambda: stub.Anonymize(request(bytes(5 * 1024 * 1024))))
    assert code == grpc.StatusCode.RESOURCE_EXHAUSTED


def test_more_calls_than_places_are_refused_with_a_time_to_come_back(stub: FaceIdentityStub, astronaut: bytes) -> None:
    calls = [stub.Anonymize.future(request(astronaut), timeout=60) for _ in range(12)]
    outcomes = []
    for call in calls:
        try:
            outcomes.append(call.result().media_type)
        except grpc.RpcError as error:
            assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED, error  # type: ignore[attr-defined]
            trailing = dict(call.trailing_metadata())
            assert int(trailing["retry-after"]) >= 1
            assert int(trailing["grpc-retry-pushback-ms"]) >= 1000
            outcomes.append("shed")
    assert outcomes.count("image/png") >= 4
    assert outcomes.count("shed") >= 1


def test_a_deadline_is_kept_and_its_work_is_dropped(
    service: Any, client: httpx.Client, stub: FaceIdentityStub, astronaut: bytes
) -> None:
    # Four take all places; the last of them waits for the first ones.
    calls = [stub.Anonymize.future(request(astronaut), timeout=60) for _ in range(3)]
    time.sleep(0.05)
    began = time.monotonic()
    late = stub.Anonymize.future(request(astronaut), timeout=0.15, metadata=[("x-request-id", "late-1")])
    with pytest.raises(grpc.RpcError) as caught:
        late.result()
    assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED  # type: ignore[attr-defined]
    assert time.monotonic() - began < 1.5
    for call in calls:
        call.result()
    deadline = time.monotonic() + 10
    while "late-1" not in service.printed() and time.monotonic() < deadline:
        time.sleep(0.05)
    (line,) = [line for line in service.printed().splitlines() if "late-1" in line]
    assert '"outcome": "cancelled"' in line or '"outcome": "timeout"' in line
    assert "mien_queue_depth 0.0" in client.get("/metrics").text


def test_health_follows_the_engine_and_reflection_names_the_services(channel: grpc.Channel) -> None:
    health = health_pb2_grpc.HealthStub(channel)
    for name in ("", "mien.v1.FaceIdentity"):
        status = health.Check(health_pb2.HealthCheckRequest(service=name), timeout=10).status
        assert status == health_pb2.HealthCheckResponse.SERVING
    names = set(ProtoReflectionDescriptorDatabase(channel).get_services())
    assert {"mien.v1.FaceIdentity", "grpc.health.v1.Health"} <= names


# -- frames -------------------------------------------------------------------------------------------------------


def stream(
    stub: FaceIdentityStub, frames: list[pb.Frame], operation: int = pb.OPERATION_ANONYMIZE, **options: Any
) -> list[pb.TransformStreamResponse]:
    edit = pb.EditOptions(**{"password": PASSWORD, "format": pb.IMAGE_FORMAT_RAW, **options.pop("edit", {})})
    first = pb.StreamOptions(operation=operation, edit=edit, **options)  # type: ignore[arg-type]
    messages = [pb.TransformStreamRequest(options=first)]
    messages += [pb.TransformStreamRequest(frame=frame) for frame in frames]
    return list(stub.TransformStream(iter(messages), timeout=60))


def raw(array: np.ndarray, number: int, geometry: pb.Geometry | None = None) -> pb.Frame:
    picture = pb.RawImage(width=array.shape[1], height=array.shape[0], rgb=array.astype(np.uint8).tobytes())
    return pb.Frame(id=number, raw=picture, geometry=geometry)


def array_of(answer: pb.TransformStreamResponse) -> np.ndarray:
    return np.frombuffer(answer.raw.rgb, np.uint8).reshape(answer.raw.height, answer.raw.width, 3).astype(int)


def test_frames_are_answered_in_order_and_come_back_by_their_geometry(stub: FaceIdentityStub, astronaut: bytes) -> None:
    photo = pixels(astronaut)
    sent = [np.roll(photo, 5 * n, axis=1) for n in range(4)]
    empty = np.full((64, 80, 3), 120)
    safe = stream(stub, [raw(frame, 10 + n) for n, frame in enumerate(sent)] + [raw(empty, 99)])
    assert [answer.id for answer in safe] == [10, 11, 12, 13, 99]
    assert len({answer.model_digest for answer in safe}) == 1
    for frame, answer in zip(sent, safe, strict=False):
        assert len(answer.geometry.faces) == 1
        assert np.abs(array_of(answer) - frame).max() > 20
    # A frame without a face is answered as it came.
    assert not safe[-1].geometry.faces
    assert (array_of(safe[-1]) == empty).all()

    back = stream(stub, [raw(array_of(a), a.id, a.geometry) for a in safe], operation=pb.OPERATION_RECOVER)
    for frame, hidden, answer in zip(sent, safe, back, strict=False):
        assert np.abs(array_of(answer) - frame).mean() < np.abs(array_of(hidden) - frame).mean() / 2
    # With fail_without_face the same frame ends the stream, after those before it were answered.
    code, trailing, _ = failure(lambda: stream(stub, [raw(empty, 1)], fail_without_face=True))
    assert (code, trailing["mien-problem"]) == (grpc.StatusCode.NOT_FOUND, "no-face-found")


def test_a_trackers_geometry_takes_the_place_of_detection(stub: FaceIdentityStub, astronaut: bytes) -> None:
    photo = pixels(astronaut)
    (found,) = stream(stub, [raw(photo, 0)])
    tracked = pb.Geometry()
    tracked.CopyFrom(found.geometry)
    tracked.model_digest = ""
    hidden = photo.copy()
    hidden[95:110, 195:250] = 0  # no detector sees a face here
    (answer,) = stream(stub, [raw(hidden, 1, tracked)])
    assert answer.geometry.faces == found.geometry.faces
    assert np.abs(array_of(answer)[FACE] - hidden[FACE]).mean() > 2


def test_files_are_frames_too_and_aligned_crops_are_taken_as_they_are(
    stub: FaceIdentityStub, astronaut: bytes, encode: Callable[..., bytes]
) -> None:
    crop = pixels(astronaut)[40:168, 160:288].astype(np.uint8)
    strip = encode(np.concatenate([crop, crop[:, ::-1]]))
    (safe,) = stream(stub, [pb.Frame(id=7, encoded=strip)], edit={"aligned": True, "format": pb.IMAGE_FORMAT_PNG})
    assert safe.id == 7 and len(safe.geometry.faces) == 2
    unary = stub.Anonymize(request(strip, aligned=True))
    again = pb.Frame(id=8, encoded=safe.encoded, geometry=safe.geometry)
    (raw_back,) = stream(stub, [again], operation=pb.OPERATION_RECOVER, edit={"aligned": True})
    assert np.abs(array_of(raw_back) - pixels(strip)).mean() < 3
    again.geometry.faces[1].matrix[5] = -60
    code, _, _ = failure(lambda: stream(stub, [again], operation=pb.OPERATION_RECOVER, edit={"aligned": True}))
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert np.abs(pixels(safe.encoded) - pixels(unary.image)).max() <= 1
    back = stub.Recover(request(unary.image, aligned=True))
    assert np.abs(pixels(back.image) - pixels(strip)).mean() < 3


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ([pb.TransformStreamRequest(frame=pb.Frame(id=1))], "malformed-request"),
        ([], "malformed-request"),
        ([pb.TransformStreamRequest(options=pb.StreamOptions(edit=pb.EditOptions(password="p")))], "malformed-request"),
    ],
)
def test_a_stream_that_does_not_begin_with_its_options_is_refused(
    stub: FaceIdentityStub, messages: list[pb.TransformStreamRequest], problem: str
) -> None:
    code, trailing, _ = failure(lambda: list(stub.TransformStream(iter(messages), timeout=30)))
    assert (code, trailing["mien-problem"]) == (grpc.StatusCode.INVALID_ARGUMENT, problem)


def test_a_frame_whose_parts_do_not_fit_ends_the_stream_after_the_answers_before_it(
    stub: FaceIdentityStub, astronaut: bytes
) -> None:
    photo = pixels(astronaut)
    short = pb.Frame(id=2, raw=pb.RawImage(width=64, height=64, rgb=b"\0" * 100))
    foreign = pb.Geometry(width=9, height=9, crop_size=128, faces=[pb.FaceGeometry(matrix=[1, 0, 0, 0, 1, 0])])
    for bad in (short, raw(photo, 2, foreign), pb.Frame(id=2)):
        first = pb.StreamOptions(operation=pb.OPERATION_ANONYMIZE, edit=pb.EditOptions(password=PASSWORD))
        messages = [
            pb.TransformStreamRequest(options=first),
            pb.TransformStreamRequest(frame=raw(photo, 1)),
            pb.TransformStreamRequest(frame=bad),
        ]
        answers = stub.TransformStream(iter(messages), timeout=30)
        assert next(answers).id == 1
        code, _, _ = failure(lambda answers=answers: next(answers))  # type: ignore[misc]
        assert code == grpc.StatusCode.INVALID_ARGUMENT


# -- in this process ----------------------------------------------------------------------------------------------


def test_a_stream_reads_no_further_than_its_window(engine: Any) -> None:
    from serving.grpc_door import Servicer

    read = 0
    release = threading.Event()
    crop = np.random.default_rng(1).integers(0, 255, (128, 128, 3)).astype(np.uint8)
    edit = pb.EditOptions(password="p", aligned=True, format=pb.IMAGE_FORMAT_RAW)
    served = engine.models.current

    def slow(crops: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        release.wait(20)
        return served.run(crops, codes)  # type: ignore[no-any-return]

    async def requests() -> AsyncIterator[pb.TransformStreamRequest]:
        nonlocal read
        yield pb.TransformStreamRequest(options=pb.StreamOptions(operation=pb.OPERATION_ANONYMIZE, edit=edit))
        for number in range(40):
            read += 1
            yield pb.TransformStreamRequest(frame=raw(crop, number))

    class Entry:
        def call(self, operation: Any, transport: str, *, endless: bool) -> Any:
            return engine.request(operation, transport, "1")

    async def go() -> list[int]:
        import dataclasses

        engine.models.current = dataclasses.replace(served, run=slow)
        answered = []
        frames = Servicer(engine)._frames(Entry(), requests())  # type: ignore[arg-type]
        first = asyncio.ensure_future(anext(frames))
        await asyncio.sleep(1.0)
        assert read <= engine.settings.stream_window + 2
        release.set()
        answered.append((await first).id)
        async for frame in frames:
            answered.append(frame.id)
        return answered

    try:
        assert asyncio.run(go()) == list(range(40))
    finally:
        engine.models.current = served
    assert engine._streams == engine._waiting == engine._running == 0


def test_tls_is_spoken_where_there_are_files_and_the_client_is_asked_for_its_own(engine: Any, tmp_path: Path) -> None:
    from serving.grpc_door import GrpcDoor

    certificate, key = self_signed(tmp_path)
    pem = certificate.read_bytes()

    async def go(**files: Path) -> list[str]:
        saw = []
        usual = engine.settings
        engine.settings = usual.model_copy(update={"grpc_tls_cert": certificate, "grpc_tls_key": key, **files})
        door = GrpcDoor(engine)
        await door.open("127.0.0.1", 0)
        with_cert = grpc.ssl_channel_credentials(pem, key.read_bytes(), pem)
        channels = {
            "plain": grpc.aio.insecure_channel(f"127.0.0.1:{door.port}"),
            "tls": grpc.aio.secure_channel(f"127.0.0.1:{door.port}", grpc.ssl_channel_credentials(pem)),
            "mtls": grpc.aio.secure_channel(f"127.0.0.1:{door.port}", with_cert),
        }
        for name, channel in channels.items():
            try:
                await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
                saw.append(name)
            except grpc.RpcError:
                pass
            await channel.close()
        await door.close()
        engine.settings = usual
        return saw

    assert asyncio.run(go()) == ["tls", "mtls"]
    assert asyncio.run(go(grpc_tls_client_ca=certificate)) == ["mtls"]


def test_a_port_that_is_taken_is_said_so(engine: Any, service: Any) -> None:
    from serving.grpc_door import GrpcDoor

    async def go() -> None:
        await GrpcDoor(engine).open("127.0.0.1", service.grpc_port)

    with pytest.raises(OSError, match="MIEN_GRPC_PORT"):
        asyncio.run(go())


def test_the_generated_stubs_are_those_of_the_proto(tmp_path: Path) -> None:
    pytest.importorskip("grpc_tools")
    subprocess.run(
        [sys.executable, "-m", "grpc_tools.protoc", "-I", "serving/proto", f"--python_out={tmp_path}",
         f"--pyi_out={tmp_path}", f"--grpc_python_out={tmp_path}", "mien/v1/face_identity.proto"],
        cwd=ROOT, check=True, timeout=60,
    )  # fmt: skip
    for fresh in sorted((tmp_path / "mien" / "v1").iterdir()):
        assert fresh.read_text() == (ROOT / "mien" / "v1" / fresh.name).read_text(), f"make proto: {fresh.name}"


def self_signed(folder: Path) -> tuple[Path, Path]:
    x509 = pytest.importorskip("cryptography.x509")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "mien")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .sign(key, hashes.SHA256())
    )
    paths = folder / "cert.pem", folder / "key.pem"
    paths[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    paths[1].write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return paths
