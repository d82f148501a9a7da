"""What `helm test` runs: one synthetic picture there and back, over HTTP and gRPC, with the right and a wrong password.

The picture is a crop of smooth colours, said to be aligned, so that no face has to be found in it and nobody's face has
to be shipped. Exit code 0 when everything held; the last line says what did not.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path

import grpc
import httpx
import numpy as np
from PIL import Image

from mien.v1 import face_identity_pb2 as messages
from mien.v1 import face_identity_pb2_grpc as stubs

PASSWORD = "helm test, right"  # noqa: S105 - of a picture of nobody
WRONG = "helm test, wrong"
SECONDS = 30.0

Edit = Callable[[str, bytes, str], bytes]
"""(operation, PNG, password) -> PNG"""


def synthetic(side: int) -> bytes:
    """A PNG, side x side: an oval of skin colours on a gradient, with a little noise, always the same."""
    y, x = np.mgrid[0:side, 0:side] / (side - 1)
    ground = np.stack([0.3 + 0.4 * x, 0.4 + 0.3 * y, 0.6 - 0.2 * x], axis=-1)
    face = np.stack([0.8 - 0.1 * y, 0.6 - 0.1 * y, 0.5 - 0.1 * x], axis=-1)
    inside = np.clip(8 * (1 - ((x - 0.5) / 0.3) ** 2 - ((y - 0.5) / 0.42) ** 2), 0, 1)[..., None]
    noise = np.random.default_rng(0).normal(0, 0.01, ground.shape)
    pixels = np.clip(ground * (1 - inside) + face * inside + noise, 0, 1) * 255
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


def distance(one: bytes, other: bytes) -> float:
    """Mean absolute difference of two pictures' pixels, of 255."""
    pixels = [np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), np.float32) for data in (one, other)]
    return float(np.abs(pixels[0] - pixels[1]).mean())


def over_http(client: httpx.Client) -> Edit:
    def edit(operation: str, image: bytes, password: str) -> bytes:
        answer = client.post(
            f"/v1/{operation}",
            files={"image": ("synthetic.png", image, "image/png")},
            data={"password": password, "aligned": "true"},
        )
        if answer.status_code != 200:
            raise SystemExit(f"FAILED: {operation} over HTTP answered {answer.status_code}: {answer.text[:300]}")
        return answer.content

    return edit


def over_grpc(channel: grpc.Channel, key: str | None) -> Edit:
    stub = stubs.FaceIdentityStub(channel)
    metadata = [("authorization", f"Bearer {key}")] if key else []

    def edit(operation: str, image: bytes, password: str) -> bytes:
        call = {"anonymize": stub.Anonymize, "recover": stub.Recover}[operation]
        request = messages.EditRequest(image=image, options=messages.EditOptions(password=password, aligned=True))
        return bytes(call(request, timeout=SECONDS, metadata=metadata, wait_for_ready=True).image)

    return edit


def open_channel(address: str, authority: Path | None) -> grpc.Channel:
    if authority is None:
        return grpc.insecure_channel(address)
    return grpc.secure_channel(address, grpc.ssl_channel_credentials(authority.read_bytes()))


def check(door: str, image: bytes, edit: Edit) -> bytes:
    """The round trip over one door; gives the anonymized picture back."""
    safe = edit("anonymize", image, PASSWORD)
    right, wrong = edit("recover", safe, PASSWORD), edit("recover", safe, WRONG)
    changed, back, third = distance(image, safe), distance(image, right), distance(image, wrong)
    sys.stdout.write(f"{door}: anonymized {changed:.2f}, recovered {back:.2f}, wrong password {third:.2f} (of 255)\n")
    if not (back < changed / 2 and back < third / 2):
        raise SystemExit(f"FAILED: over {door} the right password does not give the picture back")
    return safe


def main() -> None:
    parser = argparse.ArgumentParser(description="One synthetic picture there and back.")
    parser.add_argument("--http", required=True, help="http://HOST:PORT")
    parser.add_argument("--grpc", help="HOST:PORT")
    parser.add_argument("--grpc-ca", type=Path, help="PEM authority of the gRPC door, where it speaks TLS")
    arguments = parser.parse_args()
    key = os.environ.get("MIEN_API_KEY")
    with httpx.Client(
        base_url=arguments.http, timeout=SECONDS, headers={"Authorization": f"Bearer {key}"} if key else {}
    ) as client:
        model = client.get("/v1/model").raise_for_status().json()
        image = synthetic(model["crop_size"])
        safe = check("HTTP", image, over_http(client))
    if arguments.grpc:
        with open_channel(arguments.grpc, arguments.grpc_ca) as channel:
            same = check("gRPC", image, over_grpc(channel, key))
        if distance(safe, same) > 0:
            raise SystemExit("FAILED: HTTP and gRPC made different pictures of the same one")
    sys.stdout.write(f"OK, model {model['digest']}\n")


if __name__ == "__main__":
    main()
