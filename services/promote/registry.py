"""What promotion asks of MLflow: aliases, the reports that services.evaluate left, and the audit trail.

The trail is in tags of the versions, ``mien.audit.TIME`` with one event as JSON each, so it lies where the decision
shows, is written by nobody else, and is only ever added to. Times are UTC and sort as text.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

from mien.errors import MienError

EXPERIMENT: Final = "mien-evaluate"  # where services.evaluate logs
_PREFIX: Final = "mien.audit."
_T = TypeVar("_T")

What = Literal["promoted", "refused", "rolled-back", "restored"]

# A registry that does not answer must not hold a job for a quarter of an hour (MLflow's own: 7 tries of 120 s).
_MLFLOW: Final = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "GIT_PYTHON_REFRESH": "quiet",
}


class RegistryError(MienError):
    """The registry does not answer, or not with what was asked; trying again may help."""


@dataclass(frozen=True)
class Event:
    """One decision about one version, as it is written on it.

    Attributes:
        what: ``promoted`` and ``restored`` make it the champion, ``rolled-back`` ends that, ``refused`` never began it.
        who: a person, or the pod of a job.
        why: in words: which gates held or failed, or what a person gave as the reason.
        when: UTC, ISO 8601 with microseconds.
        other: the version that was champion before (``promoted``, ``restored``) or is after (``rolled-back``).
        details: evaluation, sha256 of the report, version and sha256 of the gates.
    """

    what: What
    who: str
    why: str
    when: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="microseconds"))
    other: str | None = None
    details: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        other = {"promoted": "after", "restored": "after", "rolled-back": "back to"}.get(self.what)
        return f"{self.when[:19]}Z {self.what} by {self.who}" + (
            f", {other} version {self.other}" if other and self.other else ""
        ) + f": {self.why}"  # fmt: skip


@dataclass(frozen=True)
class Report:
    """A report.json and where it came from (an MLflow run's id, or a path)."""

    source: str
    sha256: str
    figures: dict[str, Any]


class Registry:
    """One registered model of an MLflow server.

    Args:
        uri: of tracking server and registry, with MLflow's own variables for credentials.
        name: of the registered model.
    """

    def __init__(self, uri: str, name: str) -> None:
        for variable, value in _MLFLOW.items():
            os.environ.setdefault(variable, value)
        os.environ["MLFLOW_TRACKING_URI"] = uri  # storage.registry, which fetches models, reads it there
        from mlflow import MlflowClient

        self.name, self.uri = name, uri
        self._client = MlflowClient(uri, uri)

    def alias(self, alias: str) -> str | None:
        """The version that has the alias, None where none has; raises :class:`RegistryError`."""
        from mlflow.exceptions import MlflowException

        def ask() -> str | None:
            try:
                return str(self._client.get_model_version_by_alias(self.name, alias).version)
            except MlflowException as error:
                # No such model: RESOURCE_DOES_NOT_EXIST. A model without the alias: INVALID_PARAMETER_VALUE.
                if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                    return None
                raise

        return self._ask(ask)

    def point(self, alias: str, version: str) -> None:
        """Give a version the alias: one request, so nobody sees the model without a champion."""
        self._ask(lambda: self._client.set_registered_model_alias(self.name, alias, version))

    def versions(self) -> list[str]:
        """All versions, oldest first."""
        found = self._ask(lambda: self._client.search_model_versions(f"name = '{self.name}'"))
        return sorted((str(v.version) for v in found), key=int)

    def write(self, version: str, event: Event) -> None:
        """Add an event to a version's trail."""
        at = datetime.fromisoformat(event.when).strftime("%Y%m%dT%H%M%S.%fZ")
        value = json.dumps(vars(event))
        self._ask(lambda: self._client.set_model_version_tag(self.name, version, f"{_PREFIX}{at}", value))

    def trail(self, version: str) -> list[Event]:
        """The events of a version, oldest first.

        Raises:
            RegistryError: there is no such version, or a tag of the trail was changed by other hands.
        """
        tags = self._ask(lambda: self._client.get_model_version(self.name, version)).tags
        try:
            return [Event(**json.loads(tags[key])) for key in sorted(tags) if key.startswith(_PREFIX)]
        except (ValueError, TypeError) as error:
            raise RegistryError(f"the trail of version {version} is not what promotion wrote: {error}") from error

    def reports(self, digest: str) -> Iterator[Report]:
        """What evaluations said of weights, the newest finished one first."""
        experiment = self._ask(lambda: self._client.get_experiment_by_name(EXPERIMENT))
        if experiment is None:
            return
        found = self._ask(
            lambda: self._client.search_runs(
                [experiment.experiment_id],
                f"tags.`model.digest` = '{digest}' and attributes.status = 'FINISHED'",
                max_results=50,
                order_by=["attributes.start_time DESC"],
            )
        )
        for run in found:
            yield self.report(run.info.run_id)

    def report(self, run_id: str) -> Report:
        """The report of one evaluation's run."""
        with tempfile.TemporaryDirectory() as folder:
            path = self._ask(lambda: self._client.download_artifacts(run_id, "report.json", folder))
            return read_report(Path(path), f"run {run_id}")

    def _ask(self, question: Callable[[], _T]) -> _T:
        try:
            return question()
        except MienError:
            raise
        except Exception as error:  # MLflow raises its own, requests' and urllib3's
            first = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
            raise RegistryError(f"the registry {self.uri}: {first}") from error


def read_report(path: Path, source: str | None = None) -> Report:
    """A flat report from a file.

    Raises:
        RegistryError: it cannot be read, or holds no flat mapping with ``model.digest``.
    """
    try:
        raw = path.read_bytes()
        figures = json.loads(raw)
    except (OSError, ValueError) as error:
        raise RegistryError(f"{source or path} is no report: {error}") from error
    if not isinstance(figures, dict) or not isinstance(figures.get("model.digest"), str):
        raise RegistryError(f"{source or path} is no report of services.evaluate: it names no model.digest")
    return Report(source or str(path), hashlib.sha256(raw).hexdigest(), figures)
