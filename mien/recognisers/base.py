"""What every face recogniser is to the rest of Mien."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mien.errors import ModelError
from mien.geometry import Matrix
from mien.warp import FixedWarp


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine similarity of embeddings ``[..., D]`` and ``[..., D]``, ``[...]`` in [-1, 1]."""
    return F.cosine_similarity(a, b, dim=-1)


class Recogniser(nn.Module, ABC):
    """A network that tells faces apart: Mien's aligned squares in, embeddings out.

    Attributes:
        name: what :func:`mien.recognisers.load` calls it.
        embedding_size: D.
        threshold: cosine at and above which two embeddings are of one person, or None where none was measured.
        differentiable: whether gradients flow from the embeddings to the crops.
        normalisation_frozen: batch norm stays in evaluation mode whatever :meth:`train` says (the default). Batches
            of transformed faces must not leak into the running statistics, and an embedding must not depend on its
            batch-mates. Set it to False before ``train()`` to learn a recogniser from scratch.

    Args:
        matrix: ``[2, 3]`` from Mien's 128 pixel square to the recogniser's own crop.
        size: (height, width) of that crop.
    """

    differentiable = True

    def __init__(
        self, *, name: str, embedding_size: int, threshold: float | None, matrix: Matrix, size: tuple[int, int]
    ) -> None:
        super().__init__()
        self.name = name
        self.embedding_size = embedding_size
        self.threshold = threshold
        self.crop_size = size
        self.normalisation_frozen = True
        self.crop = FixedWarp(matrix, size)

    def forward(self, crops: Tensor) -> Tensor:
        """Embed Mien's squares.

        Args:
            crops: float ``[B, 3, S, S]`` in [-1, 1], RGB, aligned by :func:`mien.geometry.crop_transform`.

        Returns:
            float ``[B, D]``, not normalised.
        """
        embeddings: Tensor = self.embed(self.crop(crops))
        return embeddings

    @abstractmethod
    def embed(self, aligned: Tensor) -> Tensor:
        """Embed the recogniser's own crops, float ``[B, 3, height, width]`` in [-1, 1], to float ``[B, D]``."""

    def matches(self, a: Tensor, b: Tensor) -> Tensor:
        """Whether embeddings ``[..., D]`` are of one person, bool ``[...]``.

        Raises:
            ModelError: no threshold is known for this recogniser.
        """
        if self.threshold is None:
            raise ModelError(f"no threshold was measured for {self.name}: compare its embeddings with cosine()")
        return cosine(a, b) >= self.threshold

    def train(self, mode: bool = True) -> Recogniser:
        """Set training mode; batch norm follows only where ``normalisation_frozen`` is off."""
        super().train(mode)
        if self.normalisation_frozen:
            for module in self.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    def frozen(self) -> Recogniser:
        """Itself, in evaluation mode and with parameters that take no gradient; gradients still reach the crops."""
        self.eval()
        return self.requires_grad_(False)


@torch.no_grad()
def embed_in_batches(recogniser: Recogniser, crops: Tensor, batch: int = 128) -> Tensor:
    """Embeddings ``[B, D]`` of many crops (uint8 or float ``[B, 3, S, S]``; uint8 is taken as 0..255) without gradient.

    Uses the device of the recogniser; the result is on the CPU.
    """
    device = next((p.device for p in recogniser.parameters()), torch.device("cpu"))
    parts = []
    for start in range(0, len(crops), batch):
        part = crops[start : start + batch].to(device)
        parts.append(recogniser(part.float() / 127.5 - 1 if part.dtype == torch.uint8 else part).cpu())
    return torch.cat(parts) if parts else torch.empty(0, recogniser.embedding_size)
