"""Promise 4: who recovers with a wrong password cannot tell, from outside, that it was wrong.

Right and wrong requests alternate in a random order, so that whatever else the machine does meets both alike.
"""

from __future__ import annotations

import io
import json
import random
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
from PIL import Image

from mien.v1 import face_identity_pb2 as pb
from mien.v1.face_identity_pb2_grpc import FaceIdentityStub
from serving import engine

stats = pytest.importorskip("scipy.stats")

ROOT = Path(__file__).resolve().parents[2]
RIGHT = "correct horse"
# What a test of no difference may say by chance: once in ten thousand runs.
CHANCE = 1e-4
#: Of an answer, what differs between two requests that are the same.
OWN = {"x-request-id", "date"}


@dataclass
class Seen:
    """What an observer has of the answers to one kind of password."""

    seconds: list[float] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    shown: set[tuple[Any, ...]] = field(default_factory=set)


def alternate(ask: Callable[[str], tuple[bytes, tuple[Any, ...]]], count: int) -> tuple[Seen, Seen]:
    """``count`` requests with the right password and as many with wrong ones, each wrong one another."""
    draw = random.Random(5)
    order = [True, False] * count
    draw.shuffle(order)
    right, wrong = Seen(), Seen()
    for _ in range(5):
        ask("warm-up")
    for n, is_right in enumerate(order):
        # As long as the right one: a password's length is the caller's own.
        password = RIGHT if is_right else f"wrong {n:07d}"
        began = time.perf_counter()
        data, shown = ask(password)
        seen = right if is_right else wrong
        seen.seconds.append(time.perf_counter() - began)
        seen.sizes.append(len(data))
        seen.shown.add(shown)
    return right, wrong


def same_distribution(a: list[float], b: list[float]) -> float:
    """The smaller p-value of Kolmogorov-Smirnov (any difference) and Mann-Whitney (a shift), times two."""
    return min(1.0, 2 * min(float(stats.ks_2samp(a, b).pvalue), float(stats.mannwhitneyu(a, b).pvalue)))


@pytest.fixture(scope="module")
def crop() -> np.ndarray:
    from skimage import data

    return np.ascontiguousarray(data.astronaut()[40:168, 160:288])


@pytest.fixture(scope="module")
def anonymized(service: Any, crop: np.ndarray, encode: Callable[..., bytes]) -> bytes:
    with service.client() as client:
        answer = client.post(
            "/v1/anonymize", files={"image": encode(crop)}, data={"password": RIGHT, "aligned": "true"}
        )
    assert answer.status_code == 200, answer.text
    return answer.content


@pytest.fixture(scope="module")
def over_http(service: Any, anonymized: bytes) -> Iterator[Callable[[str], tuple[bytes, tuple[Any, ...]]]]:
    with service.client() as client:

        def ask(password: str) -> tuple[bytes, tuple[Any, ...]]:
            answer: httpx.Response = client.post(
                "/v1/recover", files={"image": anonymized}, data={"password": password, "aligned": "true"}
            )
            headers = tuple((k, v) for k, v in answer.headers.items() if k not in OWN)
            return answer.content, (answer.status_code, answer.http_version, headers)

        yield ask


@pytest.fixture(scope="module")
def over_grpc(service: Any, anonymized: bytes) -> Iterator[Callable[[str], tuple[bytes, tuple[Any, ...]]]]:
    with grpc.insecure_channel(service.grpc) as channel:
        stub = FaceIdentityStub(channel)

        def ask(password: str) -> tuple[bytes, tuple[Any, ...]]:
            options = pb.EditOptions(password=password, aligned=True)
            answer, call = stub.Recover.with_call(pb.EditRequest(image=anonymized, options=options), timeout=60)
            initial = tuple((k, v) for k, v in call.initial_metadata() if k not in OWN)
            faces = answer.faces[0].SerializeToString()
            shown = (call.code(), initial, tuple(call.trailing_metadata()), answer.media_type, faces)
            return answer.image, shown

        yield ask


def judge(ask: Callable[[str], tuple[bytes, tuple[Any, ...]]], count: int, crop: np.ndarray) -> None:
    right, wrong = alternate(ask, count)
    # The test would be of nothing if the password made no difference.
    back, other = (np.asarray(Image.open(io.BytesIO(ask(p)[0]))).astype(int) for p in (RIGHT, "wrong"))
    assert np.abs(back - crop).mean() < 2 < np.abs(other - crop).mean()
    assert len(right.shown | wrong.shown) == 1, right.shown ^ wrong.shown
    # To the byte, although the pictures are others.
    assert len({*right.sizes, *wrong.sizes}) == 1, (right.sizes[:3], wrong.sizes[:3])
    p = same_distribution(right.seconds, wrong.seconds)
    medians = [float(np.median(seen.seconds)) for seen in (right, wrong)]
    print(json.dumps({"pairs": count, "p": p, "median_seconds": medians, "png": right.sizes[0]}))
    assert p > CHANCE, (p, medians)


def test_over_http_a_wrong_password_looks_like_the_right_one(over_http: Callable[..., Any], crop: np.ndarray) -> None:
    judge(over_http, 40, crop)


def test_over_grpc_a_wrong_password_looks_like_the_right_one(over_grpc: Callable[..., Any], crop: np.ndarray) -> None:
    judge(over_grpc, 40, crop)


@pytest.mark.soak
@pytest.mark.parametrize("door", ["over_http", "over_grpc"])
def test_over_both_doors_a_wrong_password_looks_like_the_right_one_500_times(
    request: pytest.FixtureRequest, door: str, crop: np.ndarray
) -> None:
    judge(request.getfixturevalue(door), 500, crop)


