"""One evaluation: parts in order, each kept as soon as it is done, the report made of all that are there."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from services.evaluate import parts
from services.evaluate.context import Context, Sizes
from services.evaluate.figures import Result

# Raise when a part measures otherwise than before, so that what was kept is measured again.
VERSION = 2


def fingerprint(context: Context, data: str) -> str:
    """Names what figures depend on: model, data, seed, judges, and the optional material; sizes are kept by part."""
    record: dict[str, Any] = {
        "version": VERSION,
        "model": context.subject.digest,
        "data": data,
        "faces": hashlib.sha256(context.sample.faces.images.tobytes()).hexdigest(),
        "seed": context.seed,
        "fpr": context.fpr,
        "judges": sorted(context.judges),
        "material": [
            str(path) for path in (context.weights, context.pairs, context.photos, context.train_data) if path
        ],
    }
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def run(context: Context, names: Sequence[str], out: Path, mark: str) -> dict[str, Result]:
    """Measure the named parts, or take what an earlier run with the same fingerprint kept; all kept parts come back."""
    results: dict[str, Result] = {}
    took = expected = 0.0
    for number, name in enumerate(names, start=1):
        path = out / "parts" / f"{name}.json"
        own = f"{mark}-{_material(context, name)}"
        kept = _kept(context, path, own)
        if kept is None:
            # By the shares that parts have of a default run, at the pace of those that are done.
            # Embeddings that were kept make a part look fast: never less than a quarter.
            pace = max(took / expected, 0.25) if expected else 1.0
            left = pace * sum(parts.SECONDS[n] for n in names[number - 1 :])
            known = expected > 0 or context.sizes == Sizes()
            start = time.perf_counter()
            with context.progress.part(name, number, len(names), left if known else None), _watched(context) as used:
                kept = parts.load(name)(context)
            kept.sizes = {field: getattr(context.sizes, field) for field in sorted(used)}
            kept.write(path, own)
            took, expected = took + time.perf_counter() - start, expected + parts.SECONDS[name]
        else:
            context.progress.console.print(f"[{number}/{len(names)}] {name}: kept", markup=False, highlight=False)
        results[name] = kept
    for name in parts.NAMES:
        if name not in results:
            kept = _kept(context, out / "parts" / f"{name}.json", f"{mark}-{_material(context, name)}")
            if kept is not None:
                results[name] = kept
    return {name: results[name] for name in parts.NAMES if name in results}


def _kept(context: Context, path: Path, mark: str) -> Result | None:
    """What was kept, if it was measured at the sizes that are asked for now."""
    kept = Result.read(path, mark)
    if kept is None or any(getattr(context.sizes, name, None) != value for name, value in kept.sizes.items()):
        return None
    return kept


@contextmanager
def _watched(context: Context) -> Iterator[set[str]]:
    """Which sizes a part looks at: those alone decide whether it has to be measured again."""
    sizes, used = context.sizes, set[str]()

    class Watched(Sizes):
        def __getattribute__(self, name: str) -> Any:
            if name in Sizes.__dataclass_fields__:
                used.add(name)
            return super().__getattribute__(name)

    context.sizes = Watched(**asdict(sizes))
    used.clear()
    try:
        yield used
    finally:
        context.sizes = sizes


def _material(context: Context, name: str) -> str:
    """Baselines and ablations may be trained after a first report, clips be added: their part is measured again."""
    folder = {"baselines": context.baselines, "ablations": context.ablations, "video": context.clips}.get(name)
    if folder is None or not folder.is_dir():
        return ""
    files = sorted(folder.glob("*" if name == "video" else "*/*.safetensors"))
    return hashlib.sha256(repr([(str(f), f.stat().st_mtime_ns) for f in files]).encode()).hexdigest()[:16]


def flatten(results: dict[str, Result], meta: dict[str, str | int | float]) -> dict[str, str | int | float]:
    """report.json: one flat object; reasons under ``skipped.KEY``."""
    flat: dict[str, str | int | float] = dict(meta)
    for result in results.values():
        flat.update({k: int(v) if k.endswith(".n") else v for k, v in result.figures.items()})
        flat.update({f"skipped.{k}": why for k, why in result.skipped.items()})
    return flat
