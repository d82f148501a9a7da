"""Attacks by who knows how the cover transformer works (:mod:`services.evaluate.covers`)."""

from __future__ import annotations

import time
from typing import Final

import numpy as np
from numpy.typing import NDArray

from mien.networks import CoverTransformer
from services.evaluate import covers, distances, files
from services.evaluate.chain import Codes
from services.evaluate.context import Context
from services.evaluate.distances import Floats, Pixels
from services.evaluate.faces import read_shards
from services.evaluate.figures import Result, grid
from services.evaluate.parts import verification
from services.evaluate.parts.attacks import other_codes, strangers_of
from services.evaluate.parts.attacks_known import one_code, pass_as_one

KNOWN_PAIRS: Final = (1, 64, 512, 2048)
FEW_PAIRS: Final = (16, 32, 64)
_VICTIMS: Final = 24
# Pictures that are opened by pairs made for each.
_CHOSEN: Final = 6
# Regression on fewer faces says nothing.
_FEWEST: Final = 100
# All codes are tried where there are no more bits than this.
_EXHAUSTIBLE: Final = 16
# Pictures of one password of which the likeness is read, by majority.
_READ: Final = 9


def _network(context: Context, result: Result, *keys: str) -> CoverTransformer | None:
    """The network, where it is of the kind; else None, and the result says so."""
    network = getattr(context.model, "_network", context.model)
    if isinstance(network, CoverTransformer):
        return network
    for key in keys:
        result.skip(key, "an attack on the cover transformer; this model is of another architecture")
    return None


def _others(context: Context, result: Result, key: str) -> Pixels | None:
    """Faces of nobody in the sample, to make pairs of; None where they are too few, and the result says so."""
    wanted = context.sizes.latent_train
    if context.train_data is not None:
        known = read_shards(context.train_data, "train", wanted).images
    else:
        known = context.sample.rest.images[:wanted]
    if len(known) >= _FEWEST:
        return known
    result.skip(key, f"{len(known)} faces of other people; {_FEWEST} are needed (--train-data)")
    return None


def _all_show(network: CoverTransformer, pictures: Pixels) -> NDArray[np.int64]:
    """The likeness that pictures of one password show, for each of them."""
    read = covers.shown_likeness(network, pictures[:_READ])
    return np.full(len(pictures), np.bincount(read).argmax())


def pattern(context: Context) -> Result:
    """No password, no original: the known pattern tells the right code when it is tried. How long does trying take?

    Only codes that pick the likeness that A shows are tried: all of them where there are few, else some.
    """
    result = Result()
    key, bits = "attack.pattern", context.subject.bits
    network = _network(context, result, key)
    if network is None:
        return result
    count = min(context.sizes.candidates_faces, len(context.sample.faces))
    pictures = context.chain("A", count)
    numbers = covers.shown_likeness(network, pictures)
    mixed, own = covers.carried(network, pictures, numbers)
    everything = covers.all_codes(bits) if bits <= _EXHAUSTIBLE else None
    whose = covers.number_of(network, everything) if everything is not None else None
    firsts, right, wrong, spent, tried = [], [], [], 0.0, 0
    with context.progress.stage("codes by the known pattern", count) as advance:
        for i, number in enumerate(numbers.tolist()):
            truth = context.chain.codes["first"][i]
            codes: Codes
            if everything is not None:
                codes = everything[whose == number]
            else:
                rng = np.random.default_rng([context.seed, 14, i])
                others = other_codes(truth, context.sizes.latent_codes - 1, rng)
                # The right code is among those tried only where the likeness was read right.
                codes = covers.with_number(network, np.concatenate([truth[None], others]), number)
            begun = time.perf_counter()
            scores = covers.pattern(network, mixed[i], int(own[i]), codes)
            spent += time.perf_counter() - begun
            tried += len(codes)
            same = (codes == truth).all(axis=1)
            firsts.append(bool(same.any() and scores[same].max() > scores[~same].max()))
            right.append(float(scores[same].max()) if same.any() else 0.0)
            wrong.append(float(scores[~same].max()))
            advance(1)
    left = 2.0**bits / len(network.likenesses.faces)
    result.mean(f"{key}.success", firsts)
    result.number(f"{key}.chance", count / tried)
    result.number(f"{key}.codes-tried", tried / count)
    result.number(f"{key}.codes-left", left)
    result.mean(f"{key}.right.cosine", right)
    result.mean(f"{key}.wrong.cosine", wrong)
    result.number(f"{key}.seconds", spent / tried)
    result.number(f"{key}.hours-for-all-codes", spent / tried * left / 3600)
    return result


