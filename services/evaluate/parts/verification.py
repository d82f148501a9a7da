"""Is it the same person? The paper's section 5.3, asked of recognisers instead of people; and the gallery."""

from __future__ import annotations

from typing import Final

import numpy as np

from services.evaluate import intervals
from services.evaluate.chain import NEAR
from services.evaluate.context import Context
from services.evaluate.distances import Floats
from services.evaluate.figures import Result
from services.evaluate.files import LOSSY
from services.evaluate.judges import Judge

PAIRS: Final = {
    "I-A": ("I", "A"),
    "I-R": ("I", "R"),
    "I-WR": ("I", "WR"),
    **{f"I-WR-{n}bit": ("I", f"WR-{n}bit") for n in NEAR},
    "A-WR": ("A", "WR"),
    "A1-A2": ("A", "A2"),
    "WR1-WR2": ("WR", "WR2"),
}

# Between the figures that gates look at: fewer faces say enough.
_FEWER: Final = ("I-WR-2bit", "I-WR-4bit")

# Equal error and galleries need a few people with a second photo to mean anything.
_FEWEST_MATES: Final = 20


def run(context: Context) -> Result:
    """Shares passing as one person at FPR 1e-3 and at equal error, mean cosines, rank-1 re-identification."""
    result = Result()
    for judge in context.judges.values():
        _judge(context, judge, result)
    for name, why in context.missing_judges.items():
        result.skip(f"verification.{name}", why)
    return result


def thresholds(context: Context, judge: Judge) -> tuple[float, float | None, float | None]:
    """Cosine at FPR ``context.fpr``, cosine at equal error, and that error; the latter None with too few photos."""
    unchanged = context.chain.embeddings(judge, "I")
    impostors = intervals.impostors(unchanged, context.sample.faces.identities)
    threshold = intervals.threshold_at(context.fpr, impostors)
    if len(context.sample.mate_of) < _FEWEST_MATES:
        return threshold, None, None
    genuine = (unchanged[context.sample.mate_of] * mates(context, judge)).sum(axis=1)
    return threshold, *intervals.equal_error(genuine, impostors)


def mates(context: Context, judge: Judge) -> Floats:
    """Embeddings of the other photos of the people in the sample."""
    others = context.sample.mates
    return context.chain.embed(judge, "mates", lambda: others.images, len(others))


def _judge(context: Context, judge: Judge, result: Result) -> None:
    chain, sample, groups = context.chain, context.sample, context.groups
    key = f"verification.{judge.name}"
    threshold, at_equal_error, error = thresholds(context, judge)
    result.number(f"{key}.threshold", threshold)
    if at_equal_error is not None and error is not None:
        result.number(f"{key}.threshold-eer", at_equal_error)
        result.number(f"{key}.eer", error, len(sample.mate_of))

    def pair(name: str, cosines: Floats, of: list[object]) -> None:
        result.mean(f"{key}.{name}.same", cosines >= threshold, of)
        if at_equal_error is not None:
            result.mean(f"{key}.{name}.same-eer", cosines >= at_equal_error, of)
        result.mean(f"{key}.{name}.cosine", cosines, of)

    for name, (a, b) in PAIRS.items():
        count = min(context.sizes.near, len(groups)) if name in _FEWER else len(groups)
        cosines = (chain.embeddings(judge, a, count) * chain.embeddings(judge, b, count)).sum(axis=1)
        pair(name, cosines, groups[:count])
        if name in ("I-A", "I-R", "I-WR"):
            result.series[f"cosines.{judge.name}.{name}"] = np.round(cosines, 4).tolist()
    _files(context, judge, threshold, result)
    if len(sample.mate_of) < _FEWEST_MATES:
        why = f"{len(sample.mate_of)} people of the sample have a second photo; {_FEWEST_MATES} are needed"
        for name in ("I-I2", "A-I2", "eer"):
            result.skip(f"{key}.{name}", why)
        result.skip(f"reidentification.{judge.name}", why)
        return
    mated = [groups[i] for i in sample.mate_of]
    others = mates(context, judge)
    for kind in ("I", "A", "R", "WR"):
        cosines = (chain.embeddings(judge, kind)[sample.mate_of] * others).sum(axis=1)
        pair(f"{kind}-I2", cosines, mated)
    _gallery(context, judge, others, result)


def _files(context: Context, judge: Judge, threshold: float, result: Result) -> None:
    """Hiding and giving back through files that lose something."""
    count = min(context.sizes.lossy, len(context.sample.faces))
    unchanged = context.chain.embeddings(judge, "I", count)
    if judge is not context.headline:
        return
    for codec in LOSSY:
        for kind in ("A", "R"):
            seen = context.chain.embeddings(judge, f"{kind}@{codec}", count)
            cosines = (unchanged * seen).sum(axis=1)
            result.mean(
                f"verification.{judge.name}.I-{kind}@{codec}.same", cosines >= threshold, context.groups[:count]
            )


def _gallery(context: Context, judge: Judge, others: Floats, result: Result) -> None:
    """Rank 1: is the nearest of a gallery of real photos another photo of the same person?"""
    sample = context.sample
    wanted = max(0, context.sizes.gallery - len(others))
    firsts: dict[object, int] = {}
    for i, identity in enumerate(sample.rest.identities):
        if identity is not None:
            firsts.setdefault(identity, i)
    distractors = sample.rest.take(list(firsts.values())[:wanted])
    strangers = context.chain.embed(judge, "distractors", lambda: distractors.images, len(distractors))
    gallery = np.concatenate([others, strangers])
    key = f"reidentification.{judge.name}"
    result.number(f"{key}.gallery", len(gallery))
    result.number(f"{key}.chance", 1 / len(gallery))
    mated = [context.groups[i] for i in sample.mate_of]
    for kind in ("I", "A", "R", "WR"):
        probes = context.chain.embeddings(judge, kind)[sample.mate_of]
        nearest = np.concatenate([(part @ gallery.T).argmax(axis=1) for part in np.array_split(probes, 8)])
        result.mean(f"{key}.{kind}.rank1", nearest == np.arange(len(probes)), mated)
