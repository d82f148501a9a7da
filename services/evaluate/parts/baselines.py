"""Table 2: the baselines, each with its trained deanonymizer, beside the model."""

from __future__ import annotations

import numpy as np
from scipy.stats import spearmanr

from services.evaluate import baselines, deanonymizer, files, paper
from services.evaluate.context import Context
from services.evaluate.figures import Result, grid
from services.evaluate.parts import verification

HOW = "not trained; `python -m services.evaluate train-baselines` trains them all"


def run(context: Context) -> Result:
    """Recovery by LPIPS, DSSIM, L1, L2; how often A and R pass as the person; the order beside the paper's."""
    result = Result()
    count = min(context.sizes.baseline_faces, len(context.sample.faces))
    original, groups = context.chain("I", count), context.groups[:count]
    judge = context.headline
    threshold = verification.thresholds(context, judge)[0]
    real = context.chain.embeddings(judge, "I")[:count]
    rows = [list(original[:6])]
    named = []
    for name in baselines.NAMES:
        folder = context.baselines / name if context.baselines else None
        if folder is None or not (folder / deanonymizer.WEIGHTS).exists():
            result.skip(f"baselines.{name}", HOW)
            continue
        hidden = files.save(deanonymizer.anonymizer(name, folder)(original))
        back = files.save(deanonymizer.load(folder, deanonymizer.WEIGHTS).apply_to(hidden))
        for metric, distance in context.distances.items():
            result.mean(f"baselines.{name}.{metric}", distance(original, back), groups)
        for kind, pictures in (("I-A", hidden), ("I-R", back)):
            e = context.chain.embed_pictures(judge, pictures, f"{name} {kind}")
            result.mean(f"baselines.{name}.{kind}.same", (e * real).sum(axis=1) >= threshold, groups)
            result.series[f"cosines.{name}.{kind}"] = np.round((e * real).sum(axis=1), 4).tolist()
        rows += [list(hidden[:6]), list(back[:6])]
        named.append(name)
    if named:
        result.picture("baselines", grid(rows))
        result.series["baselines.shown"] = named
    metric = "lpips" if "lpips" in context.distances else "dssim"
    if len(named) >= 3:
        ours = [result.figures[f"baselines.{name}.{metric}"] for name in named]
        theirs = [paper.BASELINES[name][metric] for name in named]
        result.number("baselines.order.spearman", float(spearmanr(ours, theirs).statistic), len(named))
        result.series["baselines.order"] = [named[i] for i in np.argsort(ours)]
        result.series["baselines.order.paper"] = [named[i] for i in np.argsort(theirs)]
        result.series["baselines.order.metric"] = metric
    return result
