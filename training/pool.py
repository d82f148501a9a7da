"""The buffer of generated images that D is trained on (Shrivastava et al. 2017; the paper keeps 500)."""

from __future__ import annotations

import torch
from torch import Tensor


class ImagePool:
    """Keeps up to ``size`` images; each image put in is answered with itself or, half the time, with an older one.

    Args:
        size: 0 switches the buffer off.
        shape: shape of one image.
    """

    def __init__(self, size: int, shape: tuple[int, ...]) -> None:
        self.size = size
        self.images = torch.zeros((size, *shape), dtype=torch.bfloat16)
        self.filled = 0

    def exchange(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """``[B, ...]`` in, ``[B, ...]`` out, detached; draws come from ``generator`` (on the CPU)."""
        images = images.detach()
        if self.size == 0:
            return images
        out = images.clone()
        for i in range(images.shape[0]):
            if self.filled < self.size:
                self.images[self.filled] = images[i]
                self.filled += 1
            elif torch.rand((), generator=generator) < 0.5:
                j = int(torch.randint(self.size, (), generator=generator))
                out[i] = self.images[j].to(images)
                self.images[j] = images[i]
        return out

    def state_dict(self) -> dict[str, Tensor]:
        return {"images": self.images, "filled": torch.tensor(self.filled)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.images.copy_(state["images"])
        self.filled = int(state["filled"])
