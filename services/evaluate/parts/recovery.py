"""What the right password gives back: the paper's table 2, from saved files."""

from __future__ import annotations

from services.evaluate import distances as measures
from services.evaluate import files
from services.evaluate.context import Context
from services.evaluate.figures import Result, grid

SHOWN = ("I", "A", "A2", "R", "WR", "WR2", "WR-1bit")


def run(context: Context) -> Result:
    """LPIPS, DSSIM, L1, L2 (on [-1, 1]), PSNR of R against I through PNG and lossy files, and of unrounded floats."""
    result = Result()
    chain, groups = context.chain, context.groups
    for name, distance in context.distances.items():
        result.mean(f"recovery.{name}", distance(chain("I"), chain("R")), groups)
        result.mean(f"change.{name}", distance(chain("I"), chain("A")), groups)
    count = min(context.sizes.lossy, len(context.sample.faces))
    for codec in files.LOSSY:
        original, back = chain("I", count), chain(f"R@{codec}", count)
        for name, distance in context.distances.items():
            result.mean(f"recovery.{codec}.{name}", distance(original, back), groups[:count])
    if context.subject.transform_float is None:
        result.skip("recovery.float", "this model has no unrounded output")
    else:
        images = measures.to_tensor(chain("I", count))
        hidden = context.subject.transform_float(images, chain.codes["first"][:count])
        back = measures.to_pixels(context.subject.transform_float(hidden, chain.codes["right"][:count]))
        for name, distance in context.distances.items():
            result.mean(f"recovery.float.{name}", distance(chain("I", count), back), groups[:count])
    if "lpips" not in context.distances:
        result.skip("recovery.lpips", "no lpips_alex.safetensors in --weights")
    shown = min(8, len(context.sample.faces))
    result.series["grid"] = list(SHOWN)
    result.picture("faces", grid([[chain(kind, shown)[i] for kind in SHOWN] for i in range(shown)]))
    return result
