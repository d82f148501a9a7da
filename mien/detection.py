"""Finding faces: a small interface, and MTCNN behind it.

MTCNN (Zhang et al. 2016) is the detector the paper uses (section 4.1); its weights come inside the facenet-pytorch
wheel, so nothing is downloaded.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mien import geometry
from mien.errors import TooManyFaces

DEFAULT_MAX_FACES: Final = 256

# Width of the gray border around the searched picture, of its longer side.
_BORDER: Final = 1 / 8


@dataclass(frozen=True, eq=False)
class Face:
    """One face in a picture; coordinates in picture pixels, integers at pixel centres."""

    box: NDArray[np.float64]
    """x0, y0, x1, y1, float ``[4]``."""
    confidence: float
    """The detector's, in [0, 1]."""
    landmarks: NDArray[np.float64]
    """Eyes, nose, mouth corners in image order, float ``[5, 2]``; see :mod:`mien.geometry`."""


_Found = tuple[NDArray[np.float64], float, NDArray[np.float64]]
"""Box, confidence, landmarks."""


class Detector(Protocol):
    """What Mien needs of a face detector. Deterministic, and callable from several threads at once."""

    def detect(self, pixels: NDArray[np.uint8]) -> list[Face]:
        """Every face in uint8 RGB ``[H, W, 3]``, largest box first; an empty list where there is none."""
        ...


class MTCNNDetector:
    """MTCNN of facenet-pytorch.

    Pictures whose longer side exceeds ``long_side`` are searched in a smaller copy, which bounds the time: a face must
    then have ``min_face`` pixels in that copy.

    Thread safety: the networks are read-only and run without gradients; a lock only guards the first, lazy load.

    Args:
        device: a torch device; the CPU by default.
        min_face: smallest face side to look for, in pixels of the searched copy.
        long_side: see above.
        min_confidence: drops faces below it.
        max_faces: more raise :class:`~mien.errors.TooManyFaces`.
    """

    def __init__(
        self,
        *,
        device: str | None = None,
        min_face: int = 20,
        long_side: int = 1600,
        min_confidence: float = 0.9,
        max_faces: int = DEFAULT_MAX_FACES,
    ) -> None:
        self.device = device or "cpu"
        self.min_face = min_face
        self.long_side = long_side
        self.min_confidence = min_confidence
        self.max_faces = max_faces
        self._network: Any = None
        self._loading = threading.Lock()

    def with_confidence(self, min_confidence: float) -> MTCNNDetector:
        """The same detector with another ``min_confidence``; the networks are loaded once for both."""
        other = MTCNNDetector(
            device=self.device,
            min_face=self.min_face,
            long_side=self.long_side,
            min_confidence=min_confidence,
            max_faces=self.max_faces,
        )
        other._network = self.load()
        return other

    def load(self) -> Any:
        """The network, loaded now if it was not yet (a server does this before it says that it is ready)."""
        with self._loading:
            if self._network is None:
                # Here, because it takes many seconds: facenet_pytorch imports torchvision.
                from facenet_pytorch import MTCNN

                self._network = MTCNN(
                    keep_all=True, min_face_size=self.min_face, post_process=False, device=self.device
                ).eval()
                if self._on_cpu:
                    from mien import mtcnn  # brings torch, which a client of the service does without

                    mtcnn.accelerate(self._network)
            return self._network

    def detect(self, pixels: NDArray[np.uint8]) -> list[Face]:
        """See :meth:`Detector.detect`.

        Raises:
            ValueError: ``pixels`` is not uint8 ``[H, W, 3]``.
            TooManyFaces: more than ``max_faces``.
        """
        return self.detect_many([pixels])[0]

    def detect_many(self, pictures: Sequence[NDArray[np.uint8]]) -> list[list[Face]]:
        """:meth:`detect` for several pictures; on a GPU those of one size go through the networks together.

        What is found there in a picture can depend on the others in the last digits: a sum over a batch is rounded
        otherwise.
        """
        searched: list[NDArray[np.uint8]] = []
        of_shape: dict[tuple[int, ...], list[int]] = {}
        for i, pixels in enumerate(pictures):
            if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
                raise ValueError(f"expected uint8 pixels [H, W, 3], not {pixels.dtype} {pixels.shape}")
            height, width = pixels.shape[:2]
            factor = min(1.0, self.long_side / max(height, width))
            small = pixels
            if factor < 1:
                size = (max(1, round(width * factor)), max(1, round(height * factor)))
                small = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BOX))
            searched.append(small)
            # Without one whole window at the first scale MTCNN fails on its empty pyramid.
            if min(small.shape[:2]) >= self.min_face:
                of_shape.setdefault(small.shape, []).append(i)
        found: list[list[Face]] = [[] for _ in pictures]
        for members in of_shape.values():
            for i, faces in zip(members, self._run([searched[i] for i in members]), strict=True):
                found[i] = self._faces(faces, searched[i].shape, pictures[i].shape)
        return found

    def _faces(self, found: list[_Found], searched: tuple[int, ...], picture: tuple[int, ...]) -> list[Face]:
        """What was found in the searched copy, in coordinates of the picture."""
        stretch = np.array([picture[1] / searched[1], picture[0] / searched[0]])
        faces = [
            Face(
                box=((box.reshape(2, 2) + 0.5) * stretch - 0.5).reshape(4),
                confidence=confidence,
                landmarks=(landmarks + 0.5) * stretch - 0.5,
            )
            for box, confidence, landmarks in found
            if confidence >= self.min_confidence and plausible(landmarks, box, (searched[0], searched[1]))
        ]
        if len(faces) > self.max_faces:
            raise TooManyFaces(f"The picture shows {len(faces)} faces; at most {self.max_faces} are accepted.")
        return sorted(faces, key=lambda face: (-_area(face.box), *face.box))

    @property
    def _on_cpu(self) -> bool:
        return self.device.startswith("cpu")

    def _run(self, pictures: list[NDArray[np.uint8]]) -> list[list[_Found]]:
        network = self.load()
        # A border, because facenet-pytorch clips windows at the picture's edge and then scales landmarks by the
        # unclipped ones: faces cut by the edge were off by 20 px of 90, or missed. With it they are within 3.
        border = max(self.min_face, round(max(pictures[0].shape[:2]) * _BORDER))
        if self._on_cpu:
            # Batches would only fill the caches: one picture after the other, and the same for each in any company.
            from mien import mtcnn

            found = [mtcnn.find(network, p, border) for p in pictures]
            return [[(b, float(c), p) for b, c, p in zip(*of, strict=True)] for of in found]
        padded = [np.pad(p, ((border, border), (border, border), (0, 0)), constant_values=127) for p in pictures]
        results = zip(*network.detect(np.stack(padded), landmarks=True), strict=True)
        return [
            []
            if boxes is None
            else [
                (np.asarray(b, np.float64) - border, float(c), np.asarray(p, np.float64) - border)
                for b, c, p in zip(boxes, confidences, landmarks, strict=True)
            ]
            for boxes, confidences, landmarks in results
        ]


