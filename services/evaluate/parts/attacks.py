"""What who holds the model and an anonymized picture, but no password, can do; each beside chance.

The model is public here (Kerckhoffs): its 2^N codes can be tried. The paper says that its own model does not withstand
such attacks (appendix B); these figures say by how much ours does not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import torch

from mien import passwords
from mien.networks.blocks import head_mask
from services.evaluate import attackers, distances, files, intervals
from services.evaluate.chain import Codes, save_array
from services.evaluate.context import Context
from services.evaluate.distances import Floats, Pixels
from services.evaluate.faces import Faces, read_shards
from services.evaluate.figures import Result, grid
from services.evaluate.files import LOSSY
from services.evaluate.judges import Judge
from services.evaluate.parts import verification

_CHUNK: Final = 256  # codes tried at a time


def _apply(context: Context, face: Pixels, codes: Codes) -> Pixels:
    """One face ``[S, S, 3]`` under many codes, saved."""
    return files.save(context.subject.transform(np.repeat(face[None], len(codes), axis=0), codes))


def _fast_judge(context: Context) -> Judge:
    """The attacker's recogniser: any will do, so the fastest that was in no loss."""
    return context.judges.get("mobilefacenet-ms1m", context.headline)


def _other_codes(right: np.ndarray, count: int, rng: np.random.Generator) -> Codes:
    """``count`` different wrong codes; all of them where there are no more."""
    bits = len(right)
    if bits <= 20:
        number = int("".join("1" if b else "0" for b in right), 2)
        everything = np.delete(np.arange(2**bits), number)
        chosen = everything if count >= len(everything) else rng.choice(everything, size=count, replace=False)
        codes: Codes = (chosen[:, None] >> np.arange(bits)[::-1] & 1).astype(np.bool_)
        return codes
    return passwords.random_codes(count, bits, rng)


# The sweep. --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Gallery:
    embeddings: Floats
    owner: list[int]  # index of the face in the sample, -1 for strangers


def _gallery(context: Context, judge: Judge) -> _Gallery:
    sample = context.sample
    mates = verification.mates(context, judge)
    wanted = max(0, context.sizes.gallery - len(mates))
    firsts: dict[object, int] = {}
    for i, identity in enumerate(sample.rest.identities):
        if identity is not None:
            firsts.setdefault(identity, i)
    strangers = sample.rest.take(list(firsts.values())[:wanted])
    others = context.chain.embed(judge, "distractors", lambda: strangers.images, len(strangers))
    return _Gallery(np.concatenate([mates, others]), [*sample.mate_of, *[-1] * len(others)])


def sweep(context: Context) -> Result:
    """Try codes, look every outcome up in a gallery of other photos, believe the best match.

    The right code is among those tried; where not all are, the share of wrong codes that beat it says how many of the
    whole 2^N would.
    """
    result = Result()
    judge = _fast_judge(context)
    key, sample = "attack.sweep", context.sample
    if len(sample.mate_of) < 2:
        result.skip(key, "nobody in the sample has another photo, which the gallery would hold")
        return result
    gallery = _gallery(context, judge)
    probes = sample.mate_of[: context.sizes.sweep_faces]
    total = 2**context.subject.bits
    tried = min(context.sizes.sweep_codes, total)
    hits, direct, beaten, firsts = [], [], [], []
    with context.progress.stage(f"{tried} codes for each of {len(probes)} faces", tried * len(probes)) as advance:
        for probe in probes:
            best, who = _sweep_one(context, judge, gallery, probe, tried, advance)
            hits.append(float(gallery.owner[who[int(np.argmax(best))]] == probe))
            beaten.append(float((best[1:] > best[0]).mean()))
            firsts.append(float(best[0] >= best.max()))
            e = context.chain.embeddings(judge, "A")[probe]
            direct.append(float(gallery.owner[int(np.argmax(gallery.embeddings @ e))] == probe))
    result.mean(f"{key}.success", hits)
    result.number(f"{key}.chance", 1 / len(gallery.owner))
    result.mean(f"{key}.without-sweep", direct)
    result.mean(f"{key}.right-code-first", firsts)
    result.mean(f"{key}.wrong-codes-above", np.array(beaten) * (total - 1))
    result.number(f"{key}.codes-tried", tried)
    result.number(f"{key}.codes", total)
    result.number(f"{key}.gallery", len(gallery.owner))
    return result


