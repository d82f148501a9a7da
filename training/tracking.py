"""Where figures go: always a JSON-lines file in the run's folder, and MLflow where a tracking URI is given.

Nothing here makes training wait or fail. What MLflow is to know is appended to a journal in the run's folder
(:mod:`training.journal`); a thread delivers it, tries again for as long as the server is away, and goes on from where
it was after a restart. Times are those of the events, not of their delivery. ``python -m training.tracking runs/NAME``
delivers what a run that has ended could not.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import logging
import os
import platform
import sys
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from mien import store
from training.journal import Journal

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger(__name__)

EXPERIMENT = "mien"
ALIAS = "candidate"
MODEL_FOLDER = "model"  # of a run's artifacts: README.md, config.json, model.safetensors; a version's source
# Seconds that a run which ends waits for what is not delivered yet: little where somebody waits for it to go.
STOP_PATIENCE, FINISH_PATIENCE = 5.0, 60.0
_KEY_TAG = "mien.run"  # finds the MLflow run of a run of ours, also where the answer to its creation was lost

# A server that does not answer is given up after seconds, not after MLflow's own 7 tries of 120 s: the journal waits.
_MLFLOW = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}
# What no further try will mend; everything else is taken for a server that is away.
_REFUSED = {"INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_DOES_NOT_EXIST", "INVALID_STATE"}


class Tracker(Protocol):
    """Receives what a run has to tell; ``nimg`` is the clock."""

    def figures(self, nimg: int, values: dict[str, float]) -> None: ...
    def picture(self, nimg: int, path: Path) -> None: ...
    def finish(self, model: Path) -> None: ...
    def close(self, patience: float) -> None: ...


class JsonLines:
    """``log.jsonl`` in the run's folder: one object a line."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def figures(self, nimg: int, values: dict[str, float]) -> None:
        line = {"nimg": nimg, "time": round(time.time(), 3), **{k: round(v, 6) for k, v in values.items()}}
        with open(self._path, "a") as file:
            file.write(json.dumps(line) + "\n")

    def picture(self, nimg: int, path: Path) -> None:
        del nimg, path  # the picture lies in the folder already

    def finish(self, model: Path) -> None:
        del model

    def close(self, patience: float) -> None:
        del patience


class MLflow:
    """A run in MLflow, told through the journal.

    Args:
        uri: of the tracking server.
        folder: of the run; pictures and the model lie in it.
        key: names our run; the same after every resume.
        begin: what to create the run with where it does not exist: see :func:`beginning`.
        first_delay: seconds before the second try at a server that is away; each later one waits twice as long, a
            minute at most.
    """

    def __init__(self, uri: str, *, folder: Path, key: str, begin: dict[str, Any], first_delay: float = 1.0) -> None:
        self.key, self._folder = key, folder
        self._journal = Journal(folder)
        known = {e.get("key") for _, e in self._journal.entries(0, 1)}
        self._append({"kind": "resume" if key in known else "begin", "key": key, **begin})
        self._delivery = Delivery(uri, folder, self._journal, first_delay=first_delay)
        self._delivery.start()

    @property
    def run_id(self) -> str | None:
        """The MLflow run's id, once the server has given one."""
        return self._delivery.run_id

    def figures(self, nimg: int, values: dict[str, float]) -> None:
        self._append({"kind": "metrics", "nimg": nimg, "values": values})

    def picture(self, nimg: int, path: Path) -> None:
        self._append({"kind": "artifact", "nimg": nimg, "path": str(path.relative_to(self._folder)), "to": "samples"})

    def finish(self, model: Path) -> None:
        """Hand in the model, a folder inside the run's, and end the run."""
        self._append({"kind": "model", "path": str(model.relative_to(self._folder)), "alias": ALIAS})
        self._append({"kind": "finish"})

    def close(self, patience: float) -> None:
        """Wait so many seconds at most until everything is delivered, and stop; what is left stays in the journal."""
        self._delivery.stop(patience)
        if not self._journal.delivered():
            logger.warning(
                "MLflow has not got all of this run yet; it goes on when the run does, or with"
                " `python -m training.tracking %s`", self._folder,
            )  # fmt: skip

    def _append(self, entry: dict[str, Any]) -> None:
        self._journal.append({"time": int(time.time() * 1000), **entry})


