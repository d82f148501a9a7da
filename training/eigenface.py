"""``python -m training.eigenface --config C --out models/NAME``: fit the eigenface transformer, shards to model folder.

No loss of the paper is in it: eigenfaces are a decomposition, the context is a regression, and what the regression
leaves over is whitened (see :mod:`mien.networks.eigenface`). Where a recogniser is given, likenesses are chosen and
moved until it tells them apart (:mod:`training.likenesses`); all others may judge the model. ``python -m training``
goes on from it with the paper's objective where ``start`` names the folder.
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mien import recognisers, store
from mien.errors import MienError
from mien.networks import eigenface
from mien.networks.eigenface import EigenfaceConfig, EigenfaceTransformer, Side
from training import config as run_config
from training import likenesses
from training.data import FaceShards
from training.export import git_commit
from training.pose import Pose
from training.samples import from_uint8

logger = logging.getLogger(__name__)

# Eigenfaces of luma, symmetric and antisymmetric, that the axes of the face are found among.
EIGENFACES: Final = (640, 450)

# Steps in which likenesses are moved apart.
APART: Final = 240

# Of the regression of landmarks, against the mean square of a coordinate.
_RIDGE: Final = 0.02

# What likenesses are drawn out by: the strongest that do not look painted.
_STRENGTH: Final = 1.3

# Coordinates of more than the deviation of the so-manieth get all the room they ask for; others by the square root.
_FULL_SHARE: Final = 200


@dataclass(frozen=True)
class Faces:
    """What a fit needs of the crops of a split.

    Attributes:
        luma, colour: symmetric and antisymmetric halves, less the mean, float ``[M, P]`` and ``[M, Q]``.
        around: context pictures, half precision ``[M, 4, 64, 64]``.
        landmarks: symmetric and antisymmetric part of where they are, float ``[M, 10]``.
    """

    luma: tuple[Tensor, Tensor]
    colour: tuple[Tensor, Tensor]
    around: Tensor
    landmarks: tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Basis:
    """Eigenfaces of one side, as columns: the leading ones first."""

    luma: Tensor
    colour: Tensor


def fit(
    network: EigenfaceTransformer, train: FaceShards, val: FaceShards, *, steps: int, batch: int, seed: int,
    device: torch.device, eigenfaces: tuple[int, int] = EIGENFACES, recogniser: nn.Module | None = None,
    apart: int = APART,
) -> dict[str, float]:  # fmt: skip
    """Fit every part of ``network`` in place.

    Args:
        network: fresh; left on ``device`` in evaluation mode.
        train: what is fitted.
        val: what the returned figures are measured on.
        steps: of the context's regression.
        batch: faces a step.
        seed: of the regression and the choice of likenesses; same seed, data and machine give the same network.
        eigenfaces: of luma, symmetric and antisymmetric, that the face's axes are found among.
        recogniser: what shall tell likenesses apart (:func:`training.likenesses.settle`); on ``device``.
        apart: steps of moving them apart.

    Returns:
        ``explained``: the share of the coordinates' variance that the context predicts; ``energy``: mean square of z
        (what of it the grain has room for); ``grain``: mean square of g, both of validation faces.
    """
    torch.manual_seed(seed)
    config = network.config
    network.to(device).train()
    with torch.no_grad():
        _means(network, train, device)
        faces = _faces(train, network, device)
        bases = [_eigenfaces(network, faces, side, eigenfaces[side]) for side in range(2)]
        leading, target = _coordinates(network, faces, bases, device)
        network.leading_scale.copy_(leading.std(dim=0))
        scale = target.std(dim=0)
        logger.info("eigenfaces of luma: %d + %d", *eigenfaces)
        held_out = _faces(val, network, device)
        held_leading, held_target = _coordinates(network, held_out, bases, device)
    regression = _Regression(network, target.shape[1], bases, device)
    regression.fit((faces, leading, target / scale), (held_out, held_leading, held_target / scale), steps, batch)
    network.eval()
    regression.context.eval()
    with torch.no_grad():
        rest = target - regression.predict(faces.around, leading) * scale
        axes = _whiten(network, bases, rest)
        network.context.load_state_dict(regression.turned(axes, scale))
        for side, colour in zip(network._sides(), faces.colour, strict=True):
            _settle_grain(side, colour, config.grain_deviation)
        z = _latent(network, faces, device)[0]
        likenesses.settle(
            network, train, z, leading / network.leading_scale, strength=_STRENGTH, seed=seed, recogniser=recogniser,
            steps=apart,
        )  # fmt: skip
        z_val, g_val, mean, face = _latent(network, held_out, device)
        centred = face - face.mean(dim=0)
        return {
            "explained": 1 - ((face - mean).square().sum() / centred.square().sum()).item(),
            "energy": z_val.square().mean().item(),
            "grain": g_val.square().mean().item(),
        }


def _batches(shards: FaceShards, device: torch.device, size: int = 256) -> Iterator[Tensor]:
    """The stretched crops of a split, float ``[B, 3, S, S]``."""
    for start in range(0, len(shards), size):
        images = shards.decode(np.arange(start, min(start + size, len(shards)))).images
        yield eigenface.stretch(from_uint8(images, device))


def _means(network: EigenfaceTransformer, shards: FaceShards, device: torch.device) -> None:
    total = torch.zeros_like(network.mean)
    for stretched in _batches(shards, device):
        total += F.avg_pool2d(eigenface.planes_of(stretched), 2).sum(dim=0)
    network.mean.copy_((total + total.flip(2)) / (2 * len(shards)))


def _faces(shards: FaceShards, network: EigenfaceTransformer, device: torch.device) -> Faces:
    luma: tuple[list[Tensor], list[Tensor]] = ([], [])
    colour: tuple[list[Tensor], list[Tensor]] = ([], [])
    around = []
    found: tuple[list[Tensor], list[Tensor]] = ([], [])
    pose = Pose().to(device) if any(network.config.landmarks) else None
    for stretched in _batches(shards, device):
        low = F.avg_pool2d(eigenface.planes_of(stretched), 2) - network.mean
        for side, (y, c) in enumerate(network._halves(low)):
            luma[side].append(y.cpu())
            colour[side].append(c.cpu())
        around.append(network.surroundings(stretched).half().cpu())
        for side, part in enumerate(_landmarks(pose, stretched)):
            found[side].append(part.cpu())
    two = [(torch.cat(rows[0]), torch.cat(rows[1])) for rows in (luma, colour, found)]
    return Faces(two[0], two[1], torch.cat(around), two[2])


# A mirrored face has its left eye where the right one was.
_MIRRORED: Final = (1, 0, 2, 4, 3)


def _landmarks(pose: Pose | None, stretched: Tensor) -> tuple[Tensor, Tensor]:
    """The symmetric and the antisymmetric part of landmarks in sides of MTCNN's box, float ``[B, 10]`` each."""
    if pose is None:
        return stretched.new_zeros(len(stretched), 10), stretched.new_zeros(len(stretched), 10)
    images = eigenface.unstretch(stretched)
    x, y = pose(images, torch.full((len(images), 3), 0.5))[1].split(5, dim=1)
    there, mirrored = torch.cat([x, y], dim=1), torch.cat([1 - x[:, _MIRRORED], y[:, _MIRRORED]], dim=1)
    return (there + mirrored) / 2, (there - mirrored) / 2


