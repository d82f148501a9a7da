"""The service's promises (DESIGN.md, "Serving"), each with a test that fails where it is broken."""

from __future__ import annotations

import base64
import io
import json
import re
import resource
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
from PIL import Image

from mien.v1 import face_identity_pb2 as pb
from mien.v1.face_identity_pb2_grpc import FaceIdentityStub

CANARY = "c4nary-Xq7-geheim"
TYPE = b"Content-Type: multipart/form-data; boundary=b\r\n"


def post(client: httpx.Client, path: str, image: bytes, **fields: str) -> httpx.Response:
    return client.post(path, files={"image": ("x", image)}, data=fields)


def traffic(service: Any, client: httpx.Client, astronaut: bytes, large: bytes) -> list[httpx.Response]:
    """Good and bad requests of every kind and over both doors, all with the canary for a password."""
    over_grpc(service.grpc, astronaut, large)
    encoded = base64.b64encode(astronaut).decode()
    wrong_type = {"Content-Type": "application/x-www-form-urlencoded"}
    safe = post(client, "/v1/anonymize", astronaut, password=CANARY)
    return [
        safe,
        post(client, "/v1/recover", safe.content, password=CANARY),
        post(client, "/v1/anonymize", large, password=CANARY),
        client.post("/v1/anonymize", json={"image": encoded, "password": CANARY}),
        client.post("/v1/anonymize", json={"image": encoded, "password": CANARY, "format": "bad"}),
        client.post("/v1/anonymize", json={"image": encoded, "password": [CANARY]}),
        client.post("/v1/anonymize", json={"image": "x", CANARY: CANARY}),
        post(client, "/v1/anonymize", b"not a picture", password=CANARY),
        post(client, "/v1/anonymize", astronaut, password=CANARY * 100),
        post(client, "/v1/detect", astronaut, password=CANARY),
        client.post("/v1/anonymize", content=f"password={CANARY}", headers=wrong_type),
        client.get("/nowhere", params={"password": CANARY}),
    ]


def over_grpc(address: str, astronaut: bytes, large: bytes) -> None:
    """The same over gRPC: pictures that are, and are not; a stream of two frames."""
    edit = pb.EditOptions(password=CANARY)
    with grpc.insecure_channel(address, [("grpc.max_receive_message_length", -1)]) as channel:
        stub = FaceIdentityStub(channel)
        safe = stub.Anonymize(pb.EditRequest(image=astronaut, options=edit), timeout=60)
        for call in (
            lambda: stub.Recover(pb.EditRequest(image=safe.image, options=edit), timeout=60),
            lambda: stub.Anonymize(pb.EditRequest(image=large, options=edit), timeout=60),
            lambda: stub.Detect(pb.DetectRequest(image=astronaut), timeout=60),
        ):
            assert CANARY.encode() not in call().SerializeToString()
        for image, options in (
            (b"not a picture", edit),
            (astronaut, pb.EditOptions(password=CANARY * 100)),
            (astronaut, pb.EditOptions(password=CANARY, quality=1000)),
        ):
            with pytest.raises(grpc.RpcError) as caught:
                stub.Anonymize(pb.EditRequest(image=image, options=options), timeout=60)
            assert CANARY not in str(caught.value)
        frames = [pb.TransformStreamRequest(frame=pb.Frame(id=n, encoded=astronaut)) for n in range(2)]
        first = pb.StreamOptions(operation=pb.OPERATION_ANONYMIZE, edit=edit)
        answers = stub.TransformStream(iter([pb.TransformStreamRequest(options=first), *frames]), timeout=60)
        assert [answer.id for answer in answers] == [0, 1]


@pytest.fixture(scope="session")
def large(encode: Callable[..., bytes]) -> bytes:
    """A picture of more than 1 MiB, which form parsers put into temporary files."""
    from skimage import data

    noise = np.random.default_rng(0).integers(0, 60, (900, 900, 3)).astype(np.uint8)
    noise[:512, :512] = data.astronaut()
    encoded = encode(noise)
    assert len(encoded) > 1.5 * 1024 * 1024
    return encoded


# 1. Nothing is kept.


