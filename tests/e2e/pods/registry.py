"""``registry.py good|bad SEED URI``: a small fresh model in MLflow as ``mien@candidate``, with a report of its own.

In the training image. The figures of the report are made up, all on one side of the gates, since this is about who
moves what and who follows. The last line of the output is a JSON object with the version and its digest.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

import torch
from mlflow import MlflowClient

from mien import networks, store
from services import gates
from services.evaluate import tracking
from training.tracking import ALIAS, EXPERIMENT, MODEL_FOLDER

ARCHITECTURE = {"name": "coupling", "steps": 1, "widths": [8, 16]}


def model(folder: Path, seed: int) -> store.ModelConfig:
    torch.manual_seed(seed)
    config = store.ModelConfig.model_validate({"architecture": ARCHITECTURE, "bits": 16, "crop_size": 128})
    return store.save(
        folder,
        networks.build(config.architecture, bits=config.bits, size=config.crop_size),
        config,
        card=f"# Made up, {seed}\n",
    )


def figures(good: bool) -> dict[str, float]:
    """A figure for each gate: on the right side of its bound, or on the wrong one."""
    found: dict[str, float] = {}
    for gate in gates.load(gates.DEFAULT).gates:
        if gate.of == "bound":
            step = 0.5 * abs(gate.value) if (gate.op.startswith(">")) == good else -0.5 * abs(gate.value)
            found[gate.key] = gate.value + step
    return found


def main() -> None:
    good, seed, uri = sys.argv[1] == "good", int(sys.argv[2]), sys.argv[3]
    os.environ["MLFLOW_TRACKING_URI"] = uri  # artifacts go by it too
    client = MlflowClient(uri, uri)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = model(folder / "model", seed)
        if not client.search_registered_models(f"name = '{EXPERIMENT}'"):
            client.create_registered_model(EXPERIMENT)
        experiment = client.get_experiment_by_name(EXPERIMENT)
        run = client.create_run(experiment.experiment_id if experiment else client.create_experiment(EXPERIMENT))
        client.log_artifacts(run.info.run_id, str(folder / "model"), MODEL_FOLDER)
        client.set_terminated(run.info.run_id)
        version = client.create_model_version(
            EXPERIMENT, f"{run.info.artifact_uri}/{MODEL_FOLDER}", run.info.run_id, tags={"digest": config.digest}
        )
        client.set_registered_model_alias(EXPERIMENT, ALIAS, version.version)
        report = {"model.digest": config.digest, **figures(good)}
        (folder / "report.json").write_text(json.dumps(report))
        tracking.log(uri, report, folder)
    sys.stdout.write(json.dumps({"version": str(version.version), "digest": config.digest}) + "\n")


if __name__ == "__main__":
    main()
