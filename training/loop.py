"""The training loop, top to bottom: step; once in a while log, look, save; at the end export."""

from __future__ import annotations

import json
import logging
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from mien import networks, store
from training import checkpoint
from training.config import RunConfig
from training.data import FaceShards, Order
from training.draws import Draws
from training.export import export, git_commit
from training.samples import chain, from_uint8, grid
from training.step import Trainer, draw_codes
from training.tracking import JsonLines, MLflow, Tolerant, Tracker

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """How a run ended: ``finished`` with a model folder, or interrupted by a signal with its state saved."""

    finished: bool
    nimg: int
    model: Path | None


def train(config: RunConfig, *, stop_at: int | None = None, allow_change: frozenset[str] = frozenset()) -> Outcome:
    """Train until ``config.total_images``; goes on from the last whole checkpoint where the run exists.

    Args:
        config: the run.
        allow_change: sections in which the config may differ from the one the run began with (a curriculum); every
            config a run has had is kept in its folder.
        stop_at: end (with a checkpoint) once so many images are seen: for tests and for rationed machines.

    Raises:
        training.data.ShardError: the data is not what its manifest says.
        ValueError: the run exists with another config.
    """
    device = torch.device(
        ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
    )
    if config.threads:
        torch.set_num_threads(config.threads)
    folder = Path(config.runs) / config.name
    (folder / "samples").mkdir(parents=True, exist_ok=True)
    _same_config(config, folder, allow_change)
    shards = FaceShards(config.data.shards, "train", limit=config.data.limit)
    validation = Validation(FaceShards(config.data.shards, "val", limit=256), config, device)
    order = Order(len(shards), config.seed)
    trainer = Trainer(config, identities=shards.identities, device=device)
    logger.info(
        "%s: %d training crops of %d identities; T has %.2f M parameters; on %s",
        config.name, len(shards), shards.identities, networks.count_parameters(trainer.transformer) / 1e6, device,
    )  # fmt: skip

    resumed = checkpoint.latest(folder / "checkpoints")
    nimg, run_id = 0, None
    if resumed is not None:
        nimg, state = resumed
        trainer.load_state_dict(state["trainer"])
        run_id = state["mlflow_run_id"]
        logger.info("going on from %d images", nimg)
    elif trainer.learns_recogniser:
        logger.info("centring F's head on %d identities", shards.identities)
        trainer.centre_head(_everything(shards))
    trackers, run_id = _trackers(config, folder, run_id, shards.digest)

    interrupted = _Interrupt()
    end = min(config.total_images, stop_at or config.total_images)
    meter = _Meter(nimg, config.total_images)
    with ThreadPoolExecutor(2) as pool, interrupted:
        while nimg < end and not interrupted:
            waited = time.perf_counter()
            size = min(config.batch, end - nimg)
            batch = shards.decode(order.take(nimg, nimg + size), pool)
            images = from_uint8(batch.images, device)
            if config.data.flip:
                flips = torch.from_numpy(np.random.default_rng([config.seed, 1, nimg]).random(size) < 0.5).to(device)
                images = torch.where(flips[:, None, None, None], images.flip(3), images)
            waited = time.perf_counter() - waited
            figures = trainer.step(images, torch.from_numpy(batch.identities).to(device), nimg)
            previous, nimg = nimg, nimg + size
            meter.add(figures, size, waited)

            if _due(config.log_every, previous, nimg) or nimg == end:
                line = meter.flush(nimg)
                for tracker in trackers:
                    tracker.figures(nimg, line)
            if _due(config.sample_every, previous, nimg) or nimg == config.total_images:
                figures, picture = validation.look(trainer.ema.network)
                path = folder / "samples" / f"nimg-{nimg:012d}.png"
                Image.fromarray(picture).save(path)
                logger.info("validation at %d: %s", nimg, " ".join(f"{k}={v:.3f}" for k, v in figures.items()))
                for tracker in trackers:
                    tracker.figures(nimg, {f"val/{_plain(k)}": v for k, v in figures.items()})
                    tracker.picture(nimg, path)
            if _due(config.checkpoint_every, previous, nimg) or nimg == end or interrupted:
                state = {"trainer": trainer.state_dict(), "mlflow_run_id": run_id}
                checkpoint.write(folder / "checkpoints", nimg, state, keep=config.keep_checkpoints)

    if nimg < config.total_images:
        logger.info("stopped at %d images, saved; the same command goes on", nimg)
        return Outcome(False, nimg, None)
    figures, _ = validation.look(trainer.ema.network)
    model = Path(config.export) if config.export else folder / "model"
    export(trainer.ema.network, config, model, nimg=nimg, data_digest=shards.digest, figures=figures)
    for tracker in trackers:
        tracker.finish(model)
    return Outcome(True, nimg, model)


