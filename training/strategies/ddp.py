"""Data parallel: every process has everything; gradients are summed after each backward pass.

The reduction is explicit rather than :class:`torch.nn.parallel.DistributedDataParallel`'s. A step has three backward
passes over shared graphs: T's output is used by both stages, D and F are trained in the first and only passed through
in the second, and terms of weight 0 leave out modules. DDP's reducer wants one wrapped forward for each backward, would
have to search for unused parameters, and averages, which is wrong where parts of a batch differ in size or in labelled
samples. Here the loss of a part is scaled to its share of the whole batch and the sum is the gradient of the whole,
exactly. What is given up is the overlap of communication with backward: T has some 10 M parameters (40 MB), a few
milliseconds of a step of several hundred.

Gradients live in one flat buffer that the parameters' ``.grad`` are views of, so the sum needs no copies.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from training.distributed import World


class SummedGradients:
    """See :class:`training.strategies.Player`."""

    def __init__(self, optimizer: torch.optim.Optimizer, world: World, *, clip: float | None) -> None:
        self.optimizer, self._world, self._clip = optimizer, world, clip
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._flat = torch.zeros(sum(p.numel() for p in self._parameters), device=world.device)
        self._views: list[Tensor] = []
        offset = 0
        for parameter in self._parameters:
            piece = self._flat[offset : offset + parameter.numel()]
            # The parameter's own strides (channels_last), or Adam's fused kernel takes its slow path.
            self._views.append(torch.as_strided(piece, parameter.shape, parameter.stride(), piece.storage_offset()))
            offset += parameter.numel()

    def begin(self) -> None:
        self._flat.zero_()
        for parameter, view in zip(self._parameters, self._views, strict=True):
            parameter.grad = view

    def backward(self, loss: Callable[[], Tensor], *, last: bool) -> Tensor:
        del last
        value = loss()
        value.backward()
        return value.detach()

    def update(self) -> bool:
        self._world.sum_(self._flat)
        # A sum is not finite everywhere when it is not anywhere; asking all the same leaves nothing to the network.
        if self._world.any(not bool(torch.isfinite(self._flat).all())):
            return False
        if self._clip is not None:
            nn.utils.clip_grad_norm_(self._parameters, self._clip)
        self.optimizer.step()
        return True

    def weights_were_set(self) -> None:
        """Nothing is kept but the weights themselves."""

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state)
        # Files know no memory format, and the fused Adam of a GPU wants that of the parameters (channels_last).
        for parameter, moments in self.optimizer.state.items():
            for name, value in moments.items():
                if value.shape == parameter.shape and value.stride() != parameter.stride():
                    moments[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
