"""Models by ``models:/`` URI: from the MLflow registry to a verified folder on this machine.

A registered version's source is an artifact folder with ``config.json``, ``model.safetensors`` and ``README.md``.
``models:/mien/3`` names a version, ``models:/mien@champion`` an alias that may move. The registry is that of
``MLFLOW_TRACKING_URI`` (or ``MLFLOW_REGISTRY_URI``), with MLflow's own variables for credentials.

Folders lie in a content-addressed cache, ``DIGEST/`` by the sha256 of the weights: a version that is there is not
downloaded again, and what is found is verified each time it is used. ``MIEN_CACHE`` places the cache, else
``XDG_CACHE_HOME/mien`` or ``~/.cache/mien``.

:func:`fetch` is the entry point ``mien.models`` that :func:`mien.load` resolves such URIs with.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from mien import store
from mien.errors import ModelError, ModelIntegrityError

if TYPE_CHECKING:
    from mlflow import MlflowClient

_URI: Final = re.compile(r"models:/+(?P<name>[^/@]+)(?:/(?P<version>[0-9]+)|@(?P<alias>[^/@]+))")

# A registry that does not answer must not hold a poll or a start for minutes (MLflow's own: 7 tries of 120 s).
_MLFLOW: Final = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_ARTIFACT_UPLOAD_DOWNLOAD_TIMEOUT": "120",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}
_CARD_MISSING: Final = "# A Mien model\n\nIt was registered without a card.\n"


@dataclass(frozen=True)
class Version:
    """One registered version."""

    name: str
    number: str

    @property
    def uri(self) -> str:
        """``models:/NAME/NUMBER``, which does not move."""
        return f"models:/{self.name}/{self.number}"


def resolve(uri: str) -> Version:
    """Which version a URI means right now; one request to the registry for an alias, none for a version.

    Raises:
        ModelError: not such a URI, the registry cannot be asked, or it has no such model or alias.
    """
    match = _URI.fullmatch(uri)
    if match is None:
        raise ModelError(f"{uri!r} names no registered model; write models:/NAME/VERSION or models:/NAME@ALIAS")
    if match["version"]:
        return Version(match["name"], match["version"])
    client = _client(uri)
    try:
        found = client.get_model_version_by_alias(match["name"], match["alias"])
    except Exception as error:  # MLflow raises its own, requests' and urllib3's
        raise ModelError(f"the registry does not say what {uri} is: {_short(error)}") from error
    return Version(match["name"], str(found.version))


def fetch(uri: str, *, cache: str | os.PathLike[str] | None = None) -> Path:
    """The folder of a registered model, downloaded where it is not in the cache, and verified.

    Args:
        uri: ``models:/NAME/VERSION`` or ``models:/NAME@ALIAS``.
        cache: where folders are kept; see the module.

    Returns:
        A folder that :func:`mien.load` takes. Treat it as read-only.

    Raises:
        ModelError: the registry or its artifacts cannot be read, or the version is not a Mien model.
        ModelIntegrityError: the weights do not have the digest that the config names.
    """
    version = resolve(uri)
    root = Path(cache) if cache is not None else default_cache()
    client = _client(uri)
    try:
        source = client.get_model_version_download_uri(version.name, version.number)
    except Exception as error:
        raise ModelError(f"the registry has no {version.uri}: {_short(error)}") from error
    root.mkdir(parents=True, exist_ok=True)
    # In the cache's own file system, so that a whole folder appears by one rename.
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=root) as scratch:
        fresh = Path(scratch)
        _download(source, store.CONFIG, fresh, version)
        config = store.load_config(fresh)
        if not re.fullmatch(r"[0-9a-f]{64}", config.digest):
            raise ModelError(f"the config of {version.uri} names no digest of its weights")
        # The digest is of the weights alone: the same weights registered with another config are another folder.
        text = (fresh / store.CONFIG).read_bytes()
        kept = root / f"{config.digest}-{hashlib.sha256(text).hexdigest()[:12]}"
        if _is_whole(kept, config.digest):
            return kept
        _download(source, store.WEIGHTS, fresh, version)
        if (digest := _sha256(fresh / store.WEIGHTS)) != config.digest:
            raise ModelIntegrityError(
                f"the weights of {version.uri} have sha256 {digest[:12]}..., its config names {config.digest[:12]}..."
            )
        try:
            _download(source, store.CARD, fresh, version)
        except ModelError:
            (fresh / store.CARD).write_text(_CARD_MISSING)
        _put(fresh, kept)
    return kept


def default_cache() -> Path:
    """Where fetched models are kept; see the module."""
    if named := os.environ.get("MIEN_CACHE"):
        return Path(named) / "models"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mien" / "models"


def _client(uri: str) -> MlflowClient:
    for name, value in _MLFLOW.items():
        os.environ.setdefault(name, value)
    try:
        from mlflow import MlflowClient
    except ImportError as error:
        raise ModelError(
            f"{uri} lies in an MLflow registry, and MLflow is not installed: pip install 'mien[serve]' (or [train])"
        ) from error
    return MlflowClient()


def _download(source: str, name: str, folder: Path, version: Version) -> None:
    import mlflow.artifacts

    try:
        mlflow.artifacts.download_artifacts(artifact_uri=f"{source.rstrip('/')}/{name}", dst_path=str(folder))
    except Exception as error:
        raise ModelError(f"cannot download {name} of {version.uri}: {_short(error)}") from error
    # A source that is a local folder may be answered with its own path rather than with a copy in dst_path.
    if not (folder / name).is_file():
        raise ModelError(f"{version.uri} has no {name}; it was not registered by Mien's training")


def _is_whole(folder: Path, digest: str) -> bool:
    files = (store.CONFIG, store.WEIGHTS, store.CARD)
    return all((folder / name).is_file() for name in files) and _sha256(folder / store.WEIGHTS) == digest


def _put(fresh: Path, kept: Path) -> None:
    """Move a verified folder to its place; another process may put the same one there at the same moment."""
    whole = kept.with_name(f".{kept.name}.{os.getpid()}")
    shutil.rmtree(whole, ignore_errors=True)
    whole.mkdir()
    for name in (store.CONFIG, store.WEIGHTS, store.CARD):
        (fresh / name).replace(whole / name)
    try:
        whole.rename(kept)
    except OSError:
        # There is one: the other process's, or a damaged one, which gives way.
        shutil.rmtree(kept, ignore_errors=True)
        whole.rename(kept)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _short(error: BaseException) -> str:
    """The first line of an error: MLflow's messages run over many, with advice for MLflow's own users."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
