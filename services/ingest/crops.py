"""One photo to one aligned square crop, or to the reason why not."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mien import geometry
from mien.errors import InvalidImage
from mien.geometry import Matrix, Points
from mien.pictures import decode
from services.ingest.config import Fill
from services.ingest.reading import Bytes
from services.ingest.sources import Landmarks, Photo

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
    """Finds the five landmarks of the face that each of some photos is of."""

    def __call__(self, pictures: Sequence[NDArray[np.uint8]]) -> list[Landmarks | None]:
        """In pictures uint8 ``[H, W, 3]``; None where there is no face."""


class DetectedFace:
    """The face a photo is most likely of, by MTCNN: largest after taking off its distance from the middle.

    That is the largest box side (root of the area) minus the distance of the box's centre from the picture's: in a
    portrait with bystanders the portrayed person, as in LFW, whose photos are centred on theirs.
    """

    def __init__(self) -> None:
        # Imported here: it brings torchvision, and a landmarks file makes it unnecessary.
        from mien.detection import MTCNNDetector

        self._detector = MTCNNDetector(min_confidence=0.0, max_faces=_CROWD)

    def __call__(self, pictures: Sequence[NDArray[np.uint8]]) -> list[Landmarks | None]:
        found: list[Landmarks | None] = []
        for pixels, faces in zip(pictures, self._detector.detect_many(pictures), strict=True):
            centre = (np.array(pixels.shape[1::-1]) - 1) / 2
            face = max(faces, key=lambda face: _portrayed(face.box, centre), default=None)
            found.append(None if face is None else Landmarks(face.landmarks, None, face.confidence))
        return found


def _portrayed(box: NDArray[np.float64], centre: NDArray[np.float64]) -> float:
    side = float(np.sqrt(max(0.0, (box[2] - box[0]) * (box[3] - box[1]))))
    return side - float(np.linalg.norm((box[:2] + box[2:]) / 2 - centre))


@dataclass(frozen=True, eq=False)
class Decoded:
    """A photo whose pixels are known and whose face is not yet cut out."""

    photo: Photo
    digest: str
    pixels: NDArray[np.uint8]  # [H, W, 3]
    landmarks: Landmarks | None  # where given


def open_photo(
    photo: Photo, data: Bytes, landmarks: Landmarks | None, *, detect: bool, aligned: bool
) -> Decoded | Rejection:
    """Decode a photo.

    Args:
        photo: what was listed.
        data: its bytes, as :func:`services.ingest.reading.read` gives them.
        landmarks: those of the landmarks file.
        detect: landmarks will be detected, and none are needed.
        aligned: landmarks are those of InsightFace's template, scaled to the photo.
    """
    if photo.refused:
        return _reject(photo, Reason.NOT_A_PICTURE, photo.refused)
    if not (detect or aligned) and landmarks is None:
        return _reject(photo, Reason.NO_LANDMARKS, "the landmarks file has none for it")
    if isinstance(data, Exception):
        return _reject(photo, Reason.BROKEN, str(data))
    try:
        pixels = decode(data).pixels
    except InvalidImage as error:
        return _reject(photo, Reason.BROKEN, str(error))
    height, width = pixels.shape[:2]
    if aligned:
        if height != width:
            return _reject(photo, Reason.LANDMARKS_OFF, f"an aligned crop is square, this one is {(width, height)}")
        landmarks = Landmarks(geometry.scale_points(geometry.RECOGNISER_112, width / 112))
    elif landmarks is not None and landmarks.size not in (None, (width, height)):
        detail = f"found in a picture of {landmarks.size}, this one is {(width, height)}"
        return _reject(photo, Reason.LANDMARKS_OFF, detail)
    return Decoded(photo, hashlib.sha256(data).hexdigest(), pixels, landmarks)


def crop(decoded: Decoded, landmarks: Landmarks | None, limits: Limits) -> Crop | Rejection:
    """Cut the face out of a photo, if it is usable."""
    photo, pixels = decoded.photo, decoded.pixels
    height, width = pixels.shape[:2]
    if landmarks is None:
        return _reject(photo, Reason.NO_FACE, "the detector found none")
    if landmarks.confidence is not None and landmarks.confidence < limits.min_confidence:
        detail = f"the detector's confidence is {landmarks.confidence:.3f}, of {limits.min_confidence:g} wanted"
        return _reject(photo, Reason.NO_FACE, detail)
    points = landmarks.points
    eyes = float(np.linalg.norm(points[1] - points[0]))
    if eyes < limits.min_eyes:
        return _reject(photo, Reason.TOO_SMALL, f"{eyes:.1f} px between the eyes, of {limits.min_eyes:g} wanted")
    matrix = geometry.crop_transform(points, limits.size)
    placed = geometry.apply(matrix, points)
    residual = float(np.sqrt(((placed - geometry.template(limits.size)) ** 2).sum(axis=1).mean()))
    residual *= geometry.CROP_SIZE / limits.size
    if residual > limits.max_residual:
        detail = f"{residual:.1f} px from the template, {limits.max_residual:g} allowed"
        return _reject(photo, Reason.LANDMARKS_OFF, detail)
    covered = _covered(matrix, limits.size, width, height)
    inside = 1.0 if covered is None else float(covered.mean())
    if inside < limits.min_inside:
        return _reject(photo, Reason.OUTSIDE, f"{inside:.2f} of the crop is inside, of {limits.min_inside:g} wanted")
    image = encode(cut(pixels, matrix, limits.size, limits.fill, covered), limits.image)
    low, right, bottom = -0.5, width - 0.5, height - 0.5
    outline = geometry.apply(matrix, np.array([[low, low], [right, low], [right, bottom], [low, bottom]]))
    return Crop(photo, decoded.digest, image, placed, outline, inside)


def _reject(photo: Photo, reason: Reason, detail: str) -> Rejection:
    return Rejection(photo.source, photo.name, reason, detail)


def cut(
    pixels: NDArray[np.uint8], matrix: Matrix, size: int, fill: Fill, covered: NDArray[np.bool_] | None
) -> NDArray[np.uint8]:
    """The aligned square, uint8 ``[S, S, 3]``.

    Args:
        pixels: uint8 ``[H, W, 3]``.
        matrix: ``[2, 3]`` from picture to crop.
        size: S.
        fill: what to put where the square reaches over the picture's edge: ``mirror``, exactly as the library cuts a
            face out of a picture, or ``smooth``, colours that flow on from the edge. Mirroring suits a strip of
            background; around a tight crop it would draw more eyes and mouths.
        covered: bool ``[S, S]``, which pixels lie in the picture; None where all do.
    """
    import torch

    with torch.inference_mode():
        face = _sampled(pixels, matrix, size)
        if covered is not None and fill == "smooth":
            known = torch.from_numpy(covered)[None, None].float()
            face = known * face + (1 - known) * _flow_on(face * known, known)
        return face[0].round_().clamp_(0, 255).to(torch.uint8).permute(1, 2, 0).contiguous().numpy()


def _sampled(pixels: NDArray[np.uint8], matrix: Matrix, size: int) -> Tensor:
    """What :func:`mien.compositing.extract` gives, float ``[1, 3, S, S]`` in [0, 255], in a quarter of its time.

    The same samples and the same mean of them, without what only the way back into the picture needs: positions are
    sums in float32 (off by less than 1e-4 px, a test compares crops), and samples of an output pixel lie in different
    images of a batch, whose mean needs no pooling.
    """
    import torch
    import torch.nn.functional as F

    from mien.warp import supersampling_for

    samples = supersampling_for(matrix, 16)
    height, width = pixels.shape[:2]
    inverse = geometry.invert(matrix)
    # Only the part that is read: mirroring would need the rest, and the conversion to float costs by the pixel.
    reach = geometry.apply(inverse, geometry.corners(size))
    low, high = np.floor(reach.min(axis=0)).astype(int) - 2, np.ceil(reach.max(axis=0)).astype(int) + 3
    if (low >= 0).all() and high[0] <= width and high[1] <= height:
        pixels, padding = pixels[low[1] : high[1], low[0] : high[0]], "border"
        inverse = inverse - np.array([[0, 0, low[0]], [0, 0, low[1]]])
        height, width = pixels.shape[:2]
    else:
        padding = "reflection"
    sides = np.array([[width], [height]])
    to_grid = inverse * 2 / sides
    to_grid[:, 2] += (1 / sides - 1)[:, 0]
    (a, b, left), (c, d, top) = to_grid.astype(np.float32)
    x, y = _positions(size, samples)
    grid = np.empty((samples**2, size, size, 2), dtype=np.float32)
    np.add(x * a, y * b + left, out=grid[..., 0])
    np.add(x * c, y * d + top, out=grid[..., 1])
    picture = torch.from_numpy(pixels.astype(np.float32, order="C")).permute(2, 0, 1)[None]
    found = F.grid_sample(
        picture.expand(samples**2, -1, -1, -1), torch.from_numpy(grid),
        mode="bilinear", padding_mode=padding, align_corners=False,
    )  # fmt: skip
    return found.mean(dim=0, keepdim=True)


@lru_cache(maxsize=8)
def _positions(size: int, samples: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Where the samples of a crop's pixels lie in it: x float32 ``[samples**2, 1, S]``, y ``[samples**2, S, 1]``."""
    within = (np.arange(samples) + 0.5) / samples - 0.5
    dy, dx = np.meshgrid(within, within, indexing="ij")
    x = dx.reshape(-1, 1, 1) + np.arange(size)
    y = dy.reshape(-1, 1, 1) + np.arange(size)[:, None]
    return x.astype(np.float32), y.astype(np.float32)


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
    covered = _covered(matrix, size, width, height)
    return 1.0 if covered is None else float(covered.mean())


def _covered(matrix: Matrix, size: int, width: int, height: int) -> NDArray[np.bool_] | None:
    """Which of a crop's pixel centres lie in the picture, bool ``[S, S]``; None where all do."""
    inverse = geometry.invert(matrix)
    ends = geometry.apply(inverse, np.array([[0, 0], [size - 1, 0], [size - 1, size - 1], [0, size - 1]]))
    if (ends >= -0.5).all() and (ends <= np.array([width, height]) - 0.5).all():
        return None
    across, down = np.arange(size)[None, :], np.arange(size)[:, None]
    x, y = (row[0] * across + row[1] * down + row[2] for row in inverse)
    return (x >= -0.5) & (x <= width - 0.5) & (y >= -0.5) & (y <= height - 0.5)


def encode(pixels: NDArray[np.uint8], image: str) -> bytes:
    """A crop as the bytes of a ``jpg`` or ``png`` file."""
    buffer = io.BytesIO()
    if image == "png":
        Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
    else:
        Image.fromarray(pixels).save(buffer, "JPEG", **_JPEG)
    return buffer.getvalue()