def test_the_password_is_in_no_log_metric_or_error(
    service: Any, client: httpx.Client, astronaut: bytes, large: bytes
) -> None:
    responses = traffic(service, client, astronaut, large)
    assert responses[0].status_code == 200
    for response in responses:
        assert CANARY.encode() not in response.content
        assert CANARY not in str(response.headers)
    assert CANARY not in client.get("/metrics").text
    printed = service.printed()
    assert CANARY not in printed
    assert base64.b64encode(CANARY.encode()).decode()[:16] not in printed
    assert "Traceback" not in printed
    for path in service.home.rglob("*"):
        if path.is_file():
            assert CANARY.encode() not in path.read_bytes(), path


def test_a_request_is_one_json_line_with_sizes_and_outcome(
    service: Any, client: httpx.Client, astronaut: bytes
) -> None:
    client.post("/v1/anonymize", files={"image": astronaut}, data={"password": "p"}, headers={"X-Request-Id": "log-1"})
    client.post("/v1/anonymize", files={"image": b"x"}, data={"password": "p"}, headers={"X-Request-Id": "log-2"})
    lines = [json.loads(line) for line in service.printed().splitlines() if line.startswith("{")]
    good = next(line for line in lines if line.get("request_id") == "log-1")
    bad = next(line for line in lines if line.get("request_id") == "log-2")
    assert good["outcome"] == "ok"
    assert good["faces"] == 1
    assert good["bytes_in"] == len(astronaut)
    assert good["bytes_out"] > 1000
    assert good["operation"] == "anonymize"
    assert len(good["model_digest"]) == 64
    assert 0 < good["seconds"] < 60
    assert bad["outcome"] == "invalid-image"
    assert set(good) == {
        "event", "level", "timestamp", "request_id", "operation", "transport", "outcome", "seconds", "model_digest",
        "bytes_in", "bytes_out", "faces",
    }  # fmt: skip


