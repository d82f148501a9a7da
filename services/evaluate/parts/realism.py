"""Do they look like photographs? Frechet distances on named features; people are asked with ``study``."""

from __future__ import annotations

from services.evaluate import distances
from services.evaluate.context import Context
from services.evaluate.figures import Result

KINDS = ("I", "A", "WR", "R")


def run(context: Context) -> Result:
    """Frechet distance of I, A, WR and R to real faces of *other* people. That of I is the floor at this sample size.

    Without an interval: resampling repeats faces, and repeated faces are what the distance is most sensitive to.
    """
    result = Result()
    result.skip("realism.fid", "FID is defined on Inception-v3's features, whose weights are a download; see docs")
    reference = context.sample.rest.take(range(min(context.sizes.reference, len(context.sample.rest))))
    count = min(len(context.sample.faces), len(reference))
    if count < 20:
        result.skip("realism", f"{len(reference)} real faces of other people are left to compare with; 20 are needed")
        return result
    result.number("realism.n", count)
    judge = context.judges.get("mobilefacenet-ms1m", context.headline)
    real = context.chain.embed(judge, "reference", lambda: reference.images, len(reference))[:count]
    for kind in KINDS:
        made = context.chain.embeddings(judge, kind)[:count]
        result.number(f"realism.frechet.{judge.name}.{kind}", distances.frechet(made, real), count)
    if context.lpips_file is None:
        result.skip("realism.frechet.alexnet", "no lpips_alex.safetensors in --weights")
        return result
    features = distances.alexnet_features(context.lpips_file)
    with context.progress.stage("AlexNet looks", len(KINDS) + 1) as advance:
        ideal = features(reference.images[:count])
        advance(1)
        for kind in KINDS:
            value = distances.frechet(features(context.chain(kind)[:count]), ideal)
            result.number(f"realism.frechet.alexnet.{kind}", value, count)
            advance(1)
    return result