def _eigenfaces(network: EigenfaceTransformer, faces: Faces, side: int, count: int) -> Basis:
    """The principal axes of luma and of colour, of pictures that fade out at the face's outline."""
    config = network.config
    mask = eigenface.coarse_mask(2 * network.mean.shape[-1])
    faded = mask[:, : mask.shape[1] // 2].reshape(-1)[network.pixels.cpu()]
    colours = config.leading_colour[side] + config.colour[side]
    luma = _principal(faces.luma[side] * faded, config.leading[side] + count)
    read = config.landmarks[side]
    if read:
        first = config.leading_luma[side]
        luma = luma @ _turned_to(faces.luma[side] @ luma, faces.landmarks[side], first, read)
    return Basis(luma, _principal(faces.colour[side] * faded.repeat(2), colours))


def _turned_to(coordinates: Tensor, landmarks: Tensor, first: int, count: int) -> Tensor:
    """A rotation of coordinates that leaves the ``first`` alone and makes the next ``count`` those that tell landmarks.

    Reduced-rank ridge regression (Izenman 1975) of landmarks float ``[M, L]`` on coordinates float ``[M, K]``.
    """
    target = (landmarks - landmarks.mean(dim=0)).double()
    given = coordinates.double()
    ridge = _RIDGE * given.square().mean() * torch.eye(given.shape[1], dtype=torch.float64)
    weights = torch.linalg.solve(given.T @ given / len(given) + ridge, given.T @ target / len(given))
    weights[:first] = 0
    _, _, told = torch.linalg.svd(given @ weights, full_matrices=False)
    kept = torch.eye(len(weights), dtype=torch.float64)[:, :first]
    out = torch.linalg.qr(torch.cat([kept, weights @ told[:count].T], dim=1), mode="complete")[0]
    out[:, :first] = kept
    return out.float()


def _principal(data: Tensor, count: int) -> Tensor:
    """The ``count`` leading right singular vectors of ``data`` float ``[M, P]``, as columns."""
    _, vectors = torch.linalg.eigh((data.T @ data).double())
    return vectors.flip(1)[:, :count].float().contiguous()


def _coordinates(
    network: EigenfaceTransformer, faces: Faces, bases: Sequence[Basis], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Leading coordinates as the network has them, and the others: luma and colour of one side, then of the other."""
    config = network.config
    leading, rest = [], []
    for side, basis in enumerate(bases):
        luma, colour = faces.luma[side] @ basis.luma, faces.colour[side] @ basis.colour
        a, b = config.leading[side], config.leading_colour[side]
        leading += [luma[:, :a], colour[:, :b]]
        rest += [luma[:, a:], colour[:, b:]]
    return torch.cat(leading, dim=1).to(device), torch.cat(rest, dim=1).to(device)


class _Regression:
    """The context, predicting coordinates over their deviation before the face's axes are known."""

    def __init__(self, network: EigenfaceTransformer, out: int, bases: Sequence[Basis], device: torch.device) -> None:
        self.network, self.device = network, device
        self.context = eigenface.Context(network.config)
        self.context.out = torch.nn.Linear(self.context.out.in_features, out)
        self.context.direct = torch.nn.Linear(self.context.direct.in_features, out)
        self.context.to(device)
        config = network.config
        # A mirrored face has the same symmetric coordinates and the opposite antisymmetric ones.
        leading = [a + b for a, b in zip(config.leading, config.leading_colour, strict=True)]
        rest = [b.luma.shape[1] + b.colour.shape[1] - n for b, n in zip(bases, leading, strict=True)]
        self.mirror = [torch.cat([torch.ones(a), -torch.ones(b)]).to(device) for a, b in (leading, rest)]

    def predict(self, around: Tensor, leading: Tensor) -> Tensor:
        parts = [
            self.context(around[i : i + 256].to(self.device).float(), leading[i : i + 256] / self.network.leading_scale)
            for i in range(0, len(around), 256)
        ]
        return torch.cat(parts)

    def fit(
        self, train: tuple[Faces, Tensor, Tensor], val: tuple[Faces, Tensor, Tensor], steps: int, batch: int
    ) -> None:
        """Least squares of the coordinates on the context."""
        (faces, leading, target), context = train, self.context
        optimizer = torch.optim.AdamW(context.parameters(), lr=2e-3, weight_decay=0.05)
        began = time.monotonic()
        for step in range(1, steps + 1):
            for group in optimizer.param_groups:
                group["lr"] = 2e-3 * min(1.0, step / 100) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
            chosen = torch.randint(len(target), (batch,))
            around, here = faces.around[chosen].to(self.device).float(), chosen.to(self.device)
            lead, wanted = leading[here] / self.network.leading_scale, target[here]
            flip = (torch.rand(batch, 1) < 0.5).to(self.device)
            around = torch.where(flip[:, :, None, None], around.flip(3), around)
            lead, wanted = (torch.where(flip, x * sign, x) for x, sign in zip((lead, wanted), self.mirror, strict=True))
            loss = F.mse_loss(context(around, lead), wanted)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            if step % 100 == 0 or step == steps:
                context.eval()
                with torch.no_grad():
                    error = F.mse_loss(self.predict(val[0].around, val[1]), val[2]).item()
                context.train()
                left = (time.monotonic() - began) / step * (steps - step)
                logger.info(
                    "context %d/%d, %.0f s left: training %.3f, validation %.3f", step, steps, left, loss.item(), error
                )

    def turned(self, axes: Tensor, scale: Tensor) -> dict[str, Tensor]:
        """The state of a context that predicts coordinates along ``axes`` float ``[coordinates, K]``."""
        state = dict(self.context.state_dict())
        for layer in ("out", "direct"):
            state[f"{layer}.weight"] = axes.T @ (scale[:, None] * state[f"{layer}.weight"])
            state[f"{layer}.bias"] = axes.T @ (scale * state[f"{layer}.bias"])
        return state


def _whiten(network: EigenfaceTransformer, bases: Sequence[Basis], rest: Tensor) -> Tensor:
    """Give the network, side by side, the principal axes of what the context leaves over.

    Returns:
        The axes in coordinates, colour weighted: what takes ``rest`` to the network's coordinates of the face.
    """
    config, device = network.config, rest.device
    blocks, deviations, start = [], [], 0
    for number, (side, basis) in enumerate(zip(network._sides(), bases, strict=True)):
        lead, lead_colour = config.leading[number], config.leading_colour[number]
        luma = basis.luma.shape[1] - lead
        count = luma + basis.colour.shape[1] - lead_colour
        weight = torch.ones(count, device=device)
        weight[luma:] = config.colour_weight
        part = rest[:, start : start + count] * weight
        start += count
        values, vectors = torch.linalg.eigh((part.T @ part / len(part)).double())
        axes = vectors.flip(1)[:, : config.turned[number]].float()
        deviations.append(values.flip(0)[: config.turned[number]].clamp_min(1e-8).sqrt().float())
        side.leading.copy_(basis.luma[:, :lead])
        side.luma.copy_(basis.luma[:, lead:].to(device) @ axes[:luma])
        side.colour.copy_(basis.colour)
        side.axes.copy_(axes[luma:])
        blocks.append(weight[:, None] * axes)
    network.deviation.copy_(torch.cat(deviations))
    total = len(network.deviation)
    reference = network.deviation.topk(min(_FULL_SHARE, total)).values[-1]
    network.share.copy_((network.deviation / reference).sqrt().clamp(0.1, 1))
    return torch.block_diag(*blocks)


def _settle_grain(side: Side, colour: Tensor, deviation: float) -> None:
    """Choose the quietest coordinates of what the eigenfaces of colour do not span."""
    side.order.copy_(_pivots(side.colour.cpu()))
    complement = side.complete().float()
    # Tails count as far as they come through.
    natural = torch.asinh(colour[:: max(1, len(colour) // 2500)] @ complement / deviation).square().mean(dim=0)
    side.quiet.copy_(natural.argsort()[: len(side.quiet)].sort().values)
    side.forget()


def _pivots(basis: Tensor) -> Tensor:
    """An order of the rows of ``basis`` whose first ones are far from dependent (Gram-Schmidt with pivots), int64."""
    rows = basis.double().clone()
    chosen = []
    for _ in range(basis.shape[1]):
        norms = rows.square().sum(dim=1)
        norms[chosen] = -1
        best = int(norms.argmax())
        chosen.append(best)
        direction = rows[best] / rows[best].norm()
        rows -= (rows @ direction)[:, None] * direction
    others = torch.ones(len(basis), dtype=torch.bool)
    others[chosen] = False
    return torch.cat([torch.tensor(chosen), others.nonzero()[:, 0]])


def _latent(network: EigenfaceTransformer, faces: Faces, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """z and g of eigenfaces and grain (details aside), and the predicted and the real coordinates, on the CPU."""
    out: list[list[Tensor]] = [[], [], [], []]
    for start in range(0, len(faces.around), 512):
        part = slice(start, start + 512)
        sides = [
            side.analyse(faces.luma[i][part].to(device), faces.colour[i][part].to(device))
            for i, side in enumerate(network._sides())
        ]
        leading, face, grain = (torch.cat(parts, dim=1) for parts in zip(*sides, strict=True))
        mean = network.context(faces.around[part].to(device).float(), leading / network.leading_scale)
        none = face.new_empty(len(face), 0)
        z, g = network.unfold(eigenface.Parts(leading, face, grain, none, none), mean)
        for rows, values in zip(out, (z, g, mean, face), strict=True):
            rows.append(values.cpu())
    z, g, mean, face = (torch.cat(rows) for rows in out)
    in_order = torch.empty_like(z)
    in_order[:, network.order.cpu()] = z
    return in_order, g, mean, face


@dataclass(frozen=True)
class _Asked:
    """What the command line and the run config ask for."""

    architecture: EigenfaceConfig
    bits: int
    shards: str
    recogniser: str
    weights: str | None

    @staticmethod
    def of(arguments: argparse.Namespace) -> _Asked:
        """ValueError where they do not say enough."""
        architecture, bits, shards, recogniser, weights = EigenfaceConfig(), 64, None, "mobilefacenet-casia", None
        if arguments.config:
            run = run_config.load(arguments.config)
            if not isinstance(run.architecture, EigenfaceConfig):
                raise ValueError(f"{arguments.config} is a run of {run.architecture.name}, which nothing is fitted for")
            architecture, bits, shards = run.architecture, run.bits, run.data.shards
            recogniser, weights = run.recogniser.name, run.recogniser.weights
        shards = arguments.shards or shards
        if shards is None:
            raise ValueError("give --shards, or a --config that names them")
        return _Asked(
            architecture,
            arguments.bits or bits,
            shards,
            arguments.recogniser or recogniser,
            arguments.weights or weights,
        )


def main() -> int:
    """Exit codes: 0 a model folder is there, 1 the data is wrong."""
    parser = argparse.ArgumentParser(prog="training.eigenface", description=__doc__)
    parser.add_argument("--config", help="run config that gives architecture, bits and shards, for `start` of that run")
    parser.add_argument("--shards", help="folder with manifest.json and its shards; the config's by default")
    parser.add_argument("--out", required=True, type=Path, help="model folder that is written")
    parser.add_argument("--bits", type=int, help="N, the length of a code; a multiple of 4; the config's, or 64")
    parser.add_argument("--recogniser", help="what tells likenesses apart; the config's, or mobilefacenet-casia")
    parser.add_argument("--weights", help="its weights; the config's; without any, likenesses are left as they fall")
    parser.add_argument("--steps", type=int, default=500, help="of the context's regression")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--limit", type=int, help="use only the first so many training samples (dry runs)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="CPU threads; torch's choice by default")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--card", type=Path, help="model card to write beside it; figures of the fit by default")
    parser.add_argument("--dry-run", action="store_true", help="say what would be fitted, and stop")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    try:
        asked = _Asked.of(arguments)
    except ValueError as error:
        sys.stderr.write(f"training.eigenface: {error}\n")
        return 1
    if arguments.dry_run:
        sys.stdout.write(f"would fit {asked.architecture!r} to {asked.shards}, writing {arguments.out}\n")
        return 0
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    try:
        train = FaceShards(asked.shards, "train", limit=arguments.limit)
        val = FaceShards(asked.shards, "val")
        recogniser = recognisers.load(asked.recogniser, asked.weights) if asked.weights else None
    except MienError as error:
        sys.stderr.write(f"training.eigenface: {error}\n")
        return 1
    device = torch.device(arguments.device)
    network = EigenfaceTransformer(asked.architecture, bits=asked.bits, size=train.crop_size)
    figures = fit(
        network, train, val, steps=arguments.steps, batch=arguments.batch, seed=arguments.seed, device=device,
        recogniser=recogniser.to(device).eval() if recogniser else None,
    )  # fmt: skip
    model = store.ModelConfig(
        architecture=asked.architecture,
        bits=asked.bits,
        crop_size=train.crop_size,
        training_commit=git_commit(),
        data_digest=train.digest,
        images_seen=arguments.steps * arguments.batch,
    )
    rows = "".join(f"- {name}: {value:.4f}\n" for name, value in figures.items())
    sys.stdout.write(rows)
    card = (
        f"# {arguments.out.name}\n\nAn eigenface transformer fitted by `training.eigenface` to {len(train):,} crops"
        f" (manifest {train.digest}); the data's terms bind it.\n\n{rows}"
    )
    store.save(arguments.out, network, model, card=arguments.card.read_text() if arguments.card else card)
    sys.stdout.write(f"{arguments.out}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
