"""The clients' manners, against small real servers of this file: what is asked again, when, and what becomes of errors.

What the clients give back is tested against the real service in ``tests/serving/test_clients_service.py``.
"""

from __future__ import annotations

import asyncio
import io
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
from PIL import Image

import mien
from mien import errors
from mien.clients.client import check_url
from mien.clients.failures import Attempts, Failed, refused
from mien.clients.requests import Edit

SECRET = "Geheim-77-c4nary"
PNG_HEADERS = {"Content-Type": "image/png", "X-Mien-Faces": "1", "X-Mien-Model-Digest": "ab" * 32, "X-Request-Id": "r1"}


def problem(status: int, slug: str, after: str | None = None) -> Callable[[Any], None]:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        body = json.dumps({"type": f"urn:mien:problem:{slug}", "detail": f"detail of {slug}"}).encode()
        handler.send_response(status)
        handler.send_header("Content-Type", "application/problem+json")
        handler.send_header("Content-Length", str(len(body)))
        if after is not None:
            handler.send_header("Retry-After", after)
        handler.end_headers()
        handler.wfile.write(body)

    return answer


def picture(handler: BaseHTTPRequestHandler) -> None:
    body = png()
    handler.send_response(200)
    for name, value in {**PNG_HEADERS, "Content-Length": str(len(body))}.items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(body)


def hang_up(handler: BaseHTTPRequestHandler) -> None:
    """What a server does that dies after it has read the request."""
    handler.connection.shutdown(socket.SHUT_RDWR)
    handler.close_connection = True


def keep_waiting(handler: BaseHTTPRequestHandler) -> None:
    time.sleep(1.5)
    handler.close_connection = True


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), (9, 99, 9)).save(buffer, "PNG")
    return buffer.getvalue()


class Scripted:
    """A server on a socket of 127.0.0.1 that answers by a list; the last answer is repeated."""

    def __init__(self, *answers: Callable[[Any], None]) -> None:
        self.requests: list[tuple[str, dict[str, str], bytes]] = []
        self.times: list[float] = []
        scripted = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                scripted.requests.append((self.path, dict(self.headers), body))
                scripted.times.append(time.monotonic())
                answers[min(len(scripted.requests), len(answers)) - 1](self)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def scripted() -> Iterator[Callable[..., Scripted]]:
    servers: list[Scripted] = []

    def start(*answers: Callable[[Any], None]) -> Scripted:
        servers.append(Scripted(*answers))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def waiting(url: str, **options: Any) -> mien.Answer:
    with mien.Client(url, **options) as client:
        return client.anonymize_bytes(png(), SECRET)


def looping(url: str, **options: Any) -> mien.Answer:
    async def run() -> mien.Answer:
        async with mien.AsyncClient(url, **options) as client:
            return await client.anonymize_bytes(png(), SECRET)

    return asyncio.run(run())


both = pytest.mark.parametrize("ask", [waiting, looping])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


# -- asking again ---------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize(("status", "slug"), [(429, "overloaded"), (503, "not-ready"), (429, "too-many-requests")])
def test_a_service_that_refused_before_working_is_asked_again_when_it_said(
    scripted: Any, ask: Any, status: int, slug: str
) -> None:
    server = scripted(problem(status, slug, after="1"), picture)
    answer = ask(server.url, timeout=20)
    assert answer.face_count == 1 and answer.digest == "ab" * 32 and answer.request_id == "r1"
    assert len(server.requests) == 2
    assert 1.0 <= server.times[1] - server.times[0] < 3.0
    assert server.requests[0][2].split(b"\r\n", 1)[1:] != []
    # The very same request: only the boundary of the form differs.
    assert len(server.requests[0][2]) == len(server.requests[1][2])


@both
@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (problem(503, "timeout", after="1"), errors.ServiceTimeout),
        (problem(429, "overloaded"), errors.ServiceUnavailable),
        (problem(429, "too-many-requests", after="600"), errors.ServiceUnavailable),
        (problem(500, "internal-error"), errors.ServiceError),
        (problem(400, "malformed-request"), errors.ServiceError),
        (problem(401, "unauthenticated"), errors.AccessDenied),
        (problem(422, "no-face-found"), errors.NoFaceFound),
        (problem(422, "invalid-image"), errors.InvalidImage),
        (problem(413, "image-too-large"), errors.ImageTooLarge),
        (problem(422, "too-many-faces"), errors.TooManyFaces),
        (problem(422, "no-such-face"), errors.NoSuchFace),
        (problem(422, "wrong-model"), errors.WrongModel),
        (problem(422, "invalid-password"), errors.InvalidPassword),
    ],
)
def test_what_was_worked_on_or_will_be_refused_again_is_asked_once(
    scripted: Any, ask: Any, answer: Any, kind: type[Exception]
) -> None:
    server = scripted(answer)
    with pytest.raises(kind, match="detail of") as caught:
        ask(server.url, timeout=20)
    assert type(caught.value) is kind
    assert len(server.requests) == 1


