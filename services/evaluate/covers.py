"""Attacks on the cover transformer (:mod:`mien.networks.cover`) by who knows how it works.

Of the context c, which anybody reads from A, it paints one of a few hundred likenesses s(p) and adds the real face's
coordinates x, scaled, under a keyed orthonormal mixing:

    A = f(c, s(p)) + O_p x,    O_p = D2 C D1 P C D0

where D are signs, each the parity of half of the code's bits, C is a cosine transform and P a shuffle that all share.
So the likeness is read from A; what is hidden lies bare once f is taken away; whether a code is right is told by the
known pattern in x; and pairs of one password tell O_p, and by its signs the code.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from mien.networks import cover
from mien.networks.cover import CoverTransformer, Mixing, Seen
from services.evaluate.attackers import Advance
from services.evaluate.chain import Codes
from services.evaluate.distances import Floats, Pixels, to_pixels, to_tensor

_CHUNK: Final = 2048
_PICTURES: Final = 32
# Likenesses that are painted before one is believed, the nearest by their coordinates.
_SHORTLIST: Final = 8
# Hidden coordinates that pairs are asked about, the strongest: more tell little more.
_ASKED: Final = 96
# Of the signs that pairs tell, the surest; and how often some of them are drawn to solve for a code.
_SUREST: Final = 200
_DRAWS: Final = 400
# How much better than half of the other signs a code must explain, in standard deviations of a wrong one.
_BETTER: Final = 5.0


def _some(network: CoverTransformer, pictures: Pixels) -> Iterator[tuple[slice, Tensor, Seen]]:
    """Pictures uint8 ``[M, S, S, 3]`` in parts: which, stretched, and their context."""
    for start in range(0, len(pictures), _PICTURES):
        part = slice(start, min(start + _PICTURES, len(pictures)))
        stretched = cover.stretch(to_tensor(pictures[part]))
        yield part, stretched, network.observe(stretched)


def signed(codes: Codes) -> Tensor:
    """Codes bool ``[B, N]`` as a network takes them."""
    return torch.from_numpy(np.ascontiguousarray(codes)).float() - 0.5


@torch.no_grad()
def leading(network: CoverTransformer, pictures: Pixels) -> Floats:
    """Leading coordinates, which never change, float ``[M, .]``."""
    return np.concatenate([seen.leading.double().numpy() for _, _, seen in _some(network, pictures)])


@torch.no_grad()
def secrets(network: CoverTransformer, pictures: Pixels) -> Floats:
    """The coordinates of each face that are hidden where JPEG leaves them, scaled: x, float ``[M, r]``."""
    return np.concatenate([network.secrets(s, seen)[0].double().numpy() for _, s, seen in _some(network, pictures)])


# The likeness. -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def number_of(network: CoverTransformer, codes: Codes) -> NDArray[np.int64]:
    """Which likeness each code picks."""
    out: NDArray[np.int64] = network.likenesses.number(signed(codes)).numpy()
    return out


def with_number(network: CoverTransformer, codes: Codes, number: int) -> Codes:
    """Codes that all pick one likeness, and are as given but for a few bits."""
    bits = codes.shape[1]
    single = number_of(network, np.eye(bits, dtype=np.bool_))
    # A code's number is the exclusive or of those of its bits: bits whose sum is each power of two.
    basis: dict[int, tuple[int, NDArray[np.bool_]]] = {}
    for bit, value in enumerate(single.tolist()):
        which = np.zeros(bits, dtype=np.bool_)
        which[bit] = True
        while value and value.bit_length() in basis:
            other, theirs = basis[value.bit_length()]
            value, which = value ^ other, which ^ theirs
        if value:
            basis[value.bit_length()] = value, which
    out = codes.copy()
    for row, there in zip(out, number_of(network, codes).tolist(), strict=True):
        left = there ^ number
        while left:
            if left.bit_length() not in basis:
                raise ValueError(f"no code of {bits} bits picks likeness {number}")
            value, which = basis[left.bit_length()]
            left ^= value
            row ^= which
    return out


@torch.no_grad()
def shown_likeness(
    network: CoverTransformer, pictures: Pixels, advance: Advance = lambda done: None
) -> NDArray[np.int64]:
    """Which likeness each picture shows: of those nearest by coordinates, the one that leaves least when painted."""
    faces = network.likenesses.faces
    found = []
    for part, stretched, seen in _some(network, pictures):
        away = torch.cdist(network.coordinates(stretched, seen) * network.deviation, faces * network.deviation)
        nearest = away.topk(min(_SHORTLIST, len(faces)), largest=False).indices
        left = [_beyond(network, stretched, seen, faces[near]).square().sum(dim=1) for near in nearest.T]
        found.append(nearest.gather(1, torch.stack(left).argmin(dim=0)[:, None])[:, 0].numpy())
        advance(part.stop - part.start)
    return np.concatenate(found)


# What is hidden. ---------------------------------------------------------------------------------------------------


def _beyond(network: CoverTransformer, stretched: Tensor, seen: Seen, likeness: Tensor) -> Tensor:
    """What pictures have beyond a painted likeness: luma of the inner blocks, float ``[B, n]``."""
    low = F.avg_pool2d(cover.planes_of(stretched - network.paint(seen, likeness)), 2)
    return network.inside(low)[0]


@torch.no_grad()
def carried(
    network: CoverTransformer, pictures: Pixels, numbers: NDArray[np.int64], advance: Advance = lambda done: None
) -> Floats:
    """O_p x but for a factor: what pictures hide beyond the likenesses that they show, float ``[M, mixed]``."""
    smooth = network._worked_out().smooth
    found = []
    for part, stretched, seen in _some(network, pictures):
        likeness = network.likenesses.faces[torch.from_numpy(numbers[part])]
        read = _beyond(network, stretched, seen, likeness) @ smooth
        found.append(read[:, : network.mix_robust.size].double().numpy())
        advance(part.stop - part.start)
    return np.concatenate(found)


def known_numbers() -> int:
    """How many numbers the known pattern has, which are hidden after x and are all 1."""
    return cover._PATTERN


@torch.no_grad()
def pattern(network: CoverTransformer, hidden: Floats, codes: Codes) -> Floats:
    """How much of the known pattern each code finds in what one picture hides, ``[mixed]``: cosines float ``[B]``."""
    mixing, given = network.mix_robust, torch.from_numpy(hidden).float()
    known = slice(len(network.scales()[0]), len(network.scales()[0]) + known_numbers())
    found = []
    for start in range(0, len(codes), _CHUNK):
        p = signed(codes[start : start + _CHUNK])
        read = mixing.inverse(given.expand(len(p), -1), mixing.signs(p))[:, known]
        found.append((read.mean(dim=1) / read.square().mean(dim=1).sqrt().clamp_min(1e-9)).double().numpy())
    return np.concatenate(found)


class Affine:
    """x as an affine function of what is hidden by ridge regression, from pairs float ``[k, m]`` and ``[k, r]``."""

    def __init__(self, given: Floats, wanted: Floats, ridge: float = 0.03) -> None:
        self.given, self.wanted = given.mean(axis=0), wanted.mean(axis=0)
        centred = given - self.given
        kernel = centred @ centred.T
        scale = max(float(np.trace(kernel)) / len(kernel), 1e-12)
        weights = np.linalg.solve(kernel + ridge * scale * np.eye(len(kernel)), wanted - self.wanted)
        self.slope = centred.T @ weights

    def __call__(self, given: Floats) -> Floats:
        out: Floats = (given - self.given) @ self.slope + self.wanted
        return out


@torch.no_grad()
def opened(network: CoverTransformer, pictures: Pixels, numbers: NDArray[np.int64], x: Floats | None) -> Pixels:
    """What an attacker makes of pictures: the faces of coordinates x, float ``[M, r]``; None is that of the context.

    Towards the outline the painted face is taken away again, which needs no code.
    """
    faces, config = network.likenesses.faces, network.config
    r, q = config.robust
    out = []
    for part, stretched, seen in _some(network, pictures):
        shown = network.paint(seen, faces[torch.from_numpy(numbers[part])])
        face = torch.zeros(len(stretched), faces.shape[1])
        if x is not None:
            coordinates = torch.from_numpy(x[part]).float() * network.scales()[0]
            face[:, :r], face[:, config.luma : config.luma + q] = coordinates[:, :r], coordinates[:, r : r + q]
            face /= network.deviation
            seen = seen._replace(leading=seen.leading + coordinates[:, r + q :])
        low = network.plan(seen, face)
        made = cover.stretched_of(cover.synthesise_blocks(torch.cat([low[:, :, None], cover.foretold(low)], dim=2)))
        passing = shown + (stretched - shown) / network.left.clamp_min(1e-3)
        out.append(to_pixels(cover.unstretch(torch.where(network.left == 0, made, passing))))
    return np.concatenate(out)


# The code. ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def last_signs(mixing: Mixing, x: Floats, hidden: Floats, ridge: float = 0.03) -> Floats:
    """D2 of pairs of one password: float ``[size]``, its signs right or all of them wrong, the larger the surer.

    O_p x is linear in the signs of each of the three layers. Let w be what regression says of O_p's column of one
    coordinate. w w^T has a mean that is D2 K D2, with a known K: the entrywise product with K, summed over coordinates,
    has the signs for its leading eigenvector.

    Args:
        x: what is hidden, the known pattern included, float ``[k, r]``.
        hidden: as :func:`carried` reads it, float ``[k, size]``.
    """
    given, seen = torch.from_numpy(x).float(), torch.from_numpy(hidden).float()
    kernel = given @ given.T
    kernel += ridge * kernel.diagonal().mean() * torch.eye(len(kernel))
    columns = given.T @ torch.linalg.solve(kernel, seen)
    cosines = torch.kron(mixing.rows, mixing.columns)  # C: rows are what comes out
    first = cosines.T[:, mixing.shuffle]
    agreement = torch.zeros(mixing.size, mixing.size)
    for m in columns.square().sum(dim=1).argsort(descending=True)[:_ASKED].tolist():
        agreement += torch.outer(columns[m], columns[m]) * ((cosines * first[m].square()) @ cosines.T)
    agreement.fill_diagonal_(0)
    out: Floats = torch.linalg.eigh(agreement)[1][:, -1].double().numpy()
    return out


def code_of(mixing: Mixing, signs: Floats, seed: int) -> Codes | None:
    """The code bool ``[N]`` whose last signs these are, up to all of them; None where no code explains them.

    Signs are parities of bits, so as many sure ones as there are bits are linear equations over GF(2).
    """
    masks = mixing.masks[2].numpy().T  # [size, N]
    bits = masks.shape[1]
    # One more unknown: whether all signs are turned.
    equations = np.concatenate([masks, np.ones((len(masks), 1), dtype=masks.dtype), (signs < 0)[:, None]], axis=1)
    equations = equations.astype(np.uint8)
    surest = np.argsort(-np.abs(signs))[: min(_SUREST, len(signs) // 2)]
    rng = np.random.default_rng([seed, 15])
    for _ in range(_DRAWS):
        drawn = rng.permutation(surest)[: bits + 8]
        solved = _solve(equations[drawn])
        if solved is None:
            continue
        others = np.delete(equations, drawn, axis=0)
        told = (others[:, :-1] @ solved) % 2 == others[:, -1]
        if told.mean() > 0.5 + _BETTER * 0.5 / len(told) ** 0.5:
            return solved[:bits].astype(np.bool_)
    return None


def _solve(equations: NDArray[np.uint8]) -> NDArray[np.uint8] | None:
    """The solution of linear equations over GF(2), the last column their right side; None where it is not one."""
    rows, unknowns = equations.copy(), equations.shape[1] - 1
    for column in range(unknowns):
        pivots = rows[column:, column].nonzero()[0]
        if not len(pivots):
            return None
        pivot = column + int(pivots[0])
        rows[[column, pivot]] = rows[[pivot, column]]
        others = rows[:, column].astype(np.bool_)
        others[column] = False
        rows[others] ^= rows[column]
    return rows[:unknowns, -1]


def all_codes(bits: int) -> Codes:
    """bool ``[2^bits, bits]``."""
    return (np.arange(2**bits)[:, None] >> np.arange(bits)[::-1] & 1).astype(np.bool_)
