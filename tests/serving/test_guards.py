"""Who may ask, how often, and how much one request may hold."""

from __future__ import annotations

import asyncio
import hashlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from serving.http_frame import body_stream
from serving.keys import Allowance, InvalidKeyFile, KeyRing, read
from serving.problems import Overloaded, RateLimited, Unauthenticated, UploadStalled
from serving.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
ALICE, BOB = "mien_alice-key-0123456789", "mien_bob-key-0123456789"


def line(name: str, key: str) -> str:
    return f"{name} {hashlib.sha256(key.encode()).hexdigest()}\n"


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text("# who may ask\n\n" + line("alice", ALICE) + line("bob", BOB))
    return path


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


# -- API keys -----------------------------------------------------------------------------------------------------


def test_with_keys_every_operation_asks_for_one_and_the_log_names_its_owner(
    run_engine: Callable[..., Any], tiny_model: Path, keys: Path, astronaut: bytes
) -> None:
    running = run_engine(tiny_model, api_keys=keys)
    picture = {"files": {"image": astronaut}}
    for headers in ({}, bearer("wrong"), {"Authorization": f"Basic {ALICE}"}, {"Authorization": "Bearer"}):
        for method, path in (("POST", "/v1/anonymize"), ("POST", "/v1/recover"), ("POST", "/v1/detect")):
            refused = running.ask(method, path, headers=headers, data={"password": "p"}, **picture)
            assert refused.status_code == 401
            assert refused.json()["type"] == "urn:mien:problem:unauthenticated"
            assert refused.headers["www-authenticate"] == "Bearer"
        assert running.ask("GET", "/v1/model", headers=headers).status_code == 401
    for path in ("/healthz", "/readyz", "/metrics", "/openapi.json", "/"):
        assert running.ask("GET", path).status_code == 200
    assert running.ask("POST", "/v1/detect", headers=bearer(BOB), **picture).status_code == 200
    assert running.ask("GET", "/v1/model", headers=bearer(ALICE)).status_code == 200
    served = [entry for entry in running.lines.of("request") if entry["outcome"] == "ok"]
    assert [entry["caller"] for entry in served] == ["bob"]
    printed = "".join(running.lines.text)
    assert "alice-key" not in printed and "bob-key" not in printed and "wrong" not in printed


def test_keys_are_read_again_when_their_file_changes_and_survive_a_broken_one(keys: Path) -> None:
    said: list[str] = []

    class Log:
        def msg(self, message: str) -> None:
            said.append(message)

        info = error = msg

    log = structlog.wrap_logger(Log(), processors=[structlog.processors.JSONRenderer()])
    ring = KeyRing(keys, log)
    assert (ring.owner(ALICE), ring.owner(BOB), ring.owner("x")) == ("alice", "bob", None)

    def put(text: str) -> None:
        scratch = keys.with_name("new")
        scratch.write_text(text)
        scratch.replace(keys)
        ring._looked = 0  # a second has passed

    put(line("carol", BOB))
    assert (ring.owner(ALICE), ring.owner(BOB)) == (None, "carol")
    put("this is no key file\n")
    assert ring.owner(BOB) == "carol"
    keys.unlink()
    ring._looked = 0
    assert ring.owner(BOB) == "carol"
    assert len([entry for entry in said if "api_keys_unusable" in entry]) == 2
    assert "no key file" not in "".join(said)


@pytest.mark.parametrize("text", ["", "# only a comment\n", "alice\n", f"alice {ALICE}\n", line("a b", ALICE)])
def test_a_key_file_that_is_none_stops_the_start_and_is_not_quoted(tmp_path: Path, text: str) -> None:
    path = tmp_path / "keys"
    path.write_text(text)
    with pytest.raises(InvalidKeyFile) as caught:
        read(path)
    assert ALICE not in str(caught.value)


