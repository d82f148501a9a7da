"""Attacks by who knows an original, or what one password did to several pictures; each beside chance.

One password gives one code everywhere in a deployment (nothing is stored that could tell pictures apart), so what opens
one picture opens all of that password.
"""

from __future__ import annotations

import time

import numpy as np

from mien import passwords
from services.evaluate import distances, files
from services.evaluate.chain import Codes
from services.evaluate.context import Context
from services.evaluate.distances import Floats, Pixels
from services.evaluate.figures import Result
from services.evaluate.judges import Judge
from services.evaluate.parts import verification
from services.evaluate.parts.attacks import apply_codes, climb_bits, other_codes


def one_code(context: Context, pictures: Pixels, code: Codes) -> Pixels:
    """Many faces under one code, saved."""
    return files.save(context.subject.transform(pictures, np.repeat(code[None], len(pictures), axis=0)))


def known_plaintext(context: Context) -> Result:
    """One original beside its anonymized picture: which code was it? And another picture of that password.

    The search compares what each of many codes makes of the original with A: the right one makes exactly A, so who can
    try all of them finds it; how long that takes is said at the speed measured here. The climb flips bits instead.
    """
    result = Result()
    key, bits, restarts = "attack.known-plaintext", context.subject.bits, 3
    count = min(context.sizes.climbs, len(context.sample.faces) - 1)
    tried = min(context.sizes.known_codes, 2**bits)
    judge = context.headline
    threshold = verification.thresholds(context, judge)[0]
    exact, used, nearest, firsts, seconds = [], [], [], [], 0.0
    opened, victims = [], []
    with context.progress.stage("known plaintext", count) as advance:
        for i in range(count):
            original, hidden = context.sample.faces.images[i], context.chain("A", count)[i]
            truth = context.chain.codes["first"][i]
            rng = np.random.default_rng([context.seed, 9, i])

            def score(codes: Codes, original: Pixels = original, hidden: Pixels = hidden) -> Floats:
                made = apply_codes(context, original, codes)
                return -distances.l1(made, np.repeat(hidden[None], len(made), axis=0))

            begun = time.perf_counter()
            values = score(np.concatenate([truth[None], other_codes(truth, tried - 1, rng)]))
            seconds += time.perf_counter() - begun
            firsts.append(_first_of(values))
            best, code, spent = -np.inf, truth, 0
            for start in passwords.random_codes(restarts, bits, rng):
                found, value, evaluations = climb_bits(start, score, bits)
                spent += evaluations
                if value > best:
                    best, code = value, found
                if best > -1e-3:  # nothing but rounding is left
                    break
            exact.append(float((code == truth).all()))
            nearest.append(float((code != truth).sum()))
            used.append(spent)
            victim = context.sample.faces.images[i + 1]
            victims.append(victim)
            opened.append(apply_codes(context, one_code(context, victim[None], truth)[0], ~code[None])[0])
            advance(1)
    result.mean(f"{key}.success", firsts)
    result.number(f"{key}.chance", 1 / tried)
    result.number(f"{key}.codes-tried", tried)
    result.number(f"{key}.hours-for-all-codes", seconds / (count * tried) * 2.0**bits / 3600)
    result.mean(f"{key}.climb.success", exact)
    result.number(f"{key}.climb.chance", min(1.0, float(np.mean(used)) / 2**bits))
    result.mean(f"{key}.climb.evaluations", used)
    result.mean(f"{key}.climb.bits-wrong", nearest)
    result.mean(f"{key}.climb.other-picture.success", pass_as_one(context, judge, victims, opened, threshold))
    result.number(f"{key}.climb.other-picture.chance", wrong_share(context, judge))
    return result


def _first_of(values: Floats) -> float:
    """1 where the first is best; among t equal bests it counts 1/t: the attacker would have to guess."""
    return float(values[0] >= values.max()) / max(1, int((values >= values.max()).sum()))


def pass_as_one(context: Context, judge: Judge, a: list[Pixels], b: list[Pixels], threshold: float) -> np.ndarray:
    """Whether pictures pass as the same person, pair by pair."""
    e, f = judge.embed(np.stack(a)), judge.embed(np.stack(b))
    return (e * f).sum(axis=1) >= threshold


def wrong_share(context: Context, judge: Judge) -> float:
    """How often a *uniformly* wrong code gives a face that passes as the person."""
    threshold = verification.thresholds(context, judge)[0]
    cosines = (context.chain.embeddings(judge, "I") * context.chain.embeddings(judge, "WR")).sum(axis=1)
    return float((cosines >= threshold).mean())


def linking(context: Context) -> Result:
    """Two photos of one person under one password: do the faces they were given pass as one person?

    Wanted where a person is to be followed through a video, not wanted where two pictures should not be linked.
    """
    result = Result()
    key, sample, judge = "attack.linking", context.sample, context.headline
    if len(sample.mate_of) < 2:
        result.skip(key, "nobody in the sample has another photo")
        return result
    threshold = verification.thresholds(context, judge)[0]
    count = min(len(sample.mate_of), context.sizes.linking)
    chosen = sample.mate_of[:count]
    code, other = context.chain.codes["first"][0], context.chain.codes["second"][0]
    first = judge.embed(one_code(context, sample.faces.images[chosen], code))
    second = judge.embed(one_code(context, sample.mates.images[:count], code))
    apart = judge.embed(one_code(context, sample.mates.images[:count], other))
    groups = [context.groups[i] for i in chosen]
    table = first @ second.T >= threshold
    result.mean(f"{key}.success", np.diag(table), groups)
    result.number(f"{key}.chance", float(table[~np.eye(count, dtype=bool)].mean()))
    result.mean(f"{key}.two-passwords", (first * apart).sum(axis=1) >= threshold, groups)
    plain = (context.chain.embeddings(judge, "I")[chosen] * verification.mates(context, judge)[:count]).sum(axis=1)
    result.mean(f"{key}.unprotected", plain >= threshold, groups)
    return result
