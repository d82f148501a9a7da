"""Many passwords, many people? The paper's section 5.4 and its figures of one face under many codes."""

from __future__ import annotations

import numpy as np

from mien import passwords
from services.evaluate import files
from services.evaluate.chain import Codes
from services.evaluate.context import Context
from services.evaluate.distances import Floats, Pixels, l1
from services.evaluate.figures import Result, grid
from services.evaluate.parts import verification


def run(context: Context) -> Result:
    """Similarity among the faces that 32 passwords give one person; what one bit does; a grid of codes."""
    result = Result()
    _passwords(context, result)
    _bits(context, result)
    _grid(context, result)
    return result


def people(cosines: Floats, threshold: float) -> int:
    """How many people a matrix of cosines shows: groups of faces linked by pairs that pass as the same person."""
    from scipy.sparse.csgraph import connected_components

    return int(connected_components(cosines >= threshold, directed=False)[0])


def _under(context: Context, faces: Pixels, codes: Codes, what: str) -> Pixels:
    out = np.empty_like(faces)
    with context.progress.stage(what, len(faces)) as advance:
        for start in range(0, len(faces), 32):
            part = slice(start, start + 32)
            out[part] = files.save(context.subject.transform(faces[part], codes[part]))
            advance(len(out[part]))
    return out


def _passwords(context: Context, result: Result) -> None:
    count = min(context.sizes.diversity, len(context.sample.faces))
    each = context.sizes.passwords
    rng = np.random.default_rng([context.seed, 3])
    codes = passwords.random_codes(each, context.subject.bits, rng)
    result.number("diversity.passwords", each)
    repeated = np.repeat(context.sample.faces.images[:count], each, axis=0)
    made = _under(context, repeated, np.tile(codes, (count, 1)), f"{each} passwords for each of {count} faces")
    rows, columns = np.triu_indices(each, k=1)
    owners = np.repeat(np.arange(count), len(rows)).tolist()
    for judge in context.judges.values():
        if judge.trainer:
            continue
        threshold = verification.thresholds(context, judge)[0]
        e = context.chain.embed_pictures(judge, made, "passwords").reshape(count, each, -1)
        tables = e @ e.transpose(0, 2, 1)
        pairs = tables[:, rows, columns]
        result.mean(f"diversity.{judge.name}.same", (pairs >= threshold).ravel(), owners)
        result.mean(f"diversity.{judge.name}.cosine", pairs.ravel(), owners)
        result.mean(f"diversity.{judge.name}.people", [people(table, threshold) for table in tables], share=False)


def _bits(context: Context, result: Result) -> None:
    count, bits = min(context.sizes.bits, len(context.sample.faces)), context.subject.bits
    faces = context.sample.faces.images[:count]
    base = context.chain.codes["first"][:count]
    near = np.repeat(base, bits, axis=0)
    near[np.arange(len(near)), np.tile(np.arange(bits), count)] ^= True
    made = _under(context, np.repeat(faces, bits, axis=0), near, "one bit at a time")
    before = np.repeat(context.chain("A", count), bits, axis=0)
    owners = np.repeat(np.arange(count), bits).tolist()
    change = l1(before, made)
    result.mean("diversity.one-bit.l1", change, owners)
    result.series["diversity.bits.l1"] = change.reshape(count, bits).mean(axis=0).round(5).tolist()
    judge = context.headline
    threshold = verification.thresholds(context, judge)[0]
    flipped = context.chain.embed_pictures(judge, made, "one bit")
    cosines = (flipped * np.repeat(context.chain.embeddings(judge, "A")[:count], bits, axis=0)).sum(axis=1)
    result.mean(f"diversity.one-bit.{judge.name}.same", cosines >= threshold, owners)
    result.mean(f"diversity.one-bit.{judge.name}.cosine", cosines, owners)
    result.series["diversity.bits.cosine"] = cosines.reshape(count, bits).mean(axis=0).round(4).tolist()


def _grid(context: Context, result: Result) -> None:
    """All 256 codes of one face where the model has 8 bits; else 64 that count up in six bits spread over the code."""
    bits = context.subject.bits
    if bits == 8:
        count, varied = 256, list(range(8))
    else:
        result.skip("diversity.grid-256", f"this model has {bits} bits; the report shows 64 of its codes")
        varied = [round(i * (bits - 1) / 5) for i in range(6)] if bits >= 6 else list(range(bits))
        count = 2 ** len(varied)
    codes = np.repeat(context.chain.codes["first"][:1], count, axis=0)
    for place, bit in enumerate(varied):
        codes[:, bit] = (np.arange(count) >> place) & 1
    made = _under(context, np.repeat(context.sample.faces.images[:1], count, axis=0), codes, "a grid of codes")
    side = 16 if count == 256 else 8
    small = made[:, ::2, ::2] if side == 16 else made
    result.picture("codes", grid([list(small[i : i + side]) for i in range(0, count, side)]))
    result.series["codes.bits"] = varied
