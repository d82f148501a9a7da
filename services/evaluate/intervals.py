"""Thresholds, equal error, and how sure a figure is."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def interval(
    values: Floats, groups: Sequence[object] | None = None, *, seed: int = 0, draws: int = 1000, share: bool = True
) -> tuple[float, float]:
    """95 % bootstrap interval of the mean of ``values`` float ``[M]``.

    Whole groups are drawn where they are given (several pictures of one person, pairs from one face): their values
    hang together, and drawing them one by one would make the interval too narrow. Where all values are the same 0 or 1
    a bootstrap sees no spread at all; the interval is then the exact binomial one (Clopper and Pearson 1934) over
    groups, unless ``share`` is False: for counts and distances 0 and 1 are values like others.

    Raises:
        ValueError: no value, or as many groups as values were not given.
    """
    values = np.asarray(values, dtype=np.float64)
    if not len(values) or (groups is not None and len(groups) != len(values)):
        raise ValueError(f"{len(values)} values and {'no' if groups is None else len(groups)} groups")
    if groups is None:
        sums, counts = values, np.ones(len(values))
    else:
        numbers: dict[object, int] = {}
        index = np.array([numbers.setdefault(g, len(numbers)) for g in groups])
        sums = np.bincount(index, weights=values)
        counts = np.bincount(index).astype(np.float64)
    n = len(sums)
    if share and np.all(values == values[0]) and values[0] in (0.0, 1.0):
        bound = 1 - 0.025 ** (1 / n)
        return (0.0, bound) if values[0] == 0 else (1 - bound, 1.0)
    rng = np.random.default_rng(seed)
    means = np.empty(draws)
    for i in range(draws):  # one draw at a time: draws x groups at once would take hundreds of MB for pair figures
        chosen = rng.integers(0, n, size=n)
        means[i] = sums[chosen].sum() / counts[chosen].sum()
    return float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))


def impostors(embeddings: Floats, identities: Sequence[int | None]) -> Floats:
    """Cosines of all pairs of *different*, known people; unit embeddings ``[M, D]``."""
    known = np.array([i for i, identity in enumerate(identities) if identity is not None], dtype=np.int64)
    labels = np.array([identities[i] for i in known])
    cosines = embeddings[known] @ embeddings[known].T
    rows, columns = np.triu_indices(len(known), k=1)
    different: Floats = cosines[rows, columns][labels[rows] != labels[columns]]
    return different


def threshold_at(fpr: float, impostor_cosines: Floats) -> float:
    """The cosine above which a share ``fpr`` of pairs of different people lies.

    Raises:
        ValueError: fewer than 10 / fpr such pairs: the quantile would be noise.
    """
    if len(impostor_cosines) < 10 / fpr:
        raise ValueError(f"{len(impostor_cosines)} pairs of different people are too few for a threshold at FPR {fpr}")
    return float(np.quantile(impostor_cosines, 1 - fpr))


def equal_error(genuine: Floats, impostor: Floats) -> tuple[float, float]:
    """(threshold, error rate) where as many genuine pairs fail as impostors pass."""
    scores = np.concatenate([genuine, impostor])
    labels = np.concatenate([np.ones(len(genuine)), np.zeros(len(impostor))])
    order = np.argsort(scores, kind="stable")
    scores, labels = scores[order], labels[order]
    # Threshold just above scores[i]: genuine up to i are rejected, impostors from i + 1 on accepted.
    rejected = np.cumsum(labels) / len(genuine)
    accepted = 1 - np.cumsum(1 - labels) / len(impostor)
    i = int(np.argmin(np.abs(rejected - accepted)))
    upper = scores[min(i + 1, len(scores) - 1)]
    return float((scores[i] + upper) / 2), float((rejected[i] + accepted[i]) / 2)


def area_under_curve(positive: Floats, negative: Floats) -> float:
    """Chance that a positive scores above a negative, ties half (Mann and Whitney); 0.5 is guessing."""
    from scipy.stats import rankdata

    ranks = rankdata(np.concatenate([positive, negative]))
    n, m = len(positive), len(negative)
    return float((ranks[:n].sum() - n * (n + 1) / 2) / (n * m))
