"""The HTTP door, against a real ``bentoml serve``."""

from __future__ import annotations

import base64
import io
import json
import socket
import struct
import time
import zlib
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

PASSWORD = "correct horse"


def post(client: httpx.Client, path: str, image: bytes, **fields: str) -> httpx.Response:
    return client.post(path, files={"image": ("x", image)}, data=fields)


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


def assert_problem(response: httpx.Response, status: int, slug: str) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    document = response.json()
    assert set(document) == {"type", "title", "status", "detail", "request_id"}
    assert document["type"] == f"urn:mien:problem:{slug}"
    assert document["status"] == status
    assert document["request_id"] == response.headers["x-request-id"]
    assert response.headers["cache-control"] == "no-store"
    return document


# -- what it is for -----------------------------------------------------------------------------------------------


def test_anonymized_and_recovered_with_the_password_the_face_is_back(client: httpx.Client, astronaut: bytes) -> None:
    safe = post(client, "/v1/anonymize", astronaut, password=PASSWORD)
    assert safe.status_code == 200, safe.text
    assert safe.headers["content-type"] == "image/png"
    assert safe.headers["x-mien-faces"] == "1"
    assert len(safe.headers["x-mien-model-digest"]) == 64
    back = post(client, "/v1/recover", safe.content, password=PASSWORD)
    wrong = post(client, "/v1/recover", safe.content, password="a wrong guess")
    assert back.status_code == wrong.status_code == 200

    box = np.round(client.post("/v1/detect", files={"image": astronaut}).json()["faces"][0]["box"]).astype(int)
    face = np.s_[box[1] : box[3], box[0] : box[2]]
    original = pixels(astronaut)

    def change(response: httpx.Response) -> float:
        return float(np.abs(pixels(response.content)[face] - original[face]).mean())

    assert change(safe) > 3
    assert change(back) < change(safe) / 2
    assert change(wrong) > change(back) * 2
    # Far from the face not one bit differs.
    assert (pixels(safe.content)[:, 400:] == original[:, 400:]).all()


def test_a_wrong_password_cannot_be_told_from_the_right_one_by_the_answer(
    client: httpx.Client, astronaut: bytes
) -> None:
    safe = post(client, "/v1/anonymize", astronaut, password=PASSWORD).content
    answers = [post(client, "/v1/recover", safe, password=word) for word in (PASSWORD, "another", "yet another")]
    assert {a.status_code for a in answers} == {200}
    variable = {"date", "x-request-id", "content-length"}
    headers = [{k: v for k, v in a.headers.items() if k not in variable} for a in answers]
    assert headers[0] == headers[1] == headers[2]
    sizes = [len(a.content) for a in answers]
    assert max(sizes) < 1.25 * min(sizes)


def test_form_and_json_give_the_same_picture(client: httpx.Client, astronaut: bytes) -> None:
    form = post(client, "/v1/anonymize", astronaut, password=PASSWORD)
    document = client.post("/v1/anonymize", json={"image": base64.b64encode(astronaut).decode(), "password": PASSWORD})
    assert document.headers["content-type"] == "image/png"
    assert (pixels(form.content) == pixels(document.content)).all()


def test_json_is_answered_where_it_is_accepted(client: httpx.Client, astronaut: bytes) -> None:
    answer = client.post(
        "/v1/anonymize",
        files={"image": astronaut},
        data={"password": PASSWORD, "format": "jpeg", "quality": "90"},
        headers={"Accept": "application/json", "X-Request-Id": "my-id.1"},
    )
    document = answer.json()
    assert set(document) == {"image", "media_type", "faces", "model_digest", "request_id"}
    assert document["media_type"] == "image/jpeg"
    assert document["request_id"] == answer.headers["x-request-id"] == "my-id.1"
    assert document["model_digest"] == answer.headers["x-mien-model-digest"]
    assert base64.b64decode(document["image"]).startswith(b"\xff\xd8\xff")
    assert len(document["faces"]) == 1
    assert len(document["faces"][0]["box"]) == 4


