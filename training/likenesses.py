"""The likenesses of a cover transformer: believable, in the place of faces, and unlike one another.

Blends of two real faces that are alike are shown in other people's pictures. Those go that move the landmarks, that
MTCNN doubts, or that a recogniser takes for many of the others; what stays is then moved a little, by gradients through
the picture, until the recogniser tells them apart. That recogniser is no judge of the model any more.
"""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mien.networks.cover import CoverTransformer, Seen, stretch, unstretch
from training.classifier import augment_view
from training.data import Faces
from training.draws import Draws
from training.pose import Pose, jitter, pose_distance
from training.samples import from_uint8
from training.saving import round_8bit

logger = logging.getLogger(__name__)

# The second face of a blend is one of so many that are nearest to the first: what is alike blends without double edges.
_NEAREST: Final = 6
# Donors are seen and lit from the front (the share of training faces whose leading coordinates are smallest) and no
# outliers (glasses, hands, paint), of at most so many times the median energy.
_FRONTAL: Final = 0.35
_PLAIN: Final = 1.1
# Pictures that likenesses are shown in have leading coordinates of this share of training faces.
_USUAL: Final = 0.6

_CANDIDATES: Final = 10
_SHOWN_IN: Final = 3
# Shares of the candidates that move landmarks least, and that are surest to be faces.
_IN_PLACE: Final = 0.55
_SURE: Final = 0.8

# A cosine that a recogniser takes for the same person's, and the width of the step.
_SAME: Final = 0.35
_SOFT: Final = 0.05

_BATCH: Final = 32
_TOGETHER: Final = 8
_RATE: Final = 0.02
# Weights of what keeps likenesses where they were and landmarks in place, against their being alike.
_STAY: Final = 1.0
_POSE: Final = 0.04
# How far a likeness may move, of its length; and what cosine is unlike enough.
_FURTHEST: Final = 0.5
_UNLIKE: Final = 0.05


@dataclass(frozen=True)
class _Pictures:
    """Pictures that likenesses are shown in: stretched, and their context."""

    stretched: Tensor
    seen: Seen

    @staticmethod
    @torch.no_grad()
    def of(network: CoverTransformer, images: Tensor) -> _Pictures:
        """Float ``[B, 3, S, S]`` in [-1, 1]."""
        stretched = stretch(images)
        return _Pictures(stretched, network.observe(stretched))

    def __len__(self) -> int:
        return len(self.stretched)

    def __getitem__(self, chosen: Tensor) -> _Pictures:
        return _Pictures(self.stretched[chosen], Seen(*(part[chosen] for part in self.seen)))

    def with_faces(self, network: CoverTransformer, likenesses: Tensor) -> Tensor:
        """One likeness float ``[B, K]`` in each picture: float ``[B, 3, S, S]`` in [-1, 1]."""
        return network.shown(self.stretched, network.paint(self.seen, likenesses)).clamp(-1, 1)


def settle(
    network: CoverTransformer, shards: Faces, z: Tensor, leading: Tensor, *, strength: float, seed: int,
    recogniser: nn.Module | None, steps: int,
) -> None:  # fmt: skip
    """Give ``network`` its likenesses.

    Args:
        network: fitted but for them; evaluation mode.
        shards: the faces that ``z`` is of, whose pictures likenesses are shown in.
        z: coordinates of eigenfaces, float ``[M, K]`` on the CPU.
        leading: leading coordinates in deviations, float ``[M, .]``.
        strength: what blends are drawn out by, for a mean is plainer than a face and alike to other means.
        seed: of every choice.
        recogniser: what shall tell them apart, float ``[B, 3, S, S]`` -> ``[B, E]``; None leaves blends as they fall.
        steps: of moving them apart.
    """
    generator = torch.Generator().manual_seed(seed)
    energy = leading.cpu().square().mean(dim=1)
    faces = network.likenesses.faces
    count = len(faces)
    blends = strength * _blends(network, z, energy, count if recogniser is None else _CANDIDATES * count, generator)
    if recogniser is None:
        faces.copy_(blends)
        return
    usual = (energy <= energy.quantile(_USUAL)).nonzero()[:, 0]
    shown = _pictures(network, shards, usual[torch.randperm(len(usual), generator=generator)[:_SHOWN_IN]])
    pose = Pose().to(faces.device)
    blends = _choose(network, blends.to(faces.device), shown, recogniser, pose, count)
    several = usual[torch.randperm(len(usual), generator=generator)[: 8 * _BATCH]]
    faces.copy_(_part(network, blends, _pictures(network, shards, several), recogniser, pose, steps, seed))


