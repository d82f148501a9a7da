"""LFW's standard pairs (folds as they come in pairs.txt) before and after."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from services.evaluate.chain import Chain
from services.evaluate.context import Context
from services.evaluate.distances import Floats
from services.evaluate.figures import Result
from services.evaluate.parts import verification


def run(context: Context) -> Result:
    """Accuracy and TPR of (real, real), (anonymized, real), (recovered, real), (wrongly recovered, real) pairs."""
    result = Result()
    if context.pairs is None or context.everyone is None:
        result.skip("lfw-pairs", "no file of standard pairs (--pairs)")
        return result
    index = {Path(source).name: i for i, source in enumerate(context.everyone.sources)}
    listed = read_pairs(context.pairs)
    usable = [(fold, same, a, b) for fold, same, a, b in listed if a in index and b in index]
    if len(usable) < 20:
        why = f"{len(usable)} of the {len(listed)} standard pairs are in these shards: not LFW"
        result.skip("lfw-pairs", why)
        return result
    rng = np.random.default_rng([context.seed, 2])
    chosen = np.sort(rng.choice(len(usable), size=min(context.sizes.pairs, len(usable)), replace=False))
    pairs = [usable[i] for i in chosen]
    left = context.everyone.take([index[a] for _, _, a, _ in pairs])
    right = context.everyone.take([index[b] for _, _, _, b in pairs])
    chain = Chain(context.subject, left.images, seed=context.seed + 1, progress=context.progress)
    if context.chain.cache is not None:
        chain.cache = context.chain.cache / "pairs"
    folds = np.array([fold for fold, _, _, _ in pairs])
    same = np.array([is_same for _, is_same, _, _ in pairs])
    result.number("lfw-pairs.n", len(pairs))
    for judge in context.judges.values():
        if judge.trainer:
            continue
        threshold = verification.thresholds(context, judge)[0]
        real = chain.embed(judge, "right", lambda: right.images, len(right))
        for kind, name in (("I", "real"), ("A", "anonymized"), ("R", "recovered"), ("WR", "wrongly-recovered")):
            cosines = (chain.embeddings(judge, kind) * real).sum(axis=1)
            key = f"lfw-pairs.{judge.name}.{name}"
            result.mean(f"{key}.accuracy", cross_validated(cosines, same, folds))
            result.mean(f"{key}.tpr", cosines[same] >= threshold)
            result.mean(f"{key}.fpr", cosines[~same] >= threshold)
    return result


def read_pairs(path: Path) -> list[tuple[int, bool, str, str]]:
    """(fold, same person, file, file) of every pair in LFW's own format.

    Raises:
        ValueError: it is not of that format.
    """
    lines = path.read_text().splitlines()
    head = lines[0].split()
    if len(head) != 2:
        raise ValueError(f"{path} does not begin with the number of folds and of pairs, as LFW's pairs.txt does")
    per_fold = 2 * int(head[1])
    pairs = []
    for number, line in enumerate(filter(None, lines[1:])):
        fields = line.split("\t")
        if len(fields) == 3:
            (a, i, j), b = fields, fields[0]
        elif len(fields) == 4:
            a, i, b, j = fields
        else:
            raise ValueError(f"{path}, line {number + 2}: {len(fields)} fields where 3 or 4 were expected")
        pairs.append((number // per_fold, a == b, f"{a}_{int(i):04d}.jpg", f"{b}_{int(j):04d}.jpg"))
    return pairs


def cross_validated(cosines: Floats, same: Floats, folds: Floats) -> Floats:
    """Whether each pair is judged rightly by the threshold that is best on the *other* folds (LFW's protocol)."""
    right = np.zeros(len(cosines))
    for fold in np.unique(folds):
        inside, outside = folds == fold, folds != fold
        if not outside.any():
            inside, outside = outside | True, inside
        order = np.sort(cosines[outside])
        candidates = np.concatenate([[order[0] - 1e-6], (order[1:] + order[:-1]) / 2, [order[-1] + 1e-6]])
        hits = [((cosines[outside] >= t) == same[outside]).mean() for t in candidates]
        best = candidates[int(np.argmax(hits))]
        right[inside] = (cosines[inside] >= best) == same[inside]
    return right