def plausible(landmarks: NDArray[np.float64], box: NDArray[np.float64], picture: tuple[int, int]) -> bool:
    """Whether five landmarks can be those of the face in the box, and that face is in the picture (height, width).

    MTCNN's third stage regresses landmarks for false alarms too: all in one spot, mirrored, or far off.
    """
    if not (np.isfinite(landmarks).all() and np.isfinite(box).all()) or box[2] <= box[0] or box[3] <= box[1]:
        return False
    side = float(np.sqrt(_area(box)))
    try:
        matrix = geometry.crop_transform(landmarks)
    except ValueError:
        return False
    scale = geometry.scale_of(matrix)
    if scale <= 0:
        return False
    # Eyes are 32 px apart in the crop, in which a face box is some 80 px wide.
    if not 0.25 < side * scale / 80 < 4:
        return False
    off = np.linalg.norm(geometry.apply(matrix, landmarks) - geometry.template(), axis=1)
    # The middle of the head must be in or near the box, and most of the head in the picture.
    centre = geometry.apply(geometry.invert(matrix), np.array([63.5, 63.5]))
    in_box = (centre > box[:2] - 0.5 * side).all() and (centre < box[2:] + 0.5 * side).all()
    in_picture = (centre > -0.4 * side).all() and (centre < np.array(picture[::-1]) + 0.4 * side).all()
    return bool(off.max() < 32 and in_box and in_picture)


def _area(box: NDArray[np.float64]) -> float:
    return float((box[2] - box[0]) * (box[3] - box[1]))
