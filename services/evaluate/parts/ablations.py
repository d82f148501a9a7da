"""Section 5.6 and appendix D: what each term is for. Judges the models that ``train-ablations`` made."""

from __future__ import annotations

import numpy as np

import mien
from mien.errors import MienError, ModelError
from services.evaluate.chain import Chain, Subject
from services.evaluate.context import Context
from services.evaluate.distances import Pixels, l1
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
HOW = "not trained; `python -m services.evaluate train-ablations` trains them (docs/evaluation.md: what a CPU affords)"


def run(context: Context) -> Result:
    """For each ablation the shares of table 1 by the headline judge, L1 of recovery, and images it was trained on.

    Ablations may have been trained on smaller crops than the model that the report is about: the faces are made as
    small for them, and judged so. The judge's threshold stays that of whole faces.
    """
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
            faces = smaller(context.sample.faces.images[:count], model.crop_size)
        except MienError as error:
            result.skip(f"ablations.{name}", str(error))
            continue
        chain = Chain(
            Subject(model.transform, model.bits, model.digest),
            faces,
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
        result.number(f"ablations.{name}.crop", model.crop_size)
    return result


def smaller(images: Pixels, size: int) -> Pixels:
    """Faces a whole number of times smaller, each pixel the mean of those it takes the place of, as training has them.

    Args:
        images: uint8 ``[M, S, S, 3]``.
        size: S of what is returned.

    Raises:
        ModelError: the faces are no multiple of it.
    """
    times, rest = divmod(images.shape[1], size)
    if rest:
        raise ModelError(f"trained on crops of {size} pixels, which does not divide the {images.shape[1]} of the faces")
    cells = images.reshape(len(images), size, times, size, times, 3)
    return np.rint(cells.mean(axis=(2, 4))).astype(np.uint8)
