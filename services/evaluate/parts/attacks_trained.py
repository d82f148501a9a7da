"""Attackers that learn: an inverter, a reader of codes, a classifier of recovered faces; each beside chance.

They see faces of other people, which the attacker anonymized with the model, for minutes of a CPU. What they reach is a
lower bound.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from mien import passwords
from services.evaluate import attackers, files, intervals
from services.evaluate.chain import Codes
from services.evaluate.context import Context
from services.evaluate.distances import Pixels
from services.evaluate.faces import Faces, read_shards
from services.evaluate.figures import Result, grid
from services.evaluate.parts import verification

_FEWEST: Final = 16


@dataclass(frozen=True)
class _Material:
    original: Pixels
    hidden: Pixels
    codes: Codes
    where: str


def _material(context: Context, result: Result, key: str) -> _Material | None:
    """Faces of nobody in the sample, anonymized by the model under random codes, made once; else says so."""
    # Read before anything is remembered: what a part looks at decides whether it has to be measured again.
    wanted = context.sizes.attack_train
    known = context.memo.get("attack material")
    if isinstance(known, _Material):
        return known
    if context.train_data is not None:
        faces, where = read_shards(context.train_data, "train", wanted), context.train_data
    else:
        rest: Faces = context.sample.rest
        faces, where = rest.take(range(min(wanted, len(rest)))), "faces of other people of the same data"
    if len(faces) < _FEWEST:
        result.skip(key, f"{len(faces)} faces of other people to learn from; {_FEWEST} are needed (--train-data)")
        return None
    codes = passwords.random_codes(len(faces), context.subject.bits, np.random.default_rng([context.seed, 10]))
    hidden = np.empty_like(faces.images)
    with context.progress.stage("faces for attackers to learn from", len(faces)) as advance:
        for start in range(0, len(faces), 32):
            part = slice(start, start + 32)
            hidden[part] = files.save(context.subject.transform(faces.images[part], codes[part]))
            advance(len(hidden[part]))
    material = _Material(faces.images, hidden, codes, where)
    context.memo["attack material"] = material
    return material


def inverter(context: Context) -> Result:
    """A network that learns A -> I without a code, with the trainer's recogniser as its guide where there is one."""
    result = Result()
    material = _material(context, result, "attack.inverter")
    if material is None:
        return result
    guide = next((j.recogniser for j in context.judges.values() if j.trainer), None)
    images = context.sizes.attack_images
    with context.progress.stage("training an inverter", images) as advance:
        network = attackers.train_inverter(
            material.hidden,
            material.original,
            images=images,
            seed=context.seed,
            advance=advance,
            recogniser=None if guide is None else guide.frozen(),
        )
    count = min(context.sizes.attack_test, len(context.sample.faces))
    original, hidden = context.chain("I", count), context.chain("A", count)
    guessed = files.save(attackers.invert(network, hidden))
    groups = context.groups[:count]
    for name in ("lpips", "l1", "psnr"):
        if name in context.distances:
            result.mean(f"attack.inverter.{name}", context.distances[name](original, guessed), groups)
            result.mean(f"attack.inverter.nothing-done.{name}", context.distances[name](original, hidden), groups)
    for judge in context.judges.values():
        if judge.trainer:
            continue
        threshold = verification.thresholds(context, judge)[0]
        real = context.chain.embeddings(judge, "I")[:count]
        e = context.chain.embed_pictures(judge, guessed, "inverted")
        same = (e * real).sum(axis=1) >= threshold
        before = (context.chain.embeddings(judge, "A")[:count] * real).sum(axis=1) >= threshold
        key = "attack.inverter" if judge is context.headline else f"attack.inverter.{judge.name}"
        result.mean(f"{key}.success", same, groups)
        result.mean(f"{key}.chance", before, groups)
    result.number("attack.inverter.images", images)
    shown = min(6, count)
    result.picture("inverter", grid([list(x[:shown]) for x in (original, hidden, guessed)]))
    return result


def code_predictor(context: Context) -> Result:
    """A network that learns A -> p: bits read rightly (chance 1/2), whole codes (chance 2^-N)."""
    result = Result()
    material = _material(context, result, "attack.code-predictor")
    if material is None:
        return result
    images = context.sizes.attack_images
    with context.progress.stage("training a code predictor", images) as advance:
        network = attackers.train_classifier(
            material.hidden, material.codes.astype(np.float64), images=images, seed=context.seed, advance=advance
        )
    guessed = attackers.scores(network, context.chain("A")) > 0
    right = guessed == context.chain.codes["first"]
    bits = context.subject.bits
    result.mean("attack.code-predictor.bits", right.mean(axis=1), context.groups)
    result.number("attack.code-predictor.bits.chance", 0.5)
    result.mean("attack.code-predictor.success", right.all(axis=1), context.groups)
    result.number("attack.code-predictor.chance", 2.0**-bits)
    result.series["code-predictor.bits"] = right.mean(axis=0).round(3).tolist()
    return result


def recovery_classifier(context: Context) -> Result:
    """A network that learns to tell rightly from wrongly recovered faces, both made of the attacker's own pictures."""
    result = Result()
    material = _material(context, result, "attack.recovery-classifier")
    if material is None:
        return result
    is_right = np.arange(len(material.original)) % 2 == 0
    rng = np.random.default_rng([context.seed, 11])
    right = ~material.codes
    wrong = passwords.random_codes(len(right), context.subject.bits, rng)
    codes = np.where(is_right[:, None], right, wrong)
    made = np.empty_like(material.hidden)
    with context.progress.stage("recovering, half of them wrongly", len(made)) as advance:
        for start in range(0, len(made), 32):
            part = slice(start, start + 32)
            made[part] = files.save(context.subject.transform(material.hidden[part], codes[part]))
            advance(len(made[part]))
    labels = is_right.astype(np.float64)[:, None]
    images = context.sizes.attack_images
    with context.progress.stage("training a classifier of R and WR", images) as advance:
        network = attackers.train_classifier(made, labels, images=images, seed=context.seed, advance=advance)
    positive = attackers.scores(network, context.chain("R"))[:, 0]
    negative = attackers.scores(network, context.chain("WR"))[:, 0]
    correct = np.concatenate([positive > 0, negative <= 0])
    result.mean("attack.recovery-classifier.success", correct, [*context.groups, *context.groups])
    result.number("attack.recovery-classifier.chance", 0.5)
    result.number("attack.recovery-classifier.auc", intervals.area_under_curve(positive, negative), 2 * len(positive))
    return result
