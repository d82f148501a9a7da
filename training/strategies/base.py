"""What the step asks of a strategy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor


class Player(Protocol):
    """Modules that learn together: T and Q, D, or F and its head. All methods are called by all processes alike."""

    optimizer: torch.optim.Optimizer
    """Whose ``param_groups`` the schedule writes learning rates into."""

    def begin(self) -> None:
        """Forget the gradients of the step before."""
        ...

    def backward(self, loss: Callable[[], Tensor], *, last: bool) -> Tensor:
        """Add a micro-batch's gradients.

        Args:
            loss: computes the scalar loss, scaled so that the sum over micro-batches and processes is the batch's.
            last: whether it is the step's last micro-batch.

        Returns:
            The loss, detached.
        """
        ...

    def update(self) -> bool:
        """Sum the gradients over all processes and move the weights; where any gradient of any process is not finite,
        nothing moves and all return False."""
        ...

    def weights_were_set(self) -> None:
        """The modules' weights were written by other hands than :meth:`update`: a strategy that keeps copies of them
        takes these, or its next update would bring the old ones back."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """The whole optimizer's state in :class:`torch.optim.Adam`'s form, the same on all processes."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """After the modules' own weights were loaded."""
        ...
