"""Attacks on the eigenface transformer (:mod:`mien.networks.eigenface`) by who knows how it works.

It hides the face z in the grain g: with public U, keyed rotations and a public table of likenesses s,

    z_A = s(p) + what the grain had there        g_A carries O_p (z - s(-p))

Codes are tried on the robust coordinates, which come first in z. The face that A shows tells which likeness a code
picks; trying a code is a rotation of numbers, no picture is made; and for one code z is an affine function of g_A,
which pairs of one password give by least squares, however long the code is.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from services.evaluate.attackers import Advance
from services.evaluate.chain import Codes
from services.evaluate.distances import Floats, Pixels, to_pixels, to_tensor

_CHUNK: Final = 2048
_PICTURES: Final = 64


def hides_in_grain(network: object) -> bool:
    """Whether ``network`` is of this kind."""
    return isinstance(network, nn.Module) and all(
        hasattr(network, name) for name in ("turn_face", "turn_grain", "likenesses", "unfold")
    )


def _parts(network: Any, images: Tensor) -> tuple[Any, ...]:
    from mien.networks.eigenface import stretch

    stretched = stretch(images)
    parts = network.analyse(stretched)
    mean = network.predict(stretched, parts.leading)
    return stretched, parts, mean, *network.unfold(parts, mean)


def robust(network: Any) -> int:
    """How many coordinates of z are robust."""
    return sum(network.config.robust)


@torch.no_grad()
def latents(network: Any, pictures: Pixels, advance: Advance = lambda done: None) -> tuple[Floats, Floats, Floats]:
    """Leading coordinates, which never change, face z and grain g of uint8 ``[M, S, S, 3]``; float ``[M, .]`` each."""
    found = []
    for start in range(0, len(pictures), _PICTURES):
        _, parts, _, z, g = _parts(network, to_tensor(pictures[start : start + _PICTURES]))
        found.append([part.double().numpy() for part in (parts.leading, z, g)])
        advance(len(z))
    leading, z, g = (np.concatenate(part) for part in zip(*found, strict=True))
    return leading, z, g


def signed(codes: Codes) -> Tensor:
    """Codes bool ``[B, N]`` as a network takes them."""
    return torch.from_numpy(np.ascontiguousarray(codes)).float() - 0.5


@torch.no_grad()
def likenesses(network: Any, codes: Codes) -> Floats:
    """s of each code in robust coordinates, float ``[B, n]``."""
    out: Floats = network.shown(signed(codes), None)[:, : robust(network)].double().numpy()
    return out


def nearest_likeness(network: Any, z: Floats) -> NDArray[np.int64]:
    """Which likeness each face z ``[M, n]``, or its robust part, is nearest to."""
    faces = network.likenesses.faces[:, network.order[: robust(network)]].double().numpy()
    away = (faces**2).sum(axis=1)[None] - 2 * z[:, : faces.shape[1]] @ faces.T
    return away.argmin(axis=1)


def number_of(network: Any, codes: Codes) -> NDArray[np.int64]:
    """Which likeness each code picks."""
    return nearest_likeness(network, likenesses(network, codes))


@torch.no_grad()
def undo(network: Any, g: Floats, codes: Codes) -> Floats:
    """What recovery under ``codes`` makes of one grain ``[m]``: the robust part of z less the code's likeness.

    float ``[B, n]``.
    """
    grain = torch.from_numpy(g).float()
    found = []
    for start in range(0, len(codes), _CHUNK):
        p = signed(codes[start : start + _CHUNK])
        found.append(network.hidden(grain.expand(len(p), -1), p).double().numpy())
    return np.concatenate(found)


@torch.no_grad()
def with_face(network: Any, pictures: Pixels, z: Floats) -> Pixels:
    """The pictures uint8 ``[M, S, S, 3]`` with other faces z ``[M, n]`` in them, all else as it is."""
    out = []
    for start in range(0, len(pictures), _PICTURES):
        stretched, parts, mean, _, g = _parts(network, to_tensor(pictures[start : start + _PICTURES]))
        after = torch.from_numpy(z[start : start + _PICTURES]).float()
        out.append(to_pixels(network.changed(stretched, parts, mean, after, g)))
    return np.concatenate(out)


class Affine:
    """z as an affine function of g by ridge regression, from pairs float ``[k, m]`` and ``[k, n]``."""

    def __init__(self, g: Floats, z: Floats, ridge: float = 0.03) -> None:
        self.g, self.z = g.mean(axis=0), z.mean(axis=0)
        centred = g - self.g
        kernel = centred @ centred.T
        scale = max(float(np.trace(kernel)) / len(kernel), 1e-12)
        weights = np.linalg.solve(kernel + ridge * scale * np.eye(len(kernel)), z - self.z)
        self.slope = centred.T @ weights

    def __call__(self, g: Floats) -> Floats:
        out: Floats = (g - self.g) @ self.slope + self.z
        return out


class Gaussian:
    """Fitted to float ``[M, K]``, its covariance shrunk towards the diagonal."""

    def __init__(self, samples: Floats, shrink: float = 0.3) -> None:
        self.mean = samples.mean(axis=0)
        covariance = np.cov(samples, rowvar=False)
        shrunk = (1 - shrink) * covariance + (shrink + 1e-6) * np.diag(np.diag(covariance))
        self.factor = np.linalg.cholesky(shrunk + 1e-9 * np.eye(len(shrunk)))
        self.constant = float(np.log(np.diag(self.factor)).sum())

    def __call__(self, x: Floats) -> Floats:
        """Log-likelihoods but for a constant that does not depend on the fit, float ``[B]``."""
        white = np.linalg.solve(self.factor, (x - self.mean).T)
        out: Floats = -0.5 * np.square(white).sum(axis=0) - self.constant
        return out


def all_codes(bits: int) -> Codes:
    """bool ``[2^bits, bits]``."""
    return (np.arange(2**bits)[:, None] >> np.arange(bits)[::-1] & 1).astype(np.bool_)