@both
def test_attempts_are_bounded(scripted: Any, ask: Any) -> None:
    server = scripted(problem(429, "overloaded", after="0"))
    with pytest.raises(errors.ServiceUnavailable, match="detail of overloaded"):
        ask(server.url, timeout=20, attempts=3)
    assert len(server.requests) == 3


@both
def test_a_connection_that_breaks_is_tried_once_more_and_no_more(scripted: Any, ask: Any) -> None:
    once = scripted(hang_up, picture)
    assert ask(once.url, timeout=20).face_count == 1
    assert len(once.requests) == 2
    always = scripted(hang_up)
    with pytest.raises(errors.ServiceUnavailable, match="broke"):
        ask(always.url, timeout=20)
    assert len(always.requests) == 2


@both
def test_no_answer_in_time_is_not_asked_again(scripted: Any, ask: Any) -> None:
    server = scripted(keep_waiting)
    began = time.monotonic()
    with pytest.raises(errors.ServiceTimeout):
        ask(server.url, timeout=0.5)
    assert time.monotonic() - began < 1.4
    assert len(server.requests) == 1


@both
def test_a_service_that_comes_up_meanwhile_is_found(ask: Any) -> None:
    port = free_port()
    servers: list[ThreadingHTTPServer] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            picture(self)

        def log_message(self, *_: object) -> None:
            pass

    def come_up() -> None:
        time.sleep(0.3)
        servers.append(ThreadingHTTPServer(("127.0.0.1", port), Handler))
        servers[0].serve_forever()

    threading.Thread(target=come_up, daemon=True).start()
    try:
        assert ask(f"http://127.0.0.1:{port}", timeout=20, attempts=8).face_count == 1
    finally:
        servers[0].shutdown()
        servers[0].server_close()


@both
@pytest.mark.parametrize("scheme", ["http", "grpc"])
def test_nobody_there_is_said_within_the_timeout(ask: Any, scheme: str) -> None:
    if scheme == "grpc":
        pytest.importorskip("grpc", reason="the grpc extra is not installed")
    began = time.monotonic()
    with pytest.raises(errors.ServiceUnavailable, match="cannot be reached"):
        ask(f"{scheme}://127.0.0.1:{free_port()}", timeout=3)
    assert time.monotonic() - began < 5


def test_pauses_grow_heed_the_service_and_end_with_the_timeout() -> None:
    attempts = Attempts(timeout=60, left=10)
    pauses = []
    for _ in range(6):
        attempts.start()
        pauses.append(attempts.pause(Failed(errors.ServiceUnavailable("x"), again=True)))
    assert 0.2 <= pauses[0] <= 0.4 and pauses[5] <= 5.0
    assert all(later > earlier for earlier, later in zip(pauses[:3:2], pauses[2::2], strict=False))
    attempts.start()
    assert 3 <= attempts.pause(refused(429, "overloaded", "x", 3.0)) <= 3.75
    with pytest.raises(errors.ServiceUnavailable):
        attempts.pause(refused(429, "overloaded", "x", 61.0))
    late = Attempts(timeout=-1, left=10)
    with pytest.raises(errors.ServiceTimeout):
        late.start()


# -- secrets --------------------------------------------------------------------------------------------------------