def _sweep_one(
    context: Context, judge: Judge, gallery: _Gallery, probe: int, tried: int, advance: attackers.Advance
) -> tuple[Floats, np.ndarray]:
    """Best similarity and whose, for the right code first and then the wrong ones; kept chunk by chunk."""
    rng = np.random.default_rng([context.seed, 6, probe])
    right = context.chain.codes["right"][probe]
    codes = np.concatenate([right[None], _other_codes(right, tried - 1, rng)])
    face = context.chain("A")[probe]
    best, who = [], []
    for start in range(0, len(codes), _CHUNK):
        name = f"sweep-{judge.name}-{probe}-{tried}-{start}.npy"
        file = context.chain.cache / name if context.chain.cache else None
        if file is not None and file.exists():
            table = np.load(file, allow_pickle=False)
        else:
            e = judge.embed(_apply(context, face, codes[start : start + _CHUNK]))
            cosines = e @ gallery.embeddings.T
            table = np.stack([cosines.max(axis=1), cosines.argmax(axis=1).astype(np.float64)])
            if file is not None:
                save_array(file, table)
        best.append(table[0])
        who.append(table[1].astype(np.int64))
        advance(table.shape[1])
    return np.concatenate(best), np.concatenate(who)


# The right one among candidates. ------------------------------------------------------------------------------------


def candidates(context: Context) -> Result:
    """Does the right one of many candidates give itself away: by looks, by the round trip, by its pixels?

    Looks: MTCNN's confidence; likelihood of AlexNet's features among real faces; smoothness. (The paper's appendix
    would use D, which training does not export.) Round trip: how far ``T_-p' T_p' A`` is from A, files between. Grid:
    the right one was an 8-bit picture once, so its unrounded values lie nearer to whole steps.
    """
    result = Result()
    faces = min(context.sizes.candidates_faces, len(context.sample.faces))
    wrong = min(context.sizes.candidates_codes, 2**context.subject.bits) - 1
    looks = _looks(context)
    found: dict[str, list[Floats]] = {}
    with context.progress.stage(f"{wrong + 1} candidates for each of {faces} faces", faces) as advance:
        for i in range(faces):
            rng = np.random.default_rng([context.seed, 7, i])
            right = context.chain.codes["right"][i]
            codes = np.concatenate([right[None], _other_codes(right, wrong, rng)])
            hidden = context.chain("A")[i]
            made = _apply(context, hidden, codes)
            for name, value in _scores(context, hidden, made, codes, looks).items():
                found.setdefault(name, []).append(value)
            advance(1)
    for name, rows in found.items():
        # Among t equal bests the right one counts 1/t: the attacker would have to guess.
        tops = [float(r[0] >= r.max()) / max(1, int((r >= r.max()).sum())) for r in rows]
        areas = [intervals.area_under_curve(r[:1], r[1:]) for r in rows]
        result.mean(f"attack.{name}.success", tops)
        result.number(f"attack.{name}.chance", 1 / (wrong + 1))
        result.mean(f"attack.{name}.auc", areas)
    for name in ("best-looking", "round-trip", "grid"):
        if f"attack.{name}.success" not in result.figures:
            why = "no lpips_alex.safetensors in --weights" if name == "best-looking" else "no unrounded output"
            result.skip(f"attack.{name}", why)
    if context.subject.architecture == "coupling":
        result.series["round-trip"] = (
            "This network satisfies T_-p T_p = 1 exactly for every code: only rounding and clipping are left for the"
            " round trip to see, and its chance level says nothing about other architectures."
        )
    return result