class Delivery(threading.Thread):
    """Takes a journal to MLflow."""

    def __init__(self, uri: str, folder: Path, journal: Journal, *, first_delay: float = 1.0) -> None:
        super().__init__(name="mlflow", daemon=True)
        self._uri, self._folder, self._journal, self._first_delay = uri, folder, journal, first_delay
        self._stopping, self._abandoned = threading.Event(), threading.Event()
        self._client: MlflowClient | None = None
        self.run_id: str | None = journal.state()[1].get("run_id")

    def run(self) -> None:
        delay = self._first_delay
        while not self._abandoned.is_set() and not (self._stopping.is_set() and self._journal.delivered()):
            try:
                self.deliver()
                delay = self._first_delay
            except Exception as error:  # MLflow raises its own, requests', urllib3's, and whatever its stores raise
                logger.warning("MLflow at %s is away, next try in %.0f s: %s", self._uri, delay, _short(error))
                if not self._stopping.wait(delay):
                    delay = min(delay * 2, 60.0)
                    continue
                self._abandoned.wait(min(delay, 1.0))
                delay = min(delay * 2, 60.0)
            else:
                if not self._stopping.is_set():
                    self._journal.wait(1.0)

    def stop(self, patience: float) -> None:
        """Deliver the rest, for so many seconds at most."""
        self._stopping.set()
        self.join(patience)
        self._abandoned.set()

    def deliver(self) -> None:
        """Deliver everything that is there; raises what MLflow raises where it is away."""
        offset, _ = self._journal.state()
        while entries := self._journal.entries(offset):
            while entries:
                # Figures go in batches, everything else one by one.
                batch = [entries.pop(0)]
                while batch[0][1].get("kind") == "metrics" and entries and entries[0][1].get("kind") == "metrics":
                    if sum(len(e["values"]) for _, e in [*batch, entries[0]]) > 1000:
                        break
                    batch.append(entries.pop(0))
                self._one([entry for _, entry in batch])
                offset = batch[-1][0]
                self._journal.note(offset, run_id=self.run_id)

    def _one(self, batch: list[dict[str, Any]]) -> None:
        from mlflow.exceptions import MlflowException

        try:
            handlers: dict[str, Callable[[list[dict[str, Any]]], None]] = {
                "begin": self._begin, "resume": self._resume, "metrics": self._metrics, "artifact": self._artifact,
                "model": self._model, "finish": self._finish,
            }  # fmt: skip
            handler = handlers.get(batch[0].get("kind", ""))
            if handler is not None:
                handler(batch)
        except MlflowException as error:
            if error.error_code not in _REFUSED:
                raise
            logger.warning("MLflow does not take %s, it is left out: %s", batch[0].get("kind"), _short(error))

    # -- one kind of entry each -------------------------------------------------------------------------------------

    def _mlflow(self) -> MlflowClient:
        if self._client is None:
            for key, value in _MLFLOW.items():
                os.environ.setdefault(key, value)
            import mlflow

            self._client = mlflow.MlflowClient(self._uri, self._uri)
        return self._client

    def _id(self) -> str:
        if self.run_id is None:
            raise RuntimeError("the journal does not begin with the run's beginning")
        return self.run_id

    def _begin(self, batch: list[dict[str, Any]]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag, Param

        (entry,) = batch
        client = self._mlflow()
        experiment = client.get_experiment_by_name(EXPERIMENT)
        where = experiment.experiment_id if experiment else client.create_experiment(EXPERIMENT)
        self.run_id = entry.get("run_id")
        if self.run_id is None:
            found = client.search_runs([where], f"tags.`{_KEY_TAG}` = '{entry['key']}'", max_results=1)
            if found:
                self.run_id = found[0].info.run_id
            else:
                tags = entry["tags"] | {_KEY_TAG: entry["key"]}
                run = client.create_run(where, start_time=entry["time"], tags=tags, run_name=entry["name"])
                self.run_id = run.info.run_id
        params = [Param(k, str(v)) for k, v in _flat(entry["params"]).items()]
        for start in range(0, len(params), 100):
            client.log_batch(self._id(), params=params[start : start + 100])
        data = entry["dataset"]
        # MLflow's digests have 36 characters at most: the whole one is in the profile and in the run's tags.
        dataset = Dataset(
            data["name"], data["digest"][:36], "mien-shards", json.dumps({"uri": data["uri"]}),
            profile=json.dumps(data),
        )  # fmt: skip
        client.log_inputs(self._id(), [DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])])
        client.log_dict(self._id(), entry["environment"], "environment.json")

    def _resume(self, batch: list[dict[str, Any]]) -> None:
        (entry,) = batch
        for key, value in entry["tags"].items():
            self._mlflow().set_tag(self._id(), key, value)
        self._mlflow().update_run(self._id(), status="RUNNING")

    def _metrics(self, batch: list[dict[str, Any]]) -> None:
        from mlflow.entities import Metric

        metrics = [Metric(k, v, e["time"], e["nimg"]) for e in batch for k, v in e["values"].items()]
        self._mlflow().log_batch(self._id(), metrics=metrics)

    def _artifact(self, batch: list[dict[str, Any]]) -> None:
        (entry,) = batch
        path = self._folder / entry["path"]
        if path.exists():
            self._mlflow().log_artifact(self._id(), str(path), entry["to"])
        else:
            logger.warning("MLflow does not get %s: it is not there any more", path)

    def _model(self, batch: list[dict[str, Any]]) -> None:
        from mlflow.exceptions import MlflowException

        (entry,) = batch
        client, folder = self._mlflow(), self._folder / entry["path"]
        config = store.load_config(folder)
        for name in (store.CARD, store.CONFIG, store.WEIGHTS):
            client.log_artifact(self._id(), str(folder / name), MODEL_FOLDER)
        try:
            client.create_registered_model(EXPERIMENT)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        tags = {"digest": config.digest, "images_seen": str(config.images_seen)}
        tags |= {"data_digest": config.data_digest or "", "training_commit": config.training_commit or ""}
        mine = client.search_model_versions(f"name = '{EXPERIMENT}' and run_id = '{self._id()}'")
        same = [v for v in mine if v.tags.get("digest") == config.digest]
        version = same[0] if same else client.create_model_version(
            EXPERIMENT,
            f"{client.get_run(self._id()).info.artifact_uri}/{MODEL_FOLDER}",
            self._id(),
            tags=tags,
            description=(folder / store.CARD).read_text(),
            await_creation_for=None,
        )  # fmt: skip
        client.set_registered_model_alias(EXPERIMENT, entry["alias"], version.version)
        logger.info("registered as models:/%s/%s, alias %s", EXPERIMENT, version.version, entry["alias"])

    def _finish(self, batch: list[dict[str, Any]]) -> None:
        self._mlflow().set_terminated(self._id(), end_time=batch[0]["time"])


