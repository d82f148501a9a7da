"""One photo to one aligned square crop, or to the reason why not."""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mien import geometry
from mien.errors import InvalidImage
from mien.geometry import Matrix, Points
from mien.pictures import decode
from services.ingest.config import Fill
from services.ingest.sources import EXTENSIONS, Landmarks, Photo

if TYPE_CHECKING:
    from torch import Tensor

# 4:4:4 (no chroma subsampling) at quality 95: the shards are what training calls real, and halved colour resolution or
# blocks would be learned as part of faces. Both cost about 14 kB a crop, a third of a PNG.
_JPEG: dict[str, Any] = {"quality": 95, "subsampling": 0, "optimize": True}

# Training photos show a few people; where a detector finds more than this, it has lost its way.
_CROWD = 1000


class Reason(StrEnum):
    """Why a file did not become a sample."""

    NOT_A_PICTURE = "not a picture"
    BROKEN = "broken picture"
    NO_IDENTITY = "in no person's folder"
    NO_LANDMARKS = "no landmarks"
    NO_FACE = "no face"
    TOO_SMALL = "face too small"
    LANDMARKS_OFF = "landmarks off"
    OUTSIDE = "mostly outside the picture"
    DUPLICATE = "duplicate"
    LIKE_TEST_SET = "matches the test set"
    MISSING = "landmarks without a picture"


@dataclass(frozen=True)
class Rejection:
    """A file that cannot be used."""

    source: str
    file: str
    reason: Reason
    detail: str


@dataclass(frozen=True)
class Crop:
    """A sample in the making."""

    photo: Photo
    digest: str  # sha256 of the photo's bytes
    image: bytes  # encoded square
    landmarks: Points  # float [5, 2], pixels of the crop
    outline: Points  # float [4, 2], the photo's corners in pixels of the crop, clockwise from its top left
    inside: float  # part of the crop that the photo covers; the rest is filled


@dataclass(frozen=True)
class Limits:
    """What a usable face is; see :class:`services.ingest.config.IngestConfig`."""

    size: int
    image: str
    min_confidence: float
    min_eyes: float
    max_residual: float
    min_inside: float
    fill: Fill


class Finder(Protocol):
    """Finds the five landmarks of the face a photo is of."""

    def __call__(self, pixels: NDArray[np.uint8]) -> Landmarks | None:
        """In pixels uint8 ``[H, W, 3]``; None where there is no face."""


class DetectedFace:
    """The face a photo is most likely of, by MTCNN: largest after taking off its distance from the middle.

    That is the largest box side (root of the area) minus the distance of the box's centre from the picture's: in a
    portrait with bystanders the portrayed person, as in LFW, whose photos are centred on theirs.
    """

    def __init__(self) -> None:
        # Imported here: it brings torchvision, and a landmarks file makes it unnecessary.
        from mien.detection import MTCNNDetector

        self._detector = MTCNNDetector(min_confidence=0.0, max_faces=_CROWD)

    def __call__(self, pixels: NDArray[np.uint8]) -> Landmarks | None:
        centre = (np.array(pixels.shape[1::-1]) - 1) / 2

        def score(box: NDArray[np.float64]) -> float:
            side = float(np.sqrt(max(0.0, (box[2] - box[0]) * (box[3] - box[1]))))
            return side - float(np.linalg.norm((box[:2] + box[2:]) / 2 - centre))

        faces = self._detector.detect(pixels)
        if not faces:
            return None
        face = max(faces, key=lambda face: score(face.box))
        return Landmarks(face.landmarks, None, face.confidence)


