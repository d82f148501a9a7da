"""MobileFaceNet (Chen et al. 2018, "MobileFaceNets", table 1), in the two variants whose weights Mien uses.

Parameter names are those of the weight files (``shared/weights/README.md``).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch import Tensor, nn

from mien import geometry
from mien.errors import ModelError
from mien.recognisers.base import Recogniser

Variant = Literal["casia", "ms1m"]

# (expansion, channels, repeats, stride of the first)
_STAGES = ((2, 64, 5, 2), (4, 128, 1, 2), (2, 128, 6, 1), (4, 128, 1, 2), (2, 128, 2, 1))
_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_DEVIATION = (0.229, 0.224, 0.225)


class _ConvNorm(nn.Module):
    """Convolution, batch norm, activation. ``prelu`` is a bare parameter because the files name it so."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int | tuple[int, int] = 1,
        *,
        stride: int = 1,
        padding: int = 0,
        groups: int = 1,
        bias: bool = False,
        activation: Literal["prelu", "relu", "relu6"] | None = None,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=bias)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-5)
        self.activation = activation
        if activation == "prelu":
            self.prelu = nn.Parameter(torch.full((outputs,), 0.25))

    def forward(self, x: Tensor) -> Tensor:
        x = self._convolve(x)
        if self.activation == "prelu":
            return nn.functional.prelu(x, self.prelu)
        if self.activation == "relu6":
            return nn.functional.relu6(x)
        return nn.functional.relu(x) if self.activation == "relu" else x

    def _convolve(self, x: Tensor) -> Tensor:
        """Convolution and batch norm, as one convolution where both are frozen (a fifth less time under a loss)."""
        bn, conv = self.bn, self.conv
        if bn.training or conv.weight.requires_grad or bn.running_mean is None or bn.running_var is None:
            out: Tensor = bn(conv(x))
            return out
        gain = bn.weight * torch.rsqrt(bn.running_var + bn.eps)
        shift = bn.bias + gain * ((0 if conv.bias is None else conv.bias) - bn.running_mean)
        weight = conv.weight * gain[:, None, None, None]
        return nn.functional.conv2d(x, weight, shift, conv.stride, conv.padding, 1, conv.groups)


class _InvertedResidual(nn.Module):
    def __init__(
        self, inputs: int, outputs: int, expansion: int, stride: int, activation: Literal["prelu", "relu6"]
    ) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.expand = _ConvNorm(inputs, hidden, activation=activation)
        self.depthwise = _ConvNorm(hidden, hidden, 3, stride=stride, padding=1, groups=hidden, activation=activation)
        self.project = _ConvNorm(hidden, outputs)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.project(self.depthwise(self.expand(x)))
        return x + out if self.residual else out


class MobileFaceNet(Recogniser):
    """128-d embeddings of a 112x96 (``casia``) or 112x112 (``ms1m``) crop.

    ``casia`` was trained on CASIA-WebFace and is for training; ``ms1m`` was trained on MS1M and is a judge, which it
    remains only while no loss uses it.
    """

    def __init__(self, variant: Variant) -> None:
        casia = variant == "casia"
        super().__init__(
            name=f"mobilefacenet-{variant}",
            embedding_size=128,
            threshold=0.297 if casia else 0.273,
            matrix=geometry.TO_112X96 if casia else geometry.TO_112,
            size=(112, 96) if casia else (112, 112),
        )
        activation: Literal["prelu", "relu6"] = "prelu" if casia else "relu6"
        self.stem = _ConvNorm(3, 64, 3, stride=2, padding=1, activation=activation)
        self.stem_depthwise = _ConvNorm(64, 64, 3, padding=1, groups=64, activation="prelu" if casia else "relu")
        self.stem_pointwise = None if casia else _ConvNorm(64, 64, activation="relu")
        blocks: list[nn.Module] = []
        channels = 64
        for expansion, outputs, repeats, first_stride in _STAGES:
            for index in range(repeats):
                stride = first_stride if index == 0 else 1
                blocks.append(_InvertedResidual(channels, outputs, expansion, stride, activation))
                channels = outputs
        self.blocks = nn.Sequential(*blocks)
        self.head = _ConvNorm(channels, 512, activation=activation)
        self.global_depthwise = _ConvNorm(512, 512, (7, 6) if casia else (7, 7), groups=512)
        self.embedding = _ConvNorm(512, 128, bias=not casia)
        # Input normalisation as a scale and shift of [-1, 1]: (x - 127.5) / 128, or ImageNet's on [0, 1].
        mean = torch.tensor([0.5] * 3 if casia else _IMAGENET_MEAN)
        deviation = torch.tensor([128 / 255] * 3 if casia else _IMAGENET_DEVIATION)
        self.register_buffer("scale", (0.5 / deviation)[:, None, None], persistent=False)
        self.register_buffer("shift", ((0.5 - mean) / deviation)[:, None, None], persistent=False)
        self.scale: Tensor
        self.shift: Tensor
        self.eval()

    def embed(self, aligned: Tensor) -> Tensor:
        x = self.stem_depthwise(self.stem(aligned * self.scale + self.shift))
        if self.stem_pointwise is not None:
            x = self.stem_pointwise(x)
        x = self.global_depthwise(self.head(self.blocks(x)))
        out: Tensor = self.embedding(x)
        return out.flatten(1)


def load_mobilefacenet(path: str | os.PathLike[str], variant: Variant) -> MobileFaceNet:
    """Build a MobileFaceNet in evaluation mode with the weights of a safetensors file.

    Raises:
        ModelError: the file is missing, is not safetensors, or holds another network.
    """
    network = MobileFaceNet(variant)
    load_weights(network, path)
    return network


def load_weights(network: nn.Module, path: str | os.PathLike[str]) -> None:
    """Fill a recogniser from a safetensors file, which must have exactly its parameters and running statistics.

    Raises:
        ModelError: the file is missing, is not safetensors, or does not fit the network.
    """
    try:
        state = load_safetensors(Path(path).read_bytes())
    except OSError as error:
        raise ModelError(f"cannot read the recogniser weights {path}: {error.strerror}") from error
    except SafetensorError as error:
        raise ModelError(f"{path} is not a safetensors file: {error}") from error
    # num_batches_tracked only matters where momentum is None; files rarely carry it.
    expected = {name for name in network.state_dict() if not name.endswith("num_batches_tracked")}
    given = {name for name in state if not name.endswith("num_batches_tracked")}
    if expected != given:
        different = ", ".join(sorted(expected ^ given)[:3])
        raise ModelError(f"{path} does not hold the weights of {type(network).__name__}: {different}, ... differ")
    try:
        network.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise ModelError(f"{path} does not hold the weights of {type(network).__name__}: {error}") from error
