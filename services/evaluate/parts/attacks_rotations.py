"""Attacks by who knows how the eigenface transformer works (:mod:`services.evaluate.rotations`)."""

from __future__ import annotations

import time
from typing import Any, Final

import numpy as np

from mien import passwords
from services.evaluate import distances, files, intervals, rotations
from services.evaluate.chain import Codes
from services.evaluate.context import Context
from services.evaluate.distances import Pixels
from services.evaluate.faces import read_shards
from services.evaluate.figures import Result, grid
from services.evaluate.parts import verification
from services.evaluate.parts.attacks import other_codes, strangers_of
from services.evaluate.parts.attacks_known import one_code, pass_as_one

KNOWN_PAIRS: Final = (1, 64, 512, 2048)
_VICTIMS: Final = 24
# A covariance of fewer faces says nothing.
_FEWEST: Final = 100
# All codes are tried where there are no more bits than this.
_EXHAUSTIBLE: Final = 16


def _network(context: Context, result: Result, *keys: str) -> Any:
    """The network, where it is of the kind; else None, and the result says so."""
    network = getattr(context.model, "_network", context.model)
    if rotations.hides_in_grain(network):
        return network
    for key in keys:
        result.skip(key, "an attack on the eigenface architecture; this model is of another")
    return None


def _others(context: Context) -> Pixels:
    """Faces of nobody in the sample."""
    wanted = context.sizes.latent_train
    if context.train_data is not None:
        return read_shards(context.train_data, "train", wanted).images
    return context.sample.rest.images[:wanted]


def known_pairs(context: Context) -> Result:
    """Pairs of one password: least squares from grain to face, which opens other pictures of it without their code.

    The attacker makes the pairs of other people's faces, as who may have pictures anonymized under the password can.
    """
    result = Result()
    network = _network(context, result, "attack.known-pairs")
    if network is None:
        return result
    known = _others(context)
    if len(known) < _FEWEST:
        result.skip("attack.known-pairs", f"{len(known)} faces of other people; {_FEWEST} are needed (--train-data)")
        return result
    judge = context.headline
    threshold = verification.thresholds(context, judge)[0]
    victims = context.sample.faces.images[:_VICTIMS]
    code = context.chain.codes["first"][0]
    theirs = one_code(context, victims, code)
    counts = [k for k in KNOWN_PAIRS if k <= len(known)]
    with context.progress.stage("pairs of one password", counts[-1]) as advance:
        wanted = rotations.latents(network, known[: counts[-1]])[1]
        given = rotations.latents(network, one_code(context, known[: counts[-1]], code), advance)[2]
    grains, truth = rotations.latents(network, theirs)[2], rotations.latents(network, victims)[1]
    rows, shown = [list(victims[:6]), list(theirs[:6])], []
    before = float(pass_as_one(context, judge, list(victims), list(theirs), threshold).mean())
    for count in counts:
        opened = rotations.Affine(given[:count], wanted[:count])(grains)
        back = files.save(rotations.with_face(network, theirs, opened))
        key = f"attack.known-pairs.{count}"
        result.mean(f"{key}.success", pass_as_one(context, judge, list(victims), list(back), threshold))
        result.number(f"{key}.chance", before)
        result.mean(f"{key}.psnr", distances.psnr(victims, back))
        left = np.square(opened - truth).sum(axis=1) / np.square(truth - wanted.mean(axis=0)).sum(axis=1)
        result.mean(f"{key}.explained", 1 - left, share=False)
        rows.append(list(back[:6]))
        shown.append(count)
    result.picture("known-pairs", grid(rows))
    result.series["known-pairs.shown"] = shown
    return result


def latent_search(context: Context) -> Result:
    """One known pair, and every code that picks the likeness that A shows: the code itself, while 2^N can be tried."""
    result = Result()
    key, bits = "attack.latent-search", context.subject.bits
    network = _network(context, result, key)
    if network is None:
        return result
    if bits > _EXHAUSTIBLE:
        result.skip(key, f"2^{bits} codes are too many to try all, also in the latents")
        return result
    codes = rotations.all_codes(bits)
    numbers = rotations.number_of(network, codes)
    count = min(context.sizes.climbs, len(context.sample.faces))
    hidden, truths = context.chain("A", count), context.chain.codes["first"][:count]
    z = rotations.latents(network, context.chain("I", count))[1][:, : rotations.robust(network)]
    _, shown, grains = rotations.latents(network, hidden)
    begun = time.perf_counter()
    found, left = [], []
    with context.progress.stage("codes of one likeness", count) as advance:
        for i, number in enumerate(rotations.nearest_likeness(network, shown)):
            candidates = codes[numbers == number]
            if len(candidates):
                back = rotations.undo(network, grains[i], ~candidates) + rotations.likenesses(network, ~candidates)
                best = candidates[int(np.square(back - z[i]).sum(axis=1).argmin())]
                found.append(bool((best == truths[i]).all()))
            else:
                found.append(False)
            left.append(len(candidates))
            advance(1)
    result.mean(f"{key}.success", found)
    result.number(f"{key}.chance", 2.0**-bits)
    result.mean(f"{key}.codes-left", left, share=False)
    result.number(f"{key}.seconds", (time.perf_counter() - begun) / count)
    return result


