"""Section 5.6 and appendix D: what each term is for. Judges the models that ``train-ablations`` made."""

from __future__ import annotations

import mien
from mien.errors import MienError
from services.evaluate.chain import Chain, Subject
from services.evaluate.context import Context
from services.evaluate.distances import l1
from services.evaluate.figures import Result
from services.evaluate.parts import verification

NAMES = (
    "full",
    "without-dissimilarity",
    "without-wrong-recovery",
    "without-predictor",
    "without-recovery-class",
    "fixed-recogniser",
    "eight-bits",
)
HOW = "not trained; `python -m services.evaluate train-ablations` trains them (hours of CPU, or minutes of a GPU)"


def run(context: Context) -> Result:
    """For each ablation the shares of table 1 by the headline judge, L1 of recovery, and images it was trained on."""
    result = Result()
    judge = context.headline
    threshold = verification.thresholds(context, judge)[0]
    count = min(context.sizes.ablation_faces, len(context.sample.faces))
    groups = context.groups[:count]
    for name in NAMES:
        folder = context.ablations / name if context.ablations else None
        if folder is None or not (folder / "config.json").exists():
            result.skip(f"ablations.{name}", HOW)
            continue
        try:
            model = mien.load(folder)
        except MienError as error:
            result.skip(f"ablations.{name}", str(error))
            continue
        chain = Chain(
            Subject(model.transform, model.bits, model.digest),
            context.sample.faces.images[:count],
            seed=context.seed,
            progress=context.progress,
            cache=context.chain.cache / f"{name}-{model.digest[:12]}" if context.chain.cache else None,
        )
        for pair, (a, b) in verification.PAIRS.items():
            cosines = (chain.embeddings(judge, a) * chain.embeddings(judge, b)).sum(axis=1)
            result.mean(f"ablations.{name}.{pair}.same", cosines >= threshold, groups)
            result.mean(f"ablations.{name}.{pair}.cosine", cosines, groups)
        result.mean(f"ablations.{name}.l1", l1(chain("I"), chain("R")), groups)
        result.number(f"ablations.{name}.images-seen", model.config.images_seen)
    return result
