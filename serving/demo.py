"""``make demo``: the real service, one real photo, and what it does to it, in ``demo/``.

Starts the service (and leaves it running), sends it scikit-image's photo of the astronaut Eileen Collins (public
domain, carried by the package), and writes input, anonymized, recovered and wrongly recovered pictures, plus all of
them in one with a recogniser's similarity under each.
"""

from __future__ import annotations

import argparse
import io
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import numpy as np
from PIL import Image, ImageDraw, ImageFont

logger = logging.getLogger(__name__)

OUT = Path("demo")
PORT = 3000
PASSWORD = "correct horse battery staple"  # noqa: S105 - a demonstration shows its password
WRONG = "incorrect horse"
READY_WITHIN = 240.0  # seconds; a cold start imports torch, torchvision and BentoML


def start(port: int) -> None:
    """Start the service in the background, or use the one that an earlier demo left running."""
    if _ready(port):
        logger.info("the service is already running on port %d", port)
        return
    environment = os.environ | {"BENTOML_DO_NOT_TRACK": "true"}
    with open(OUT / "service.log", "wb") as log:
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "bentoml",
                "serve",
                "serving.service:MienService",
                "--host",
                "127.0.0.1",
                "--port",
                str(port),
            ],
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,  # it outlives this command
        )
    (OUT / "service.pid").write_text(f"{process.pid}\n")
    logger.info("starting the service on port %d (its log: %s)", port, OUT / "service.log")
    deadline = time.monotonic() + READY_WITHIN
    while not _ready(port):
        if process.poll() is not None or time.monotonic() > deadline:
            stop()  # a supervisor goes on starting workers that fail
            tail = (OUT / "service.log").read_text(errors="replace")[-2000:]
            sys.exit(f"the service did not start; the end of its log:\n{tail}")
        time.sleep(0.5)


def stop() -> None:
    """Stop the service that :func:`start` left running."""
    path = OUT / "service.pid"
    try:
        pid = int(path.read_text())
        os.killpg(pid, signal.SIGTERM)
    except (FileNotFoundError, ValueError, ProcessLookupError):
        logger.info("no service of an earlier demo is running")
    else:
        logger.info("stopped the service")
    path.unlink(missing_ok=True)


def _ready(port: int) -> bool:
    try:
        return httpx.get(f"http://localhost:{port}/readyz", timeout=5).is_success
    except httpx.HTTPError:
        return False


def _call(port: int, operation: str, picture: bytes, password: str) -> bytes:
    answer = httpx.post(
        f"http://localhost:{port}/v1/{operation}",
        files={"image": ("picture.png", picture, "image/png")},
        data={"password": password},
        timeout=120,
    )
    if not answer.is_success:
        sys.exit(f"{operation} failed with {answer.status_code}: {answer.text}")
    return answer.content


def sheet(pictures: dict[str, bytes]) -> Image.Image:
    """The pictures side by side, each with how similar dlib's recogniser finds its face to the input's.

    dlib was in no loss. It compares by Euclidean distance; below 0.6 it takes two faces for one person.
    """
    import torch

    from mien import compositing, detection, geometry, recognisers

    judge = recognisers.load("dlib")
    opened = {name: np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for name, data in pictures.items()}
    face = detection.MTCNNDetector().detect(opened["input"])[0]
    matrix = geometry.crop_transform(face.landmarks)[None]
    embedded = {
        name: judge(compositing.extract(pixels, matrix, geometry.CROP_SIZE))[0] for name, pixels in opened.items()
    }
    x0, y0, x1, y1 = geometry.apply(geometry.invert(matrix[0]), geometry.corners(geometry.CROP_SIZE)).mean(axis=0)[
        [0, 1, 0, 1]
    ] + np.array([-1, -1, 1, 1]) * (geometry.CROP_SIZE / geometry.scale_of(matrix[0]) * 0.62)
    side, text = 360, 74
    board = Image.new("RGB", (side * len(opened), side + text), "white")
    draw = ImageDraw.Draw(board)
    large, small = ImageFont.load_default(20), ImageFont.load_default(15)
    for i, (name, pixels) in enumerate(opened.items()):
        part = Image.fromarray(pixels).crop((round(x0), round(y0), round(x1), round(y1)))
        board.paste(part.resize((side, side), Image.Resampling.LANCZOS), (i * side, 0))
        cosine = float(torch.cosine_similarity(embedded["input"], embedded[name], dim=0))
        distance = float(torch.linalg.vector_norm(embedded["input"] - embedded[name]))
        verdict = "same person" if distance < recognisers.DlibRecogniser.distance_threshold else "another person"
        draw.text((i * side + 12, side + 8), name.replace("_", " "), fill="black", font=large)
        line = f"dlib: distance {distance:.2f} (cos {cosine:.2f}), {verdict}"
        draw.text((i * side + 12, side + 40), line, fill="#333333", font=small)
        logger.info("%-20s distance to the input %.3f, cosine %.3f: %s", name, distance, cosine, verdict)
    return board


def main() -> None:
    parser = argparse.ArgumentParser(prog="serving.demo", description="The service, shown on one photo.")
    parser.add_argument("--port", type=int, default=PORT)
    parser.add_argument("--stop", action="store_true", help="stop the service that an earlier demo left running")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    OUT.mkdir(exist_ok=True)
    if arguments.stop:
        stop()
        return

    from skimage.data import astronaut

    start(arguments.port)
    buffer = io.BytesIO()
    Image.fromarray(astronaut()).save(buffer, "PNG")
    pictures = {"input": buffer.getvalue()}
    pictures["anonymized"] = _call(arguments.port, "anonymize", pictures["input"], PASSWORD)
    pictures["recovered"] = _call(arguments.port, "recover", pictures["anonymized"], PASSWORD)
    pictures["wrongly_recovered"] = _call(arguments.port, "recover", pictures["anonymized"], WRONG)
    for name, data in pictures.items():
        (OUT / f"{name}.png").write_bytes(data)
    sheet(pictures).save(OUT / "side_by_side.png")
    logger.info("the page:      http://localhost:%d  (stop it with `make demo-stop`)", arguments.port)
    logger.info("the pictures:  %s", OUT / "side_by_side.png")


if __name__ == "__main__":
    main()
