"""Attacks on the cover transformer (:mod:`mien.networks.cover`) by who knows how it works.

Of the context c, which anybody reads from A, it paints one of a few hundred likenesses s(p) and adds the real face's
coordinates x, scaled, under an orthonormal mixing that is keyed with the code and a number k of the context:

    A = f(c, s(p)) + O x,    O = D2 C D1 P C D0

where D are signs that a cipher draws for p and k, C is a cosine transform and P a shuffle that all share. So the
likeness is read from A; O x and k lie bare once f is taken away; whether a code is right is told by the known pattern
in x; and pairs of one password *and one k* tell O, but not the code.
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
from mien.networks.cover import CoverTransformer, Seen
from mien.networks.mixing import Mixing, signs
from services.evaluate.attackers import Advance
from services.evaluate.chain import Codes
from services.evaluate.distances import Floats, Pixels, to_pixels, to_tensor

_CHUNK: Final = 2048
_PICTURES: Final = 32
# Likenesses that are painted before one is believed, the nearest by their coordinates.
_SHORTLIST: Final = 8
# Hidden coordinates that pairs are asked about, the strongest: more tell little more.
_ASKED: Final = 96
# How often signs are mended.
_MENDED: Final = 20


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


@torch.no_grad()
def picture_numbers(network: CoverTransformer, pictures: Pixels) -> NDArray[np.int64]:
    """k of pictures that are not anonymized yet: of their contexts."""
    return np.concatenate([network.number(seen).numpy() for _, _, seen in _some(network, pictures)])


# What is hidden. ---------------------------------------------------------------------------------------------------


def _beyond(network: CoverTransformer, stretched: Tensor, seen: Seen, likeness: Tensor) -> Tensor:
    """What pictures have beyond a painted likeness: luma of the inner blocks, float ``[B, n]``."""
    low = F.avg_pool2d(cover.planes_of(stretched - network.paint(seen, likeness)), 2)
    return network.inside(low)[0]


@torch.no_grad()
def carried(
    network: CoverTransformer, pictures: Pixels, likenesses: NDArray[np.int64], advance: Advance = lambda done: None
) -> tuple[Floats, NDArray[np.int64]]:
    """O x but for a factor, and k, of what pictures hide beyond the likenesses they show: ``[M, size]`` and ``[M]``."""
    smooth = network._worked_out().smooth
    mixed, numbers = [], []
    for part, stretched, seen in _some(network, pictures):
        likeness = network.likenesses.faces[torch.from_numpy(likenesses[part])]
        found, number = network.clear(_beyond(network, stretched, seen, likeness) @ smooth)
        mixed.append(found.double().numpy())
        numbers.append(number.numpy())
        advance(part.stop - part.start)
    return np.concatenate(mixed), np.concatenate(numbers)


def known_numbers() -> int:
    """How many numbers the known pattern has, which are hidden after x and are all 1."""
    return cover._PATTERN


def drawn(network: CoverTransformer, codes: Codes, number: int) -> Tensor:
    """The signs of codes for a picture of this number, float ``[B, 3, size]``: those of the robust part alone."""
    p, size = signed(codes), network.mix_robust.size
    return signs(p, torch.full((len(p),), number), 3 * size).view(len(p), 3, size)


@torch.no_grad()
def pattern(network: CoverTransformer, mixed: Floats, number: int, codes: Codes) -> Floats:
    """How much of the known pattern each code finds in one picture's O x, ``[size]``: cosines float ``[B]``."""
    given, secrets = torch.from_numpy(mixed).float(), len(network.scales()[0])
    found = []
    for start in range(0, len(codes), _CHUNK):
        p = codes[start : start + _CHUNK]
        read = network.mix_robust.inverse(given.expand(len(p), -1), drawn(network, p, number))
        read = read[:, secrets : secrets + known_numbers()]
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
def with_context_of(network: CoverTransformer, victim: Pixels, pictures: Pixels) -> Pixels:
    """The faces of pictures uint8 ``[M, S, S, 3]`` in the context, and so of the number, of one ``[S, S, 3]``."""
    _, _, mine = next(_some(network, victim[None]))
    out = []
    for _, stretched, seen in _some(network, pictures):
        here = Seen(*(part.expand(len(stretched), *part.shape[1:]) for part in mine))
        low = network.plan(here, network.coordinates(stretched, seen))
        made = cover.synthesise_blocks(torch.cat([low[:, :, None], cover.foretold(low) * network.area], dim=2))
        out.append(to_pixels(cover.unstretch(cover.stretched_of(made))))
    return np.concatenate(out)


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


