"""Exponential moving average of weights, with a half-life in images so that it does not depend on the batch size."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


class EMA:
    """Keeps ``network``'s average in ``.network``; a half-life of 0 makes it a plain copy."""

    def __init__(self, network: nn.Module, half_life: float) -> None:
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        self.half_life = half_life

    @torch.no_grad()
    def update(self, network: nn.Module, images: int, nimg: int) -> None:
        """After a step over ``images`` images, ``nimg`` in all; a short half-life at first lets early weights fade."""
        half_life = min(self.half_life, nimg * 0.1)
        decay = 0.5 ** (images / half_life) if half_life > 0 else 0.0
        for mine, theirs in zip(self.network.parameters(), network.parameters(), strict=True):
            mine.lerp_(theirs.detach().to(mine), 1 - decay)
        # What is not part of the state is made from what is, and may not be made yet.
        kept = self.network.state_dict().keys()
        mine_too = dict(self.network.named_buffers())
        for name, theirs in network.named_buffers():
            if name in kept:
                mine_too[name].copy_(theirs)

    def state_dict(self) -> dict[str, Tensor]:
        return self.network.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.network.load_state_dict(state)
