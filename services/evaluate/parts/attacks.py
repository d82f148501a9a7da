"""What who holds the model and an anonymized picture, but no password, can do; each beside chance.

The model is public here (Kerckhoffs): its 2^N codes can be tried. The paper says that its own model does not withstand
such attacks (appendix B); these figures say by how much ours does not.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from PIL import Image
from scipy.stats import rankdata

from mien import passwords
from mien.networks.blocks import head_mask
from services.evaluate import attackers, distances, intervals
from services.evaluate.chain import Codes, save_array
from services.evaluate.context import Context
from services.evaluate.distances import Floats, Pixels
from services.evaluate.faces import Faces
from services.evaluate.figures import Result
from services.evaluate.files import LOSSY
from services.evaluate.judges import Judge
from services.evaluate.parts import verification

_CHUNK: Final = 256  # codes tried at a time


def apply_codes(context: Context, face: Pixels, codes: Codes) -> Pixels:
    """One face ``[S, S, 3]`` under many codes, as 8-bit pictures: what a PNG of each would hold."""
    return context.subject.transform(np.repeat(face[None], len(codes), axis=0), codes)


def fast_judge(context: Context) -> Judge:
    """The attacker's recogniser: any will do, so the fastest that was in no loss."""
    return context.judges.get("mobilefacenet-ms1m", context.headline)


def other_codes(right: np.ndarray, count: int, rng: np.random.Generator) -> Codes:
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
class Gallery:
    embeddings: Floats
    owner: list[int]  # index of the face in the sample, -1 for strangers


def strangers_of(context: Context) -> Faces:
    """One photo of each of so many people outside the sample that the gallery has its size with the mates."""
    sample = context.sample
    firsts: dict[object, int] = {}
    for i, identity in enumerate(sample.rest.identities):
        if identity is not None:
            firsts.setdefault(identity, i)
    return sample.rest.take(list(firsts.values())[: max(0, context.sizes.gallery - len(sample.mates))])


def gallery_of(context: Context, judge: Judge) -> Gallery:
    """Other photos of the people in the sample, among strangers."""
    strangers = strangers_of(context)
    mates = verification.mates(context, judge)
    others = context.chain.embed(judge, "distractors", lambda: strangers.images, len(strangers))
    return Gallery(np.concatenate([mates, others]), [*context.sample.mate_of, *[-1] * len(others)])


def sweep(context: Context) -> Result:
    """Try codes, look every outcome up in a gallery of other photos, believe the best match.

    The right code is among those tried; where not all are, the share of wrong codes that beat it says how many of the
    whole 2^N would.
    """
    result = Result()
    judge = fast_judge(context)
    key, sample = "attack.sweep", context.sample
    if len(sample.mate_of) < 2:
        result.skip(key, "nobody in the sample has another photo, which the gallery would hold")
        return result
    gallery = gallery_of(context, judge)
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
    result.mean(f"{key}.wrong-codes-above", np.array(beaten) * (total - 1), share=False)
    result.number(f"{key}.codes-tried", tried)
    result.number(f"{key}.codes", total)
    result.number(f"{key}.gallery", len(gallery.owner))
    return result


def _sweep_one(
    context: Context, judge: Judge, gallery: Gallery, probe: int, tried: int, advance: attackers.Advance
) -> tuple[Floats, np.ndarray]:
    """Best similarity and whose, for the right code first and then the wrong ones; kept chunk by chunk."""
    rng = np.random.default_rng([context.seed, 6, probe])
    right = context.chain.codes["right"][probe]
    codes = np.concatenate([right[None], other_codes(right, tried - 1, rng)])
    face = context.chain("A")[probe]
    best, who = [], []
    for start in range(0, len(codes), _CHUNK):
        name = f"sweep-{judge.name}-{probe}-{tried}-{start}.npy"
        file = context.chain.cache / name if context.chain.cache else None
        if file is not None and file.exists():
            table = np.load(file, allow_pickle=False)
        else:
            e = judge.embed(apply_codes(context, face, codes[start : start + _CHUNK]))
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

    Looks: MTCNN's confidence; likelihood of AlexNet's features among real faces; smoothness; length of the PNG. (The
    paper's appendix would use D, which training does not export.) Round trip: how far ``T_-p' T_p' A`` is from A. Grid:
    the right one was an 8-bit picture once, so its unrounded values lie nearer to whole steps.

    Several: whoever has several pictures of one password adds up what each says of a code. Codes are drawn for every
    face by itself here, which says the same of chance: the right one in all of them against a wrong one in each.
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
            codes = np.concatenate([right[None], other_codes(right, wrong, rng)])
            hidden = context.chain("A", faces)[i]
            made = apply_codes(context, hidden, codes)
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
        result.number(f"attack.{name}.several.success", _pooled(np.stack(rows), context.seed), len(rows))
        result.number(f"attack.{name}.several.chance", 1 / (wrong + 1))
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


def _pooled(rows: Floats, seed: int, several: int = 8, draws: int = 200) -> float:
    """How often the right one has the best mean rank over ``several`` faces; rows ``[M, K]``, right ones first."""
    ranks = np.stack([rankdata(row) for row in rows])
    rng = np.random.default_rng([seed, 12])
    groups = [rng.choice(len(ranks), size=min(several, len(ranks)), replace=False) for _ in range(draws)]
    means = np.stack([ranks[group].mean(axis=0) for group in groups])
    best = means.max(axis=1, keepdims=True)
    return float(((means[:, :1] >= best) / (means >= best).sum(axis=1, keepdims=True)).mean())


def png_bytes(picture: Pixels) -> int:
    """Length of a picture's PNG: what a compressor thinks of it."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return len(buffer.getvalue())


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
    out["shortest"] = -np.array([png_bytes(p) for p in made], dtype=np.float64)
    out["smoothest"] = -np.abs(np.diff(values, 2, axis=1)).mean(axis=(1, 2, 3))
    again = context.subject.transform(made, ~codes)
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


def climb_bits(start: np.ndarray, score: object, steps: int) -> tuple[np.ndarray, float, int]:
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
    judge = fast_judge(context)
    gallery = gallery_of(context, judge)
    bits = context.subject.bits
    exact, named, used = [], [], []
    probes = context.sample.mate_of[: context.sizes.climbs]
    with context.progress.stage("hill climbing", len(probes)) as advance:
        for probe in probes:
            hidden = context.chain("A")[probe]
            rng = np.random.default_rng([context.seed, 8, probe])

            def score(codes: Codes, hidden: Pixels = hidden) -> Floats:
                return (judge.embed(apply_codes(context, hidden, codes)) @ gallery.embeddings.T).max(axis=1)

            code, _, evaluations = climb_bits(passwords.random_codes(1, bits, rng)[0], score, bits)
            e = judge.embed(apply_codes(context, hidden, code[None]))[0]
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


# Denial. -----------------------------------------------------------------------------------------------------------


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