class Tolerant:
    """Passes everything on; a tracker that fails (a full disk) is reported and never stops training."""

    def __init__(self, inner: Tracker) -> None:
        self.inner = inner

    def figures(self, nimg: int, values: dict[str, float]) -> None:
        self._try("figures", nimg, values)

    def picture(self, nimg: int, path: Path) -> None:
        self._try("picture", nimg, path)

    def finish(self, model: Path) -> None:
        self._try("finish", model)

    def close(self, patience: float) -> None:
        self._try("close", patience)

    def _try(self, method: str, *arguments: Any) -> None:
        try:
            getattr(self.inner, method)(*arguments)
        except Exception as error:
            logger.warning("tracking: %s was not recorded: %s", method, error)


def new_key(folder: Path) -> str:
    """The key of the run in a folder: the one its journal began with, or a fresh one."""
    for _, entry in Journal(folder).entries(0, 1):
        if entry.get("key"):
            return str(entry["key"])
    return uuid.uuid4().hex


def beginning(
    *, name: str, params: dict[str, Any], tags: dict[str, str], shards: str, digest: str, samples: int,
    run_id: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """What MLflow is told of a run at its start.

    Args:
        name, params, tags: of the run.
        shards: prefix of the shards.
        digest: sha256 of their manifest, the data's lineage.
        samples: in the training split.
        run_id: of an MLflow run that exists.
    """
    dataset = {"name": shards.rstrip("/").rsplit("/", 1)[-1], "uri": shards, "digest": digest, "samples": samples}
    return {
        "name": name, "params": params, "tags": tags, "dataset": dataset, "environment": environment(),
        "run_id": run_id,
    }  # fmt: skip


def environment() -> dict[str, Any]:
    """Versions of Python, the platform and every package."""
    packages = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions() if d.metadata["Name"]}
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": dict(sorted(packages.items(), key=lambda item: item[0].lower())),
    }


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            out.update(_flat(value, f"{prefix}{key}."))
        else:
            out[f"{prefix}{key}"] = value
    return out


def _short(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:300]


def main(arguments: Sequence[str] | None = None) -> int:
    """Deliver the journal of a run; exit code 1 where something is left."""
    parser = argparse.ArgumentParser(prog="training.tracking", description="Deliver a run's journal to MLflow.")
    parser.add_argument("folder", type=Path, help="of the run: runs/NAME")
    parser.add_argument("--to", metavar="URI", help="tracking server; default: the one in the run's config")
    parser.add_argument("--patience", type=float, default=60.0, help="seconds")
    chosen = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    try:
        uri = chosen.to or json.loads((chosen.folder / "config.json").read_text())["mlflow"]
    except (OSError, ValueError, KeyError):
        uri = None
    if not uri:
        parser.error(f"{chosen.folder} names no tracking server; say --to URI")
    journal = Journal(chosen.folder)
    delivery = Delivery(uri, chosen.folder, journal)
    delivery.start()
    delivery.stop(chosen.patience)
    sys.stdout.write(f"{uri} has {'all' if journal.delivered() else 'not all'} of {chosen.folder}\n")
    return 0 if journal.delivered() else 1


if __name__ == "__main__":
    sys.exit(main())
