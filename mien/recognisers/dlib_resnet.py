"""dlib's face recognition ResNet: a judge whose weights come in a package and need no download (CC0)."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mien import geometry
from mien.errors import ModelError
from mien.recognisers.base import Recogniser
from mien.recognisers.dlib_network import DlibNetwork

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
        ModelError: the package with its weights is not installed.
    """

    differentiable = False
    distance_threshold = 0.6

    def __init__(self) -> None:
        super().__init__(name="dlib", embedding_size=128, threshold=None, matrix=_TO_150, size=(150, 150))
        # The package's own function for this path imports pkg_resources, which setuptools no longer has.
        package = importlib.util.find_spec("face_recognition_models")
        if package is None or not package.submodule_search_locations:
            raise ModelError("the dlib recogniser needs the package face-recognition-models")
        file = Path(package.submodule_search_locations[0], "models", "dlib_face_recognition_resnet_model_v1.dat")
        self.network = DlibNetwork(file)
        self.eval()

    @torch.no_grad()
    def embed(self, aligned: Tensor) -> Tensor:
        chips = ((aligned.float() + 1) * 127.5).round().clamp(0, 255)
        out: Tensor = self.network(chips)
        return out

    def matches(self, a: Tensor, b: Tensor) -> Tensor:
        """Whether embeddings ``[..., 128]`` are of one person, bool ``[...]``: nearer than 0.6."""
        near: Tensor = torch.linalg.vector_norm(a - b, dim=-1) < self.distance_threshold
        return near
