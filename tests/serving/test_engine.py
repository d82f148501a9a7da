"""The engine and its batches, in this process: what the door of a running service can hardly be made to show."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import structlog
import torch

from serving import app, logs
from serving.batching import Batcher
from serving.engine import Call, Engine
from serving.metrics import Metrics
from serving.problems import PROBLEMS, MalformedRequest, detail_of, problem_of
from serving.settings import Settings

CANARY = "c4nary-in-process"


# -- batches ------------------------------------------------------------------------------------------------------


def crops(*values: float) -> torch.Tensor:
    return torch.tensor(values)[:, None, None, None].expand(-1, 3, 4, 4).clone()


def codes(count: int) -> torch.Tensor:
    return torch.zeros(count, 16, dtype=torch.bool)


def call_together(batcher: Batcher, jobs: list[tuple[Callable[..., Any], torch.Tensor]]) -> list[Any]:
    """Run every job on a thread of its own; gives results or exceptions, in order."""
    out: list[Any] = [None] * len(jobs)

    def call(n: int) -> None:
        try:
            out[n] = batcher.transform(jobs[n][0], jobs[n][1], codes(len(jobs[n][1])))
        except Exception as error:
            out[n] = error

    threads = [threading.Thread(target=call, args=(n,)) for n in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return out


@pytest.fixture
def sizes() -> list[int]:
    return []


@pytest.fixture
def batcher(sizes: list[int]) -> Any:
    batcher = Batcher(size=8, wait=0.3, company=lambda: True, observe=sizes.append)
    yield batcher
    batcher.close()


def double(images: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    return images * 2


def test_crops_of_several_callers_share_a_pass_and_each_gets_its_own_back(batcher: Batcher, sizes: list[int]) -> None:
    out = call_together(batcher, [(double, crops(n, n + 0.5)) for n in range(4)])
    for n, result in enumerate(out):
        assert torch.equal(result, crops(2 * n, 2 * n + 1))
    assert sum(sizes) == 8
    assert max(sizes) > 2


def test_a_caller_with_more_crops_than_a_batch_gets_several_passes(batcher: Batcher, sizes: list[int]) -> None:
    (result,) = call_together(batcher, [(double, crops(*range(20)))])
    assert torch.equal(result, crops(*range(0, 40, 2)))
    assert sizes == [8, 8, 4]


def test_one_callers_failure_is_not_anothers(batcher: Batcher) -> None:
    def picky(images: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        if (images == 13).any():
            raise RuntimeError("unlucky")
        return images

    bad, good = call_together(batcher, [(picky, crops(13)), (picky, crops(1))])
    assert isinstance(bad, RuntimeError)
    assert torch.equal(good, crops(1))


def test_output_that_is_not_finite_is_an_error_for_that_caller_alone(batcher: Batcher) -> None:
    def holes(images: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        return torch.where(images == 13, torch.nan, images)

    bad, good = call_together(batcher, [(holes, crops(13)), (holes, crops(1))])
    assert isinstance(bad, ArithmeticError)
    assert torch.equal(good, crops(1))


def test_crops_for_different_networks_never_share_a_pass(batcher: Batcher) -> None:
    def negate(images: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        return -images

    jobs = [(double if n % 2 else negate, crops(n + 1)) for n in range(6)]
    for n, result in enumerate(call_together(batcher, jobs)):
        assert torch.equal(result, crops(2 * (n + 1) if n % 2 else -(n + 1)))


def test_a_lone_caller_does_not_wait_for_company(sizes: list[int]) -> None:
    batcher = Batcher(size=8, wait=5, company=lambda: False, observe=sizes.append)
    began = time.monotonic()
    batcher.transform(double, crops(1), codes(1))
    assert time.monotonic() - began < 2
    batcher.close()


# -- the engine ---------------------------------------------------------------------------------------------------


class Lines:
    """Collects what is logged."""

    def __init__(self) -> None:
        self.text: list[str] = []
        self.logger = structlog.wrap_logger(
            self,
            processors=[structlog.processors.add_log_level, structlog.processors.JSONRenderer()],
            wrapper_class=structlog.make_filtering_bound_logger("info"),
        )

    def msg(self, message: str) -> None:
        self.text.append(message)

    info = error = warning = msg

    def all(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.text]


def engine_for(model: Path, lines: Lines | None = None, **settings: Any) -> Engine:
    return Engine(Settings(model=model, workers=1, **settings), Metrics(), (lines or Lines()).logger)


def loaded(model: Path, lines: Lines | None = None, **settings: Any) -> Engine:
    engine = engine_for(model, lines, **settings)
    engine.start()
    deadline = time.monotonic() + 90
    while engine.status == "loading" and time.monotonic() < deadline:
        time.sleep(0.05)
    return engine


def ask(engine: Engine, method: str, path: str, **options: Any) -> httpx.Response:
    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(app.build(engine), raise_app_exceptions=True)
        async with httpx.AsyncClient(transport=transport, base_url="http://mien", timeout=60) as client:
            return await client.request(method, path, **options)

    return asyncio.run(send())


def test_until_the_model_is_loaded_the_service_lives_and_asks_to_come_back(tmp_path: Path) -> None:
    engine = engine_for(tmp_path / "none")
    assert ask(engine, "GET", "/healthz").status_code == 200
    assert ask(engine, "GET", "/readyz").status_code == 503
    refused = ask(engine, "POST", "/v1/anonymize", files={"image": b"x"}, data={"password": CANARY})
    assert refused.status_code == 503
    assert refused.json()["type"] == "urn:mien:problem:not-ready"
    assert int(refused.headers["retry-after"]) > 0
    engine.close()


def test_a_model_that_cannot_be_loaded_makes_the_process_unhealthy(tmp_path: Path) -> None:
    lines = Lines()
    engine = loaded(tmp_path / "none", lines)
    assert engine.status == "failed"
    assert ask(engine, "GET", "/healthz").status_code == 503
    assert 'mien_model_reloads_total{outcome="failed"} 1.0' in ask(engine, "GET", "/metrics").text
    (line,) = lines.all()
    assert line["error"] == "mien.errors.ModelError"
    engine.close()


def test_a_face_that_does_not_change_never_leaves_the_service(tiny_model: Path, astronaut: bytes) -> None:
    lines = Lines()
    engine = loaded(tiny_model, lines)
    assert engine.models.current is not None
    engine.models.current = replace(engine.models.current, run=lambda crops, codes: crops)  # type: ignore[arg-type]
    answer = ask(engine, "POST", "/v1/anonymize", files={"image": astronaut}, data={"password": CANARY})
    assert answer.status_code == 500
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["type"] == "urn:mien:problem:internal-error"
    assert len(answer.content) < 1000
    failed = [line for line in lines.all() if line.get("outcome") == "internal-error"]
    assert len(failed) == 1
    assert failed[0]["error"] == "mien.errors.ModelError"
    assert failed[0]["level"] == "error"
    assert any("edit_steps" in where for where in failed[0]["where"])
    assert CANARY not in "".join(lines.text)
    engine.close()


def test_work_that_takes_too_long_is_answered_and_its_place_is_given_back(tiny_model: Path, astronaut: bytes) -> None:
    engine = loaded(tiny_model, request_timeout=0.05)
    answer = ask(engine, "POST", "/v1/anonymize", files={"image": astronaut}, data={"password": "p"})
    assert answer.status_code == 503
    assert answer.json()["type"] == "urn:mien:problem:timeout"
    deadline = time.monotonic() + 20
    while (engine._running or engine._waiting) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert engine._waiting == engine._running == 0
    engine.close()


def test_work_of_a_caller_who_left_is_dropped_before_it_begins(tiny_model: Path) -> None:
    engine = loaded(tiny_model)
    begun: list[int] = []

    async def go() -> None:
        async def leaves() -> None:
            await asyncio.sleep(0.05)

        release = threading.Event()
        with engine.request("detect", "http", "1") as first:
            busy = asyncio.ensure_future(engine.run(first, lambda: release.wait(20)))
            await asyncio.sleep(0.05)
            with (
                pytest.raises(Exception, match="closed the connection"),
                engine.request("detect", "http", "2") as second,
            ):
                await engine.run(second, lambda: begun.append(2), leaves)
            await asyncio.sleep(0.05)
            assert (engine._waiting, engine._running) == (0, 1)
            release.set()
            await busy

    asyncio.run(go())
    engine.close()
    assert begun == []
    assert engine._waiting == engine._running == 0
    text = engine.metrics.render().decode()
    assert 'mien_requests_total{operation="detect",outcome="caller-gone",transport="http"} 1.0' in text


# -- what is told -------------------------------------------------------------------------------------------------


def test_an_unexpected_error_is_logged_by_kind_and_place_without_its_message() -> None:
    try:
        secret = CANARY
        raise RuntimeError(f"password was {secret}")
    except RuntimeError as error:
        described = logs.describe(error)
        assert detail_of(error) and CANARY not in detail_of(error)
        assert problem_of(error).status == 500
    assert described["error"] == "builtins.RuntimeError"
    assert "test_engine.py" in described["where"][-1]
    assert CANARY not in json.dumps(described)


def test_a_request_in_flight_does_not_show_its_parts_when_printed() -> None:
    from serving.bodies import Body
    from serving.options import EditOptions, parse

    options = parse(EditOptions, {"password": CANARY})
    shown = repr(options) + repr(Body(b"x", {"password": CANARY})) + repr(Call("detect", "http", "1"))
    assert CANARY not in shown
    with pytest.raises(MalformedRequest) as caught:
        parse(EditOptions, {"password": {"a": CANARY}, CANARY: CANARY})
    assert CANARY not in str(caught.value)
    assert caught.value.__suppress_context__


def test_every_problem_has_its_own_type_and_every_error_of_mien_its_row() -> None:
    from mien import errors

    assert len({problem.type for problem in PROBLEMS.values()}) == len(PROBLEMS)
    of_the_caller = [
        kind
        for kind in vars(errors).values()
        if isinstance(kind, type)
        and issubclass(kind, errors.MienError)
        # The first is ours; the second is what a client raises about a service.
        and not issubclass(kind, errors.ModelError | errors.ServiceError)
    ]
    for kind in of_the_caller:
        if kind is not errors.MienError:
            assert 400 <= problem_of(kind("x")).status < 500, kind
    assert problem_of(errors.ModelIntegrityError("x")).status == 500


def test_settings_are_frozen_and_refuse_nonsense(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIEN_QUEUE_SIZE", "3")
    settings = Settings()
    assert settings.queue_size == 3
    with pytest.raises(ValueError, match="frozen"):
        settings.queue_size = 4  # type: ignore[misc]
    monkeypatch.setenv("MIEN_QUEUE_SIZE", "many")
    with pytest.raises(ValueError, match="queue_size"):
        Settings()
