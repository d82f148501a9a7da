"""The buffer of generated images that D is trained on (Shrivastava et al. 2017; the paper keeps 500).

The buffer is cut into lanes, one for each place in the batch: the image at place ``i`` is exchanged with images that
were once at place ``i``, and with no other. Samples come in random order, so a place means nothing and the mixture of
ages is the same; but a process that makes a part of the batch needs its own lanes alone, no image crosses the network,
and what comes out does not depend on how the batch is divided.
"""

from __future__ import annotations

import torch
from torch import Tensor

from training.draws import Draws


class ImagePool:
    """Keeps up to ``size`` images; each image put in is answered with itself or, half the time, with an older one.

    Args:
        size: 0 switches the buffer off.
        shape: shape of one image.
        batch: images in a whole batch, the number of lanes; slot ``s`` belongs to lane ``s % batch``.
        device: where the images are kept: that of the images put in, or every exchange waits for copies.
    """

    def __init__(self, size: int, shape: tuple[int, ...], batch: int, device: torch.device | str | None = None) -> None:
        self.size, self.batch = size, batch
        self.images = torch.zeros((size, *shape), dtype=torch.bfloat16, device=device)
        self.filled = torch.zeros(size, dtype=torch.bool)

    def exchange(self, images: Tensor, draws: Draws, place: int = 0) -> Tensor:
        """``[B, ...]`` in, ``[B, ...]`` out, detached.

        Args:
            images: consecutive images of the batch.
            draws: of the same samples.
            place: of the first image in the whole batch.
        """
        images = images.detach()
        if self.size == 0:
            return images
        filled = self.filled.tolist()
        kept: list[tuple[int, int]] = []  # (place, slot) of images that the buffer takes
        swapped: list[tuple[int, int]] = []
        for i, (swap, which) in enumerate(draws.rows(len(images), 2).tolist()):
            slots = range(place + i, self.size, self.batch)
            empty = next((s for s in slots if not filled[s]), None)
            if empty is not None:
                kept.append((i, empty))
            elif slots and swap < 0.5:
                swapped.append((i, slots[int(which * len(slots))]))
        # No two places share a slot, so all are exchanged at once.
        out = images.clone()
        if swapped:
            places, chosen = _columns(swapped, images.device)
            out[places] = self.images[chosen].to(images)
        if kept or swapped:
            places, chosen = _columns(kept + swapped, images.device)
            self.images[chosen] = images[places].to(self.images)
            self.filled[chosen.cpu()] = True
        return out

    def state_dict(self, first: int = 0, last: int | None = None) -> dict[str, Tensor]:
        """The whole buffer; with ``first`` and ``last``, zeros but for the lanes of these places of the batch, so that
        the sum over processes is the whole."""
        mine = torch.arange(self.size) % self.batch
        mine = (mine >= first) & (mine < (self.batch if last is None else last))
        whose = mine.view(-1, *[1] * (self.images.dim() - 1)).to(self.images.device)
        images = torch.where(whose, self.images, torch.zeros_like(self.images))
        return {"images": images, "filled": self.filled & mine}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.images.copy_(state["images"])
        filled = state["filled"]
        if filled.dim() == 0:  # checkpoints of before the lanes have the number of filled slots
            filled = torch.arange(self.size) < filled
        self.filled.copy_(filled)


def _columns(pairs: list[tuple[int, int]], device: torch.device) -> tuple[Tensor, Tensor]:
    places, slots = torch.tensor(pairs, device=device).unbind(dim=1)
    return places, slots