@both
def test_password_and_key_travel_in_body_and_header_and_show_up_nowhere_else(
    scripted: Any, ask: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    server = scripted(picture, problem(500, "internal-error"))
    ask(server.url, api_key="key-c4nary")
    with pytest.raises(errors.ServiceError) as caught:
        ask(server.url, api_key="key-c4nary")
    path, headers, body = server.requests[0]
    assert path == "/v1/anonymize" and SECRET.encode() in body
    assert headers["Authorization"] == "Bearer key-c4nary"
    assert SECRET not in str(headers)
    shown = str(caught.value) + repr(caught.value) + caplog.text
    chain: BaseException | None = caught.value
    while chain is not None:
        shown += repr(chain) + repr(vars(chain))
        chain = chain.__cause__ or (None if chain.__suppress_context__ else chain.__context__)
    assert SECRET not in shown and "key-c4nary" not in shown
    assert SECRET not in repr(Edit("anonymize", SECRET, passwords={0: SECRET}))
    assert "key-c4nary" not in repr(mien.Client(server.url, api_key="key-c4nary"))


@both
def test_neither_a_redirect_nor_a_proxy_gets_to_see_the_password(
    scripted: Any, ask: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = scripted(picture)

    def redirect(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(307)
        handler.send_header("Location", f"{elsewhere.url}/v1/anonymize")
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    monkeypatch.setenv("HTTP_PROXY", elsewhere.url)
    monkeypatch.setenv("ALL_PROXY", elsewhere.url)
    server = scripted(redirect)
    with pytest.raises(errors.ServiceError, match="status 307"):
        ask(server.url)
    assert len(server.requests) == 1 and elsewhere.requests == []


@pytest.mark.parametrize(
    "url",
    [
        "localhost:3000",
        "ftp://host",
        "http://",
        "http://user:secret@host",
        "http://host?key=1",
        "grpc://host:1/path",
        "/models",
    ],
)
def test_addresses_that_are_none_are_refused_without_being_quoted(url: str) -> None:
    with pytest.raises(ValueError) as caught:
        mien.Client(url)
    assert "secret" not in str(caught.value)


def test_a_path_before_the_api_is_kept(scripted: Any) -> None:
    server = scripted(picture)
    waiting(server.url + "/mien/")
    assert server.requests[0][0] == "/mien/v1/anonymize"
    assert check_url("grpcs://[::1]:443/") == "grpcs://[::1]:443"


# -- requests -------------------------------------------------------------------------------------------------------


def test_options_become_form_fields_as_the_service_reads_them() -> None:
    edit = Edit(
        "anonymize",
        "p",
        passwords={1: "q"},
        faces=[0, 2],
        boxes=[(1, 2.5, 3, 4)],
        exclude_faces=[3],
        exclude_boxes=[(0, 0, 9, 9)],
        format="JPEG",
        quality=80,
        keep_metadata=True,
    )
    assert edit.form() == {
        "password": "p",
        "passwords": '{"1": "q"}',
        "faces": "0,2",
        "boxes": "1.0,2.5,3.0,4.0",
        "exclude_faces": "3",
        "exclude_boxes": "0.0,0.0,9.0,9.0",
        "format": "jpeg",
        "quality": "80",
        "keep_metadata": "true",
    }
    for wrong in ({"format": "GIF"}, {"quality": 0}):
        with pytest.raises(ValueError):
            Edit("anonymize", "p", **wrong)  # type: ignore[arg-type]


def test_an_answer_that_is_not_miens_is_said_to_be_none(scripted: Any) -> None:
    def page(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Type", "text/html")
        handler.send_header("Content-Length", "2")
        handler.end_headers()
        handler.wfile.write(b"hi")

    server = scripted(page)
    with pytest.raises(errors.ServiceError, match="not as Mien does"):
        waiting(server.url)
    with mien.Client(server.url) as client, pytest.raises(errors.ServiceError, match="not as Mien does"):
        client.detect(png())


def test_crops_and_frames_of_a_wrong_shape_are_refused_before_anything_is_sent(scripted: Any) -> None:
    server = scripted(picture)
    with mien.Client(server.url) as client:
        for wrong in (np.zeros((2, 8, 9, 3), np.uint8), np.zeros((8, 8, 3), np.uint8), np.zeros((1, 8, 8, 3))):
            with pytest.raises(ValueError, match="crops"):
                client.anonymize_faces(wrong, "p")
        with pytest.raises(ValueError, match="frame"):
            list(client.stream([np.zeros((8, 8), np.uint8)], "p"))
    assert server.requests == []


def test_frames_come_back_in_order_a_few_are_under_way_and_no_more_are_taken(scripted: Any) -> None:
    lock = threading.Lock()
    state = {"now": 0, "most": 0}

    def slowly(handler: BaseHTTPRequestHandler) -> None:
        with lock:
            state["now"] += 1
            state["most"] = max(state["most"], state["now"])
        time.sleep(0.05)
        with lock:
            state["now"] -= 1
        picture(handler)

    server = scripted(slowly)
    taken = 0

    def frames() -> Iterator[np.ndarray]:
        nonlocal taken
        for _ in range(20):
            taken += 1
            yield np.zeros((32, 32, 3), np.uint8)

    with mien.Client(server.url) as client:
        answers = client.stream(frames(), "p")
        next(answers)
        assert taken <= 5
        answers.close()
        assert len(list(client.stream(frames(), "p"))) == 20
    assert 2 <= state["most"] <= 4


def test_what_the_frames_raise_reaches_the_caller(scripted: Any) -> None:
    server = scripted(picture)

    def frames() -> Iterator[np.ndarray]:
        yield np.zeros((32, 32, 3), np.uint8)
        raise OSError("the camera is gone")

    async def run() -> None:
        async with mien.AsyncClient(server.url) as client:
            async for _ in client.stream(frames(), "p"):
                pass

    with mien.Client(server.url) as client, pytest.raises(OSError, match="camera"):
        list(client.stream(frames(), "p"))
    with pytest.raises(OSError, match="camera"):
        asyncio.run(run())


def test_a_client_loads_neither_torch_nor_grpc() -> None:
    code = (
        "import sys, mien\n"
        "mien.Client('http://localhost:1'); mien.AsyncClient('http://localhost:1')\n"
        "print([m for m in ('torch', 'torchvision', 'grpc', 'bentoml') if m in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert ran.stdout.strip() == "[]"
