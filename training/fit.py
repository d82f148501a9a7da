"""``python -m training.fit --config FILE [key=value ...]``: shards to a registered candidate, by a fit.

The model that ships is fitted (:mod:`training.cover`), not trained by steps; this is that fit as a run: shards from
a folder or ``s3://``, a folder ``runs/NAME`` with the model, its card, a picture and the log, and, where a tracking
server is named, an MLflow run and a version of the registered model ``mien`` under the alias ``candidate``, which
``services.evaluate`` judges and ``services.promote`` moves on: as ``python -m training`` ends. The config is
``training/configs/fit/mien-128.yaml``, also on a cluster, where ``k8s/training/overlays/OVERLAY/fit`` runs it.

A fit takes minutes and keeps nothing on its way: what was interrupted begins again. Its MLflow run is found by what was
asked for, so that a pod that comes again, or a command given twice, goes on with that run and registers the same
weights once.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import torch
from PIL import Image
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

import storage
from mien import recognisers, store
from mien.errors import MienError
from mien.networks.cover import CoverConfig, CoverTransformer
from training import config as run_config
from training import cover
from training.config import Config
from training.data import CACHE_LIMIT, Faces, open_faces
from training.draws import Draws
from training.export import git_commit
from training.journal import Journal
from training.samples import chain, from_uint8, grid
from training.step import draw_codes
from training.tracking import ALIAS, EXPERIMENT, JsonLines, MLflow, beginning

logger = logging.getLogger(__name__)

MODEL: Final = "model"  # of the run's folder
SHOWN: Final = 10  # faces of the picture
# What does not change the weights: two fits that differ in nothing else are one run.
_ELSEWHERE: Final = frozenset({"runs", "threads", "cache", "cache_limit", "patience", "export", "mlflow"})


class FitData(Config):
    """Where the crops are (services.ingest wrote them)."""

    shards: str = Field(description="folder or s3:// prefix with manifest.json and its shards")
    limit: PositiveInt | None = Field(None, description="use only the first so many training samples (dry runs)")


class FitRecogniser(Config):
    """What shall tell likenesses apart (:mod:`training.likenesses`): no judge of the model any more."""

    name: Literal["sphereface20", "mobilefacenet-casia", "inception-resnet-v1"] = "mobilefacenet-casia"
    weights: str = Field(description="safetensors file")
    steps: PositiveInt = Field(cover.APART, description="of moving likenesses apart")


class FitConfig(Config):
    """A whole fit."""

    name: str = Field(pattern=r"^[A-Za-z0-9._-]+$")
    runs: str = Field("runs", description="folder of runs; this one lies in runs/name")
    seed: NonNegativeInt = 0
    bits: int = Field(128, gt=0, multiple_of=4)
    architecture: CoverConfig = CoverConfig()
    data: FitData
    recogniser: FitRecogniser | None = Field(None, description="None leaves likenesses as they fall")
    steps: PositiveInt = Field(500, description="of the context's regression")
    batch: PositiveInt = Field(64, description="faces a step")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: PositiveInt | None = Field(None, description="CPU threads; None leaves torch's choice")
    cache: str | None = Field(
        None, description="folder for verified copies of shards; None: $XDG_CACHE_HOME/mien/shards for s3://, else none"
    )
    cache_limit: PositiveInt | None = Field(None, description="bytes that the cache may hold; None is 16 GiB")
    patience: PositiveFloat = Field(
        600, description="seconds for which a store or a server that is away is asked again"
    )
    export: str | None = Field(None, description="folder that gets a copy of the model")
    mlflow: str | None = Field(None, description="tracking URI; None registers nothing")


class NotRegistered(MienError):
    """The model is fitted and MLflow has not taken it.

    Attributes:
        refused: whether the server answered, so that another try changes nothing.
    """

    def __init__(self, message: str, *, refused: bool) -> None:
        super().__init__(message)
        self.refused = refused


@dataclass(frozen=True)
class Fitted:
    """What came out.

    Attributes:
        model: its folder.
        config: as it lies there.
        figures: of validation faces.
        version: number of the registered version; None where no server was named.
    """

    model: Path
    config: store.ModelConfig
    figures: dict[str, float]
    version: str | None


def load(path: str | Path, overrides: Sequence[str] = ()) -> FitConfig:
    """Read a fit's config and apply ``a.b.c=value`` overrides; raises ValueError that says what is not allowed."""
    return FitConfig.model_validate(run_config.expand(run_config.read(path, overrides)))


