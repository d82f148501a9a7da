"""``python -m training.fetch s3://bucket/prefix FOLDER``: files that a run needs on disk, before it starts.

Recognisers are read from files, which lie beside the shards in object storage and in no image, since their licences
differ. The manifests of ``k8s/training`` run this in an init container.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path, PurePosixPath

import storage


def fetch(url: str, folder: Path) -> list[Path]:
    """Copy every object under a prefix to a folder; each is checked and appears whole.

    Args:
        url: what :func:`storage.open_prefix` takes.
        folder: created where missing. Files that are there are replaced.

    Returns:
        The files, in the order of their names.

    Raises:
        storage.StorageError: the place cannot be read, or a name would leave the folder.
    """
    place = storage.open_prefix(url)
    place.check()
    files = []
    for entry in place.list(""):
        name = PurePosixPath(entry.name)
        if name.is_absolute() or ".." in name.parts:
            raise storage.StorageError(f"{url} holds {entry.name!r}, which would leave {folder}")
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        place.download(entry.name, target)
        files.append(target)
    return files


def main() -> int:
    """Exit codes: 0 copied (an empty prefix is said and allowed: not every run needs such files), 1 storage failed."""
    parser = argparse.ArgumentParser(prog="training.fetch", description=fetch.__doc__.splitlines()[0])
    parser.add_argument("url", help="s3://bucket/prefix or a folder")
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    try:
        files = fetch(arguments.url, arguments.folder)
    except storage.StorageError as error:
        sys.stderr.write(f"fetch: {error}\n")
        return 1
    if not files:
        sys.stderr.write(f"fetch: nothing at {arguments.url}; a run that names no weights goes on without\n")
    sys.stdout.write(f"{len(files)} files: {arguments.folder}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