def likeness(context: Context) -> Result:
    """What the face that A shows tells of the code: which of the likenesses it picks."""
    result = Result()
    key = "attack.likeness"
    network = _network(context, result, key)
    if network is None:
        return result
    count = min(context.sizes.attack_test, len(context.sample.faces))
    _, shown, _ = rotations.latents(network, context.chain("A", count))
    truth = rotations.number_of(network, context.chain.codes["first"][:count])
    result.mean(f"{key}.success", rotations.nearest_likeness(network, shown) == truth, context.groups[:count])
    total = int(network.likenesses.faces.shape[0])
    result.number(f"{key}.chance", 1 / total)
    result.number(f"{key}.bits-told", float(np.log2(total)))
    return result


def likelihood(context: Context) -> Result:
    """No password, no original, no gallery: which code gives a face, and which gives a likeness with noise?

    The attacker fits a Gaussian to what right recovery leaves of faces less their likeness, one to what wrong recovery
    leaves, both on other people's pictures, and believes the largest ratio.
    """
    result = Result()
    key, bits = "attack.latent-likelihood", context.subject.bits
    network = _network(context, result, key)
    if network is None:
        return result
    faces = _others(context)
    if len(faces) < _FEWEST:
        result.skip(key, f"{len(faces)} faces of other people to learn from; {_FEWEST} are needed (--train-data)")
        return result
    rng = np.random.default_rng([context.seed, 13])
    codes = passwords.random_codes(len(faces), bits, rng)
    right, wrong = [], []
    with context.progress.stage("right and wrong recovery of other faces", len(faces)) as advance:
        for start in range(0, len(faces), 64):
            part = slice(start, start + 64)
            hidden = files.save(context.subject.transform(faces[part], codes[part]))
            _, _, grains = rotations.latents(network, hidden)
            for grain, code in zip(grains, codes[part], strict=True):
                tried: Codes = np.stack([~code, passwords.random_codes(1, bits, rng)[0]])
                both = rotations.undo(network, grain, tried)
                right.append(both[0])
                wrong.append(both[1])
            advance(len(grains))
    of_right, of_wrong = rotations.Gaussian(np.stack(right)), rotations.Gaussian(np.stack(wrong))
    count = min(context.sizes.candidates_faces, len(context.sample.faces))
    number = min(context.sizes.latent_codes, 2**bits)
    _, _, grains = rotations.latents(network, context.chain("A", count))
    firsts, areas, above = [], [], []
    with context.progress.stage("codes by the likelihood of latents", count) as advance:
        for i in range(count):
            truth = context.chain.codes["right"][i]
            draws = np.random.default_rng([context.seed, 14, i])
            codes = np.concatenate([truth[None], other_codes(truth, number - 1, draws)])
            back = rotations.undo(network, grains[i], codes)
            scores = of_right(back) - of_wrong(back)
            firsts.append(float(scores[0] > scores[1:].max()))
            areas.append(intervals.area_under_curve(scores[:1], scores[1:]))
            above.append(float((scores[1:] >= scores[0]).mean()) * (2.0**bits - 1))
            advance(1)
    result.mean(f"{key}.success", firsts)
    result.number(f"{key}.chance", 1 / number)
    result.number(f"{key}.codes-tried", number)
    result.mean(f"{key}.auc", areas)
    result.mean(f"{key}.wrong-codes-above", above, share=False)
    return result


def invariants(context: Context) -> Result:
    """No password, no original: the coordinates that no code changes, matched with other photos of people."""
    result = Result()
    key = "attack.invariants"
    network = _network(context, result, key)
    if network is None:
        return result
    sample = context.sample
    if len(sample.mate_of) < 2:
        result.skip(key, "nobody in the sample has another photo, which the gallery would hold")
        return result
    strangers = strangers_of(context)
    owner = [*sample.mate_of, *[-1] * len(strangers)]
    gallery = rotations.latents(network, np.concatenate([sample.mates.images, strangers.images]))[0]
    middle, spread = gallery.mean(axis=0), gallery.std(axis=0) + 1e-9
    probes = sample.mate_of[: context.sizes.attack_test]
    for kind in ("A", "I"):
        seen = rotations.latents(network, context.chain(kind)[probes])[0]
        away = ((seen - middle) / spread)[:, None] - ((gallery - middle) / spread)[None]
        nearest = np.square(away).sum(axis=2).argmin(axis=1)
        named = [owner[n] == probe for n, probe in zip(nearest, probes, strict=True)]
        result.mean(f"{key}.success" if kind == "A" else f"{key}.of-input", named)
    result.number(f"{key}.chance", 1 / len(owner))
    return result