def likeness(context: Context) -> Result:
    """What the face that A shows tells of the code: which of the likenesses it picks."""
    result = Result()
    key = "attack.likeness"
    network = _network(context, result, key)
    if network is None:
        return result
    count = min(context.sizes.attack_test, len(context.sample.faces))
    with context.progress.stage("the likeness that is shown", count) as advance:
        read = covers.shown_likeness(network, context.chain("A", count), advance)
    truth = covers.number_of(network, context.chain.codes["first"][:count])
    result.mean(f"{key}.success", read == truth, context.groups[:count])
    total = len(network.likenesses.faces)
    result.number(f"{key}.chance", 1 / total)
    result.number(f"{key}.bits-told", float(np.log2(total)))
    return result


def known_pairs(context: Context) -> Result:
    """Pairs of one password: does least squares from what is hidden to the face open its other pictures?

    The attacker makes the pairs of other people's faces, as who may have pictures anonymized under the password can.
    """
    result = Result()
    key = "attack.known-pairs"
    network = _network(context, result, key)
    if network is None:
        return result
    known = _others(context, result, key)
    if known is None:
        return result
    judge = context.headline
    threshold = verification.thresholds(context, judge)[0]
    victims = context.sample.faces.images[:_VICTIMS]
    code = context.chain.codes["first"][0]
    theirs = one_code(context, victims, code)
    number = _all_show(network, theirs)
    counts = [k for k in KNOWN_PAIRS if k <= len(known)]
    known = known[: counts[-1]]
    with context.progress.stage("pairs of one password", len(known)) as advance:
        wanted = covers.secrets(network, known)
        given, _ = covers.carried(network, one_code(context, known, code), np.full(len(known), number[0]), advance)
    mixed, truth = covers.carried(network, theirs, number)[0], covers.secrets(network, victims)
    rows, shown = [list(victims[:6]), list(theirs[:6])], []
    before = float(pass_as_one(context, judge, list(victims), list(theirs), threshold).mean())
    for count in counts:
        found = covers.Affine(given[:count], wanted[:count])(mixed)
        back = files.save(covers.opened(network, theirs, number, found))
        result.mean(f"{key}.{count}.success", pass_as_one(context, judge, list(victims), list(back), threshold))
        result.number(f"{key}.{count}.chance", before)
        result.mean(f"{key}.{count}.psnr", distances.psnr(victims, back))
        left = np.square(found - truth).sum(axis=1) / np.square(truth - wanted.mean(axis=0)).sum(axis=1)
        result.mean(f"{key}.{count}.explained", 1 - left, share=False)
        rows.append(list(back[:6]))
        shown.append(count)
    result.picture("known-pairs", grid(rows))
    result.series["known-pairs.shown"] = shown
    return result


def chosen_pairs(context: Context) -> Result:
    """Who may have pictures anonymized under a password puts other faces into A's context: its number is theirs.

    A few such pairs are solved for the signs of that number, which open A.
    """
    result = Result()
    key = "attack.chosen-pairs"
    network = _network(context, result, key)
    if network is None:
        return result
    known = _others(context, result, key)
    if known is None:
        return result
    known = known[: 2 * FEW_PAIRS[-1]]
    judge = context.headline
    threshold = verification.thresholds(context, judge)[0]
    victims = min(_CHOSEN, len(context.sample.faces))
    hidden, real = context.chain("A", victims), context.sample.faces.images[:victims]
    truth, likenesses = covers.secrets(network, real), covers.shown_likeness(network, hidden)
    mixed, own = covers.carried(network, hidden, likenesses)
    opened: dict[int, list[Pixels]] = {count: [] for count in FEW_PAIRS}
    explained: dict[int, list[float]] = {count: [] for count in FEW_PAIRS}
    spent, same = dict.fromkeys(FEW_PAIRS, 0.0), []
    with context.progress.stage("chosen pairs", victims) as advance:
        for i in range(victims):
            mine = slice(i, i + 1)
            made = files.save(covers.with_context_of(network, hidden[i], known))
            fits = covers.picture_numbers(network, made) == own[i]
            same.append(float(fits.mean()))
            made = made[fits][: FEW_PAIRS[-1]]
            if not len(made):
                made = hidden[mine]  # nothing can be learned of it
            theirs = one_code(context, made, context.chain.codes["first"][i])
            given, _ = covers.carried(network, theirs, np.full(len(made), likenesses[i]))
            x = np.concatenate([covers.secrets(network, made), np.ones((len(made), covers.known_numbers()))], axis=1)
            for count in FEW_PAIRS:
                begun = time.perf_counter()
                solved = covers.signs_of(network.mix_robust, x[:count], given[:count])
                spent[count] += time.perf_counter() - begun
                found = covers.read(network, mixed[mine], solved)
                opened[count].append(files.save(covers.opened(network, hidden[mine], likenesses[mine], found))[0])
                explained[count].append(float(1 - np.square(found - truth[i]).sum() / np.square(truth[i]).sum()))
            advance(1)
    before = float(pass_as_one(context, judge, list(real), list(hidden), threshold).mean())
    for count in FEW_PAIRS:
        result.mean(f"{key}.{count}.success", pass_as_one(context, judge, list(real), opened[count], threshold))
        result.number(f"{key}.{count}.chance", before)
        result.mean(f"{key}.{count}.explained", explained[count], share=False)
        result.number(f"{key}.{count}.seconds", spent[count] / victims)
    result.mean(f"{key}.same-number", same, share=False)
    return result


