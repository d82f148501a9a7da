"""The face identity transformers: one registry, one calling convention.

Every architecture is a ``torch.nn.Module`` called as ``network(images, codes)`` with images float ``[B, 3, S, S]`` in
[-1, 1] and codes float ``[B, N]`` in {-0.5, +0.5}, giving float ``[B, 3, S, S]`` (nominally in [-1, 1]; the caller
clamps when it saves). Recovery is the same call with ``-codes`` (paper, section 3.1).
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from mien.networks.coupling import CouplingConfig, CouplingTransformer
from mien.networks.cover import CoverConfig, CoverTransformer
from mien.networks.resnet import ResNetConfig, ResNetTransformer
from mien.networks.unet import UNetConfig, UNetTransformer

AnyConfig = ResNetConfig | UNetConfig | CouplingConfig | CoverConfig
ArchitectureConfig = Annotated[AnyConfig, Field(discriminator="name")]

__all__ = [
    "AnyConfig",
    "ArchitectureConfig",
    "CouplingConfig",
    "CouplingTransformer",
    "CoverConfig",
    "CoverTransformer",
    "ResNetConfig",
    "ResNetTransformer",
    "UNetConfig",
    "UNetTransformer",
    "build",
    "codes_to_tensor",
    "count_macs",
    "count_parameters",
]


def build(config: AnyConfig, *, bits: int, size: int) -> nn.Module:
    """A fresh network of the configured architecture for ``bits``-bit codes and ``size`` pixel crops.

    Weights come from torch's global generator; seed it for a reproducible start.
    """
    if isinstance(config, ResNetConfig):
        return ResNetTransformer(config, bits=bits)
    if isinstance(config, UNetConfig):
        return UNetTransformer(config, bits=bits, size=size)
    if isinstance(config, CoverConfig):
        return CoverTransformer(config, bits=bits, size=size)
    return CouplingTransformer(config, bits=bits, size=size)


def codes_to_tensor(codes: Tensor) -> Tensor:
    """Codes bool or {0, 1} ``[B, N]`` to what a network takes: float32 in {-0.5, +0.5} (paper, section 3.1)."""
    return codes.to(torch.float32) - 0.5


def count_parameters(network: nn.Module) -> int:
    """Number of trainable scalars."""
    return sum(p.numel() for p in network.parameters())


def count_macs(network: nn.Module, *, bits: int, size: int) -> int:
    """Multiply-adds of one image through the network, convolutions and linear layers counted as they run."""
    total = 0

    def hook(module: nn.Module, _inputs: object, output: Tensor) -> None:
        nonlocal total
        if isinstance(module, nn.Conv2d):
            kernel = module.kernel_size[0] * module.kernel_size[1] * module.in_channels // module.groups
            total += kernel * output.numel()
        elif isinstance(module, nn.Linear):
            total += module.in_features * output.numel()

    handles = [m.register_forward_hook(hook) for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    parameter = next(network.parameters())
    try:
        with torch.no_grad():
            network(
                torch.zeros(1, 3, size, size, device=parameter.device, dtype=parameter.dtype),
                torch.full((1, bits), 0.5, device=parameter.device, dtype=parameter.dtype),
            )
    finally:
        for handle in handles:
            handle.remove()
    return total
