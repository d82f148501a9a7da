"""How a player's gradients are shared between processes and its weights updated: one interface, three ways.

``ddp`` keeps everything on every process and sums gradients; ``zero1`` keeps a part of the optimizer's state on each
(Rajbhandari et al. 2020, DeepSpeed), ``zero2`` a part of the gradients too. Their checkpoints are the same, so that a
run may change its way between two starts.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from training.distributed import World
from training.strategies.base import Player
from training.strategies.ddp import SummedGradients

StrategyName = Literal["ddp", "zero1", "zero2"]

__all__ = ["Player", "StrategyName", "SummedGradients", "create"]


def create(
    name: StrategyName, modules: nn.ModuleDict, optimizer: torch.optim.Optimizer, world: World, *, clip: float | None
) -> Player:
    """A player of the minimax game.

    Args:
        name: the way.
        modules: what it consists of.
        optimizer: Adam over all their parameters, freshly made.
        world: the processes.
        clip: largest norm of its whole gradient.
    """
    if name == "ddp":
        return SummedGradients(optimizer, world, clip=clip)
    from training.strategies.zero import ZeroRedundancy  # DeepSpeed takes seconds to import, and is not everywhere

    return ZeroRedundancy(modules, optimizer, world, stage=int(name[-1]), clip=clip)