class Validation:
    """Fixed faces of identities kept apart, under fixed codes."""

    def __init__(self, shards: FaceShards, config: RunConfig, device: torch.device) -> None:
        from mien import recognisers

        batch = shards.decode(np.arange(len(shards)))
        self.images = from_uint8(batch.images)
        self.device, self.bits = device, config.bits
        self.codes = draw_codes(config.bits, near_miss=0.0, draws=Draws(20, 0, len(self.images)))
        # A frozen copy: F itself moves while it trains, and figures must be comparable along a run.
        self.recogniser = recognisers.load(config.recogniser.name, config.recogniser.weights).eval().to(device)

    @torch.no_grad()
    def look(self, network: nn.Module, shown: int = 10) -> tuple[dict[str, float], np.ndarray]:
        """Figures over all validation faces and a grid (uint8 ``[H, W, 3]``) of the first few."""
        sums: dict[str, list[Tensor]] = {}
        picture: np.ndarray | None = None
        for start in range(0, len(self.images), 32):
            part = slice(start, start + 32)
            codes = [
                c[part].to(self.device)
                for c in (self.codes.first, self.codes.second, self.codes.wrong, self.codes.other_wrong)
            ]
            made = chain(network, self.images[part].to(self.device), *codes)
            if picture is None:
                picture = grid({k: v[:shown] for k, v in made.items()})
            e = {k: self.recogniser(v).float() for k, v in made.items()}
            for a, b in (("I", "A1"), ("I", "R"), ("I", "WR1"), ("A1", "WR1"), ("A1", "A2"), ("WR1", "WR2")):
                sums.setdefault(f"cos({a},{b})", []).append(torch.cosine_similarity(e[a], e[b]))
            sums.setdefault("L1(I,R)", []).append((made["I"] - made["R"]).abs().mean(dim=(1, 2, 3)))
            sums.setdefault("L1(I,A1)", []).append((made["I"] - made["A1"]).abs().mean(dim=(1, 2, 3)))
        assert picture is not None  # noqa: S101 - FaceShards refuses an empty split
        return {k: torch.cat(v).mean().item() for k, v in sums.items()}, picture


class _Meter:
    """Means of the figures since the last line, throughput, share of time spent waiting for data, time left."""

    def __init__(self, nimg: int, total: int) -> None:
        self._total = total
        self._reset(nimg)

    def _reset(self, nimg: int) -> None:
        self._start, self._since, self._waited = nimg, time.perf_counter(), 0.0
        self._sums: dict[str, float] = {}
        self._count = 0

    def add(self, figures: dict[str, float], size: int, waited: float) -> None:
        self._waited += waited
        self._count += size
        for key, value in figures.items():
            self._sums[_plain(key)] = self._sums.get(_plain(key), 0.0) + value * size

    def flush(self, nimg: int) -> dict[str, float]:
        elapsed = max(time.perf_counter() - self._since, 1e-9)
        line = {k: v / self._count for k, v in self._sums.items()}
        line |= {"images_per_second": self._count / elapsed, "data_wait": self._waited / elapsed}
        left = (self._total - nimg) / line["images_per_second"]
        shown = " ".join(f"{k}={v:.3f}" for k, v in line.items())
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


def _everything(shards: FaceShards) -> list[tuple[Tensor, Tensor]]:
    labelled = np.array([i for i, s in enumerate(shards.samples) if s.identity >= 0], dtype=np.int64)
    out = []
    for start in range(0, len(labelled), 64):
        batch = shards.decode(labelled[start : start + 64])
        out.append((from_uint8(batch.images), torch.from_numpy(batch.identities)))
    return out


# What may differ between the run that wrote a checkpoint and the one that goes on from it.
_MAY_CHANGE = {"runs", "device", "threads", "compile", "log_every", "sample_every", "checkpoint_every", "export",
               "keep_checkpoints", "mlflow", "total_images"}  # fmt: skip


def _same_config(config: RunConfig, folder: Path, allow_change: frozenset[str]) -> None:
    path, mine = folder / "config.json", config.model_dump(mode="json")
    if path.exists():
        theirs = json.loads(path.read_text())
        differing = {k for k in mine.keys() | theirs.keys() if mine.get(k) != theirs.get(k)}
        forbidden = sorted(differing - _MAY_CHANGE - allow_change)
        if forbidden:
            raise ValueError(
                f"the run {folder} exists with another {', '.join(forbidden)}; give this one another name, go on with "
                f"the old config, or say --allow-change {forbidden[0]}"
            )
        if differing & allow_change:
            number = len(list(folder.glob("config.until-*.json")))
            store.write_atomically(folder / f"config.until-{number}.json", path.read_bytes())
            logger.info("going on with another %s", ", ".join(sorted(differing & allow_change)))
    store.write_atomically(path, (json.dumps(mine, indent=2) + "\n").encode())


def _trackers(
    config: RunConfig, folder: Path, run_id: str | None, data_digest: str
) -> tuple[list[Tracker], str | None]:
    trackers: list[Tracker] = [JsonLines(folder / "log.jsonl")]
    if config.mlflow:
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        tags = {"git_commit": git_commit() or "unknown", "data_digest": data_digest, "torch": torch.__version__}
        try:
            mlflow = MLflow(config.mlflow, name=config.name, run_id=run_id, params=config.model_dump(), tags=tags)
        except Exception as error:
            logger.warning("MLflow at %s does not answer, this run logs to its folder alone: %s", config.mlflow, error)
        else:
            run_id = mlflow.run_id
            trackers.append(Tolerant(mlflow))
    return trackers, run_id
