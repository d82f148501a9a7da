"""From what was asked for on the command line to a context that parts can run on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from mien import manifest
from services.evaluate import faces, judges, run
from services.evaluate.chain import Chain, Subject
from services.evaluate.context import Context, Sizes
from services.evaluate.progress import Progress


@dataclass(frozen=True)
class Request:
    """The options, as given."""

    model: str
    data: str
    out: Path
    split: manifest.Split = "test"
    judges: tuple[str, ...] = ("dlib", "mobilefacenet-ms1m", "mobilefacenet-casia")
    weights: Path | None = None
    limit: int = 600
    seed: int = 0
    quick: bool = False
    pairs: Path | None = None
    photos: Path | None = None
    train_data: str | None = None
    baselines: Path | None = None
    ablations: Path | None = None
    clips: Path | None = None
    sweep_codes: int | None = None


@dataclass(frozen=True)
class Ready:
    """A context, the name of everything it depends on, and what the report says about itself."""

    context: Context
    fingerprint: str
    meta: dict[str, str | int | float]


def prepare(request: Request, console: Console) -> Ready:
    """Load model, faces and judges.

    Raises:
        ModelError, ShardError, OSError, ValueError: what is missing or broken, in words.
    """
    import mien

    model = mien.load(request.model)
    everyone = faces.read_shards(request.data, request.split)
    limit = min(request.limit, 40) if request.quick else request.limit
    sizes = Sizes().quick() if request.quick else Sizes()
    if request.sweep_codes is not None:
        sizes = replace(sizes, sweep_codes=request.sweep_codes)
    sample = faces.draw(everyone, limit, request.seed)
    weights = request.weights or default("../shared/weights")
    found, missing = judges.load(request.judges, weights)
    for name, why in missing.items():
        console.print(f"without {name}: {why}", style="yellow", markup=False, highlight=False)
    data_digest = faces.read_manifest(request.data)[1]
    progress = Progress(console)
    subject = Subject(
        transform=model.transform,
        bits=model.bits,
        digest=model.digest,
        transform_float=model.transform_float,
        architecture=model.config.architecture.name,
    )
    context = Context(
        subject=subject,
        sample=sample,
        judges=found,
        missing_judges=missing,
        chain=Chain(subject, sample.faces.images, seed=request.seed, progress=progress),
        progress=progress,
        seed=request.seed,
        # With few faces there are too few pairs of different people for a rarer error.
        fpr=1e-3 if len(sample.faces) > 150 else 5e-2,
        sizes=sizes,
        weights=weights,
        pairs=request.pairs or default("../shared/data/lfw-pairs-folds1-5.txt"),
        photos=request.photos or default("../shared/data/lfw-folds1-5.tar"),
        everyone=everyone,
        train_data=request.train_data or (str(p) if (p := default("shards/faces")) else None),
        baselines=request.baselines or Path("runs/baselines"),
        ablations=request.ablations or Path("runs/ablations"),
        clips=request.clips,
        model_path=request.model,
        model=model,
    )
    mark = run.fingerprint(context, f"{data_digest} {request.split}")
    context.chain.cache = request.out / "parts" / f"embeddings-{mark[:12]}"
    meta: dict[str, str | int | float] = {
        "format": 1,
        "model.path": request.model,
        "model.digest": model.digest,
        "model.architecture": model.config.architecture.name,
        "model.bits": model.bits,
        "model.images-seen": model.config.images_seen,
        "data.path": request.data,
        "data.digest": data_digest,
        "data.split": request.split,
        "seed": request.seed,
        "faces": len(sample.faces),
        "people": len(set(context.groups)),
        "people-with-two-photos": len(sample.mate_of),
        "fpr": context.fpr,
        "judges": ",".join(found),
        "judges.headline": context.headline.name,
    }
    return Ready(context, mark, meta)


def default(path: str) -> Path | None:
    """The path, where something is there."""
    return Path(path) if Path(path).exists() else None