# The signs. --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def signs_of(mixing: Mixing, x: Floats, mixed: Floats, ridge: float = 0.03) -> Tensor:
    """All signs of a code and number, float ``[1, 3, size]``, from pairs of these; the code they do not tell.

    O x is linear in the signs of each of the three layers. Let w be what regression says of O's column of one
    coordinate. w w^T has a mean that is D2 K D2, with a known K: the entrywise product with K, summed over coordinates,
    has the signs of D2 for its leading eigenvector. D1 and D0 are then a singular vector each, and what each of the
    three says of the others mends what is wrong.

    Args:
        x: what is hidden, the known pattern included, float ``[k, r]``.
        mixed: as :func:`carried` reads it, float ``[k, size]``.
    """
    given, seen = torch.from_numpy(x).float(), torch.from_numpy(mixed).float()
    seen = seen * (given.norm() / seen.norm())  # O is orthonormal
    centred = given - given.mean(dim=0)
    kernel = centred @ centred.T
    kernel += ridge * kernel.diagonal().mean() * torch.eye(len(kernel))
    columns = centred.T @ torch.linalg.solve(kernel, seen - seen.mean(dim=0))
    cosines = torch.kron(mixing.rows, mixing.columns)  # C: rows are what comes out
    first = cosines[mixing.shuffle]
    # What all have in common, the known pattern above all, is a column too.
    common = given.mean(dim=0) / given.mean(dim=0).norm()
    column = seen.mean(dim=0) / seen.mean(dim=0).norm()
    spread = first[:, : len(common)].square() @ common.square()
    agreement = torch.outer(column, column) * ((cosines * spread) @ cosines.T)
    for m in columns.square().sum(dim=1).argsort(descending=True)[:_ASKED].tolist():
        agreement += torch.outer(columns[m], columns[m]) * ((cosines * first[:, m].square()) @ cosines.T)
    agreement.fill_diagonal_(0)
    last = torch.linalg.eigh(agreement)[1][:, -1]
    first = first[:, : given.shape[1]]
    between = (seen * last.sign()) @ cosines
    left, _, right = torch.linalg.svd((between.T @ given) * first)
    middle, early = left[:, 0].sign(), right[0].sign()
    for _ in range(_MENDED):
        after = (given * early) @ first.T
        last = (seen * ((after * middle) @ cosines.T)).sum(dim=0)
        between = (seen * last.sign()) @ cosines
        middle = (between * after).sum(dim=0).sign()
        early = (given * ((between * middle) @ first)).sum(dim=0).sign()
    # Of coordinates in which nothing is hidden no sign is asked for.
    early = F.pad(early, (0, mixing.size - len(early)), value=1.0)
    return torch.stack([early, middle, last.sign()])[None]


@torch.no_grad()
def read(network: CoverTransformer, mixed: Floats, solved: Tensor) -> Floats:
    """x of O x, float ``[M, r]``, by signs ``[1, 3, size]``."""
    given, secrets = torch.from_numpy(mixed).float(), len(network.scales()[0])
    out = network.mix_robust.inverse(given, solved.expand(len(given), -1, -1))
    known = out[:, secrets : secrets + known_numbers()].mean()
    found: Floats = (out[:, :secrets] / known).double().numpy()
    return found


def all_codes(bits: int) -> Codes:
    """bool ``[2^bits, bits]``."""
    return (np.arange(2**bits)[:, None] >> np.arange(bits)[::-1] & 1).astype(np.bool_)
