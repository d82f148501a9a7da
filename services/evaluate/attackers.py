"""What an attacker trains who holds the model: small networks, minutes of a CPU. A lower bound of what is possible."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mien import networks
from mien.recognisers import Recogniser
from services.evaluate.distances import Floats, Pixels, to_pixels, to_tensor

_BATCH: Final = 16
Advance = Callable[[int], None]


class PatchClassifier(nn.Module):
    """Strided convolutions without batch statistics, averaged: ``[B, 3, S, S]`` -> logits ``[B, outputs]``."""

    def __init__(self, outputs: int, *, width: int = 32, inputs: int = 3) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = inputs
        for i in range(5):
            wider = width * min(2**i, 8)
            layers += [
                nn.Conv2d(channels, wider, 4, stride=2, padding=1),
                nn.GroupNorm(max(1, wider // 16), wider),
                nn.LeakyReLU(0.2),
            ]
            channels = wider
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(channels, outputs)

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.head(self.features(images).mean(dim=(2, 3)))
        return out


def train_classifier(
    pictures: Pixels, labels: Floats, *, images: int, seed: int, advance: Advance, lr: float = 1e-3
) -> PatchClassifier:
    """Learn independent yes/no labels float ``[M, K]`` of pictures uint8 ``[M, S, S, 3]``; sees ``images`` samples."""
    torch.manual_seed(seed)
    network = PatchClassifier(labels.shape[1])
    optimizer = torch.optim.Adam(network.parameters(), lr=lr)
    for chosen in _batches(len(pictures), images, seed):
        loss = F.binary_cross_entropy_with_logits(
            network(to_tensor(pictures[chosen])), torch.from_numpy(labels[chosen]).float()
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        advance(len(chosen))
    return network.eval()


@torch.no_grad()
def scores(network: nn.Module, pictures: Pixels) -> Floats:
    """Logits float ``[M, K]``."""
    parts = [network(to_tensor(pictures[i : i + 64])).double().numpy() for i in range(0, len(pictures), 64)]
    return np.concatenate(parts)


class Inverter(nn.Module):
    """A -> I without a code: the paper's generator, smaller, which starts at giving back what it was given."""

    def __init__(self, size: int) -> None:
        super().__init__()
        config = networks.ResNetConfig(width=16, blocks=4)
        self.body = networks.ResNetTransformer(config, bits=0)

    def forward(self, images: Tensor) -> Tensor:
        empty = images.new_zeros(len(images), 0)
        out: Tensor = (images + self.body(images, empty)).clamp(-1, 1)
        return out


def train_inverter(
    inputs: Pixels,
    wanted: Pixels,
    *,
    images: int,
    seed: int,
    advance: Advance,
    recogniser: Recogniser | None = None,
    lr: float = 5e-4,
) -> Inverter:
    """Learn to give ``wanted`` for ``inputs`` by L1, and by the cosine of a recogniser where one is given."""
    torch.manual_seed(seed)
    network = Inverter(inputs.shape[1])
    optimizer = torch.optim.Adam(network.parameters(), lr=lr)
    for chosen in _batches(len(inputs), images, seed):
        target = to_tensor(wanted[chosen])
        made = network(to_tensor(inputs[chosen]))
        loss = F.l1_loss(made, target)
        if recogniser is not None:
            with torch.no_grad():
                theirs = recogniser(target)
            loss = loss + 0.3 * (1 - F.cosine_similarity(recogniser(made), theirs)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        advance(len(chosen))
    return network.eval()


@torch.no_grad()
def invert(network: Inverter, pictures: Pixels) -> Pixels:
    """What the inverter makes of anonymized faces."""
    return np.concatenate([to_pixels(network(to_tensor(pictures[i : i + 32]))) for i in range(0, len(pictures), 32)])


def _batches(count: int, images: int, seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng([seed, 5])
    order = np.concatenate([rng.permutation(count) for _ in range(-(-images // count))])[:images]
    return [order[i : i + _BATCH] for i in range(0, len(order), _BATCH)]