def _looks(context: Context) -> tuple[object, Floats, Floats] | None:
    """(features, mean, inverse covariance) of real faces of other people; None without the weights or the faces."""
    reference = context.sample.rest.images[: context.sizes.reference]
    if context.lpips_file is None or len(reference) < 20:
        return None
    features = distances.alexnet_features(context.lpips_file)
    real = features(reference)
    covariance = np.cov(real, rowvar=False)
    shrunk = covariance + np.eye(len(covariance)) * np.trace(covariance) / len(covariance) * 0.1
    return features, real.mean(axis=0), np.linalg.inv(shrunk)


def _scores(
    context: Context, hidden: Pixels, made: Pixels, codes: Codes, looks: tuple[object, Floats, Floats] | None
) -> dict[str, Floats]:
    """Higher is more like the right one, float ``[K]`` a score."""
    out: dict[str, Floats] = {}
    if looks is not None:
        features, mean, inverse = looks
        away = features(made) - mean  # type: ignore[operator]
        out["best-looking"] = -np.einsum("ki,ij,kj->k", away, inverse, away)
    confident = [max((f.confidence for f in context.detector.detect(p)), default=0.0) for p in made]
    out["best-detected"] = np.array(confident)
    values = made.astype(np.float64)
    out["smoothest"] = -np.abs(np.diff(values, 2, axis=1)).mean(axis=(1, 2, 3))
    again = files.save(context.subject.transform(made, ~codes))
    out["round-trip"] = -distances.l1(np.repeat(hidden[None], len(made), axis=0), again)
    if context.subject.transform_float is not None:
        exact = context.subject.transform_float(distances.to_tensor(np.repeat(hidden[None], len(codes), axis=0)), codes)
        changed = head_mask(hidden.shape[0])[0, 0] > 0.1
        steps = ((exact + 1) * 127.5)[:, :, changed].double()
        # 0 for values spread evenly between whole steps, 1 for whole ones.
        wave = torch.stack([torch.cos(2 * np.pi * steps), torch.sin(2 * np.pi * steps)])
        out["grid"] = wave.mean(dim=(2, 3))[0].numpy()
    return out


# Hill climbing, with and without a known original. ------------------------------------------------------------------


def _climb(start: np.ndarray, score: object, steps: int) -> tuple[np.ndarray, float, int]:
    """Flip the bit that helps most until none does: (code, its score, evaluations)."""
    code, evaluations = start.copy(), 1
    best = float(score(code[None])[0])  # type: ignore[operator]
    for _ in range(steps):
        neighbours = np.repeat(code[None], len(code), axis=0)
        neighbours[np.arange(len(code)), np.arange(len(code))] ^= True
        values = score(neighbours)  # type: ignore[operator]
        evaluations += len(code)
        if values.max() <= best:
            break
        best, code = float(values.max()), neighbours[int(values.argmax())]
    return code, best, evaluations


def climb(context: Context) -> Result:
    """Without any original: flip bits while the best match in the gallery rises."""
    result = Result()
    key = "attack.hill-climbing"
    if len(context.sample.mate_of) < 2:
        result.skip(key, "nobody in the sample has another photo, which the gallery would hold")
        return result
    judge = _fast_judge(context)
    gallery = _gallery(context, judge)
    bits = context.subject.bits
    exact, named, used = [], [], []
    probes = context.sample.mate_of[: context.sizes.climbs]
    with context.progress.stage("hill climbing", len(probes)) as advance:
        for probe in probes:
            hidden = context.chain("A")[probe]
            rng = np.random.default_rng([context.seed, 8, probe])

            def score(codes: Codes, hidden: Pixels = hidden) -> Floats:
                return (judge.embed(_apply(context, hidden, codes)) @ gallery.embeddings.T).max(axis=1)

            code, _, evaluations = _climb(passwords.random_codes(1, bits, rng)[0], score, bits)
            e = judge.embed(_apply(context, hidden, code[None]))[0]
            exact.append(float((code == context.chain.codes["right"][probe]).all()))
            named.append(float(gallery.owner[int(np.argmax(gallery.embeddings @ e))] == probe))
            used.append(evaluations)
            advance(1)
    result.mean(f"{key}.success", exact)
    result.number(f"{key}.chance", min(1.0, float(np.mean(used)) / 2**bits))
    result.mean(f"{key}.named", named)
    result.number(f"{key}.named.chance", 1 / len(gallery.owner))
    result.mean(f"{key}.evaluations", used)
    return result


