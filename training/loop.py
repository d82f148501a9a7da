"""The training loop, top to bottom: step; once in a while log, look, save; at the end export."""

from __future__ import annotations

import json
import logging
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

import storage
from mien import networks, recognisers, store
from training import distributed
from training.checkpoint import Checkpoints, snapshot
from training.config import RunConfig
from training.data import CACHE_LIMIT, Batches, Faces, Reduced, open_faces
from training.distributed import World
from training.draws import Draws
from training.export import export, git_commit
from training.order import LANES
from training.samples import chain, from_uint8, grid
from training.step import Trainer, draw_codes
from training.tracking import (
    FINISH_PATIENCE,
    STOP_PATIENCE,
    JsonLines,
    MLflow,
    Tolerant,
    Tracker,
    beginning,
    new_key,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """How a run ended: ``finished`` with a model folder, or interrupted by a signal with its state saved."""

    finished: bool
    nimg: int
    model: Path | None


OnBatch = Callable[[int, NDArray[np.int64]], None]
"""``hook(nimg, indices)``: what a process is about to train on, for tests and for looking into the data's order."""


def train(
    config: RunConfig,
    *,
    stop_at: int | None = None,
    allow_change: frozenset[str] = frozenset(),
    on_batch: OnBatch | None = None,
) -> Outcome:
    """Train until ``config.total_images`` are seen; goes on from the last whole checkpoint where the run exists.

    Under torchrun every process calls this alike. The run ends with the first whole batch at or past its end.

    Args:
        config: the run.
        allow_change: sections in which the config may differ from the one the run began with (a curriculum); every
            config a run has had is kept in its folder.
        stop_at: end (with a checkpoint) once so many images are seen: for tests and for rationed machines.
        on_batch: told of every batch before its step.

    Raises:
        training.data.ShardError: the data is not what its manifest says.
        training.distributed.PeerLost: another process died; start the run again.
        mien.errors.ModelError: ``config.start`` cannot be read.
        training.step.TrainingDiverged: too many steps in a row were not finite.
        storage.StorageError: checkpoints cannot be read, or the last one cannot be written.
        ValueError: the run exists with another config, the batch is too small to be divided, ``config.start`` is of
            another network, or the crops of the shards are no multiple of ``config.crop_size``.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    world = distributed.join(config.device, timeout=config.timeout, patience=config.patience)
    try:
        return _train(config, world, stop_at, allow_change, on_batch)
    finally:
        distributed.leave()


def _train(
    config: RunConfig, world: World, stop_at: int | None, allow_change: frozenset[str], on_batch: OnBatch | None
) -> Outcome:
    device = world.device
    torch.backends.cudnn.benchmark = True  # of CUDA alone; all shapes of a run are the same
    if config.bf16:
        torch.set_float32_matmul_precision("high")
    if config.batch < world.size * config.accumulate:
        raise ValueError(
            f"a batch of {config.batch} cannot be divided over {world.size} processes and {config.accumulate}"
            " micro-batches; give a larger batch"
        )
    folder = Path(config.runs) / config.name
    place = storage.open_prefix(config.checkpoints or folder / "checkpoints", patience=config.patience)
    checkpoints = Checkpoints(place, keep=config.keep_checkpoints)
    world.on_first(lambda: _prepare(config, folder, place, allow_change))
    shards = _faces(config, "train", config.data.limit)
    validation = Validation(_faces(config, "val", min(256, config.data.limit or 256)), config, world)
    trainer = Trainer(config, identities=shards.identities, device=device, world=world)
    logger.info(
        "%s: %d training crops of %d identities; T has %.2f M parameters; %d processes on %s, %s",
        config.name, len(shards), shards.identities, networks.count_parameters(trainer.transformer) / 1e6,
        world.size, device, config.strategy,
    )  # fmt: skip

    nimg, known = 0, {}
    resumed = checkpoints.resume(world)
    if resumed is not None:
        nimg, known = resumed
        if known.get("config"):
            _refuse_change(config.model_dump(mode="json"), known["config"], place.url, allow_change)
        trainer.load_state_dict(known["trainer"])
        logger.info("going on from %d images", nimg)
        if known.get("light"):
            anew = "Adam's moments and D's buffers"
            if "head" not in known["trainer"]["modules"]:
                anew += ", and D, Q and F,"
                _centre(trainer, shards, world)
            logger.warning("its checkpoint is a light one: %s begin anew", anew)
        del resumed, known["trainer"]
    else:
        if config.start:
            known["start_digest"] = _start(config, config.start, trainer)
        _centre(trainer, shards, world)
    trackers = _trackers(config, folder, known, shards, world) if world.first else []

    part = world.part(config.batch)
    end = min(config.total_images, stop_at or config.total_images)
    meter = _Meter(nimg, config.total_images, quiet=not world.first)
    begun, score, interrupted = nimg, None, _Interrupt()
    looked: dict[str, float] | None = None  # figures of the last look; the run's last step is always looked at
    coming = Batches(shards, seed=config.seed, nimg=nimg, size=config.batch, part=part, threads=config.decoders)
    with coming as batches, interrupted:
        stopping = world.any(bool(interrupted))
        while nimg < end and not stopping:
            waited = time.perf_counter()
            indices, batch = next(batches)
            images = from_uint8(batch.images, device)
            if config.data.flip:
                draws = Draws(config.seed, nimg + part.start, nimg + part.stop, step=nimg)
                flips = (draws.rows(len(images), 1) < 0.5).to(device)
                images = torch.where(flips[:, :, None, None], images.flip(3), images)
            waited = time.perf_counter() - waited
            if on_batch is not None:
                on_batch(nimg, indices)
            figures = trainer.step(images, torch.from_numpy(batch.identities).to(device), nimg, place=part.start)
            previous, nimg = nimg, nimg + config.batch
            meter.add(figures, config.batch, waited)
            # Agreed, so that all stop after the same step: a signal reaches processes one after another, or only one.
            stopping = world.any(bool(interrupted))

            if _due(config.log_every, previous, nimg) or nimg >= end:
                line = meter.flush(nimg)
                for tracker in trackers:
                    tracker.figures(nimg, line)
            if _due(config.sample_every, previous, nimg) or nimg >= config.total_images:
                looked, picture = validation.look(trainer.ema.network)
                score = looked["score"]
                logger.info("validation at %d: %s", nimg, " ".join(f"{k}={v:.3f}" for k, v in looked.items()))
                if picture is not None:
                    path = folder / "samples" / f"nimg-{nimg:012d}.png"
                    Image.fromarray(picture).save(path)
                    for tracker in trackers:
                        tracker.figures(nimg, {f"val/{_plain(k)}": v for k, v in looked.items()})
                        tracker.picture(nimg, path)
            else:
                score = None
            if _due(config.checkpoint_every, previous, nimg) and nimg < end and not stopping:
                state = _state(trainer, trackers, known, shards.digest)
                if world.first:
                    checkpoints.save(snapshot(nimg, state, score))
        if nimg > begun:
            state = _state(trainer, trackers, known, shards.digest)
            world.on_first(lambda: checkpoints.save_now(snapshot(nimg, state, score)))
    checkpoints.close()

    if nimg < config.total_images:
        logger.info("stopped at %d images, saved; the same command goes on", nimg)
        for tracker in trackers:
            tracker.close(STOP_PATIENCE)
        return Outcome(False, nimg, None)
    if looked is None:  # a finished run that is only handed over again
        looked, _ = validation.look(trainer.ema.network)
    model = Path(config.export) if config.export else folder / "model"

    def hand_over() -> None:
        export(trainer.ema.network, config, model, nimg=nimg, data_digest=shards.digest, figures=looked)
        if trackers and model != folder / "model":
            shutil.copytree(model, folder / "model", dirs_exist_ok=True)
        for tracker in trackers:
            tracker.finish(folder / "model")
            tracker.close(FINISH_PATIENCE)

    world.on_first(hand_over)
    return Outcome(True, nimg, model)


def _centre(trainer: Trainer, shards: Faces, world: World) -> None:
    """Let F's head, where F learns, begin with the mean face of each identity."""
    if trainer.learns_recogniser:
        logger.info("centring F's head on %d identities", shards.identities)
        trainer.centre_head(_labelled(shards, world))


def _start(config: RunConfig, where: str, trainer: Trainer) -> str:
    """Give T the weights of a model; its digest. Raises ValueError where it is another network, MienError otherwise."""
    from storage import registry

    network, model = store.load(registry.fetch(where) if where.startswith("models:") else where)
    for name in ("architecture", "bits", "crop_size"):
        mine, theirs = getattr(config, name), getattr(model, name)
        if name == "architecture" and isinstance(theirs, networks.CoverConfig) and theirs.painter is None:
            theirs = theirs.model_copy(update={"painter": getattr(mine, "painter", None)})
        if mine != theirs:
            raise ValueError(f"start: {where} has {name} {theirs}, this run {mine}; give both the same")
    trainer.start_from(network)
    logger.info("beginning with the weights of %s, digest %s", where, model.digest[:12])
    return model.digest


def _prepare(config: RunConfig, folder: Path, place: storage.Prefix, allow_change: frozenset[str]) -> None:
    """What the first process does before all others begin."""
    place.check()
    (folder / "samples").mkdir(parents=True, exist_ok=True)
    _same_config(config, folder, allow_change)


def _state(trainer: Trainer, trackers: list[Tracker], known: dict[str, Any], data_digest: str) -> dict[str, Any]:
    """Everything a checkpoint holds. All processes call it: some of it is spread over them."""
    state = {
        "trainer": trainer.state_dict(),
        "config": trainer.config.model_dump(mode="json"),
        "data_digest": data_digest,
    }
    state |= {key: known.get(key) for key in ("mlflow_key", "mlflow_run_id", "start_digest")}
    for tracker in trackers:
        if isinstance(tracker, Tolerant) and isinstance(tracker.inner, MLflow):
            state["mlflow_key"], state["mlflow_run_id"] = tracker.inner.key, tracker.inner.run_id
    return state


_COSINES = (("I", "A1"), ("I", "R"), ("I", "WR1"), ("A1", "WR1"), ("A1", "A2"), ("WR1", "WR2"))


class Validation:
    """Fixed faces of identities kept apart, under fixed codes; every process looks at its part of them."""

    def __init__(self, shards: Faces, config: RunConfig, world: World) -> None:
        self.world = world
        part = world.part(len(shards))
        self.images = (
            from_uint8(shards.decode(np.arange(part.start, part.stop)).images) if part.stop > part.start else None
        )
        codes = draw_codes(config.bits, near_miss=0.0, draws=Draws(20, 0, len(shards)))
        self.codes = [c[part].to(world.device) for c in (codes.first, codes.second, codes.wrong, codes.other_wrong)]
        # A frozen copy: F itself moves while it trains, and figures must be comparable along a run.
        self.recogniser = recognisers.load(config.recogniser.name, config.recogniser.weights).eval().to(world.device)

    @torch.no_grad()
    def look(self, network: nn.Module, shown: int = 10) -> tuple[dict[str, float], NDArray[np.uint8] | None]:
        """Figures over all validation faces, the same on all processes, and on the first one a grid.

        Returns:
            Cosines and L1 distances, and ``score``, by which the best checkpoint is kept: the part of identity that A
            and WR keep and that R loses, smaller is better. The grid is uint8 ``[H, W, 3]``, of the first few faces.
        """
        names = [*(f"cos({a},{b})" for a, b in _COSINES), "L1(I,R)", "L1(I,A1)"]
        sums = torch.zeros(len(names) + 1, dtype=torch.float64)
        picture: NDArray[np.uint8] | None = None
        for start in range(0, 0 if self.images is None else len(self.images), 32):
            part = slice(start, start + 32)
            made = chain(network, self.images[part].to(self.world.device), *(c[part] for c in self.codes))
            if picture is None and self.world.first:
                picture = grid({k: v[:shown] for k, v in made.items()})
            e = {k: self.recogniser(v).float() for k, v in made.items()}
            values = [torch.cosine_similarity(e[a], e[b]) for a, b in _COSINES]
            values += [(made["I"] - made[k]).abs().mean(dim=(1, 2, 3)) for k in ("R", "A1")]
            values.append(torch.ones_like(values[0]))
            sums += torch.stack(values).double().sum(dim=1).cpu()
        *totals, count = self.world.sum(*sums.tolist())
        figures = {name: total / count for name, total in zip(names, totals, strict=True)}
        hidden = max(0.0, figures["cos(I,A1)"]) + max(0.0, figures["cos(I,WR1)"])
        return figures | {"score": hidden + 1 - figures["cos(I,R)"]}, picture


class _Meter:
    """Means of the figures since the last line, throughput, share of time spent waiting for data, time left."""

    def __init__(self, nimg: int, total: int, *, quiet: bool) -> None:
        self._total, self._quiet = total, quiet
        self._reset(nimg)

    def _reset(self, nimg: int) -> None:
        self._start, self._since, self._waited = nimg, time.perf_counter(), 0.0
        self._sums: dict[str, tuple[float, int]] = {}
        self._count = 0

    def add(self, figures: dict[str, float], size: int, waited: float) -> None:
        self._waited += waited
        self._count += size
        for key, value in figures.items():
            total, count = self._sums.get(_plain(key), (0.0, 0))
            self._sums[_plain(key)] = total + value * size, count + size

    def flush(self, nimg: int) -> dict[str, float]:
        elapsed = max(time.perf_counter() - self._since, 1e-9)
        line = {k: total / count for k, (total, count) in self._sums.items() if k != "skipped"}
        if "skipped" in self._sums:  # the share of skipped steps; a skipped step has no other figures
            line["skipped"] = self._sums["skipped"][0] / self._count
        line |= {"images_per_second": self._count / elapsed, "data_wait": self._waited / elapsed}
        left = (self._total - nimg) / line["images_per_second"]
        shown = " ".join(f"{k}={v:.3f}" for k, v in line.items())
        if not self._quiet:
            logger.info("%d/%d, %d min left: %s", nimg, self._total, left / 60, shown)
        self._reset(nimg)
        return line


class _Interrupt:
    """True once SIGTERM or SIGINT came; the step in flight is finished and saved first."""

    def __init__(self) -> None:
        self._came = False

    def __bool__(self) -> bool:
        return self._came

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        self._came = True

    def __enter__(self) -> None:
        self._old = {s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGINT)}

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)