def run(config: FitConfig) -> Fitted:
    """Fit, save, and hand over.

    Raises:
        training.data.ShardError: the data is not what its manifest says.
        storage.StorageError: it cannot be read.
        NotRegistered: the model is there, and MLflow has no version of it.
        ValueError: CUDA is asked for and there is none.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda, and torch sees no GPU; device=auto takes what is there")
    device = torch.device("cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu")
    folder = Path(config.runs) / config.name
    (folder / "samples").mkdir(parents=True, exist_ok=True)
    train, val = _faces(config, "train"), _faces(config, "val")
    store.write_atomically(folder / "config.json", (config.model_dump_json(indent=2) + "\n").encode())
    tracker = _tracker(config, folder, train, device) if config.mlflow else None
    recogniser = None
    if config.recogniser:
        recogniser = recognisers.load(config.recogniser.name, config.recogniser.weights).to(device).eval()
    began = time.perf_counter()
    torch.manual_seed(config.seed)
    network = CoverTransformer(config.architecture, bits=config.bits, size=train.crop_size)
    figures = cover.fit(
        network, train, val, steps=config.steps, batch=config.batch, seed=config.seed, device=device,
        recogniser=recogniser, apart=config.recogniser.steps if config.recogniser else cover.APART,
    )  # fmt: skip
    network.cpu().eval()
    seconds = time.perf_counter() - began
    picture, distances = look(network, val, config)
    figures = figures | distances
    logger.info("fitted in %.0f s: %s", seconds, " ".join(f"{k}={v:.4f}" for k, v in figures.items()))
    seen = config.steps * config.batch
    model = store.save(
        folder / MODEL,
        network,
        store.ModelConfig(
            architecture=config.architecture, bits=config.bits, crop_size=train.crop_size,
            training_commit=git_commit(), data_digest=train.digest, images_seen=seen,
        ),
        card=_card(config, len(train), train.digest, figures),
    )  # fmt: skip
    if config.export:
        shutil.copytree(folder / MODEL, config.export, dirs_exist_ok=True)
    told = {f"val/{name}": value for name, value in figures.items()} | {"seconds": seconds}
    JsonLines(folder / "log.jsonl").figures(seen, told)
    path = folder / "samples" / f"nimg-{seen:012d}.png"
    picture.save(path)
    version = None
    if tracker is not None and config.mlflow:
        tracker.figures(seen, told)
        tracker.picture(seen, path)
        tracker.finish(folder / MODEL)
        tracker.close(config.patience)
        version = _version(config.mlflow, tracker, folder, model.digest)
    return Fitted(Path(config.export) if config.export else folder / MODEL, model, figures, version)


def _faces(config: FitConfig, split: str) -> Faces:
    return open_faces(
        config.data.shards,
        split,
        limit=config.data.limit if split == "train" else None,
        cache=Path(config.cache) if config.cache else None,
        cache_limit=config.cache_limit or CACHE_LIMIT,
        patience=config.patience,
    )


@torch.no_grad()
def look(network: torch.nn.Module, val: Faces, config: FitConfig) -> tuple[Image.Image, dict[str, float]]:
    """The picture of a few validation faces (:data:`training.samples.COLUMNS`), and their L1 distances through 8 bits.

    Distances are on [-1, 1], as everywhere in training.
    """
    count = min(SHOWN, len(val))
    images = from_uint8(val.decode(torch.arange(count).numpy()).images)
    codes = draw_codes(config.bits, near_miss=0.0, draws=Draws(20, 0, count))
    made = chain(network, images, codes.first, codes.second, codes.wrong, codes.other_wrong)
    distances = {f"L1_I_{name}": (made[name] - images).abs().mean().item() for name in ("A1", "R", "WR1")}
    return Image.fromarray(grid(made)), distances


def key_of(config: FitConfig, data_digest: str) -> str:
    """Names the MLflow run: the same for the same fit of the same data by the same code."""
    asked = config.model_dump(mode="json", exclude=set(_ELSEWHERE)) | {"data": data_digest, "limit": config.data.limit}
    text = json.dumps([asked, git_commit()], sort_keys=True)
    return f"fit-{hashlib.sha256(text.encode()).hexdigest()[:32]}"


def _tracker(config: FitConfig, folder: Path, train: Faces, device: torch.device) -> MLflow:
    tags = {
        "git_commit": git_commit() or "unknown",
        "data_digest": train.digest,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "processes": "1",
    }
    begin = beginning(
        name=config.name, params=config.model_dump(), tags=tags, shards=config.data.shards, digest=train.digest,
        samples=len(train),
    )  # fmt: skip
    key = key_of(config, train.digest)
    # The journal of a folder is of one run; one that another fit left and MLflow has got makes room.
    journal = Journal(folder)
    if {entry.get("key") for _, entry in journal.entries(0, 1)} - {key}:
        if not journal.delivered():
            raise ValueError(
                f"{folder} holds another fit, which MLflow has not got: deliver it"
                f" (python -m training.tracking {folder}), or give this one another name"
            )
        for name in ("journal.position", "journal.jsonl"):
            (folder / name).unlink(missing_ok=True)
    return MLflow(config.mlflow or "", folder=folder, key=key, begin=begin)


def _version(uri: str, tracker: MLflow, folder: Path, digest: str) -> str:
    """The number of the version that was registered; raises NotRegistered where there is none."""
    if not Journal(folder).delivered():
        raise NotRegistered(
            f"MLflow at {uri} has not got all of {folder} yet; `python -m training.tracking {folder}` goes on with it",
            refused=False,
        )
    import mlflow

    client = mlflow.MlflowClient(uri, uri)
    mine = client.search_model_versions(f"name = '{EXPERIMENT}' and run_id = '{tracker.run_id}'")
    for version in mine:
        if version.tags.get("digest") == digest:
            return str(version.version)
    raise NotRegistered(f"MLflow at {uri} did not take the model; the warnings above say why", refused=True)


def _card(config: FitConfig, samples: int, digest: str, figures: dict[str, float]) -> str:
    rows = "\n".join(f"| {name} | {value:.4f} |" for name, value in figures.items())
    against = "no recogniser had a part in it"
    if config.recogniser:
        against = f"`{config.recogniser.name}` told its likenesses apart, and is no judge of it"
    return f"""# {config.name}