def known_plaintext(context: Context) -> Result:
    """With one original beside its anonymized picture: climb to the code, and recover another picture with it.

    One password gives one code everywhere in a deployment, so one leaked original may open all pictures of a password.
    """
    result = Result()
    key, bits, restarts = "attack.known-plaintext", context.subject.bits, 3
    count = min(context.sizes.climbs, len(context.sample.faces) - 1)
    judge = context.headline
    threshold = verification.thresholds(context, judge)[0]
    exact, used, others, nearest = [], [], [], []
    with context.progress.stage("known plaintext", count) as advance:
        for i in range(count):
            original, hidden = context.sample.faces.images[i], context.chain("A")[i]
            truth = context.chain.codes["first"][i]
            rng = np.random.default_rng([context.seed, 9, i])

            def score(codes: Codes, original: Pixels = original, hidden: Pixels = hidden) -> Floats:
                made = _apply(context, original, codes)
                return -distances.l1(made, np.repeat(hidden[None], len(made), axis=0))

            best, code, spent = -np.inf, truth, 0
            for start in passwords.random_codes(restarts, bits, rng):
                found, value, evaluations = _climb(start, score, bits)
                spent += evaluations
                if value > best:
                    best, code = value, found
                if best > -1e-3:  # nothing but rounding is left
                    break
            exact.append(float((code == truth).all()))
            nearest.append(float((code != truth).sum()))
            used.append(spent)
            victim = context.sample.faces.images[i + 1]
            theirs = _apply(context, victim, truth[None])[0]
            e = judge.embed(np.stack([victim, _apply(context, theirs, ~code[None])[0]]))
            others.append(float(e[0] @ e[1] >= threshold))
            advance(1)
    result.mean(f"{key}.success", exact)
    result.number(f"{key}.chance", min(1.0, float(np.mean(used)) / 2**bits))
    result.mean(f"{key}.evaluations", used)
    result.mean(f"{key}.bits-wrong", nearest)
    result.mean(f"{key}.other-picture.same", others)
    result.number(f"{key}.other-picture.chance", result_share(context, judge))
    return result


def result_share(context: Context, judge: Judge) -> float:
    """How often a *uniformly* wrong code gives a face that passes as the person."""
    threshold = verification.thresholds(context, judge)[0]
    cosines = (context.chain.embeddings(judge, "I") * context.chain.embeddings(judge, "WR")).sum(axis=1)
    return float((cosines >= threshold).mean())


# What is trained. ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Material:
    original: Pixels
    hidden: Pixels
    codes: Codes
    where: str


def _material(context: Context) -> _Material:
    """Faces of nobody in the sample, anonymized by the model under random codes; made once."""
    known = context.memo.get("attack material")
    if isinstance(known, _Material):
        return known
    wanted = context.sizes.attack_train
    if context.train_data is not None:
        faces, where = read_shards(context.train_data, "train", wanted), context.train_data
    else:
        rest: Faces = context.sample.rest
        faces, where = rest.take(range(min(wanted, len(rest)))), "faces of other people of the same data"
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
    material = _material(context)
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
        e = context.chain.embed(judge, "inverted", lambda: guessed, count)
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
    material = _material(context)
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
    material = _material(context)
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


def denial(context: Context) -> Result:
    """Who cannot read a picture can still destroy it: how often the right password no longer gives the person back."""
    result = Result()
    judge = context.headline
    threshold = verification.thresholds(context, judge)[0]
    count = min(context.sizes.lossy, len(context.sample.faces))
    real = context.chain.embeddings(judge, "I", count)
    for codec in ("png", *LOSSY):
        kind = "R" if codec == "png" else f"R@{codec}"
        lost = (context.chain.embeddings(judge, kind, count)[:count] * real).sum(axis=1) < threshold
        result.mean(f"attack.denial.{codec}.success", lost, context.groups[:count])
    result.number("attack.denial.chance", result.figures["attack.denial.png.success"])
    return result