def _due(every: int, previous: int, now: int) -> bool:
    return now // every > previous // every


def _plain(name: str) -> str:
    """MLflow allows no parentheses in a metric's name."""
    return name.replace("(", "_").replace(",", "_").replace(")", "")


def _faces(config: RunConfig, split: str, limit: int | None) -> Faces:
    faces = open_faces(
        config.data.shards,
        split,
        limit=limit,
        cache=Path(config.cache) if config.cache else None,
        cache_limit=config.cache_limit or CACHE_LIMIT,
        lanes=config.lanes or LANES,
        patience=config.patience,
    )
    return faces if faces.crop_size == config.crop_size else Reduced(faces, config.crop_size)


def _labelled(shards: Faces, world: World) -> Iterator[tuple[Tensor, Tensor]]:
    """This process's part of the labelled training samples."""
    for batch in shards.labelled(world.part):
        yield from_uint8(batch.images), torch.from_numpy(batch.identities)


# What may differ between the run that wrote a checkpoint and the one that goes on from it.
_MAY_CHANGE = {"runs", "device", "threads", "compile", "log_every", "sample_every", "checkpoint_every", "export",
               "keep_checkpoints", "checkpoints", "mlflow", "total_images", "strategy", "accumulate", "timeout",
               "patience", "max_skipped", "cache", "cache_limit", "decoders"}  # fmt: skip


