"""Trains what undoes a baseline, and the learned baseline itself: the paper's generator, small, in one compact loop.

All deanonymizers have one architecture, one loss (L1 + LSGAN on patches; the paper: "same architecture, reconstruction
and GAN loss") and one budget, so that they differ in what they are given only. The learned anonymizer is after Ren et
al. 2018: a generator that keeps a picture (L1) while a recogniser, which learns to see through it, must fail.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mien import networks
from mien.recognisers import Recogniser
from mien.store import write_atomically
from services.evaluate import baselines
from services.evaluate.attackers import Advance
from services.evaluate.distances import Pixels, to_pixels, to_tensor
from services.evaluate.faces import Faces

WEIGHTS: Final = "deanonymizer.safetensors"
ANONYMIZER: Final = "anonymizer.safetensors"
_RECONSTRUCTION: Final = 100.0  # the paper's weights: 100 for L1, 1 for the GAN


@dataclass(frozen=True)
class Budget:
    """How long each network learns; the same for all."""

    images: int = 1200
    batch: int = 8
    lr: float = 1e-3
    width: int = 16
    blocks: int = 3
    seed: int = 0


class Generator(nn.Module):
    """The paper's generator without a code."""

    def __init__(self, width: int, blocks: int) -> None:
        super().__init__()
        self.body = networks.ResNetTransformer(networks.ResNetConfig(width=width, blocks=blocks), bits=0)

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.body(images, images.new_zeros(len(images), 0))
        return out

    @torch.no_grad()
    def apply_to(self, pixels: Pixels) -> Pixels:
        """uint8 ``[B, S, S, 3]`` to the same."""
        return np.concatenate([to_pixels(self(to_tensor(pixels[i : i + 32]))) for i in range(0, len(pixels), 32)])


class _Patches(nn.Module):
    """A small PatchGAN."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, width, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, 2 * width, 4, stride=2, padding=1),
            nn.GroupNorm(4, 2 * width),
            nn.LeakyReLU(0.2),
            nn.Conv2d(2 * width, 1, 4, padding=1),
        )

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.layers(images)
        return out


def train_deanonymizer(hidden: Pixels, faces: Pixels, budget: Budget, advance: Advance) -> Generator:
    """Learn to give ``faces`` for ``hidden``, uint8 ``[M, S, S, 3]`` each."""
    torch.manual_seed(budget.seed)
    generator, critic = Generator(budget.width, budget.blocks), _Patches()
    optimizer = torch.optim.Adam(generator.parameters(), lr=budget.lr, betas=(0.5, 0.999))
    critics = torch.optim.Adam(critic.parameters(), lr=budget.lr, betas=(0.5, 0.999))
    for seen, chosen in _batches(len(faces), budget):
        _decay(optimizer, budget, seen)
        target = to_tensor(faces[chosen])
        made = generator(to_tensor(hidden[chosen]))
        loss_critic = ((critic(target) - 1) ** 2).mean() + (critic(made.detach()) ** 2).mean()
        critics.zero_grad()
        loss_critic.backward()
        critics.step()
        loss = _RECONSTRUCTION * F.l1_loss(made, target) + ((critic(made) - 1) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        advance(len(chosen))
    return generator.eval()


def train_anonymizer(faces: Faces, recogniser: Recogniser, budget: Budget, advance: Advance) -> Generator:
    """After Ren et al.: L1 to the face, against a recogniser whose classifier learns on what the generator makes.

    Only labelled faces teach the recogniser's head; the generator must also leave the cosine to the input behind.
    """
    torch.manual_seed(budget.seed)
    names = {n: i for i, n in enumerate(sorted({n for n in faces.identities if n is not None}))}
    recogniser = recogniser.frozen()
    generator = Generator(budget.width, budget.blocks)
    head = nn.Linear(recogniser.embedding_size, max(1, len(names)))
    optimizer = torch.optim.Adam(generator.parameters(), lr=budget.lr, betas=(0.5, 0.999))
    heads = torch.optim.Adam(head.parameters(), lr=budget.lr)
    for seen, chosen in _batches(len(faces), budget):
        _decay(optimizer, budget, seen)
        images = to_tensor(faces.images[chosen])
        labels = torch.tensor([names.get(faces.identities[i], -1) for i in chosen])  # type: ignore[arg-type]
        known = labels >= 0
        made = generator(images)
        with torch.no_grad():
            theirs = F.normalize(recogniser(images), dim=1)
        ours = F.normalize(recogniser(made), dim=1)
        loss = F.l1_loss(made, images) + F.relu((ours * theirs).sum(dim=1)).mean()
        if known.any():
            # Least likely to be named right: the cross entropy grows, so it is bounded by the guess it should become.
            logits = head(20 * ours[known])
            loss = loss - 0.05 * F.cross_entropy(logits, labels[known]).clamp(max=float(np.log(max(2, len(names)))))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if known.any():
            learned = F.cross_entropy(head(20 * ours[known].detach()), labels[known])
            heads.zero_grad()
            learned.backward()
            heads.step()
        advance(len(chosen))
    return generator.eval()


def save(folder: Path, name: str, network: Generator, budget: Budget) -> None:
    """One network of a baseline, with the budget it had."""
    folder.mkdir(parents=True, exist_ok=True)
    known = (json.dumps(budget.__dict__) + "\n").encode()
    if not (folder / "budget.json").exists() or (folder / "budget.json").read_bytes() != known:
        for old in folder.glob("*.safetensors"):  # of another budget: would be taken for this one's
            old.unlink()
        write_atomically(folder / "budget.json", known)
    temporary = folder / f".{name}"
    save_file(network.state_dict(), str(temporary))
    temporary.replace(folder / name)


def load(folder: Path, name: str) -> Generator:
    """What :func:`save` wrote; raises OSError where it is missing."""
    budget = Budget(**json.loads((folder / "budget.json").read_text()))
    network = Generator(budget.width, budget.blocks)
    network.load_state_dict(load_file(str(folder / name)))
    return network.eval()


def anonymizer(name: str, folder: Path) -> baselines.Anonymizer:
    """A baseline's anonymizer; the learned one from its folder."""
    return load(folder, ANONYMIZER).apply_to if name == baselines.LEARNED else baselines.FIXED[name]


def _batches(count: int, budget: Budget) -> list[tuple[int, np.ndarray]]:
    rng = np.random.default_rng(budget.seed)
    order = np.concatenate([rng.permutation(count) for _ in range(-(-budget.images // count))])[: budget.images]
    return [(i, order[i : i + budget.batch]) for i in range(0, len(order), budget.batch)]


def _decay(optimizer: torch.optim.Optimizer, budget: Budget, seen: int) -> None:
    """A short warm-up, then down a cosine to a tenth."""
    rate = min(1.0, (seen + budget.batch) / 100) * (0.55 + 0.45 * float(np.cos(np.pi * seen / budget.images)))
    for group in optimizer.param_groups:
        group["lr"] = budget.lr * rate