def snapshot(folder: Path) -> dict[Path, tuple[int, int]]:
    return {p: (p.stat().st_size, p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()}


def test_requests_succeed_where_not_one_byte_may_be_written_to_a_file_and_leave_none_behind(
    service: Any, client: httpx.Client, astronaut: bytes, large: bytes
) -> None:
    """RLIMIT_FSIZE of 0 makes every write to a regular file fail, those to unnamed temporary ones included."""
    before = snapshot(service.home)
    soft, hard = resource.prlimit(service.worker, resource.RLIMIT_FSIZE)
    resource.prlimit(service.worker, resource.RLIMIT_FSIZE, (0, hard))
    try:
        responses = traffic(service, client, astronaut, large)
    finally:
        resource.prlimit(service.worker, resource.RLIMIT_FSIZE, (soft, hard))
    assert [response.status_code for response in responses[:4]] == [200] * 4
    assert snapshot(service.home) == before


#: What may open or make a file to write to.
CALLS = "trace=open,openat,openat2,creat,memfd_create,mkdir,mkdirat,rename,renameat,renameat2,link,linkat"


def writes(line: str) -> bool:
    """Whether a line of strace tells of a file that was opened or made to write to."""
    opens = re.search(r"O_WRONLY|O_RDWR|O_CREAT|O_TMPFILE|creat\(|memfd|mkdir|rename|link", line)
    return bool(opens) and "/dev/" not in line and "ENOENT" not in line


@contextmanager
def opened_for_writing(pid: int, trace: Path) -> Iterator[list[str]]:
    """Collects, until the block ends, the system calls of a process that open or make a file to write to."""
    tracer = subprocess.Popen(
        ["strace", "-f", "-qq", "-e", CALLS, "-o", str(trace), "-p", str(pid)], stderr=subprocess.PIPE
    )
    found: list[str] = []
    try:
        time.sleep(1.5)
        if tracer.poll() is not None:
            pytest.skip(f"strace may not attach here: {tracer.stderr.read().decode()[:120]!r}")  # type: ignore[union-attr]
        yield found
    finally:
        tracer.terminate()
        tracer.wait(20)
    found.extend(line for line in trace.read_text(errors="replace").splitlines() if writes(line))


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_no_system_call_opens_a_file_for_writing_during_requests(
    service: Any, client: httpx.Client, astronaut: bytes, large: bytes, tmp_path: Path
) -> None:
    post(client, "/v1/anonymize", astronaut, password="warm")
    with opened_for_writing(service.worker, tmp_path / "trace") as found:
        responses = traffic(service, client, astronaut, large)
    assert responses[2].status_code == 200, responses[2].text
    assert found == []


@pytest.mark.soak
@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_200_requests_of_50_kb_to_20_mb_open_no_file_for_writing_and_leave_no_canary(
    tiny_model: Path,
    tmp_path: Path,
    astronaut: bytes,
    large: bytes,
    encode: Callable[..., bytes],
    start_service: Callable[..., Any],
) -> None:
    from skimage import data

    draw = np.random.default_rng(1)
    pictures = [encode(data.astronaut(), "JPEG", quality=85), astronaut, large]
    for side in (1500, 2600):
        noise = draw.integers(0, 256, (side, side, 3), dtype=np.uint8)
        noise[:512, :512] = data.astronaut()
        pictures.append(encode(noise))
    assert len(pictures[0]) < 100_000 and len(pictures[-1]) > 19 * 2**20
    # A run of the picture's own pixels, which a decoded copy of it would hold.
    canary_picture = data.astronaut()[100, 200:240].tobytes()
    trace = tmp_path / "trace"
    # Traced from its start: only so does the kernel stop it at these calls alone (--seccomp-bpf), and not at each.
    under = ["strace", "-D", "-f", "-qq", "--seccomp-bpf", "-ttt", "-e", CALLS, "-o", str(trace)]
    with start_service(tiny_model, tmp_path, under=under, MIEN_MAX_BODY_BYTES=str(28 * 2**20)) as service:
        with service.client(timeout=120) as client:
            began = time.time()
            traffic(service, client, astronaut, large)
            safe = [post(client, "/v1/anonymize", picture, password=CANARY).content for picture in pictures]
            for n in range(180):
                which = (0, 1, 2, 0, 1, 2, 3, 0, 1, 4)[n % 10]
                # Large ones are recovered: their faces need not be looked for again, which takes seconds each.
                anonymize = which < 3 and n % 2
                path = "/v1/anonymize" if anonymize else "/v1/recover"
                picture = (pictures if anonymize else safe)[which]
                if n % 7 == 6:
                    picture = picture[: len(picture) // 2]
                if n % 3 == 0 and len(picture) < 16 * 2**20:
                    document = {"image": base64.b64encode(picture).decode(), "password": CANARY}
                    answer = client.post(path, json=document)
                else:
                    answer = post(client, path, picture, password=CANARY)
                assert answer.status_code == (422 if n % 7 == 6 else 200), answer.text
            metrics = client.get("/metrics").text
            ended = time.time()
        assert CANARY not in metrics + service.printed()
        sent = int(
            sum(float(line.split()[-1]) for line in metrics.splitlines() if line.startswith("mien_requests_total{"))
        )
        print(json.dumps({"requests": sent, "bytes": [len(picture) for picture in pictures]}))
        for place in (service.home, Path("/dev/shm")):
            for path in place.rglob("*"):
                if path.is_file():
                    held = path.read_bytes()
                    assert CANARY.encode() not in held and canary_picture not in held, path
    # Its lines are whole when the tracer has ended: it does with the service.
    written = [line for line in trace.read_text(errors="replace").splitlines() if writes(line)]
    at = [float(line.split()[1]) for line in written]
    assert [line for line, when in zip(written, at, strict=True) if began <= when <= ended] == []
    assert any(when < began for when in at), "a service that starts makes files: the tracer saw nothing"


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_the_tracer_sees_a_file_that_is_opened_for_writing(tmp_path: Path) -> None:
    """Else the test above could not fail."""
    writer = "import sys, tempfile, time\nsys.stdin.read(1)\ntempfile.TemporaryFile(dir=sys.argv[1]).write(b'x')"
    process = subprocess.Popen([sys.executable, "-c", writer, str(tmp_path)], stdin=subprocess.PIPE)
    try:
        with opened_for_writing(process.pid, tmp_path / "trace") as found:
            process.communicate(b"x", timeout=20)
    finally:
        process.kill()
        process.wait(20)
    assert any(str(tmp_path) in line for line in found)


def test_core_dumps_are_off(service: Any) -> None:
    limits = Path(f"/proc/{service.worker}/limits")
    if not limits.exists():
        pytest.skip("no /proc here")
    row = next(line for line in limits.read_text().splitlines() if line.startswith("Max core file size"))
    assert row.split()[4:6] == ["0", "0"]


# 5. Overload sheds. (SIGTERM under load: test_promises_load.py)


@contextmanager
def stalled_uploads(port: int, count: int) -> Iterator[None]:
    """Connections whose bodies never end."""
    connections = []
    try:
        for _ in range(count):
            connection = socket.create_connection(("127.0.0.1", port), timeout=10)
            connections.append(connection)
            connection.sendall(
                b"POST /v1/detect HTTP/1.1\r\nHost: x\r\n" + TYPE + b"Content-Length: 9999\r\n\r\n--b\r\n"
            )
        time.sleep(0.5)
        yield
    finally:
        for connection in connections:
            connection.close()


def test_a_full_service_refuses_at_once_and_recovers(service: Any, client: httpx.Client, astronaut: bytes) -> None:
    """Two workers and two places in the queue, and twelve callers."""
    answers: list[httpx.Response] = []
    took: list[float] = []
    barrier = threading.Barrier(12)

    def call() -> None:
        with service.client() as own:
            barrier.wait(20)
            began = time.monotonic()
            answer = post(own, "/v1/anonymize", astronaut, password="p")
            if answer.status_code == 429:
                took.append(time.monotonic() - began)
            answers.append(answer)

    threads = [threading.Thread(target=call) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    refused = [answer for answer in answers if answer.status_code == 429]
    assert len(answers) == 12
    assert {answer.status_code for answer in answers} == {200, 429}
    assert 12 - len(refused) >= 4
    for answer in refused:
        assert answer.json()["type"] == "urn:mien:problem:overloaded"
        assert int(answer.headers["retry-after"]) >= 1
    assert max(took) < 5
    assert client.get("/readyz").status_code == 200
    assert post(client, "/v1/anonymize", astronaut, password="p").status_code == 200
    metrics = client.get("/metrics").text
    assert "mien_queue_depth 0.0" in metrics
    assert "mien_inflight_requests 0.0" in metrics


def test_uploads_that_stand_still_hold_no_worker(service: Any, client: httpx.Client, astronaut: bytes) -> None:
    with stalled_uploads(service.port, 20):
        assert "mien_uploads 20.0" in client.get("/metrics").text
        assert post(client, "/v1/anonymize", astronaut, password="p").status_code == 200
        time.sleep(3)
        # MIEN_STALL_TIMEOUT of the tests' service is 3 s.
        deadline = time.monotonic() + 10
        while "mien_uploads 0.0" not in client.get("/metrics").text:
            assert time.monotonic() < deadline, "a stalled upload keeps its place"
            time.sleep(0.2)


def test_many_callers_at_once_get_what_each_gets_alone(service: Any, client: httpx.Client, astronaut: bytes) -> None:
    passwords = [f"password {n}" for n in range(4)]
    alone = [post(client, "/v1/anonymize", astronaut, password=p).content for p in passwords]
    together: list[bytes] = [b""] * 4

    def call(n: int) -> None:
        with service.client() as own:
            together[n] = post(own, "/v1/anonymize", astronaut, password=passwords[n]).content

    threads = [threading.Thread(target=call, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, other in zip(alone, together, strict=True):
        a, b = (np.asarray(Image.open(io.BytesIO(data))).astype(int) for data in (one, other))
        # A batch adds in another order, which may tip the rounding of a value by one step.
        assert np.abs(a - b).max() <= 1
    assert len(set(alone)) == 4


def test_the_named_metrics_are_there_and_count(client: httpx.Client, astronaut: bytes) -> None:
    def value(name: str) -> float:
        text = client.get("/metrics").text
        return sum(float(m) for m in re.findall(rf"^{re.escape(name)}(?:{{[^}}]*}})? ([0-9.e+]+)$", text, re.M))

    ok = 'mien_requests_total{operation="anonymize",outcome="ok",transport="http"}'
    counted = {
        name: value(name) for name in (ok, "mien_faces_total", "mien_batch_size_sum", "mien_request_seconds_count")
    }
    post(client, "/v1/anonymize", astronaut, password="p")
    for name, before in counted.items():
        assert value(name) == before + 1, name
    text = client.get("/metrics").text
    assert re.search(r'mien_model_info\{digest="[0-9a-f]{64}",version="[^"]+"\} 1.0', text)
    assert 'mien_model_reloads_total{outcome="ok"} 1.0' in text
    assert "mien_queue_depth" in text
    assert "mien_inflight_requests" in text
    assert "process_resident_memory_bytes" in text


def test_a_model_that_is_not_the_one_it_names_is_not_served(
    tiny_model: Path, tmp_path: Path, start_service: Callable[..., Any]
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_model, broken)
    weights = bytearray((broken / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (broken / "model.safetensors").write_bytes(weights)
    with pytest.raises(AssertionError, match="are not those its config"), start_service(broken, tmp_path / "run"):
        pass
