"""Attacks on a network that turns latents by keyed rotations (eigenface), by who knows that it does.

There T_p = U^{-1} R_p U, U is public, and R_p is linear: an orthogonal matrix in each band of coordinates. Pairs
(U I, U A) of one password give R_p by least squares (orthogonal Procrustes, Schoenemann 1966), however long the code
is; one pair gives the code itself where 2^N is small enough to try; and every band is as long in A as it is in I.
"""

from __future__ import annotations

import copy
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from services.evaluate.attackers import Advance
from services.evaluate.chain import Codes
from services.evaluate.distances import Floats, Pixels, to_pixels, to_tensor

_CHUNK: Final = 4096


class _Tap(nn.Module):
    """Stands where a rotation stood: turns nothing and keeps what it was to turn."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor, codes: Tensor) -> Tensor:
        self.seen.append(x.double().cpu())
        return x

    def inverse(self, x: Tensor, codes: Tensor) -> Tensor:
        return x


class _Solved(nn.Module):
    """Stands where a keyed rotation stood: turns back by the matrix that was solved for."""

    matrix: Tensor

    def __init__(self, matrix: Floats) -> None:
        super().__init__()
        self.register_buffer("matrix", torch.from_numpy(matrix).float())

    def forward(self, x: Tensor, codes: Tensor) -> Tensor:
        return x @ self.matrix

    def inverse(self, x: Tensor, codes: Tensor) -> Tensor:
        return x


def turns_latents(network: object) -> bool:
    """Whether ``network`` is of this kind."""
    return isinstance(network, nn.Module) and isinstance(getattr(network, "turns", None), nn.ModuleList)


def _replaced(network: nn.Module, turns: list[nn.Module]) -> nn.Module:
    out = copy.deepcopy(network).cpu()
    out.turns = nn.ModuleList(turns)
    return out.eval()


def _bits(network: nn.Module) -> int:
    return int(network.turns[0].angles.shape[-1])  # type: ignore[index, union-attr]


@torch.no_grad()
def latents(network: nn.Module, pictures: Pixels, advance: Advance = lambda done: None) -> list[Floats]:
    """What is turned, of uint8 ``[M, S, S, 3]``: float ``[M, K]``, symmetric and antisymmetric coordinates apart."""
    taps = [_Tap() for _ in network.turns]  # type: ignore[union-attr]
    tapped = _replaced(network, list(taps))
    for start in range(0, len(pictures), 64):
        images = to_tensor(pictures[start : start + 64])
        tapped(images, images.new_zeros(len(images), _bits(network)))
        advance(len(images))
    return [torch.cat(tap.seen).numpy() for tap in taps]


def bands(network: nn.Module) -> list[list[tuple[int, int]]]:
    """Ranges of the coordinates turned among themselves, for each of what :func:`latents` gives."""
    return [network.config.bands(side) for side in range(len(network.turns))]  # type: ignore[operator, arg-type, union-attr]


def solve(network: nn.Module, originals: Pixels, hidden: Pixels) -> nn.Module:
    """From pairs of one password, a network that opens other pictures of it: called with any code, A -> I.

    Fewer pairs than a band has coordinates tell only what happens in their span; what lies outside it comes back as the
    mean face.
    """
    matrices = []
    for before, after, ranges in zip(
        latents(network, originals), latents(network, hidden), bands(network), strict=True
    ):
        matrix = np.eye(before.shape[1])
        for start, stop in ranges:
            left, _, right = np.linalg.svd(after[:, start:stop].T @ before[:, start:stop])
            rank = min(len(before), stop - start)
            matrix[start:stop, start:stop] = left[:, :rank] @ right[:rank]
        matrices.append(matrix)
    return _replaced(network, [_Solved(m) for m in matrices])


@torch.no_grad()
def reopen(opened: nn.Module, pictures: Pixels, bits: int) -> Pixels:
    """What :func:`solve`'s network makes of anonymized pictures uint8 ``[M, S, S, 3]``."""
    parts = []
    for start in range(0, len(pictures), 64):
        images = to_tensor(pictures[start : start + 64])
        parts.append(to_pixels(opened(images, images.new_zeros(len(images), bits))))
    return np.concatenate(parts)


@torch.no_grad()
def search(network: nn.Module, original: Pixels, hidden: Pixels, codes: Codes) -> int:
    """Which of ``codes`` turned one face ``[S, S, 3]`` into the other; never makes a picture, so it is quick."""
    before, after = latents(network, original[None]), latents(network, hidden[None])
    # One side is enough to tell the code; the smaller is quicker.
    side = int(np.argmin([b.shape[1] for b in before]))
    turn: nn.Module = copy.deepcopy(network.turns[side]).cpu()  # type: ignore[index, union-attr]
    z, wanted = (torch.from_numpy(x[side]).float() for x in (before, after))
    found = []
    for start in range(0, len(codes), _CHUNK):
        p = torch.from_numpy(codes[start : start + _CHUNK]).float() - 0.5
        turned = turn.inverse(turn(z.expand(len(p), -1), p), -p)  # type: ignore[operator]
        found.append((turned - wanted).square().sum(dim=1))
    return int(torch.cat(found).argmin())


class Prior:
    """A Gaussian over the latents of other faces, float ``[M, K]``, its covariance shrunk towards the diagonal."""

    def __init__(self, others: Floats, shrink: float = 0.3) -> None:
        self.mean = others.mean(axis=0)
        covariance = np.cov(others, rowvar=False)
        shrunk = (1 - shrink) * covariance + shrink * np.diag(np.diag(covariance))
        # Each row of the whitened latents has a squared length that falls with the likelihood.
        self.whiten = np.linalg.inv(np.linalg.cholesky(shrunk + 1e-9 * np.eye(len(shrunk)))).T

    def __call__(self, z: Tensor) -> Floats:
        """Log-likelihoods but for a constant, float ``[B]``."""
        white = (z - torch.from_numpy(self.mean).float()) @ torch.from_numpy(self.whiten).float()
        out: Floats = (-0.5 * white.square().sum(dim=1)).double().numpy()
        return out


@torch.no_grad()
def likelihoods(network: nn.Module, hidden: Pixels, codes: Codes, prior: Prior) -> Floats:
    """How likely what each of ``codes`` makes of one face ``[S, S, 3]`` is under the prior; never makes a picture."""
    sides = [torch.from_numpy(z).float() for z in latents(network, hidden[None])]
    turns = [copy.deepcopy(turn).cpu() for turn in network.turns]  # type: ignore[union-attr]
    found = []
    for start in range(0, len(codes), _CHUNK):
        p = torch.from_numpy(codes[start : start + _CHUNK]).float() - 0.5
        turned = [t.inverse(t(z.expand(len(p), -1), p), -p) for z, t in zip(sides, turns, strict=True)]
        found.append(prior(torch.cat(turned, dim=1)))
    return np.concatenate(found)


def lengths(network: nn.Module, pictures: Pixels) -> Floats:
    """What no rotation changes: the logarithm of the length of every band, float ``[M, bands]``."""
    columns = [
        np.log(np.linalg.norm(side[:, start:stop], axis=1) + 1e-9)
        for side, ranges in zip(latents(network, pictures), bands(network), strict=True)
        for start, stop in ranges
    ]
    return np.stack(columns, axis=1)


def all_codes(bits: int) -> NDArray[np.bool_]:
    """bool ``[2^bits, bits]``."""
    return (np.arange(2**bits)[:, None] >> np.arange(bits)[::-1] & 1).astype(np.bool_)
