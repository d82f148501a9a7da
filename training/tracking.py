"""Where figures go: always a JSON-lines file in the run's folder, and MLflow where a tracking URI is given."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any, Protocol

logger = logging.getLogger(__name__)


class Tracker(Protocol):
    """Receives what a run has to tell; ``nimg`` is the clock."""

    def figures(self, nimg: int, values: dict[str, float]) -> None: ...
    def picture(self, nimg: int, path: Path) -> None: ...
    def finish(self, model: Path | None) -> None: ...


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

    def finish(self, model: Path | None) -> None:
        del model


class MLflow:
    """An MLflow run; goes on in the run whose id is in ``state``."""

    def __init__(
        self, uri: str, *, name: str, run_id: str | None, params: dict[str, Any], tags: dict[str, str]
    ) -> None:
        import mlflow

        self._client = mlflow.MlflowClient(uri)
        experiment = self._client.get_experiment_by_name("mien")
        experiment_id = experiment.experiment_id if experiment else self._client.create_experiment("mien")
        if run_id is None:
            run = self._client.create_run(experiment_id, run_name=name, tags=tags)
            run_id = run.info.run_id
            for key, value in _flat(params).items():
                self._client.log_param(run_id, key, value)
        self.run_id = run_id

    def figures(self, nimg: int, values: dict[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self.run_id, metrics=[Metric(k, v, now, nimg) for k, v in values.items()])

    def picture(self, nimg: int, path: Path) -> None:
        del nimg
        self._client.log_artifact(self.run_id, str(path), "samples")

    def finish(self, model: Path | None) -> None:
        if model is not None:
            self._client.log_artifacts(self.run_id, str(model), "model")
        self._client.set_terminated(self.run_id)


class Tolerant:
    """Passes everything on; a tracker that fails is reported once a time and never stops training."""

    def __init__(self, inner: Tracker) -> None:
        self._inner = inner

    def figures(self, nimg: int, values: dict[str, float]) -> None:
        self._try("figures", nimg, values)

    def picture(self, nimg: int, path: Path) -> None:
        self._try("picture", nimg, path)

    def finish(self, model: Path | None) -> None:
        self._try("finish", model)

    def _try(self, method: str, *arguments: Any) -> None:
        try:
            getattr(self._inner, method)(*arguments)
        except Exception as error:
            logger.warning("tracking: %s was not recorded: %s", method, error)


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            out.update(_flat(value, f"{prefix}{key}."))
        else:
            out[f"{prefix}{key}"] = value
    return out
