"""The clients against the real service, over both of its doors, waiting and in a loop."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import io
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import mien
from mien import errors, geometry, pictures

pytest.importorskip("grpc", reason="the grpc extra is not installed")


class Looping:
    """An :class:`mien.AsyncClient` driven from outside its loop, so that one test asks both kinds."""

    def __init__(self, url: str, **options: Any) -> None:
        self._loop = asyncio.new_event_loop()
        self._client = mien.AsyncClient(url, **options)

    def __getattr__(self, name: str) -> Any:
        verb = getattr(self._client, name)

        def call(*arguments: Any, **options: Any) -> Any:
            given = verb(*arguments, **options)
            if inspect.isawaitable(given):
                return self._loop.run_until_complete(given)  # type: ignore[arg-type]
            return self._collect(given)

        return call

    def _collect(self, answers: AsyncIterator[Any]) -> Iterator[Any]:
        try:
            with contextlib.suppress(StopAsyncIteration):
                while True:
                    yield self._loop.run_until_complete(anext(answers))
        finally:
            self._loop.run_until_complete(answers.aclose())  # type: ignore[attr-defined]

    def close(self) -> None:
        self._loop.run_until_complete(self._client.close())
        self._loop.close()


@pytest.fixture(params=["http", "grpc", "async-http", "async-grpc"], scope="module")
def client(request: pytest.FixtureRequest, service: Any) -> Iterator[Any]:
    kind = request.param
    url = f"grpc://{service.grpc}" if kind.endswith("grpc") else service.url
    opened = (Looping if kind.startswith("async") else mien.Client)(url, timeout=60)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def photo(astronaut: bytes) -> Image.Image:
    return Image.open(io.BytesIO(astronaut)).convert("RGB")


@pytest.fixture(scope="module")
def pair(photo: Image.Image) -> Image.Image:
    """Two faces, one in each half."""
    one = np.asarray(photo)[:256, 100:356]
    return Image.fromarray(np.hstack([one, one[:, ::-1]]))


def array(picture: Image.Image | bytes) -> np.ndarray:
    opened = Image.open(io.BytesIO(picture)) if isinstance(picture, bytes) else picture
    return np.asarray(opened.convert("RGB")).astype(int)


def halves(picture: Image.Image | bytes, original: Image.Image) -> tuple[bool, bool]:
    """Which halves differ."""
    changed = np.abs(array(picture) - array(original)).max(axis=(0, 2))
    middle = len(changed) // 2
    return bool(changed[:middle].max() > 1), bool(changed[middle:].max() > 1)


def difference(a: Any, b: Any) -> float:
    return float(np.abs(array(a) - array(b)).mean())


def test_a_picture_goes_there_and_back_as_with_a_model(client: Any, photo: Image.Image, tmp_path: Path) -> None:
    safe = client.anonymize(photo, "correct horse")
    assert difference(safe, photo) > 0.2
    safe.save(tmp_path / "safe.png")  # keeps where the faces are
    with Image.open(tmp_path / "safe.png") as again:
        back = client.recover(again, "correct horse")
        wrong = client.recover(again, "wrong horse")
    assert difference(back, photo) < difference(safe, photo) / 2
    assert difference(wrong, photo) > difference(back, photo) * 2


def test_bytes_go_there_and_back_with_what_is_known_of_the_answer(client: Any, astronaut: bytes) -> None:
    answer = client.anonymize_bytes(astronaut, "p", format="WEBP", quality=100)
    assert answer.data[8:12] == b"WEBP" and answer.format == "WEBP"
    assert answer.face_count == 1 and len(answer.digest) == 64 and answer.request_id
    found = pictures.decode(answer.data).geometry
    assert found is not None and len(found.faces) == 1 and found.model == answer.digest
    back = client.recover_bytes(answer.data, "p")
    assert back.format == "PNG"
    assert difference(back.data, astronaut) < difference(answer.data, astronaut) / 2


def test_faces_are_detected_as_by_a_model(client: Any, photo: Image.Image, astronaut: bytes) -> None:
    (face,) = client.detect(photo)
    assert isinstance(face, mien.Face) and face.landmarks.shape == (5, 2) and face.box.shape == (4,)
    assert np.allclose(client.detect(astronaut)[0].box, face.box)
    assert client.detect(Image.new("RGB", (64, 64))) == []


def test_single_faces_are_changed_left_alone_and_given_their_own_password(client: Any, pair: Image.Image) -> None:
    faces = client.detect(pair)
    assert len(faces) == 2
    left = 0 if faces[0].box[0] < 200 else 1
    assert halves(client.anonymize(pair, "p", faces=[left]), pair) == (True, False)
    assert halves(client.anonymize(pair, "p", exclude_faces=[left]), pair) == (False, True)
    assert halves(client.anonymize(pair, "p", boxes=[faces[left].box]), pair) == (True, False)
    assert halves(client.anonymize(pair, "p", exclude_boxes=[faces[left].box]), pair) == (False, True)
    safe = client.anonymize(pair, "for the right", passwords={left: "for the left"})
    back = array(client.recover(safe, "for the left"))
    error = np.abs(back - array(pair)).mean(axis=(0, 2))
    hidden = np.abs(array(safe) - array(pair)).mean(axis=(0, 2))
    assert error[:256].mean() < hidden[:256].mean() / 2, "the left face is back"
    assert error[256:].mean() > hidden[256:].mean() / 2, "the right one is not"
    with pytest.raises(errors.NoSuchFace):
        client.anonymize(pair, "p", faces=[7])
    with pytest.raises(errors.NoSuchFace):
        client.anonymize(pair, "p", exclude_faces=[0, 1])


def test_aligned_crops_go_there_and_back_whatever_is_on_them(client: Any) -> None:
    crops = np.random.default_rng(3).integers(40, 215, (3, 128, 128, 3)).astype(np.uint8)
    crops = np.stack([np.asarray(Image.fromarray(c).resize((16, 16)).resize((128, 128))) for c in crops])
    safe = client.anonymize_faces(crops, "p")
    assert safe.shape == crops.shape and safe.dtype == np.uint8
    assert all(np.abs(s.astype(int) - c).mean() > 1 for s, c in zip(safe, crops, strict=True))
    back = client.recover_faces(safe, "p")
    assert np.abs(back.astype(int) - crops).mean() < np.abs(safe.astype(int) - crops).mean() / 4


def test_errors_are_those_of_a_model(client: Any, photo: Image.Image, pair: Image.Image) -> None:
    blank = Image.new("RGB", (80, 80), (90, 90, 90))
    with pytest.raises(errors.NoFaceFound):
        client.anonymize(blank, "p")
    with pytest.raises(errors.InvalidImage) as caught:
        client.anonymize_bytes(b"not a picture", "p")
    assert not isinstance(caught.value, errors.ImageTooLarge)
    with pytest.raises(errors.InvalidPassword):
        client.anonymize(photo, "x" * 1025)
    four = Image.fromarray(np.vstack([np.asarray(pair)] * 2))
    with pytest.raises(errors.TooManyFaces):
        client.anonymize(four, "p")
    safe = client.anonymize(photo, "p")
    carried = pictures.from_pil(safe).geometry
    assert carried is not None
    safe.info["xmp"] = pictures.to_xmp(carried.model_copy(update={"model": "0" * 64}))
    with pytest.raises(errors.WrongModel):
        client.recover(safe, "p")
    with pytest.raises(errors.MienError):
        client.anonymize(photo, None)
    with pytest.raises(errors.MienError):
        client.anonymize_bytes(bytes(5 * 1024 * 1024), "p")


def frames(photo: Image.Image) -> list[np.ndarray]:
    """Six frames of a walk across, the fourth without anybody."""
    pixels = np.asarray(photo)
    out = [np.ascontiguousarray(pixels[:240, 60 + 10 * n : 320 + 10 * n]) for n in range(6)]
    out[3] = np.full_like(out[3], 90)
    return out


def test_frames_are_changed_in_order_and_recovered_by_their_geometry(client: Any, photo: Image.Image) -> None:
    given = frames(photo)
    safe = list(client.stream(given, "p"))
    assert [len(frame.geometry.faces) for frame in safe] == [1, 1, 1, 0, 1, 1]
    for n, (frame, original) in enumerate(zip(safe, given, strict=True)):
        assert frame.picture.shape == original.shape and frame.picture.dtype == np.uint8
        changed = np.abs(frame.picture.astype(int) - original).mean()
        assert changed == 0 if n == 3 else changed > 0.2
    back = list(client.stream(safe, "p", operation="recover"))
    for frame, hidden, original in zip(back, safe, given, strict=True):
        error, change = (np.abs(f.picture.astype(int) - original).mean() for f in (frame, hidden))
        assert error <= change / 2
    with pytest.raises(errors.NoFaceFound):
        list(client.stream(given, "p", fail_without_face=True))


def test_frames_may_be_files(client: Any, photo: Image.Image, encode: Callable[..., bytes]) -> None:
    given = [encode(frame) for frame in frames(photo)[:3]]
    safe = list(client.stream(given, "p"))
    assert all(frame.picture.startswith(b"\x89PNG") for frame in safe)
    back = list(client.stream(safe, "p", operation="recover"))
    for b, s, g in zip(back, safe, given, strict=True):
        assert difference(b.picture, g) < difference(s.picture, g) / 2


def test_no_frames_are_no_answers(client: Any) -> None:
    assert list(client.stream([], "p")) == []


def test_a_stream_can_be_left_and_the_client_goes_on(client: Any, photo: Image.Image) -> None:
    answers = client.stream((frame for _ in range(50) for frame in frames(photo)[:1]), "p")
    next(answers)
    answers.close()
    assert len(client.detect(photo)) == 1


def test_what_the_frames_raise_reaches_the_caller(client: Any, photo: Image.Image) -> None:
    def camera() -> Iterator[np.ndarray]:
        yield frames(photo)[0]
        raise OSError("the camera is gone")

    with pytest.raises(OSError, match="camera"):
        list(client.stream(camera(), "p"))


def test_an_asynchronous_camera_is_read_as_it_films(service: Any, photo: Image.Image) -> None:
    async def camera() -> AsyncIterator[np.ndarray]:
        for frame in frames(photo)[:3]:
            await asyncio.sleep(0.01)
            yield frame

    async def film(url: str) -> list[int]:
        async with mien.AsyncClient(url) as client:
            return [len(f.geometry.faces) async for f in client.stream(camera(), "p") if f.geometry is not None]

    for url in (service.url, f"grpc://{service.grpc}"):
        assert asyncio.run(film(url)) == [1, 1, 1]


def test_a_trackers_crops_are_used_instead_of_detecting(service: Any, photo: Image.Image) -> None:
    """Only gRPC has a place for them; a frame in which the detector finds nobody is changed all the same."""
    with mien.Client(f"grpc://{service.grpc}") as client:
        digest = client.anonymize_bytes(requests_png(photo), "p").digest
        blank = np.random.default_rng(0).integers(60, 190, (200, 200, 3)).astype(np.uint8)
        given = pictures.Geometry(
            width=200,
            height=200,
            crop_size=geometry.CROP_SIZE,
            template=geometry.TEMPLATE_NAME,
            model=digest,
            faces=(pictures.FaceGeometry(box=(40, 40, 120, 120), matrix=((1, 0, -30), (0, 1, -30))),),
        )
        (safe,) = client.stream([mien.Frame(blank, given)], "p")
        assert safe.geometry is not None and len(safe.geometry.faces) == 1
        assert np.abs(safe.picture.astype(int) - blank).max() > 1  # type: ignore[union-attr]
    with mien.Client(service.url) as client, pytest.raises(ValueError, match="gRPC"):
        list(client.stream([mien.Frame(blank, given)], "p"))


def requests_png(photo: Image.Image) -> bytes:
    buffer = io.BytesIO()
    photo.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("door", ["http", "grpc"])
def test_the_command_works_against_a_service(service: Any, astronaut: bytes, tmp_path: Path, door: str) -> None:
    url = service.url if door == "http" else f"grpc://{service.grpc}"
    secret = "p4ssw0rd-c4nary"
    (tmp_path / "in").mkdir()
    (tmp_path / "in/one.png").write_bytes(astronaut)
    Image.new("RGB", (64, 64)).save(tmp_path / "in/meadow.png")
    environment = {**os.environ, "MIEN_PASSWORD": secret, "MIEN_URL": url}

    def mien_command(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-X", "importtime", "-m", "mien", *arguments],
            cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120,
        )  # fmt: skip

    there = mien_command("anonymize", "in", "-o", "out")
    assert there.returncode == 1 and "in/meadow.png: No face was found" in there.stderr
    # Asking a service needs no torch, which takes seconds to load.
    assert not [line for line in there.stderr.splitlines() if line.endswith("| torch")]
    back = mien_command("recover", "out/one.anon.png")
    assert back.stdout.splitlines()[-1] == "1 face recovered: out/one.recovered.png", back.stderr[-500:]
    hidden, found = ((tmp_path / f"out/one.{kind}.png").read_bytes() for kind in ("anon", "recovered"))
    assert difference(found, astronaut) < difference(hidden, astronaut) / 2
    assert "1 face" in mien_command("detect", "in/one.png").stdout
    refused = mien_command("anonymize", "in/one.png", "--model", "somewhere")
    assert refused.returncode == 2 and "--model is for a model loaded here" in refused.stderr
    assert secret not in there.stdout + there.stderr + back.stdout + back.stderr
