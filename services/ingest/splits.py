"""Who goes where: splits disjoint by identity, stable when data is added."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from mien.manifest import SPLITS, Identities, Split

Shares = tuple[float, float, float]


def split_of(unit: str, shares: Shares, seed: int) -> Split:
    """The split of a person, or of a photo nobody named.

    A hash, not a shuffled list: adding people never moves those that are there, so a test set stays unseen when a
    data set grows.

    Args:
        unit: identity, or source and file of an unlabelled photo. All photos of one unit land in one split.
        shares: parts of train, val and test, adding up to 1.
        seed: another seed is another division.
    """
    position = _uniform(f"split/{seed}/{unit}")
    for split, share in zip(SPLITS, shares, strict=True):
        if position < share:
            return split
        position -= share
    # What rounding leaves over belongs to the last split that has a share at all.
    return max((split for split, share in zip(SPLITS, shares, strict=True) if share > 0), key=SPLITS.index)


def shuffled(keys: Iterable[str], seed: int) -> list[str]:
    """The keys in an order that mixes sources and people and depends on nothing but keys and seed."""
    return sorted(keys, key=lambda key: (hashlib.sha256(f"order/{seed}/{key}".encode()).digest(), key))


def number(people: dict[Split, set[str]]) -> dict[Split, Identities]:
    """Number people contiguously, train from 0, each split in alphabetical order."""
    numbered: dict[Split, Identities] = {}
    first = 0
    for split in SPLITS:
        names = tuple(sorted(people[split]))
        numbered[split] = Identities(first=first, names=names)
        first += len(names)
    return numbered


def _uniform(text: str) -> float:
    """A number in [0, 1) from a hash."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48