@pytest.mark.parametrize(
    ("accept", "media_type"),
    [
        ("*/*", "image/png"),
        ("image/*, application/json;q=0.5", "image/png"),
        ("application/json, image/*;q=0.5", "application/json"),
        ("application/json, */*;q=0.1", "application/json"),
    ],
)
def test_accept_weights_decide_between_picture_and_json(
    client: httpx.Client, astronaut: bytes, accept: str, media_type: str
) -> None:
    answer = client.post(
        "/v1/anonymize", files={"image": astronaut}, data={"password": "p"}, headers={"Accept": accept}
    )
    assert answer.headers["content-type"] == media_type


def test_detection_gives_boxes_and_landmarks_and_no_face_is_an_empty_list(
    client: httpx.Client, astronaut: bytes, encode: Callable[..., bytes]
) -> None:
    found = client.post("/v1/detect", files={"image": astronaut}).json()
    assert found["size"] == [512, 512]
    (face,) = found["faces"]
    x0, y0, x1, y1 = face["box"]
    assert 150 < x0 < x1 < 300 and 50 < y0 < y1 < 250
    assert 0.9 <= face["confidence"] <= 1
    assert np.asarray(face["landmarks"]).shape == (5, 2)
    blank = client.post("/v1/detect", files={"image": encode(np.full((80, 80, 3), 90, np.uint8))})
    assert blank.status_code == 200
    assert blank.json()["faces"] == []


def test_only_the_chosen_faces_change(client: httpx.Client, astronaut: bytes, encode: Callable[..., bytes]) -> None:
    one = pixels(astronaut).astype(np.uint8)
    pair = encode(np.hstack([one, one[:, ::-1]]))
    faces = client.post("/v1/detect", files={"image": pair}).json()["faces"]
    assert len(faces) == 2
    answer = post(client, "/v1/anonymize", pair, password=PASSWORD, faces="1")
    assert answer.headers["x-mien-faces"] == "1"
    changed = np.abs(pixels(answer.content) - pixels(pair)).max(axis=2)
    for index, face in enumerate(faces):
        x0, y0, x1, y1 = np.round(face["box"]).astype(int)
        assert (changed[y0:y1, x0:x1].max() > 0) == (index == 1)


def test_awkward_passwords_work(client: httpx.Client, astronaut: bytes) -> None:
    for password in ("🐴🔋📎", " ", "x" * 1024, "naïve\u0301\n\t\0"):
        safe = client.post("/v1/anonymize", json={"image": base64.b64encode(astronaut).decode(), "password": password})
        assert safe.status_code == 200, safe.text


# -- bad input ----------------------------------------------------------------------------------------------------


def png_header(width: int, height: int) -> bytes:
    ihdr = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + struct.pack(">I", 13)
        + ihdr
        + struct.pack(">I", zlib.crc32(ihdr))
        + b"\0\0\0\0IEND\xaeB`\x82"
    )


