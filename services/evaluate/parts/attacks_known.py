"""Attacks by who knows an original, or what one password did to several pictures; each beside chance.

One password gives one code everywhere in a deployment (nothing is stored that could tell pictures apart), so what opens
one picture opens all of that password.
"""

from __future__ import annotations

import time
from typing import Final

import numpy as np
from torch import nn

from mien import passwords
from services.evaluate import distances, files, rotations
from services.evaluate.chain import Codes
from services.evaluate.context import Context
from services.evaluate.distances import Floats, Pixels
from services.evaluate.figures import Result, grid
from services.evaluate.judges import Judge
from services.evaluate.parts import verification
from services.evaluate.parts.attacks import apply_codes, climb_bits, other_codes, strangers_of

KNOWN_PAIRS: Final = (1, 8, 24, 64)
_VICTIMS: Final = 24
# All codes are tried where there are no more bits than this.
_EXHAUSTIBLE: Final = 20


def _one_code(context: Context, pictures: Pixels, code: Codes) -> Pixels:
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
            opened.append(apply_codes(context, _one_code(context, victim[None], truth)[0], ~code[None])[0])
            advance(1)
    result.mean(f"{key}.success", firsts)
    result.number(f"{key}.chance", 1 / tried)
    result.number(f"{key}.codes-tried", tried)
    result.number(f"{key}.hours-for-all-codes", seconds / (count * tried) * 2.0**bits / 3600)
    result.mean(f"{key}.climb.success", exact)
    result.number(f"{key}.climb.chance", min(1.0, float(np.mean(used)) / 2**bits))
    result.mean(f"{key}.climb.evaluations", used)
    result.mean(f"{key}.climb.bits-wrong", nearest)
    result.mean(f"{key}.climb.other-picture.success", _same(context, judge, victims, opened, threshold))
    result.number(f"{key}.climb.other-picture.chance", wrong_share(context, judge))
    return result


def _first_of(values: Floats) -> float:
    """1 where the first is best; among t equal bests it counts 1/t: the attacker would have to guess."""
    return float(values[0] >= values.max()) / max(1, int((values >= values.max()).sum()))


def _same(context: Context, judge: Judge, a: list[Pixels], b: list[Pixels], threshold: float) -> np.ndarray:
    """Whether pictures pass as the same person, pair by pair."""
    e, f = judge.embed(np.stack(a)), judge.embed(np.stack(b))
    return (e * f).sum(axis=1) >= threshold


def wrong_share(context: Context, judge: Judge) -> float:
    """How often a *uniformly* wrong code gives a face that passes as the person."""
    threshold = verification.thresholds(context, judge)[0]
    cosines = (context.chain.embeddings(judge, "I") * context.chain.embeddings(judge, "WR")).sum(axis=1)
    return float((cosines >= threshold).mean())


def _turning(context: Context, result: Result, *keys: str) -> nn.Module | None:
    """The network, where it turns latents; else says so in the result."""
    network = getattr(context.model, "network", context.model)
    if rotations.turns_latents(network):
        return network  # type: ignore[return-value]
    for key in keys:
        result.skip(key, "an attack on networks that turn latents by keyed rotations (eigenface); this one does not")
    return None


