"""Does other software still find the face where it was? The paper's table 3, and a second detector."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from services.evaluate.context import Context
from services.evaluate.distances import Floats, Pixels
from services.evaluate.figures import Result

KINDS = ("A", "R", "WR")


def run(context: Context) -> Result:
    """Detection rates, and the mean shift of MTCNN's boxes and keypoints against those of the input, in crop pixels."""
    result = Result()
    count = min(context.sizes.detector, len(context.sample.faces))
    groups = context.groups[:count]
    found = {kind: _mtcnn(context, context.chain(kind, count), kind) for kind in ("I", *KINDS)}
    for kind, faces in found.items():
        result.mean(f"detection.mtcnn.{kind}.rate", [face is not None for face in faces], groups)
    if any(found["I"]):
        result.mean("detection.mtcnn.I.confidence", [face[2] for face in found["I"] if face is not None])
    boxes: list[float] = []
    points: list[float] = []
    for kind in KINDS:
        both = [(i, a, b) for i, (a, b) in enumerate(zip(found["I"], found[kind], strict=True)) if a and b]
        if not both:
            result.skip(f"detection.mtcnn.{kind}.box", "MTCNN finds no face here that it also finds in the input")
            continue
        of = [groups[i] for i, _, _ in both]
        box = [float(np.abs(a[0] - b[0]).mean()) for _, a, b in both]
        point = [float(np.abs(a[1] - b[1]).mean()) for _, a, b in both]
        result.mean(f"detection.mtcnn.{kind}.box", box, of)
        result.mean(f"detection.mtcnn.{kind}.landmarks", point, of)
        result.mean(f"detection.mtcnn.{kind}.confidence", [b[2] for _, _, b in both], of)
        boxes += box
        points += point
    if boxes:
        result.mean("detection.mtcnn.box", boxes)
        result.mean("detection.mtcnn.landmarks", points)
    _second(context, count, result)
    return result


def _mtcnn(
    context: Context, pictures: Pixels, kind: str
) -> list[tuple[NDArray[np.float64], NDArray[np.float64], float] | None]:
    """The face nearest to the middle of each crop: box, landmarks, confidence."""
    out: list[Any] = []
    middle = np.array([pictures.shape[2], pictures.shape[1]]) / 2
    with context.progress.stage(f"MTCNN looks at {kind}", len(pictures)) as advance:
        for picture in pictures:
            faces = context.detector.detect(picture)
            nearest = min(faces, key=lambda f: float(np.linalg.norm(f.landmarks.mean(axis=0) - middle)), default=None)
            out.append(None if nearest is None else (nearest.box, nearest.landmarks, nearest.confidence))
            advance(1)
    return out


def _second(context: Context, count: int, result: Result) -> None:
    """dlib's HOG detector (King 2015): another principle, and in no way related to MTCNN."""
    try:
        import dlib
    except ImportError:
        result.skip("detection.dlib-hog", "the package dlib-bin is not installed")
        return
    detector = dlib.get_frontal_face_detector()

    def rate(pictures: Pixels) -> Floats:
        # Once enlarged: it finds faces from 80 px on, which is just what the crop has.
        return np.array([len(detector(np.ascontiguousarray(p), 1)) > 0 for p in pictures], dtype=np.float64)

    for kind in ("I", *KINDS):
        result.mean(f"detection.dlib-hog.{kind}.rate", rate(context.chain(kind, count)), context.groups[:count])
