"""``python -m training.eigenface --shards S --out models/NAME``: fit the eigenface transformer, shards to model folder.

No loss of the paper is in it: eigenfaces are a decomposition, the context is a regression, and what the regression
leaves over is whitened (see :mod:`mien.networks.eigenface`). So there is no recogniser that the model could have
learned to deceive, and every recogniser may judge it. ``python -m training`` goes on from it with the paper's objective
where ``start`` names the folder.
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
from torch import Tensor

from mien import store
from mien.errors import MienError
from mien.networks import eigenface
from mien.networks.eigenface import EigenfaceConfig, EigenfaceTransformer, Side
from training import config as run_config
from training.data import FaceShards
from training.export import git_commit
from training.samples import from_uint8

logger = logging.getLogger(__name__)

# Eigenfaces of luma, symmetric and antisymmetric, that the axes of the face are found among.
EIGENFACES: Final = (640, 450)

# A likeness is the mean of two faces, the second one of so many that are nearest to the first: a blend of what is alike
# has no double edges. It is drawn out by so much, as a mean is plainer than a face and alike to other means.
_NEAREST: Final = 6
_STRENGTH: Final = 1.55
# Donors are seen and lit from the front (the share of training faces whose leading coordinates are smallest) and no
# outliers (glasses, hands, paint), of at most so many times the median energy.
_FRONTAL: Final = 0.35
_PLAIN: Final = 1.1

# Coordinates of more than the deviation of the so-manieth get all the room they ask for; others by the square root.
_FULL_SHARE: Final = 200


@dataclass(frozen=True)
class Faces:
    """What a fit needs of the crops of a split.

    Attributes:
        luma, colour: symmetric and antisymmetric halves, less the mean, float ``[M, P]`` and ``[M, Q]``.
        around: context pictures, half precision ``[M, 4, 64, 64]``.
    """

    luma: tuple[Tensor, Tensor]
    colour: tuple[Tensor, Tensor]
    around: Tensor


@dataclass(frozen=True)
class Basis:
    """Eigenfaces of one side, as columns: the leading ones first."""

    luma: Tensor
    colour: Tensor


def fit(
    network: EigenfaceTransformer, train: FaceShards, val: FaceShards, *, steps: int, batch: int, seed: int,
    device: torch.device, eigenfaces: tuple[int, int] = EIGENFACES,
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
        _settle_likenesses(network, z, leading / network.leading_scale, seed)
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
    luma, colour = torch.zeros_like(network.mean), torch.zeros_like(network.mean_colour)
    for stretched in _batches(shards, device):
        luma += eigenface.luma_of(stretched).sum(dim=0)
        colour += eigenface.colour_of(stretched).sum(dim=0)
    network.mean.copy_((luma + luma.flip(2)) / (2 * len(shards)))
    network.mean_colour.copy_((colour + colour.flip(2)) / (2 * len(shards)))


def _faces(shards: FaceShards, network: EigenfaceTransformer, device: torch.device) -> Faces:
    luma: tuple[list[Tensor], list[Tensor]] = ([], [])
    colour: tuple[list[Tensor], list[Tensor]] = ([], [])
    around = []
    for stretched in _batches(shards, device):
        parts = eigenface.halves(eigenface.luma_of(stretched) - network.mean, network.pixels)
        colours = eigenface.halves(eigenface.colour_of(stretched) - network.mean_colour, network.colour_pixels)
        for side in range(2):
            luma[side].append(parts[side].cpu())
            colour[side].append(colours[side].cpu())
        around.append(network.surroundings(stretched).half().cpu())
    return Faces(
        (torch.cat(luma[0]), torch.cat(luma[1])), (torch.cat(colour[0]), torch.cat(colour[1])), torch.cat(around)
    )


def _eigenfaces(network: EigenfaceTransformer, faces: Faces, side: int, count: int) -> Basis:
    """The principal axes of luma and of colour, of pictures that fade out at the face's outline."""
    config, size = network.config, network.mean.shape[-1]
    masks = []
    for mask, pixels in (
        (eigenface.face_mask(size), network.pixels),
        (eigenface.colour_mask(size), network.colour_pixels),
    ):
        masks.append(mask[:, : mask.shape[1] // 2].reshape(-1)[pixels.cpu()])
    colours = config.leading_colour[side] + config.colour[side]
    return Basis(
        _principal(faces.luma[side] * masks[0], config.leading_luma[side] + count),
        _principal(faces.colour[side] * masks[1].repeat(2), colours),
    )


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
        a, b = config.leading_luma[side], config.leading_colour[side]
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
        leading = [a + b for a, b in zip(config.leading_luma, config.leading_colour, strict=True)]
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
        lead, lead_colour = config.leading_luma[number], config.leading_colour[number]
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
    """z, g, and the predicted and the real coordinates of every face, on the CPU."""
    out: list[list[Tensor]] = [[], [], [], []]
    for start in range(0, len(faces.around), 512):
        part = slice(start, start + 512)
        sides = [
            side.analyse(faces.luma[i][part].to(device), faces.colour[i][part].to(device))
            for i, side in enumerate(network._sides())
        ]
        leading, face, grain = (torch.cat(parts, dim=1) for parts in zip(*sides, strict=True))
        mean = network.context(faces.around[part].to(device).float(), leading / network.leading_scale)
        z, g = network.unfold(face - mean, grain)
        for rows, values in zip(out, (z, g, mean, face), strict=True):
            rows.append(values.cpu())
    z, g, mean, face = (torch.cat(rows) for rows in out)
    return z, g, mean, face


def _settle_likenesses(network: EigenfaceTransformer, z: Tensor, leading: Tensor, seed: int) -> None:
    """Blends of two faces that are alike, out of those seen from the front and without anything unusual."""
    leading = leading.cpu().square().mean(dim=1)
    energy = (z / network.share.cpu()).square().mean(dim=1)
    plain = (energy < _PLAIN * energy.median()) & (leading <= leading.quantile(_FRONTAL))
    donors = z[plain] if int(plain.sum()) > _NEAREST else z
    generator = torch.Generator().manual_seed(seed)
    faces = network.likenesses.faces
    one = torch.randint(len(donors), (len(faces),), generator=generator)
    # As far apart as their pictures are.
    pictures = donors * (network.deviation / network.share).cpu()
    apart = torch.cdist(pictures[one], pictures)
    apart[torch.arange(len(one)), one] = math.inf
    near = apart.topk(min(_NEAREST, len(donors) - 1), largest=False).indices
    two = near[torch.arange(len(one)), torch.randint(near.shape[1], (len(one),), generator=generator)]
    faces.copy_(_STRENGTH * (donors[one] + donors[two]) / 2)
    logger.info("likenesses: %d, blends of two of %d faces", len(faces), len(donors))


def _asked(arguments: argparse.Namespace) -> tuple[EigenfaceConfig, int, str]:
    """Options, N and the shards that the command line and the run config ask for; ValueError where they do not."""
    config, bits, shards = EigenfaceConfig(), 64, None
    if arguments.config:
        run = run_config.load(arguments.config)
        if not isinstance(run.architecture, EigenfaceConfig):
            raise ValueError(f"{arguments.config} is a run of {run.architecture.name}, which nothing is fitted for")
        config, bits, shards = run.architecture, run.bits, run.data.shards
    shards = arguments.shards or shards
    if shards is None:
        raise ValueError("give --shards, or a --config that names them")
    return config, arguments.bits or bits, shards


def main() -> int:
    """Exit codes: 0 a model folder is there, 1 the data is wrong."""
    parser = argparse.ArgumentParser(prog="training.eigenface", description=__doc__)
    parser.add_argument("--config", help="run config that gives architecture, bits and shards, for `start` of that run")
    parser.add_argument("--shards", help="folder with manifest.json and its shards; the config's by default")
    parser.add_argument("--out", required=True, type=Path, help="model folder that is written")
    parser.add_argument("--bits", type=int, help="N, the length of a code; a multiple of 4; the config's, or 64")
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
        config, bits, shards = _asked(arguments)
    except ValueError as error:
        sys.stderr.write(f"training.eigenface: {error}\n")
        return 1
    if arguments.dry_run:
        sys.stdout.write(f"would fit {config!r} to {shards}, writing {arguments.out}\n")
        return 0
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    try:
        train = FaceShards(shards, "train", limit=arguments.limit)
        val = FaceShards(shards, "val")
    except MienError as error:
        sys.stderr.write(f"training.eigenface: {error}\n")
        return 1
    network = EigenfaceTransformer(config, bits=bits, size=train.crop_size)
    figures = fit(
        network, train, val, steps=arguments.steps, batch=arguments.batch, seed=arguments.seed,
        device=torch.device(arguments.device),
    )  # fmt: skip
    model = store.ModelConfig(
        architecture=config,
        bits=bits,
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