def known_pairs(context: Context) -> Result:
    """Pairs of one password, and the design of the network: solve for the rotation, open other pictures of it.

    It never looks for the code, so a longer one does not help. A single pair and all 2^N codes in the latents give the
    code itself, as long as N is small.
    """
    result = Result()
    network = _turning(context, result, "attack.known-pairs", "attack.latent-search")
    if network is None:
        return result
    judge = context.headline
    threshold = verification.thresholds(context, judge)[0]
    images = context.sample.faces.images
    victims = images[: min(_VICTIMS, len(images) // 2)]
    known = images[len(victims) :]
    code = context.chain.codes["first"][0]
    bits = context.subject.bits
    theirs = _one_code(context, victims, code)
    rows = [list(victims[:6]), list(theirs[:6])]
    before = float(_same(context, judge, list(victims), list(theirs), threshold).mean())
    shown = []
    for count in (k for k in KNOWN_PAIRS if k <= len(known)):
        opened = rotations.solve(network, known[:count], _one_code(context, known[:count], code))
        back = files.save(rotations.reopen(opened, theirs, bits))
        key = f"attack.known-pairs.{count}"
        result.mean(f"{key}.success", _same(context, judge, list(victims), list(back), threshold))
        result.number(f"{key}.chance", before)
        result.mean(f"{key}.psnr", distances.psnr(victims, back))
        rows.append(list(back[:6]))
        shown.append(count)
    result.number("attack.known-pairs.band", max(b - a for ranges in rotations.bands(network) for a, b in ranges))
    result.picture("known-pairs", grid(rows))
    result.series["known-pairs.shown"] = shown
    if bits > _EXHAUSTIBLE:
        result.skip("attack.latent-search", f"2^{bits} codes are too many to try all, also in the latents")
        return result
    codes = rotations.all_codes(bits)
    tried = min(context.sizes.climbs, len(images))
    hidden = context.chain("A", tried)
    truths = context.chain.codes["first"]
    begun = time.perf_counter()
    with context.progress.stage(f"all {len(codes)} codes in the latents", tried) as advance:
        found = []
        for i in range(tried):
            found.append((codes[rotations.search(network, images[i], hidden[i], codes)] == truths[i]).all())
            advance(1)
    result.mean("attack.latent-search.success", found)
    result.number("attack.latent-search.chance", 2.0**-bits)
    result.number("attack.latent-search.seconds", (time.perf_counter() - begun) / tried)
    return result


def invariants(context: Context) -> Result:
    """No password, no original: what a rotation cannot change, matched with other photos of people."""
    result = Result()
    key = "attack.invariants"
    network = _turning(context, result, key)
    if network is None:
        return result
    sample = context.sample
    if len(sample.mate_of) < 2:
        result.skip(key, "nobody in the sample has another photo, which the gallery would hold")
        return result
    strangers, owner = gallery_people(context)
    gallery = rotations.lengths(network, np.concatenate([sample.mates.images, strangers]))
    middle, spread = gallery.mean(axis=0), gallery.std(axis=0) + 1e-9
    probes = sample.mate_of[: context.sizes.attack_test]
    for kind in ("A", "I"):
        seen = rotations.lengths(network, context.chain(kind)[probes])
        away = ((seen - middle) / spread)[:, None] - ((gallery - middle) / spread)[None]
        nearest = np.square(away).sum(axis=2).argmin(axis=1)
        named = [owner[n] == probe for n, probe in zip(nearest, probes, strict=True)]
        result.mean(f"{key}.success" if kind == "A" else f"{key}.of-input", named)
    result.number(f"{key}.chance", 1 / len(owner))
    return result


def gallery_people(context: Context) -> tuple[Pixels, list[int]]:
    """Photos of strangers, and whose every photo of the gallery is: a face of the sample, or -1; mates come first."""
    sample = context.sample
    strangers = strangers_of(context)
    return strangers.images, [*sample.mate_of, *[-1] * len(strangers)]


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
    first = judge.embed(_one_code(context, sample.faces.images[chosen], code))
    second = judge.embed(_one_code(context, sample.mates.images[:count], code))
    apart = judge.embed(_one_code(context, sample.mates.images[:count], other))
    groups = [context.groups[i] for i in chosen]
    table = first @ second.T >= threshold
    result.mean(f"{key}.success", np.diag(table), groups)
    result.number(f"{key}.chance", float(table[~np.eye(count, dtype=bool)].mean()))
    result.mean(f"{key}.two-passwords", (first * apart).sum(axis=1) >= threshold, groups)
    plain = (context.chain.embeddings(judge, "I")[chosen] * verification.mates(context, judge)[:count]).sum(axis=1)
    result.mean(f"{key}.unprotected", plain >= threshold, groups)
    return result