def test_keys_are_made_by_a_command_that_shows_them_once() -> None:
    made = subprocess.run(
        [sys.executable, "-m", "serving.keys", "dave"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    name, digest = made.stdout.split()
    key = made.stderr.split("this once: ")[1].split()[0]
    assert (name, digest) == ("dave", hashlib.sha256(key.encode()).hexdigest())
    assert len(key) > 40


@pytest.mark.parametrize(
    ("host", "keys", "insecure", "refused"),
    [
        ("127.0.0.1", False, False, False),
        ("::1", False, False, False),
        ("0.0.0.0", False, False, True),
        ("::", False, False, True),
        ("10.0.0.7", False, False, True),
        ("0.0.0.0", True, False, False),
        ("0.0.0.0", False, True, False),
    ],
)
def test_other_machines_are_let_in_with_keys_only(host: str, keys: bool, insecure: bool, refused: bool) -> None:
    from serving.service import NotGuarded, check_address

    settings = Settings(api_keys=Path("keys") if keys else None, insecure=insecure)
    if refused:
        with pytest.raises(NotGuarded, match="MIEN_API_KEYS"):
            check_address(settings, host)
    else:
        check_address(settings, host)


def test_the_service_does_not_start_on_an_open_address_without_keys(tiny_model: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "MIEN_MODEL": str(tiny_model), "BENTOML_HOME": str(tmp_path), "HOME": str(tmp_path)}
    for name in ("MIEN_API_KEYS", "MIEN_INSECURE"):
        environment.pop(name, None)
    ended = subprocess.run(
        [sys.executable, "-m", "bentoml", "serve", "serving.service:MienService", "--host", "0.0.0.0", "--port", "0",
         "--working-dir", str(ROOT)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert ended.returncode != 0
    assert "can be reached from other machines and there are no API keys" in ended.stdout + ended.stderr


# -- rates --------------------------------------------------------------------------------------------------------


def test_an_allowance_is_a_quarter_at_once_and_comes_back_with_time() -> None:
    now = 0.0
    allowance = Allowance(60, "requests", lambda: now)
    for _ in range(15):
        allowance.take("alice")
    with pytest.raises(RateLimited) as caught:
        allowance.take("alice")
    assert caught.value.retry_after == pytest.approx(1.0)
    allowance.take("bob")
    now = 1.0
    allowance.take("alice")
    with pytest.raises(RateLimited):
        allowance.take("alice")


@given(st.lists(st.tuples(st.floats(0, 30), st.integers(1, 5)), max_size=60), st.integers(4, 600))
def test_no_pattern_of_asking_gets_more_than_the_rate_and_the_burst(
    steps: list[tuple[float, int]], per_minute: int
) -> None:
    now = used = 0.0
    allowance = Allowance(per_minute, "requests", lambda: now)
    for pause, count in steps:
        now += pause
        try:
            allowance.take("x", count)
            used += min(count, max(1.0, per_minute / 4))
        except RateLimited as error:
            assert error.retry_after is not None and error.retry_after > 0
    assert used <= max(1.0, per_minute / 4) + now * per_minute / 60 + 1e-6


def test_recovering_has_a_limit_of_its_own_that_counts_passwords(
    run_engine: Callable[..., Any], tiny_model: Path, keys: Path, astronaut: bytes
) -> None:
    running = run_engine(tiny_model, api_keys=keys, recover_rate_limit=12, rate_limit=1200)

    def ask(path: str, key: str = ALICE, **fields: str) -> httpx.Response:
        answer: httpx.Response = running.ask(
            "POST", path, headers=bearer(key), files={"image": astronaut}, data={"password": "p", **fields}
        )
        return answer

    # A quarter of twelve: three passwords. The first request tries two.
    assert ask("/v1/recover", passwords='{"0": "q"}').status_code == 200
    assert ask("/v1/recover").status_code == 200
    refused = ask("/v1/recover")
    assert refused.status_code == 429
    assert refused.json()["type"] == "urn:mien:problem:rate-limited"
    assert 1 <= int(refused.headers["retry-after"]) <= 6
    assert ask("/v1/anonymize").status_code == 200
    assert ask("/v1/recover", key=BOB).status_code == 200
    assert 'outcome="rate-limited"' in running.metrics()


def test_without_keys_nothing_is_limited_unless_it_is_set() -> None:
    assert Settings().requests_per_minute == Settings().recoveries_per_minute == 0
    assert Settings(api_keys=Path("x")).requests_per_minute == 1200
    assert Settings(api_keys=Path("x")).recoveries_per_minute == 120
    assert Settings(recover_rate_limit=5).recoveries_per_minute == 5


def test_a_key_is_also_asked_for_over_grpc(
    run_engine: Callable[..., Any], tiny_model: Path, keys: Path, astronaut: bytes
) -> None:
    import grpc

    from mien.v1 import face_identity_pb2 as pb
    from mien.v1.face_identity_pb2_grpc import FaceIdentityStub
    from serving.grpc_door import GrpcDoor

    running = run_engine(tiny_model, api_keys=keys)

    async def go() -> list[str]:
        door = GrpcDoor(running.engine)
        await door.open("127.0.0.1", 0)
        saw = []
        async with grpc.aio.insecure_channel(f"127.0.0.1:{door.port}") as channel:
            for metadata in ((), (("authorization", "Bearer x"),), (("authorization", f"Bearer {ALICE}"),)):
                call = FaceIdentityStub(channel).Detect(pb.DetectRequest(image=astronaut), metadata=metadata)
                try:
                    await call
                    saw.append("OK")
                except grpc.RpcError as error:
                    saw.append(error.code().name)  # type: ignore[attr-defined]
        await door.close()
        return saw

    assert asyncio.run(go()) == ["UNAUTHENTICATED", "UNAUTHENTICATED", "OK"]


# -- what one request may hold --------------------------------------------------------------------------------------


def drip(pause: float, size: int, count: int) -> Any:
    async def receive() -> dict[str, Any]:
        nonlocal count
        await asyncio.sleep(pause)
        count -= 1
        return {"type": "http.request", "body": b"x" * size, "more_body": count > 0}

    return receive


async def collect(receive: Any, **bounds: Any) -> int:
    return sum([len(chunk) async for chunk in body_stream(receive, **bounds)])


def test_a_byte_now_and_then_keeps_no_upload_alive() -> None:
    began = time.monotonic()
    with pytest.raises(UploadStalled):
        asyncio.run(collect(drip(0.05, 1, 10**6), stall=0.4, rate=1000, deadline=began + 60))
    assert 0.35 < time.monotonic() - began < 2
    steady = collect(drip(0.02, 1000, 60), stall=0.4, rate=1000, deadline=time.monotonic() + 60)
    assert asyncio.run(steady) == 60_000


def test_all_bodies_together_have_a_bound(run_engine: Callable[..., Any], tiny_model: Path) -> None:
    engine = run_engine(tiny_model, max_buffered_bytes=1024 * 1024).engine
    with engine.request("detect", "http", "1", uploading=True) as first:
        engine.receive(first, 900_000)
        with pytest.raises(Overloaded), engine.request("detect", "http", "2", uploading=True) as second:
            engine.receive(second, 200_000)
        assert engine._buffered == 900_000
    assert engine._buffered == engine._uploading == 0


def test_uploads_hold_no_worker_and_have_a_bound_of_their_own(
    run_engine: Callable[..., Any], tiny_model: Path, astronaut: bytes
) -> None:
    running = run_engine(tiny_model, queue_size=0, max_uploads=3)
    engine = running.engine
    with engine.request("detect", "http", "1", uploading=True), engine.request("detect", "http", "2", uploading=True):
        assert running.ask("POST", "/v1/detect", files={"image": astronaut}).status_code == 200
        with engine.request("detect", "http", "3", uploading=True):
            refused = running.ask("POST", "/v1/detect", files={"image": astronaut})
            assert refused.status_code == 429
            assert "mien_uploads 3.0" in running.metrics()


def test_no_address_that_a_caller_names_is_ever_asked(run_engine: Callable[..., Any], tiny_model: Path) -> None:
    running = run_engine(tiny_model)
    with socket.socket() as trap:
        trap.bind(("127.0.0.1", 0))
        trap.listen()
        trap.settimeout(0.5)
        url = f"http://127.0.0.1:{trap.getsockname()[1]}/face.png"
        answers = [
            running.ask("POST", "/v1/anonymize", json={"image": url, "password": "p"}),
            running.ask("POST", "/v1/anonymize", files={"image": (None, url)}, data={"password": "p"}),
            running.ask("POST", "/v1/anonymize", files={"image": (url, url.encode())}, data={"password": "p"}),
            running.ask("POST", "/v1/anonymize", data={"image": url, "password": "p"}),
            running.ask("POST", "/v1/anonymize", content=url, headers={"Content-Type": "text/uri-list"}),
        ]
        assert [answer.status_code for answer in answers] == [400, 422, 422, 415, 415]
        with pytest.raises(TimeoutError):
            trap.accept()


def test_an_unknown_key_costs_nothing_of_what_follows(keys: Path) -> None:
    ring_owner = KeyRing(keys, structlog.get_logger()).owner
    assert ring_owner("\udcff surrogate") is None
    from serving.keys import Gate

    gate = Gate(Settings(api_keys=keys), structlog.get_logger())
    with pytest.raises(Unauthenticated) as caught:
        gate.identify(f"Bearer {BOB}x", "127.0.0.1")
    assert BOB not in str(caught.value)