def lengths_of_recoveries(model: Any, faces: np.ndarray, wrong: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Bytes of PNGs, int ``[B, 1 + wrong]``: of each face recovered with its code, then with ``wrong`` other ones; and
    ``[B]`` of the anonymized ones."""
    from mien import passwords, pictures

    draw = np.random.default_rng(seed)
    rows, of_safe = [], []
    for face in faces:
        codes = passwords.random_codes(1 + wrong, model.bits, draw)
        safe = model.transform(face[None], codes[:1])
        recovered = model.transform(np.repeat(safe, 1 + wrong, axis=0), ~codes)
        of_safe.append(len(pictures.encode(pictures.Picture(safe[0]))))
        rows.append([len(pictures.encode(pictures.Picture(pixels))) for pixels in recovered])
    return np.array(rows), np.array(of_safe)


def judge_lengths(lengths: np.ndarray) -> dict[str, float]:
    """What the length of a recovered PNG tells of the password.

    Returns:
        ``p``: two-sample, the right ones against one wrong one of each *other* face. ``auc``: how often a right one is
        shorter than a wrong one of another face; 0.5 tells nothing. ``shortest``: how often the right one is the
        shortest of all tries at the same face, and ``by_chance``: how often it would be if lengths told nothing.
    """
    right, wrong = lengths[:, 0], np.roll(lengths[:, 1], 1)
    tested = stats.mannwhitneyu(wrong, right)
    return {
        "p": same_distribution(list(right), list(wrong)),
        "auc": float(tested.statistic) / (len(right) * len(wrong)),
        "shortest": float((lengths[:, 0] <= lengths[:, 1:].min(axis=1)).mean()),
        "by_chance": 1 / lengths.shape[1],
        "median_right": float(np.median(right)),
        "median_wrong": float(np.median(wrong)),
    }


def real_faces(folder: Any, count: int) -> np.ndarray:
    """uint8 ``[B, S, S, 3]`` of a tar of crops."""
    with tarfile.open(folder) as tar:
        names = [m for m in tar if m.name.endswith(".jpg")][:count]
        return np.stack([np.asarray(Image.open(tar.extractfile(m)).convert("RGB")) for m in names])


@pytest.mark.soak
def test_a_length_is_the_same_for_every_password_and_real_face() -> None:
    """And prints what lengths would tell otherwise: docs/serving.md, "What it keeps"."""
    import mien

    shard = ROOT / "shards" / "lfw" / "test-000000.tar"
    if not shard.exists():
        pytest.skip(f"no aligned faces at {shard.parent} (make model)")
    model = mien.load(ROOT / "models" / "mien-128")
    lengths, of_safe = lengths_of_recoveries(model, real_faces(shard, 200), wrong=9, seed=1)
    over = (lengths.max(axis=1) - of_safe) / (3 * model.crop_size**2)
    print(json.dumps({**judge_lengths(lengths), "over": float(over.max())}))
    assert (over < engine._ROOM).mean() > 0.99


def test_a_length_that_tells_would_be_seen() -> None:
    """Of faces that differ more than passwords do, as real ones: the order within a face shows, the lengths do not."""
    draw = np.random.default_rng(0)
    of_faces = draw.normal(30_000, 3_000, (200, 1))
    alike = of_faces + draw.normal(0, 300, (200, 10))
    assert judge_lengths(alike)["shortest"] < 0.2
    assert judge_lengths(alike)["p"] > CHANCE
    longer = alike + 3_000 * (np.arange(10) > 0)
    assert judge_lengths(longer)["shortest"] == 1
    assert judge_lengths(longer)["p"] < CHANCE


def test_the_log_tells_neither(service: Any, anonymized: bytes, wait_until: Callable[..., None]) -> None:
    own = {"timestamp", "seconds", "request_id"}

    def logged(password: str, name: str) -> dict[str, Any]:
        with service.client() as client:
            client.post(
                "/v1/recover",
                files={"image": anonymized},
                data={"password": password, "aligned": "true"},
                headers={"X-Request-Id": name},
            ).raise_for_status()
        wait_until(lambda: f'"{name}"' in service.printed(), 20)
        line = next(line for line in service.printed().splitlines() if f'"{name}"' in line)
        return {key: value for key, value in json.loads(line).items() if key not in own}

    right, wrong = logged(RIGHT, "log-right"), logged("another", "log-wrong")
    assert right == wrong
    assert right["outcome"] == "ok"


def test_a_difference_would_be_seen(over_http: Callable[..., Any]) -> None:
    """What the tests above would miss: the same requests, wrong ones answered later by the time of one."""
    began = time.perf_counter()
    for _ in range(5):
        over_http(RIGHT)
    usual = (time.perf_counter() - began) / 5

    def leaky(password: str) -> tuple[bytes, tuple[Any, ...]]:
        answer: tuple[bytes, tuple[Any, ...]] = over_http(password)
        if password != RIGHT:
            time.sleep(usual)
        return answer

    right, wrong = alternate(leaky, 20)
    assert same_distribution(right.seconds, wrong.seconds) < CHANCE


def test_no_operation_of_the_service_takes_a_code(service: Any, anonymized: bytes) -> None:
    """A code given as such would let a caller sweep 2^16 of them without the cost of a password each."""
    with service.client() as client:
        answer = client.post("/v1/recover", files={"image": anonymized}, data={"code": "0" * 16, "aligned": "true"})
    assert answer.status_code in (400, 422)
    assert answer.json()["type"] == "urn:mien:problem:malformed-request"
