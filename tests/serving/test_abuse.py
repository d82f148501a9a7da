"""Callers who mean ill or have a bad line, over real sockets: whatever they do holds no worker."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import httpx
import pytest

HEAD = b"POST /v1/anonymize HTTP/1.1\r\nHost: mien\r\nContent-Type: multipart/form-data; boundary=b\r\n"
LENGTH = b"Content-Length: 100000\r\n\r\n"
PART = b'--b\r\nContent-Disposition: form-data; name="image"\r\n\r\n'
# MIEN_MAX_BODY_BYTES and MIEN_STALL_TIMEOUT of the tests' service.
LIMIT = 4 * 1024 * 1024
STALL = 3.0


@contextmanager
def connections(service: Any, count: int) -> Iterator[list[socket.socket]]:
    opened: list[socket.socket] = []
    try:
        for _ in range(count):
            opened.append(socket.create_connection(("127.0.0.1", service.port), timeout=15))
        yield opened
    finally:
        for connection in opened:
            connection.close()


def answer_of(connection: socket.socket) -> bytes:
    """What is answered until the other side closes; the socket's timeout bounds every wait."""
    answer = b""
    with suppress(ConnectionResetError):
        while chunk := connection.recv(65536):
            answer += chunk
    return answer


def gauges(client: httpx.Client) -> dict[str, float]:
    lines = client.get("/metrics").text.splitlines()
    named = ("mien_uploads ", "mien_inflight_requests ", "mien_queue_depth ")
    return {line.split()[0]: float(line.split()[1]) for line in lines if line.startswith(named)}


def serves(client: httpx.Client, picture: bytes) -> None:
    """A request of somebody else is answered as usual."""
    began = time.monotonic()
    answer = client.post("/v1/anonymize", files={"image": picture}, data={"password": "p"})
    assert answer.status_code == 200, answer.text
    assert time.monotonic() - began < 10


@pytest.fixture
def idle(client: httpx.Client, wait_until: Callable[..., None]) -> Iterator[Callable[[], None]]:
    """Waits until the service holds nothing; also asked after every test."""

    def check() -> None:
        wait_until(lambda: not any(gauges(client).values()), STALL + 7)

    yield check
    check()


def test_a_connection_that_is_half_closed_in_the_middle_holds_nothing(
    service: Any, client: httpx.Client, astronaut: bytes, idle: Callable[[], None]
) -> None:
    with connections(service, 20) as opened:
        for connection in opened:
            connection.sendall(HEAD + LENGTH + PART + astronaut[:1000])
            connection.shutdown(socket.SHUT_WR)
        serves(client, astronaut)
        # The service closes its side too, without waiting for the stall timeout.
        began = time.monotonic()
        for connection in opened:
            assert not answer_of(connection).startswith(b"HTTP/1.1 200")
        assert time.monotonic() - began < STALL
        idle()


def test_a_connection_that_is_half_closed_before_its_answer_holds_nothing(
    service: Any, client: httpx.Client, astronaut: bytes, idle: Callable[[], None]
) -> None:
    body = PART + astronaut + b'\r\n--b\r\nContent-Disposition: form-data; name="password"\r\n\r\np\r\n--b--\r\n'
    with connections(service, 4) as opened:
        for connection in opened:
            connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            connection.shutdown(socket.SHUT_WR)
        idle()
        serves(client, astronaut)


def test_bytes_sent_very_slowly_are_given_up_and_hold_no_worker_meanwhile(
    service: Any, client: httpx.Client, astronaut: bytes, idle: Callable[[], None]
) -> None:
    """A byte every 0.2 s never stands still: what gives it up is the average rate."""
    done = threading.Event()
    with connections(service, 8) as bodies, connections(service, 8) as heads:
        for connection in bodies:
            connection.sendall(HEAD + LENGTH + PART)
        for connection in heads:
            connection.sendall(HEAD)

        def drip() -> None:
            while not done.wait(0.2):
                for connection in bodies:
                    with suppress(OSError):
                        connection.send(b"x")
                for connection in heads:
                    with suppress(OSError):
                        connection.send(b"X-A: b\r\n")

        dripping = threading.Thread(target=drip)
        dripping.start()
        try:
            time.sleep(0.5)
            # Heads take no place among the uploads, let alone a worker.
            held = gauges(client)
            assert held == {"mien_uploads": 8, "mien_inflight_requests": 0, "mien_queue_depth": 0}
            serves(client, astronaut)
            began = time.monotonic()
            for connection in bodies:
                head = connection.recv(65536)
                assert head.startswith(b"HTTP/1.1 408"), head[:100]
            assert time.monotonic() - began < STALL + 3
            idle()
        finally:
            done.set()
            dripping.join(10)


def test_a_body_announced_as_too_large_is_refused_unread(service: Any, client: httpx.Client, astronaut: bytes) -> None:
    with connections(service, 8) as opened:
        for expect in (b"", b"Expect: 100-continue\r\n"):
            for connection in opened[:4] if expect else opened[4:]:
                connection.sendall(HEAD + expect + b"Content-Length: 1099511627776\r\n\r\n")
        for connection in opened:
            head = connection.recv(65536)
            assert head.startswith(b"HTTP/1.1 413"), head[:100]
        assert gauges(client)["mien_inflight_requests"] == 0
        serves(client, astronaut)


def test_a_chunked_body_without_end_is_cut_at_the_limit(
    service: Any, client: httpx.Client, astronaut: bytes, idle: Callable[[], None]
) -> None:
    chunk = b"%x\r\n" % 65536 + bytes(65536) + b"\r\n"
    with connections(service, 2) as opened:
        for connection in opened:
            connection.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n" % len(PART) + PART + b"\r\n")
            sent = 0
            connection.setblocking(False)
            answer = b""
            ends = time.monotonic() + 15
            while not answer:
                assert time.monotonic() < ends and sent < 64 * LIMIT, sent
                with suppress(BlockingIOError):
                    # A part of a chunk at a time, as the line takes it.
                    offset = sent % len(chunk)
                    sent += connection.send(chunk[offset:])
                with suppress(BlockingIOError):
                    answer = connection.recv(65536)
            assert answer.startswith(b"HTTP/1.1 413"), answer[:100]
            # What lies in the buffers of both sides beside.
            assert sent < LIMIT + 32 * 1024 * 1024
        serves(client, astronaut)
    idle()


@pytest.mark.parametrize(
    "rest",
    [
        b"Content-Length: -1\r\n\r\n",
        b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
        b"Transfer-Encoding: chunked\r\n\r\nnothex\r\n",
        b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
    ],
    ids=["negative", "two-lengths", "no-chunk-size", "length-and-chunks"],
)
def test_a_body_whose_length_makes_no_sense_is_refused(
    service: Any, client: httpx.Client, idle: Callable[[], None], rest: bytes
) -> None:
    with connections(service, 1) as (connection,):
        connection.sendall(HEAD + rest)
        head = connection.recv(65536)
        assert not head or head.startswith((b"HTTP/1.1 400", b"HTTP/1.1 413")), head[:100]
    idle()
    assert client.get("/readyz").status_code == 200