def bad_pictures(astronaut: bytes, encode: Callable[..., bytes]) -> dict[str, tuple[bytes, int, str]]:
    one = pixels(astronaut).astype(np.uint8)
    jpeg = encode(one, "JPEG")
    frames = io.BytesIO()
    Image.fromarray(one).save(frames, "PNG", save_all=True, append_images=[Image.fromarray(one[::-1])], duration=100)
    return {
        "empty": (b"", 422, "invalid-image"),
        "text named .png": (b"hello, I am text", 422, "invalid-image"),
        "a URL instead of a picture": (b"http://127.0.0.1/x.png", 422, "invalid-image"),
        "truncated JPEG": (jpeg[: len(jpeg) // 2], 422, "invalid-image"),
        "one pixel": (encode(one[:1, :1]), 422, "invalid-image"),
        "animated": (frames.getvalue(), 422, "invalid-image"),
        "60,000 x 60,000 header": (png_header(60_000, 60_000), 413, "image-too-large"),
        "no face": (encode(np.full((100, 100, 3), 120, np.uint8)), 422, "no-face-found"),
        "too many faces": (encode(np.tile(one[:256, 100:356], (2, 2, 1))), 422, "too-many-faces"),
    }


def test_bad_pictures_get_their_problem_quickly(
    client: httpx.Client, astronaut: bytes, encode: Callable[..., bytes]
) -> None:
    for name, (data, status, slug) in bad_pictures(astronaut, encode).items():
        for path in ("/v1/anonymize", "/v1/recover"):
            began = time.monotonic()
            response = post(client, path, data, password=PASSWORD)
            assert response.status_code == status, f"{name}: {response.text}"
            assert_problem(response, status, slug)
            assert time.monotonic() - began < 10, name


@pytest.mark.parametrize("password", ["", "x" * 1025, "x" * 5000])
def test_an_unusable_password_is_named_without_being_quoted(
    client: httpx.Client, astronaut: bytes, password: str
) -> None:
    document = assert_problem(
        client.post("/v1/anonymize", json={"image": base64.b64encode(astronaut).decode(), "password": password}),
        422,
        "invalid-password",
    )
    assert "xxxx" not in json.dumps(document)


def multipart(*parts: tuple[str, bytes], end: bytes = b"--b--\r\n") -> bytes:
    out = b""
    for name, value in parts:
        out += b'--b\r\nContent-Disposition: form-data; name="' + name.encode() + b'"\r\n\r\n' + value + b"\r\n"
    return out + end


CANARY = "Sup3r-c4nary-passw0rd"
MALFORMED = {
    "no image": multipart(("password", b"p")),
    "no password": multipart(("image", b"x")),
    "unknown field": multipart(("image", b"x"), ("password", b"p"), (CANARY, b"1")),
    "field twice": multipart(("image", b"x"), ("password", b"p"), ("password", CANARY.encode())),
    "no closing boundary": multipart(("image", b"x"), ("password", CANARY.encode()), end=b""),
    "no multipart at all": CANARY.encode(),
    "password not UTF-8": multipart(("image", b"x"), ("password", b"\xff\xfe" + CANARY.encode())),
    "huge text field": multipart(("image", b"x"), ("password", CANARY.encode() * 1000)),
    "many fields": multipart(*((f"f{i}", b"1") for i in range(100))),
    "bad faces": multipart(("image", b"x"), ("password", CANARY.encode()), ("faces", b"one")),
    "negative face": multipart(("image", b"x"), ("password", CANARY.encode()), ("faces", b"-1")),
    "bad format": multipart(("image", b"x"), ("password", CANARY.encode()), ("format", b"gif")),
    "bad quality": multipart(("image", b"x"), ("password", CANARY.encode()), ("quality", b"101")),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_forms_are_refused_without_being_quoted(client: httpx.Client, name: str) -> None:
    response = client.post(
        "/v1/anonymize", content=MALFORMED[name], headers={"Content-Type": "multipart/form-data; boundary=b"}
    )
    assert_problem(response, 400, "malformed-request")
    assert CANARY not in response.text


@pytest.mark.parametrize(
    "document",
    [
        "{",
        "[]",
        "null",
        json.dumps({"password": CANARY}),
        json.dumps({"image": "not base64!", "password": CANARY}),
        json.dumps({"image": "http://127.0.0.1:1/x.png", "password": CANARY}),
        json.dumps({"image": "eA==", "password": {"value": CANARY}}),
        json.dumps({"image": "eA==", "password": CANARY, "faces": []}),
        json.dumps({"image": "eA==", "password": CANARY, CANARY: 1}),
        f'{{"image": "eA==", "password": "a", "password": "{CANARY}"}}',
        "[" * 100_000,
    ],
)
def test_malformed_json_is_refused_without_being_quoted(client: httpx.Client, document: str) -> None:
    response = client.post("/v1/anonymize", content=document, headers={"Content-Type": "application/json"})
    assert_problem(response, 400, "malformed-request")
    assert CANARY not in response.text


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", "image/png", ""])
def test_other_content_types_are_refused(client: httpx.Client, content_type: str) -> None:
    response = client.post("/v1/anonymize", content=b"password=x", headers={"Content-Type": content_type})
    assert_problem(response, 415, "unsupported-media-type")


def test_bentomls_pickle_is_not_accepted(client: httpx.Client) -> None:
    response = client.post(
        "/v1/anonymize", content=b"\x80\x04.", headers={"Content-Type": "application/vnd.bentoml+pickle"}
    )
    assert_problem(response, 415, "unsupported-media-type")


def test_an_announced_body_over_the_limit_is_refused_and_the_answer_arrives(client: httpx.Client) -> None:
    response = post(client, "/v1/anonymize", bytes(6 * 1024 * 1024), password="p")
    assert_problem(response, 413, "body-too-large")


def test_a_body_that_turns_out_too_large_is_refused_while_it_is_read(client: httpx.Client) -> None:
    sent = 0

    def chunks() -> Any:
        nonlocal sent
        yield multipart(("password", b"p"), end=b"")
        yield b'--b\r\nContent-Disposition: form-data; name="image"\r\n\r\n'
        for _ in range(100):
            sent += 1
            yield bytes(256 * 1024)

    response = client.post(
        "/v1/anonymize", content=chunks(), headers={"Content-Type": "multipart/form-data; boundary=b"}
    )
    assert_problem(response, 413, "body-too-large")


def test_an_upload_that_stands_still_is_given_up(service: Any) -> None:
    with socket.create_connection(("127.0.0.1", service.port), timeout=20) as connection:
        connection.sendall(
            b"POST /v1/anonymize HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=b\r\n"
            b"Content-Length: 1000\r\n\r\n--b\r\n"
        )
        answer = b""
        while b"}" not in answer and (chunk := connection.recv(65536)):
            answer += chunk
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"urn:mien:problem:upload-stalled" in answer


def test_unknown_paths_and_methods_get_problems_too(client: httpx.Client) -> None:
    assert_problem(client.get("/nowhere"), 404, "not-found")
    assert_problem(client.get("/docs.json"), 404, "not-found")
    assert_problem(client.post("/v1/anonymize/", content=b""), 404, "not-found")
    response = client.get("/v1/anonymize")
    assert_problem(response, 405, "method-not-allowed")
    assert response.headers["allow"] == "POST"
    assert_problem(
        client.post("/v1/anonymize", files={"image": b"x"}, headers={"Accept": "text/html"}), 406, "not-acceptable"
    )


# -- around it ----------------------------------------------------------------------------------------------------


def test_health_readiness_and_the_model_are_told(client: httpx.Client) -> None:
    assert client.get("/healthz").status_code == 200
    assert client.get("/readyz").text == "ready\n"
    model = client.get("/v1/model").json()
    assert model["architecture"] == "coupling"
    assert model["limits"]["faces"] == 3


def test_the_openapi_description_is_valid_and_names_every_problem_that_occurs(
    client: httpx.Client, astronaut: bytes, encode: Callable[..., bytes]
) -> None:
    openapi_spec_validator = pytest.importorskip("openapi_spec_validator")
    document = client.get("/openapi.json").json()
    openapi_spec_validator.validate(document)
    for path, operation in document["paths"].items():
        for method in operation:
            answer = client.request(method, path)
            assert answer.status_code not in (404, 405), path
            assert str(answer.status_code) in operation[method]["responses"], (path, answer.status_code)
    responses = document["paths"]["/v1/anonymize"]["post"]["responses"]
    for data, status, slug in bad_pictures(astronaut, encode).values():
        answer = post(client, "/v1/anonymize", data, password="p")
        assert answer.status_code == status
        assert f"urn:mien:problem:{slug}" in responses[str(status)]["description"]


def test_the_page_has_a_strict_policy_and_no_outside_references(client: httpx.Client) -> None:
    page = client.get("/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    for path in ("/", "/app.js", "/style.css", "/icon.svg", "/handle.svg"):
        file = client.get(path)
        assert file.status_code == 200
        assert file.headers["x-content-type-options"] == "nosniff"
        outside = file.text.replace("http://www.w3.org/2000/svg", "")
        assert "http://" not in outside and "https://" not in outside
        again = client.get(path, headers={"If-None-Match": file.headers["etag"]})
        assert again.status_code == 304
    assert "<script>" not in page.text and "style=" not in page.text and "onclick" not in page.text
