"""The report into MLflow: figures as metrics, what they depend on as params, the files as artifacts."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

# MLflow's rule for the names of metrics.
_ALLOWED: Final = re.compile(r"[^/\w.\- :]")
_EXPERIMENT: Final = "mien-evaluate"


def log(uri: str, flat: Mapping[str, Any], folder: Path) -> str:
    """Write one run; gives its id.

    Raises:
        ConnectionError: the server does not answer; the report on disk is whole all the same.
    """
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param
    from mlflow.exceptions import MlflowException

    try:
        client = MlflowClient(tracking_uri=uri)
        experiment = client.get_experiment_by_name(_EXPERIMENT)
        identifier = experiment.experiment_id if experiment else client.create_experiment(_EXPERIMENT)
        digest = str(flat.get("model.digest", ""))
        tags = {"model.digest": digest, "mlflow.runName": f"evaluate-{digest[:12]}"}
        run = client.create_run(identifier, tags=tags)
        run_id: str = run.info.run_id
        numbers = {k: float(v) for k, v in flat.items() if isinstance(v, int | float) and math.isfinite(v)}
        metrics = [Metric(_ALLOWED.sub("_", k), v, run.info.start_time, 0) for k, v in numbers.items()]
        params = [Param(k, v) for k, v in flat.items() if isinstance(v, str) and not k.startswith("skipped.")]
        for start in range(0, len(metrics), 500):  # the REST interface takes a thousand at a time
            client.log_batch(run_id, metrics=metrics[start : start + 500])
        client.log_batch(run_id, params=params)
        for name in ("report.json", "report.html"):
            if (folder / name).exists():
                client.log_artifact(run_id, str(folder / name))
        client.set_terminated(run_id)
    except MlflowException as error:
        raise ConnectionError(f"MLflow at {uri}: {error}") from error
    return run_id
