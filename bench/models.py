"""Models that need no training, for measurements and tests of what runs them."""

from __future__ import annotations

from pathlib import Path

import torch

from mien import networks, store


def untrained(folder: Path, seed: int, *, gain: float = 0.02) -> Path:
    """Make a model of a small reversible network with random weights.

    It changes faces visibly, under every code otherwise, and gives them back exactly; what comes out is no face.

    Args:
        folder: where it goes.
        seed: two seeds give two models.
        gain: standard deviation of the weights that change a face; of 0 it leaves faces as they are.

    Returns:
        The folder.
    """
    architecture = networks.CouplingConfig(widths=(16, 24), condition=32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = networks.build(architecture, bits=16, size=128)
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                if name.endswith(".head.weight"):
                    parameter.normal_(0, gain)
    store.save(folder, network, store.ModelConfig(architecture=architecture), card="# Random weights\n")
    return folder
