"""dlib's face recognition ResNet: a judge that comes with two packages and needs no download (CC0)."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mien import geometry
from mien.errors import ModelError
from mien.recognisers.base import Recogniser

# The midpoints of the eyes in dlib's 150 pixel chip of padding 0.25: (0.25 + p) / 1.5 * 150 of its template p.
_EYES_150 = np.array([[47.73, 47.14], [100.28, 47.12]])
_TO_150 = geometry.fit_similarity(geometry.MIEN_128[:2], _EYES_150)
# Two points of unequal height would leave a hair of rotation.
_TO_150 = np.array([[_TO_150[0, 0], 0.0, _TO_150[0, 2]], [0.0, _TO_150[1, 1], _TO_150[1, 2]]])


class DlibRecogniser(Recogniser):
    """128-d embeddings of a 150x150 crop, compared by Euclidean distance; not differentiable, for judging only.

    Attributes:
        distance_threshold: distance below which two embeddings are of one person (0.6, its author's).

    Raises:
        ModelError: dlib or the package with its weights is not installed.
    """

    differentiable = False
    distance_threshold = 0.6

    def __init__(self) -> None:
        super().__init__(name="dlib", embedding_size=128, threshold=None, matrix=_TO_150, size=(150, 150))
        # The package's own function for this path imports pkg_resources, which setuptools no longer has.
        package = importlib.util.find_spec("face_recognition_models")
        if package is None or not package.submodule_search_locations or importlib.util.find_spec("dlib") is None:
            raise ModelError("the dlib recogniser needs the packages dlib-bin and face-recognition-models")
        import dlib

        file = Path(package.submodule_search_locations[0], "models", "dlib_face_recognition_resnet_model_v1.dat")
        self._network = dlib.face_recognition_model_v1(str(file))
        self._vector = dlib.vector
        self.eval()

    @torch.no_grad()
    def embed(self, aligned: Tensor) -> Tensor:
        pixels = ((aligned.float() + 1) * 127.5).round().clamp(0, 255).to("cpu", torch.uint8)
        chips = [np.ascontiguousarray(chip) for chip in pixels.permute(0, 2, 3, 1).numpy()]
        rows = [np.array(row) for row in self._network.compute_face_descriptor(chips)] if chips else []
        return torch.tensor(np.array(rows).reshape(-1, 128), dtype=torch.float32, device=aligned.device)

    def matches(self, a: Tensor, b: Tensor) -> Tensor:
        """Whether embeddings ``[..., 128]`` are of one person, bool ``[...]``: nearer than 0.6."""
        near: Tensor = torch.linalg.vector_norm(a - b, dim=-1) < self.distance_threshold
        return near
