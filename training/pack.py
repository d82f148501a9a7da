"""``python -m training.pack --shards S --weights W --out OUT``: everything a bare GPU machine needs, in small pieces.

Some machines are lent without a registry and without storage: all they get is a checkout of this repository and folders
of limited size beside it. OUT then holds ``piece-1``, ``piece-2``, ..., each of ``--piece-mib`` at most, to be carried
one by one; :mod:`training.machine` puts them together there, and refuses to where one is missing or torn. In them lie

- the shards, byte for byte: the manifest's digest, and so a model's lineage, is the same there as here;
- the recognisers' weights;
- the few packages that the machine lacks, unpacked for its Python (:data:`PACKAGES`; training needs no other that a
  machine with torch does not have, which ``tests/training/test_machine.py`` watches).

The last of them come from the package index through uv, in the versions that are installed here.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import io
import json
import logging
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final

from mien import store
from mien.errors import MienError
from training import machine
from training.data import FaceShards

logger = logging.getLogger(__name__)

PACKAGES: Final = (
    "pydantic",
    "pydantic-core",
    "annotated-types",
    "typing-inspection",
    "typing-extensions",
    "facenet-pytorch",  # MTCNN, for the term that keeps a face in its place
)
_PLATFORM: Final = "x86_64-manylinux_2_28"


class PackError(MienError):
    """Something that belongs into the pieces is not there."""


def pack(files: Iterable[tuple[str, Path]], out: Path, *, piece_bytes: int) -> int:
    """Write the pieces, each a folder of its own with what all of them together must be.

    Args:
        files: name in the pieces (``shards/...``, ``shared/...``, ``site/...``) and where the file lies.
        out: folder for the pieces; older ones there are removed.
        piece_bytes: a piece's size at most.

    Returns:
        How many.
    """
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("piece-*"):
        shutil.rmtree(old)
    with tempfile.TemporaryFile() as whole:
        # Of crops only the tar's own padding is compressed: the fastest level finds it as well as the slowest.
        with tarfile.open(fileobj=whole, mode="w:gz", compresslevel=1) as tar:
            for name, path in files:
                tar.add(path, name, recursive=False)
        size = whole.seek(0, io.SEEK_END)
        whole.seek(0)
        records = []
        for number, data in enumerate(_cut(whole, size, piece_bytes), 1):
            folder = out / f"piece-{number}"
            folder.mkdir()
            (folder / machine.PART).write_bytes(data)
            records.append({"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)})
    for number in range(1, len(records) + 1):
        listing = json.dumps({"format": 1, "pieces": records}, indent=1) + "\n"
        store.write_atomically(out / f"piece-{number}" / machine.LISTING, listing.encode())
        logger.info("%s: %.1f MiB", out / f"piece-{number}", records[number - 1]["bytes"] / 2**20)
    return len(records)


def _cut(stream: io.BufferedRandom | tempfile._TemporaryFileWrapper[bytes], size: int, most: int) -> Iterator[bytes]:
    """The stream in as few pieces as it takes, of about the same size."""
    count = max(1, -(-size // most))
    for i in range(count):
        yield stream.read(size * (i + 1) // count - size * i // count)


def _shards(folder: Path) -> list[tuple[str, Path]]:
    for split in ("train", "val"):
        FaceShards(folder, split)  # read whole and checked: better here than on a machine that is paid by the minute
    manifest = json.loads((folder / "manifest.json").read_text())
    names = ["manifest.json", *(shard["name"] for shard in manifest["shards"])]
    return [(f"shards/{folder.resolve().name}/{name}", folder / name) for name in names]


def _weights(folder: Path) -> list[tuple[str, Path]]:
    found = sorted(folder.glob("*.safetensors"))
    if not found:
        raise PackError(f"{folder} has no weights (*.safetensors)")
    return [(f"shared/weights/{path.name}", path) for path in found]


def _packages(python: str, into: Path) -> list[tuple[str, Path]]:
    """:data:`PACKAGES` as installed for another Python, without what only installers read."""
    uv = shutil.which("uv") or shutil.which("uv", path=Path(__file__).resolve().parents[1] / ".cache/uv/bin")
    if uv is None:
        raise PackError("uv is not there; `make install` fetches it")
    wanted = [f"{name}=={importlib.metadata.version(name)}" for name in PACKAGES]
    options = ["--python-version", python, "--python-platform", _PLATFORM, "--only-binary", ":all:", "--no-deps"]
    try:
        subprocess.run(
            [uv, "pip", "install", "--quiet", "--target", into, *options, *wanted],
            capture_output=True,
            text=True,
            check=True,
            timeout=300,
        )
    except subprocess.CalledProcessError as error:
        raise PackError(f"uv could not fetch {', '.join(wanted)}: {error.stderr.strip()}") from error
    except subprocess.TimeoutExpired as error:
        raise PackError("uv did not fetch the packages within five minutes") from error
    files = sorted(path for path in into.rglob("*") if path.is_file() and path.name != ".lock")
    return [(f"site/{path.relative_to(into)}", path) for path in files]


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit codes: 0 the pieces are there, 1 something that belongs into them is not."""
    parser = argparse.ArgumentParser(prog="training.pack", description="Pack what a bare GPU machine needs.")
    parser.add_argument("--shards", required=True, type=Path, help="folder with manifest.json and its shards")
    parser.add_argument("--weights", required=True, type=Path, help="folder of recognisers' weights")
    parser.add_argument("--out", required=True, type=Path, help="folder for the pieces")
    parser.add_argument("--piece-mib", type=float, default=36.0, help="size of a piece at most; default %(default)g")
    parser.add_argument("--python", default="3.12", help="of the machine; default %(default)s")
    chosen = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    with tempfile.TemporaryDirectory() as site:
        try:
            files = [*_packages(chosen.python, Path(site)), *_weights(chosen.weights), *_shards(chosen.shards)]
            count = pack(files, chosen.out, piece_bytes=int(chosen.piece_mib * 2**20))
        except (MienError, OSError) as error:
            sys.stderr.write(f"training.pack: {error}\n")
            return 1
    sys.stdout.write(f"{count} pieces in {chosen.out}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