The eigenfaces and likenesses of a cover transformer, fitted by `training.fit`; {against}.

- Code: {config.bits} bits
- Data: {samples:,} crops of shards whose manifest has sha256 `{digest}`; the data's terms bind this model

| figure of validation faces, through 8 bits | value |
| --- | --- |
{rows}

Judge it (`services.evaluate`) before it is used: none of these figures is about identity.

The fit's whole config:

```json
{json.dumps(config.model_dump(mode="json"), indent=1)}
```
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit codes: 0 a model is there and, where asked for, registered; 1 config or data are wrong, or MLflow refuses;
    75 storage or MLflow is away: give the command again (Kubernetes does)."""
    parser = argparse.ArgumentParser(prog="training.fit", description="Fit the model that ships, shards to candidate.")
    parser.add_argument("--config", required=True, help="YAML or JSON file")
    parser.add_argument("--dry-run", action="store_true", help="print the whole config and stop")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="for example data.shards=s3://mien/shards/faces"
    )
    chosen = parser.parse_intermixed_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    try:
        config = load(chosen.config, chosen.overrides)
        if chosen.dry_run:
            sys.stdout.write(config.model_dump_json(indent=2) + "\n")
            return 0
        fitted = run(config)
    except (storage.Unreachable, NotRegistered) as error:
        sys.stderr.write(f"training.fit: {error}\n")
        return 1 if isinstance(error, NotRegistered) and error.refused else 75
    except (MienError, ValueError) as error:
        sys.stderr.write(f"training.fit: {error}\n")
        return 1
    if fitted.version is not None:
        sys.stdout.write(f"models:/{EXPERIMENT}/{fitted.version} is the {ALIAS}, digest {fitted.config.digest[:12]}\n")
    sys.stdout.write(f"{fitted.model}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
