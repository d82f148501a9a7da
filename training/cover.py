"""Fit what a cover transformer's painter stands on: eigenfaces, the mean of the context, likenesses.

No loss of the paper is in it: eigenfaces are a decomposition and the context is a regression. Where a recogniser is
given, likenesses are chosen and moved until it tells them apart (:mod:`training.likenesses`). ``python -m training``
goes on from it with the paper's objective and trains the painter, where ``start`` names the folder.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mien.networks import cover
from mien.networks.cover import CoverTransformer
from training import likenesses
from training.data import Faces
from training.pose import Pose
from training.samples import from_uint8

logger = logging.getLogger(__name__)

# Steps in which likenesses are moved apart.
APART: Final = 240

# Of the regression of landmarks, and of how eigenfaces go on towards the outline, against the mean square of a
# coordinate.
_RIDGE: Final = 0.02

# What likenesses are drawn out by: the strongest that do not look painted.
_STRENGTH: Final = 1.3


@dataclass(frozen=True)
class Crops:
    """What a fit needs of the crops of a split, less the mean.

    Attributes:
        luma, colour: of inner blocks, float ``[M, n]`` and ``[M, 2 n]``.
        luma_ring, colour_ring: of the blocks around them.
        around: context pictures, half precision ``[M, 4, 64, 64]``.
        landmarks: in sides of MTCNN's box, float ``[M, 10]``.
    """

    luma: Tensor
    colour: Tensor
    luma_ring: Tensor
    colour_ring: Tensor
    around: Tensor
    landmarks: Tensor


def fit(
    network: CoverTransformer, train: Faces, val: Faces, *, steps: int, batch: int, seed: int, device: torch.device,
    recogniser: nn.Module | None = None, apart: int = APART,
) -> dict[str, float]:  # fmt: skip
    """Fit every part of ``network`` but the painter, in place.

    Args:
        network: fresh; left on ``device`` in evaluation mode.
        train: what is fitted.
        val: what the returned figures are measured on.
        steps: of the context's regression.
        batch: faces a step.
        seed: of the regression and the choice of likenesses; same seed, data and machine give the same network.
        recogniser: what shall tell likenesses apart (:func:`training.likenesses.settle`); on ``device``.
        apart: steps of moving them apart.

    Returns:
        ``explained``: the share of the coordinates' variance that the context predicts; ``energy``: mean square of
        coordinates in deviations (1 where validation faces are as training ones).
    """
    torch.manual_seed(seed)
    painter, network.painter = network.painter, None  # likenesses are seen as they are
    network.to(device).train()
    try:
        with torch.no_grad():
            _means(network, train, device)
            crops, held_out = _crops(network, train, device), _crops(network, val, device)
            _eigenfaces(network, crops)
            scale = _targets(network, crops)[1].std(dim=0)
            network.deviation.copy_(scale)
            network.leading_scale.copy_(_targets(network, crops)[0].std(dim=0))
        _regress(network, crops, held_out, steps, batch)
        network.eval()
        with torch.no_grad():
            leading, target = _targets(network, crops)
            rest = target - _predict(network, crops, leading) * scale
            network.deviation.copy_(rest.std(dim=0))
            for layer in (network.context.out, network.context.direct):
                layer.weight.mul_((scale / network.deviation)[:, None])
                layer.bias.mul_(scale / network.deviation)
            _leftovers(network, train, device)
            z = (rest / network.deviation).cpu()
            likenesses.settle(
                network, train, z, (leading / network.leading_scale).cpu(), strength=_STRENGTH, seed=seed,
                recogniser=recogniser, steps=apart,
            )  # fmt: skip
            leading, target = _targets(network, held_out)
            rest = target - _predict(network, held_out, leading) * network.deviation
            centred = target - target.mean(dim=0)
            return {
                "explained": 1 - (rest.square().sum() / centred.square().sum()).item(),
                "energy": (rest / network.deviation).square().mean().item(),
            }
    finally:
        network.painter = painter
        network.to(device).eval()


def _batches(shards: Faces, device: torch.device, size: int = 256, limit: int | None = None) -> Iterator[Tensor]:
    """The stretched crops of a split, float ``[B, 3, S, S]``."""
    count = min(len(shards), limit or len(shards))
    for start in range(0, count, size):
        images = shards.decode(np.arange(start, min(start + size, count))).images
        yield cover.stretch(from_uint8(images, device))


def _means(network: CoverTransformer, shards: Faces, device: torch.device) -> None:
    total = torch.zeros_like(network.mean)
    for stretched in _batches(shards, device):
        total += F.avg_pool2d(cover.planes_of(stretched), 2).sum(dim=0)
    network.mean.copy_((total + total.flip(2)) / (2 * len(shards)))


def _crops(network: CoverTransformer, shards: Faces, device: torch.device) -> Crops:
    rows: list[list[Tensor]] = [[] for _ in range(6)]
    pose = Pose().to(device) if network.config.landmarks else None
    for stretched in _batches(shards, device):
        low = F.avg_pool2d(cover.planes_of(stretched), 2)
        centred = (low - network.mean).flatten(2)
        inner, ring = centred[..., network.inner], centred[..., network.ring]
        found = stretched.new_zeros(len(stretched), 10)
        if pose is not None:
            found = pose(cover.unstretch(stretched), torch.full((len(stretched), 3), 0.5))[1]
        values = (
            inner[:, 0], inner[:, 1:].flatten(1), ring[:, 0], ring[:, 1:].flatten(1),
            network.surroundings(low).half(), found,
        )  # fmt: skip
        for row, value in zip(rows, values, strict=True):
            row.append(value)
    return Crops(*(torch.cat(row) for row in rows))


def _eigenfaces(network: CoverTransformer, crops: Crops) -> None:
    """The principal axes of luma and of colour, mirrored faces too: leading ones, what tells landmarks, others."""
    config = network.config
    lead, read = config.leading_luma, config.landmarks
    flip = _mirror(network, network.inner)
    luma = _principal(crops.luma, flip, lead + read + config.luma)
    if read:
        luma = luma @ _turned_to(crops, luma, flip, lead, read)
        # The rest in the order of their strength again.
        first, rest = luma[:, : lead + read], luma[:, lead + read :]
        luma = torch.cat([first, rest @ _principal(crops.luma @ rest, None, rest.shape[1])], dim=1)
    both = torch.cat([flip, flip + len(flip)])
    colour = _principal(crops.colour, both, config.leading_colour + config.colour)
    network.luma.copy_(luma)
    network.colour.copy_(colour)
    network.forget()
    around = _mirror(network, network.ring)
    around_both = torch.cat([around, around + len(around)])
    network.luma_ring.copy_(_onwards(crops.luma, crops.luma_ring, luma, flip, around).T)
    network.colour_ring.copy_(_onwards(crops.colour, crops.colour_ring, colour, both, around_both).T)


def _mirror(network: CoverTransformer, blocks: Tensor) -> Tensor:
    """Where the mirror image of each block is among ``blocks`` (flat indices), int64."""
    half = network.mean.shape[-1]
    place = torch.full((half * half,), -1, dtype=torch.int64, device=blocks.device)
    place[blocks] = torch.arange(len(blocks), device=blocks.device)
    return place[blocks // half * half + (half - 1 - blocks % half)]


def _principal(data: Tensor, flip: Tensor | None, count: int) -> Tensor:
    """The ``count`` leading right singular vectors of ``data`` float ``[M, P]``, and of its mirror image."""
    square = data.T @ data
    if flip is not None:
        square = (square + square[flip][:, flip]) / 2
    _, vectors = torch.linalg.eigh(square.double())
    return vectors.flip(1)[:, :count].float().contiguous()


# A mirrored face has its left eye where the right one was.
_MIRRORED: Final = (1, 0, 2, 4, 3)


def _turned_to(crops: Crops, luma: Tensor, flip: Tensor, first: int, count: int) -> Tensor:
    """A rotation of coordinates that leaves the ``first`` alone and makes the next ``count`` those that tell landmarks.

    Reduced-rank ridge regression (Izenman 1975) of landmarks on coordinates, mirrored faces too.
    """
    x, y = crops.landmarks.double().split(5, dim=1)
    there = torch.cat([torch.cat([x, y], dim=1), torch.cat([1 - x[:, _MIRRORED], y[:, _MIRRORED]], dim=1)])
    given = torch.cat([crops.luma @ luma, crops.luma[:, flip] @ luma]).double()
    target = there - there.mean(dim=0)
    ridge = _RIDGE * given.square().mean() * torch.eye(given.shape[1], dtype=given.dtype, device=given.device)
    weights = torch.linalg.solve(given.T @ given / len(given) + ridge, given.T @ target / len(given))
    weights[:first] = 0
    _, _, told = torch.linalg.svd(given @ weights, full_matrices=False)
    kept = torch.eye(len(weights), dtype=given.dtype, device=given.device)[:, :first]
    out = torch.linalg.qr(torch.cat([kept, weights @ told[:count].T], dim=1), mode="complete")[0]
    out[:, :first] = kept
    return out.float()


def _onwards(inner: Tensor, ring: Tensor, basis: Tensor, flip: Tensor, around: Tensor) -> Tensor:
    """How eigenfaces go on outside: ridge regression of the ring on coordinates, float ``[columns, ring]``."""
    given = torch.cat([inner @ basis, inner[:, flip] @ basis]).double()
    target = torch.cat([ring, ring[:, around]]).double()
    ridge = _RIDGE * given.square().mean() * torch.eye(given.shape[1], dtype=given.dtype, device=given.device)
    return torch.linalg.solve(given.T @ given / len(given) + ridge, given.T @ target / len(given)).float()


def _targets(network: CoverTransformer, crops: Crops, mirrored: bool = False) -> tuple[Tensor, Tensor]:
    """Leading coordinates as the network has them, and the others, luma and colour."""
    y, c = crops.luma, crops.colour
    if mirrored:
        flip = _mirror(network, network.inner)
        y, c = y[:, flip], c[:, torch.cat([flip, flip + len(flip)])]
    y, c = y @ network.luma, c @ network.colour
    a, b = network._leads()
    return torch.cat([y[:, :a], c[:, :b]], dim=1), torch.cat([y[:, a:], c[:, b:]], dim=1)


def _predict(network: CoverTransformer, crops: Crops, leading: Tensor) -> Tensor:
    lead = leading / network.leading_scale
    rows = range(0, len(lead), 256)
    return torch.cat([network.context(crops.around[i : i + 256].float(), lead[i : i + 256]) for i in rows])


def _regress(network: CoverTransformer, crops: Crops, held_out: Crops, steps: int, batch: int) -> None:
    """Least squares of the coordinates on the context, in deviations; half of the faces mirrored."""
    context = network.context.requires_grad_(True)
    with torch.no_grad():
        straight, mirrored = _targets(network, crops), _targets(network, crops, mirrored=True)
        val_leading, val_target = _targets(network, held_out)
    optimizer = torch.optim.AdamW(context.parameters(), lr=2e-3, weight_decay=0.05)
    began = time.monotonic()
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, step / 100) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        chosen = torch.randint(len(straight[0]), (batch,)).to(network.mean.device)
        flip = (torch.rand(batch, 1) < 0.5).to(network.mean.device)
        around = crops.around[chosen].float()
        around = torch.where(flip[:, :, None, None], around.flip(3), around)
        lead, wanted = (torch.where(flip, m[chosen], s[chosen]) for s, m in zip(straight, mirrored, strict=True))
        loss = F.mse_loss(context(around, lead / network.leading_scale), wanted / network.deviation)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if step % 100 == 0 or step == steps:
            context.eval()
            with torch.no_grad():
                error = F.mse_loss(_predict(network, held_out, val_leading), val_target / network.deviation).item()
            context.train()
            left = (time.monotonic() - began) / step * (steps - step)
            logger.info(
                "context %d/%d, %.0f s left: training %.3f, validation %.3f", step, steps, left, loss.item(), error
            )
    context.requires_grad_(network.config.painter is None)


def _leftovers(network: CoverTransformer, shards: Faces, device: torch.device) -> None:
    """How strong is what the eigenfaces leave of luma, of colour, and of the details of luma."""
    network.rest_deviation.fill_(1.0)
    n, sums, count = len(network.inner), torch.zeros(3, device=device), 0
    for stretched in _batches(shards, device, limit=2048):
        fine = network.secrets(stretched, network.observe(stretched))[1] * network.scales()[1]
        parts = fine.split_with_sizes([n, 2 * n, 3 * n], dim=1)
        sums += torch.stack([part.square().mean(dim=1).sum() for part in parts])
        count += len(fine)
    network.rest_deviation.copy_((sums / count).sqrt())
