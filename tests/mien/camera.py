"""A camera on this machine: RTSP over TCP (RFC 2326), MPEG-TS in RTP (RFC 2250), at the pace of its clip."""

from __future__ import annotations

import socket
import struct
import threading
import time
from contextlib import suppress
from pathlib import Path

_CHUNK = 7 * 188


class Camera:
    """Serves one clip (``.ts``) to one viewer; a context manager. ``url`` has a user and a password, as cameras do."""

    def __init__(self, clip: Path, seconds: float) -> None:
        self.data, self.seconds = clip.read_bytes(), seconds
        self._socket = socket.create_server(("127.0.0.1", 0))
        self._socket.settimeout(60)
        self.url = f"rtsp://user:s3cret@127.0.0.1:{self._socket.getsockname()[1]}/stream1"
        self.asked: list[str] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> Camera:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._socket.close()
        self._thread.join(10)

    def _serve(self) -> None:
        with suppress(OSError):
            connection, _ = self._socket.accept()
            with connection:
                connection.settimeout(30)
                self._talk(connection)

    def _talk(self, connection: socket.socket) -> None:
        pending = b""
        while not self._stop.is_set():
            while b"\r\n\r\n" not in pending:
                more = connection.recv(4096)
                if not more:
                    return
                pending += more
            request, _, pending = pending.partition(b"\r\n\r\n")
            lines = request.decode().split("\r\n")
            method = lines[0].split()[0]
            self.asked.append(method)
            fields = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines[1:])}
            body, extra = b"", ""
            if method == "OPTIONS":
                extra = "Public: OPTIONS, DESCRIBE, SETUP, PLAY, TEARDOWN\r\n"
            elif method == "DESCRIBE":
                body = (
                    b"v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=camera\r\nc=IN IP4 0.0.0.0\r\nt=0 0\r\n"
                    b"m=video 0 RTP/AVP 33\r\na=rtpmap:33 MP2T/90000\r\na=control:track1\r\n"
                )
                extra = "Content-Type: application/sdp\r\n"
            elif method == "SETUP":
                extra = "Session: 1\r\nTransport: RTP/AVP/TCP;unicast;interleaved=0-1\r\n"
            elif method == "PLAY":
                extra = "Session: 1\r\n"
            answer = f"RTSP/1.0 200 OK\r\nCSeq: {fields['cseq']}\r\n{extra}Content-Length: {len(body)}\r\n\r\n"
            connection.sendall(answer.encode() + body)
            if method == "PLAY":
                self._play(connection)
                return

    def _play(self, connection: socket.socket) -> None:
        start = time.monotonic()
        for number, at in enumerate(range(0, len(self.data), _CHUNK)):
            due = self.seconds * at / len(self.data)
            if self._stop.wait(max(0.0, start + due - time.monotonic())):
                return
            payload = self.data[at : at + _CHUNK]
            header = struct.pack(">BBHII", 0x80, 33, number & 0xFFFF, int(due * 90_000) & 0xFFFFFFFF, 7)
            connection.sendall(struct.pack(">BBH", 0x24, 0, len(header) + len(payload)) + header + payload)
