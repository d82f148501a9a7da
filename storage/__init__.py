"""Folders and object storage behind one interface: what training and the services read shards from and write to.

The library knows nothing of S3, and training and services may not import one another, so what both need of it lies
here::

    place = storage.open_prefix("s3://bucket/runs/faces")  # or a folder: "runs/faces", "file:///runs/faces"
    place.check()                                           # now, not in an hour: bucket, credentials, endpoint
    written = place.write("nimg-12/model", Path("model.safetensors"))  # bytes or a file, whole or not at all
    place.read("manifest.json")                             # whole, checked against what the store knows of it
    place.read("train-000000.tar", start=512, length=4096)  # a range
    place.read("state.json", sha256=written.sha256)         # ChecksumMismatch where it is another file
    place.download("train-000000.tar", Path("/cache/x"), sha256=shard.sha256)  # range by range, in constant memory
    [entry.name for entry in place.list("nimg-")]           # names under the prefix that begin so, sorted
    place.exists("manifest.json"); place.delete("old.tar")  # deleting what is not there is no error

Names are relative, with forward slashes. **Atomic**: a reader sees the old object, the new one, or none. A folder
writes a temporary file, syncs it and renames it; S3 makes an object visible when its upload is complete. Neither offers
a transaction over several names, so write what names the others (a manifest) last. **Checked**: every upload carries a
checksum that the store verifies, and the sha256 in its metadata, which ``read`` and ``download`` verify; a folder keeps
no metadata, so there the caller says which ``sha256`` it expects. **Patient**: what may pass (no connection, 5xx,
throttling, a body that broke off) is tried again for ``patience`` seconds, with a warning in the log; ``check`` gives
up after ten. Credentials, region and endpoint come from the standard AWS variables and files
(``AWS_ACCESS_KEY_ID``, ``AWS_ENDPOINT_URL``, ...), never from a URL.

A place can be used from several threads and after a fork, and pickled to another process. boto3 is imported when an
``s3://`` URL is opened and not before.
"""

from __future__ import annotations

import os
from pathlib import Path

from storage.base import (
    AccessDenied,
    ChecksumMismatch,
    Entry,
    NoCredentials,
    NotFound,
    Prefix,
    StorageError,
    StorageFull,
    Unreachable,
    Written,
)
from storage.folder import Folder

__all__ = [
    "AccessDenied",
    "ChecksumMismatch",
    "Entry",
    "Folder",
    "NoCredentials",
    "NotFound",
    "Prefix",
    "StorageError",
    "StorageFull",
    "Unreachable",
    "Written",
    "is_s3",
    "open_prefix",
]


def is_s3(url: str | os.PathLike[str]) -> bool:
    """Whether a URL or path names object storage."""
    return os.fspath(url).startswith("s3://")


def open_prefix(url: str | os.PathLike[str], *, patience: float = 600.0) -> Prefix:
    """The place a URL names; nothing is contacted or created yet.

    Args:
        url: ``s3://bucket/prefix``, ``file:///folder``, or the path of a folder.
        patience: seconds for which what may pass (no connection, throttling, a broken body) is tried again.

    Raises:
        StorageError: the URL is of another scheme, or names no bucket.
    """
    text = os.fspath(url)
    if is_s3(text):
        try:
            from storage.s3 import S3
        except ImportError as error:
            raise StorageError(f"{text} needs {error.name}; it comes with the train and serve extras") from error

        return S3(text, patience=patience)
    scheme, separator, rest = text.partition("://")
    if separator and scheme != "file":
        raise StorageError(f"{text}: expected s3://bucket/prefix, file:///folder or a path, not {scheme}://")
    return Folder(Path(rest if separator else text))
