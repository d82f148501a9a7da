"""One evaluation: parts in order, each kept as soon as it is done, the report made of all that are there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from services.evaluate import parts
from services.evaluate.context import Context
from services.evaluate.figures import Result

# Raise when a part measures otherwise than before, so that what was kept is measured again.
VERSION = 1


def fingerprint(context: Context, data: str) -> str:
    """Names everything that figures depend on: model, data, seed, sizes, judges, and the optional material."""
    record: dict[str, Any] = {
        "version": VERSION,
        "model": context.subject.digest,
        "data": data,
        "faces": hashlib.sha256(context.sample.faces.images.tobytes()).hexdigest(),
        "seed": context.seed,
        "fpr": context.fpr,
        "sizes": asdict(context.sizes),
        "judges": sorted(context.judges),
        "material": [
            str(path) for path in (context.weights, context.pairs, context.photos, context.train_data) if path
        ],
    }
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def run(context: Context, names: Sequence[str], out: Path, mark: str) -> dict[str, Result]:
    """Measure the named parts, or take what an earlier run with the same fingerprint kept; all kept parts come back."""
    results: dict[str, Result] = {}
    for number, name in enumerate(names, start=1):
        path = out / "parts" / f"{name}.json"
        own = f"{mark}-{_material(context, name)}"
        kept = Result.read(path, own)
        if kept is None:
            with context.progress.part(name, number, len(names)):
                kept = parts.load(name)(context)
            kept.write(path, own)
        else:
            context.progress.console.print(f"[{number}/{len(names)}] {name}: kept", markup=False, highlight=False)
        results[name] = kept
    for name in parts.NAMES:
        if name not in results:
            kept = Result.read(out / "parts" / f"{name}.json", f"{mark}-{_material(context, name)}")
            if kept is not None:
                results[name] = kept
    return {name: results[name] for name in parts.NAMES if name in results}


def _material(context: Context, name: str) -> str:
    """Baselines and ablations may be trained after a first report: then their part is measured again."""
    folder = {"baselines": context.baselines, "ablations": context.ablations}.get(name)
    if folder is None or not folder.is_dir():
        return ""
    files = sorted(folder.glob("*/*.safetensors"))
    return hashlib.sha256(repr([(str(f), f.stat().st_mtime_ns) for f in files]).encode()).hexdigest()[:16]


def flatten(results: dict[str, Result], meta: dict[str, str | int | float]) -> dict[str, str | int | float]:
    """report.json: one flat object; reasons under ``skipped.KEY``."""
    flat: dict[str, str | int | float] = dict(meta)
    for result in results.values():
        flat.update({k: int(v) if k.endswith(".n") else v for k, v in result.figures.items()})
        flat.update({f"skipped.{k}": why for k, why in result.skipped.items()})
    return flat