def outline(context: Context) -> Result:
    """No password, no original: the painted face is taken away towards the outline, and the middle is guessed."""
    result = Result()
    key = "attack.outline"
    network = _network(context, result, key)
    if network is None:
        return result
    judge = context.headline
    threshold = verification.thresholds(context, judge)[0]
    count = min(context.sizes.attack_test, len(context.sample.faces))
    hidden, real = context.chain("A", count), list(context.sample.faces.images[:count])
    back = files.save(covers.opened(network, hidden, covers.shown_likeness(network, hidden), None))
    groups = context.groups[:count]
    result.mean(f"{key}.success", pass_as_one(context, judge, real, list(back), threshold), groups)
    result.number(f"{key}.chance", float(pass_as_one(context, judge, real, list(hidden), threshold).mean()))
    result.mean(f"{key}.psnr", distances.psnr(np.stack(real), back))
    return result


def hidden_linking(context: Context) -> Result:
    """Two photos of one person under one password, no code: is what they hide as near as the faces are?"""
    result = Result()
    key, sample = "attack.hidden-linking", context.sample
    network = _network(context, result, key)
    if network is None:
        return result
    if len(sample.mate_of) < 2:
        result.skip(key, "nobody in the sample has another photo")
        return result
    count = min(len(sample.mate_of), context.sizes.linking)
    first, second = sample.faces.images[sample.mate_of[:count]], sample.mates.images[:count]
    code, other = context.chain.codes["first"][0], context.chain.codes["second"][0]

    def hidden(pictures: Pixels, under: Codes) -> Floats:
        made = one_code(context, pictures, under)
        return covers.carried(network, made, _all_show(network, made))[0]

    mine = hidden(first, code)
    for name, theirs in (("success", hidden(second, code)), ("two-passwords", hidden(second, other))):
        result.mean(f"{key}.{name}", _nearest_is_own(mine, theirs))
    result.mean(f"{key}.of-input", _nearest_is_own(covers.secrets(network, first), covers.secrets(network, second)))
    result.number(f"{key}.chance", 1 / count)
    return result


def _nearest_is_own(a: Floats, b: Floats) -> NDArray[np.bool_]:
    """Whether of the rows of ``b`` the one of the same place is nearest, by the cosine of what is not common."""
    a, b = a - a.mean(axis=0), b - b.mean(axis=0)
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True).clip(1e-9) for x in (a, b))
    out: NDArray[np.bool_] = (a @ b.T).argmax(axis=1) == np.arange(len(a))
    return out


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
    gallery = covers.leading(network, np.concatenate([sample.mates.images, strangers.images]))
    middle, spread = gallery.mean(axis=0), gallery.std(axis=0) + 1e-9
    probes = sample.mate_of[: context.sizes.attack_test]
    for kind in ("A", "I"):
        seen = covers.leading(network, context.chain(kind)[probes])
        away = ((seen - middle) / spread)[:, None] - ((gallery - middle) / spread)[None]
        nearest = np.square(away).sum(axis=2).argmin(axis=1)
        named = [owner[n] == probe for n, probe in zip(nearest, probes, strict=True)]
        result.mean(f"{key}.success" if kind == "A" else f"{key}.of-input", named)
    result.number(f"{key}.chance", 1 / len(owner))
    return result