def crop(photo: Photo, landmarks: Landmarks | None, find: Finder | None, limits: Limits) -> Crop | Rejection:
    """Turn one photo into a crop.

    Args:
        photo: where it lies.
        landmarks: those of the landmarks file; ignored where ``find`` is given.
        find: finds landmarks, or None where a landmarks file was given.
        limits: what is usable.
    """

    def reject(reason: Reason, detail: str) -> Rejection:
        return Rejection(photo.source, photo.name, reason, detail)

    if not photo.regular or not photo.name.lower().endswith(tuple(EXTENSIONS)):
        return reject(Reason.NOT_A_PICTURE, "a link or another special file" if not photo.regular else "by its name")
    if find is None and landmarks is None:
        return reject(Reason.NO_LANDMARKS, "the landmarks file has none for it")
    try:
        data = photo.read()
        pixels = decode(data).pixels
    except (OSError, InvalidImage) as error:
        return reject(Reason.BROKEN, str(error))
    height, width = pixels.shape[:2]
    if landmarks is not None and landmarks.size not in (None, (width, height)):
        return reject(Reason.LANDMARKS_OFF, f"found in a picture of {landmarks.size}, this one is {(width, height)}")
    if find is not None:
        landmarks = find(pixels)
    if landmarks is None:
        return reject(Reason.NO_FACE, "the detector found none")
    if landmarks.confidence is not None and landmarks.confidence < limits.min_confidence:
        detail = f"the detector's confidence is {landmarks.confidence:.3f}, of {limits.min_confidence:g} wanted"
        return reject(Reason.NO_FACE, detail)
    points = landmarks.points
    eyes = float(np.linalg.norm(points[1] - points[0]))
    if eyes < limits.min_eyes:
        return reject(Reason.TOO_SMALL, f"{eyes:.1f} px between the eyes, of {limits.min_eyes:g} wanted")
    matrix = geometry.crop_transform(points, limits.size)
    placed = geometry.apply(matrix, points)
    residual = float(np.sqrt(((placed - geometry.template(limits.size)) ** 2).sum(axis=1).mean()))
    residual *= geometry.CROP_SIZE / limits.size
    if residual > limits.max_residual:
        return reject(Reason.LANDMARKS_OFF, f"{residual:.1f} px from the template, {limits.max_residual:g} allowed")
    inside = part_inside(matrix, limits.size, width, height)
    if inside < limits.min_inside:
        return reject(Reason.OUTSIDE, f"{inside:.2f} of the crop is inside, of {limits.min_inside:g} wanted")
    image = encode(cut(pixels, matrix, limits.size, limits.fill), limits.image)
    low, right, bottom = -0.5, width - 0.5, height - 0.5
    outline = geometry.apply(matrix, np.array([[low, low], [right, low], [right, bottom], [low, bottom]]))
    return Crop(photo, hashlib.sha256(data).hexdigest(), image, placed, outline, inside)


def cut(pixels: NDArray[np.uint8], matrix: Matrix, size: int, fill: Fill) -> NDArray[np.uint8]:
    """The aligned square, uint8 ``[S, S, 3]``.

    Args:
        pixels: uint8 ``[H, W, 3]``.
        matrix: ``[2, 3]`` from picture to crop.
        size: S.
        fill: what to put where the square reaches over the picture's edge: ``mirror``, exactly as the library cuts a
            face out of a picture, or ``smooth``, colours that flow on from the edge. Mirroring suits a strip of
            background; around a tight crop it would draw more eyes and mouths.
    """
    import torch

    from mien.compositing import extract

    with torch.inference_mode():
        face = (extract(pixels, matrix[None], size) + 1) * 127.5
        if fill == "smooth":
            covered = torch.from_numpy(_covered(matrix, size, *pixels.shape[1::-1]))[None, None].float()
            face = covered * face + (1 - covered) * _flow_on(face * covered, covered)
        return face[0].round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()


def _flow_on(colour: Tensor, weight: Tensor) -> Tensor:
    """Known colours continued into the unknown by push and pull (Gortler et al. 1996, "The Lumigraph", section 3.4).

    Args:
        colour: float ``[1, 3, S, S]``, multiplied by its weight.
        weight: float ``[1, 1, S, S]`` in [0, 1], somewhere positive.
    """
    import torch.nn.functional as F

    mean = colour / weight.clamp(min=1e-6)
    if colour.shape[-1] == 1:
        return mean
    # Sums, not means: a coarse pixel with any known part in it is worth up to one known pixel.
    coarse, known = 4 * F.avg_pool2d(colour, 2, ceil_mode=True), 4 * F.avg_pool2d(weight, 2, ceil_mode=True)
    share = known.clamp(max=1) / known.clamp(min=1e-6)
    below = F.interpolate(
        _flow_on(coarse * share, known * share), colour.shape[-2:], mode="bilinear", align_corners=False
    )
    return weight * mean + (1 - weight) * below


def part_inside(matrix: Matrix, size: int, width: int, height: int) -> float:
    """Part of a crop's pixels whose centres lie in the picture, in [0, 1]."""
    return float(_covered(matrix, size, width, height).mean())


def _covered(matrix: Matrix, size: int, width: int, height: int) -> NDArray[np.bool_]:
    """Which of a crop's pixel centres lie in the picture, bool ``[S, S]``."""
    grid = np.stack(np.meshgrid(np.arange(size), np.arange(size)), axis=-1).astype(np.float64)
    at = geometry.apply(geometry.invert(matrix), grid)
    x, y = at[..., 0], at[..., 1]
    return (x >= -0.5) & (x <= width - 0.5) & (y >= -0.5) & (y <= height - 0.5)


def encode(pixels: NDArray[np.uint8], image: str) -> bytes:
    """A crop as the bytes of a ``jpg`` or ``png`` file."""
    buffer = io.BytesIO()
    if image == "png":
        Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
    else:
        Image.fromarray(pixels).save(buffer, "JPEG", **_JPEG)
    return buffer.getvalue()
