"""Attacks by who knows that the network turns latents by keyed rotations (:mod:`services.evaluate.rotations`)."""

from __future__ import annotations

import time
from typing import Final

import numpy as np
from torch import nn

from services.evaluate import distances, files, intervals, rotations
from services.evaluate.context import Context
from services.evaluate.distances import Pixels
from services.evaluate.faces import read_shards
from services.evaluate.figures import Result, grid
from services.evaluate.parts import verification
from services.evaluate.parts.attacks import other_codes, strangers_of
from services.evaluate.parts.attacks_known import one_code, pass_as_one

KNOWN_PAIRS: Final = (1, 8, 24, 64)
_VICTIMS: Final = 24
# A covariance of fewer faces says nothing.
_FEWEST: Final = 100
# All codes are tried where there are no more bits than this; else so many.
_EXHAUSTIBLE: Final = 16
_SAMPLED: Final = 2**12


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
    theirs = one_code(context, victims, code)
    rows = [list(victims[:6]), list(theirs[:6])]
    before = float(pass_as_one(context, judge, list(victims), list(theirs), threshold).mean())
    shown = []
    for count in (k for k in KNOWN_PAIRS if k <= len(known)):
        opened = rotations.solve(network, known[:count], one_code(context, known[:count], code))
        back = files.save(rotations.reopen(opened, theirs, bits))
        key = f"attack.known-pairs.{count}"
        result.mean(f"{key}.success", pass_as_one(context, judge, list(victims), list(back), threshold))
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


def likelihood(context: Context) -> Result:
    """No password, no original, no gallery: which code gives latents as faces have them?

    A rotation leaves every band as it is distributed, but not how bands hang together: eyes that went with a mouth are
    turned apart by a wrong code. A Gaussian over all coordinates of other people's faces sees that.
    """
    result = Result()
    key = "attack.latent-likelihood"
    network = _turning(context, result, key)
    if network is None:
        return result
    wanted = context.sizes.latent_train
    if context.train_data is not None:
        faces = read_shards(context.train_data, "train", wanted).images
    else:
        faces = context.sample.rest.images[:wanted]
    if len(faces) < _FEWEST:
        result.skip(key, f"{len(faces)} faces of other people to learn from; {_FEWEST} are needed (--train-data)")
        return result
    with context.progress.stage("latents of other faces", len(faces)) as advance:
        prior = rotations.Prior(np.concatenate(rotations.latents(network, faces, advance), axis=1))
    bits = context.subject.bits
    count = min(context.sizes.climbs, len(context.sample.faces))
    hidden, right = context.chain("A", count), context.chain.codes["right"][:count]
    firsts, areas, above = [], [], []
    with context.progress.stage("codes by the likelihood of latents", count) as advance:
        for i in range(count):
            rng = np.random.default_rng([context.seed, 13, i])
            tried = 2**bits if bits <= _EXHAUSTIBLE else _SAMPLED
            codes = np.concatenate([right[i][None], other_codes(right[i], tried - 1, rng)])
            scores = rotations.likelihoods(network, hidden[i], codes, prior)
            firsts.append(float(scores[0] > scores[1:].max()))
            areas.append(intervals.area_under_curve(scores[:1], scores[1:]))
            above.append(float((scores[1:] >= scores[0]).mean()) * (2.0**bits - 1))
            advance(1)
    result.mean(f"{key}.success", firsts)
    result.number(f"{key}.chance", 1 / tried)
    result.number(f"{key}.codes-tried", tried)
    result.mean(f"{key}.auc", areas)
    result.mean(f"{key}.wrong-codes-above", above, share=False)
    return result