def _same_config(config: RunConfig, folder: Path, allow_change: frozenset[str]) -> None:
    path, mine = folder / "config.json", config.model_dump(mode="json")
    if path.exists():
        theirs = json.loads(path.read_text())
        changed = _refuse_change(mine, theirs, str(folder), allow_change)
        if changed:
            number = len(list(folder.glob("config.until-*.json")))
            store.write_atomically(folder / f"config.until-{number}.json", path.read_bytes())
            logger.info("going on with another %s", ", ".join(changed))
    store.write_atomically(path, (json.dumps(mine, indent=2) + "\n").encode())


def _refuse_change(mine: dict[str, Any], theirs: dict[str, Any], where: str, allow_change: frozenset[str]) -> list[str]:
    """The sections that differ and are allowed to; raises ValueError where others do."""
    differing = {k for k in mine.keys() | theirs.keys() if mine.get(k) != theirs.get(k)} - _MAY_CHANGE
    forbidden = sorted(differing - allow_change)
    if forbidden:
        raise ValueError(
            f"the run {where} exists with another {', '.join(forbidden)}; give this one another name, go on with "
            f"the old config, or say --allow-change {forbidden[0]}"
        )
    return sorted(differing)


def _trackers(config: RunConfig, folder: Path, known: dict[str, Any], shards: Faces, world: World) -> list[Tracker]:
    trackers: list[Tracker] = [JsonLines(folder / "log.jsonl")]
    if config.mlflow:
        tags = {
            "git_commit": git_commit() or "unknown",
            "data_digest": shards.digest,
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "cpu",
            "processes": str(world.size),
        }
        if known.get("start_digest"):
            tags["start_digest"] = known["start_digest"]
        begin = beginning(
            name=config.name,
            params=config.model_dump(),
            tags=tags,
            shards=config.data.shards,
            digest=shards.digest,
            samples=len(shards),
            run_id=known.get("mlflow_run_id"),
        )
        key = known.get("mlflow_key") or new_key(folder)
        trackers.append(Tolerant(MLflow(config.mlflow, folder=folder, key=key, begin=begin)))
    return trackers