def _blends(network: CoverTransformer, z: Tensor, energy: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Means of two faces that are alike, of those seen from the front and without anything unusual: ``[count, K]``."""
    unusual = z.square().mean(dim=1)
    plain = (unusual < _PLAIN * unusual.median()) & (energy <= energy.quantile(_FRONTAL))
    donors = z[plain] if int(plain.sum()) > _NEAREST else z
    # As far apart as their pictures are.
    pictures = donors * network.deviation.cpu()
    away = torch.cdist(pictures, pictures).fill_diagonal_(math.inf)
    near = away.topk(min(_NEAREST, len(donors) - 1), largest=False).indices
    one = torch.randint(len(donors), (count,), generator=generator)
    two = near[one, torch.randint(near.shape[1], (count,), generator=generator)]
    logger.info("likenesses: blends of two of %d faces", len(donors))
    return (donors[one] + donors[two]) / 2


def _pictures(network: CoverTransformer, shards: Faces, numbers: Tensor) -> _Pictures:
    return _Pictures.of(network, from_uint8(shards.decode(np.sort(numbers.numpy())).images, network.mean.device))


def _choose(
    network: CoverTransformer, blends: Tensor, shown: _Pictures, recogniser: nn.Module, pose: Pose, count: int
) -> Tensor:
    """The ``count`` candidates that keep landmarks in place, are surely faces and unlike one another."""
    views = len(shown)
    middle = torch.full((views, 3), 0.5)
    there = pose(unstretch(shown.stretched), middle)
    embeddings, moved, sure = [], [], []
    began, done = time.monotonic(), 0
    for some in blends.split(_BATCH):
        pictures = shown[torch.arange(views).repeat(len(some))]
        made = round_8bit(pictures.with_faces(network, some.repeat_interleave(views, dim=0)))
        _, landmarks, certain = pose(made, middle.repeat(len(some), 1))
        embeddings.append(F.normalize(recogniser(made).float(), dim=1).unflatten(0, (len(some), views)))
        moved.append((landmarks.unflatten(0, (len(some), views)) - there[1]).abs().mean(dim=(1, 2)))
        sure.append(certain.view(len(some), views).mean(dim=1))
        done += len(some)
        if done % (16 * _BATCH) == 0:
            left = (time.monotonic() - began) / done * (len(blends) - done)
            logger.info("likenesses: %d of %d candidates seen, %.0f s left", done, len(blends), left)
    embedding, shift, certainty = torch.cat(embeddings), torch.cat(moved), torch.cat(sure)
    good = (shift <= shift.quantile(_IN_PLACE)) & (certainty >= certainty.quantile(1 - _SURE))
    if int(good.sum()) < count:
        good = torch.ones_like(good)
    embedding, blends = embedding[good], blends[good]
    alike = torch.einsum("ave,bve->vab", embedding, embedding)
    alike = torch.sigmoid((alike - _SAME) / _SOFT).mean(dim=0).fill_diagonal_(0)
    stay = torch.ones(len(blends), dtype=torch.bool, device=blends.device)
    taken_for = alike.sum(dim=1)
    for _ in range(len(blends) - count):
        worst = int(taken_for.masked_fill(~stay, -1).argmax())
        stay[worst] = False
        taken_for -= alike[:, worst]
    return blends[stay]


@torch.enable_grad()
def _part(
    network: CoverTransformer, blends: Tensor, shown: _Pictures, recogniser: nn.Module, pose: Pose, steps: int,
    seed: int,
) -> Tensor:  # fmt: skip
    """Move likenesses ``[count, K]``, as strong as before, until a recogniser tells them apart in the same picture."""
    learning = [p for p in (*network.parameters(), *recogniser.parameters()) if p.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    faces, length = blends.clone().requires_grad_(), blends.norm(dim=1, keepdim=True)
    optimizer = torch.optim.Adam([faces], lr=_RATE)
    generator = torch.Generator().manual_seed(seed)
    together = min(_TOGETHER, len(blends))
    groups = _BATCH // together
    others = ~torch.eye(together, dtype=torch.bool, device=blends.device)
    began = time.monotonic()
    for step in range(1, steps + 1):
        draws = Draws(seed, (step - 1) * _BATCH, step * _BATCH)
        chosen = torch.cat([torch.randperm(len(blends), generator=generator)[:together] for _ in range(groups)])
        pictures = shown[torch.randint(len(shown), (groups,), generator=generator).repeat_interleave(together)]
        made = pictures.with_faces(network, faces[chosen])
        views = augment_view(made, Draws(seed, 0, len(made), step=step))
        embedding = F.normalize(recogniser(views).float(), dim=1).unflatten(0, (groups, together))
        cosines = (embedding @ embedding.mT)[:, others]
        placing = jitter(draws, _BATCH)[: len(made)]
        with torch.no_grad():
            there = pose(unstretch(pictures.stretched), placing)
        moved = (faces[chosen] - blends[chosen]).square().sum(dim=1) / length[chosen, 0].square()
        loss = 10 * F.relu(cosines - _UNLIKE).square().mean() + _STAY * moved.mean()
        loss = loss + _POSE * pose_distance(there, pose(made, placing))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            change = faces - blends
            change *= (_FURTHEST * length / change.norm(dim=1, keepdim=True).clamp_min(1e-6)).clamp(max=1)
            faces.copy_(blends + change)
            faces.mul_(length / faces.norm(dim=1, keepdim=True))
        if step % 20 == 0 or step == steps:
            left = (time.monotonic() - began) / step * (steps - step)
            logger.info(
                "likenesses %d/%d, %.0f s left: cosine %.3f, taken for another %.3f, moved %.2f", step, steps, left,
                cosines.mean().item(), (cosines > _SAME).float().mean().item(), moved.mean().sqrt().item(),
            )  # fmt: skip
    for parameter in learning:
        parameter.requires_grad_(True)
    return faces.detach()
