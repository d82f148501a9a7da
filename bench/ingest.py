"""How near ingest comes to plain JPEG decoding and encoding: ``python -m bench.ingest``.

One process, one thread, one run, so that the ratios mean something where the figures themselves do not travel. Of each
source, with landmarks given:

- *plain*: decode each file and encode what was decoded, with ingest's own JPEG settings,
- *crop*: decode each file and encode a square of the crop's size, what ingest cannot do without,
- *ingest*: what a worker of ingest does with them: read, decode, check, align, cut out, encode, hash,
- *detect*: the same with faces detected, of fewer photos.

The three take turns, chunk by chunk, and are timed by the processor time of the process: a machine that is shared is
seldom as fast now as it was a minute ago.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from PIL import Image

from services.ingest import config as configs
from services.ingest import crops, pipeline, reading
from services.ingest.config import IngestConfig, Source
from services.ingest.sources import Photo, photos, read_landmarks

ROOT = Path(__file__).resolve().parents[1]
AIM = 0.8
_CHUNK = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    shared = Path(os.environ.get("MIEN_SHARED", ROOT.parent / "shared"))
    parser.add_argument("--config", type=Path, action="append", help="of ingest; its sources with landmarks are read")
    parser.add_argument("--photos", type=int, default=640, help="of each source")
    parser.add_argument("--detect", type=int, default=64, help="photos of each source in which faces are detected")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "ingest.json")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    folder = ROOT / "services" / "ingest" / "configs"
    found = [c for p in asked.config or sorted(folder.glob("*.yaml")) for c in with_landmarks(p, shared)]
    if not found:
        raise SystemExit(f"no source with landmarks is there (MIEN_SHARED is {shared})")
    report = {
        "machine": {"cpus": os.cpu_count(), "processor": platform.processor() or platform.machine()},
        "versions": {"pillow": PIL.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "aim": AIM,
        "sources": {item.sources[0].name: measure(item, asked.photos, asked.detect) for item in found},
    }
    asked.out.write_text(json.dumps(report, indent=2) + "\n")
    print(table(report))  # noqa: T201
    print(asked.out)  # noqa: T201


def with_landmarks(path: Path, shared: Path) -> list[IngestConfig]:
    """A config for each of a config's sources that has landmarks and is there."""
    config = configs.load(path, {**os.environ, "MIEN_SHARED": str(shared)})
    return [
        config.model_copy(update={"sources": (source,)})
        for source in config.sources
        if source.landmarks is not None and Path(source.path).exists()
    ]


def measure(config: IngestConfig, count: int, detected: int) -> dict[str, Any]:
    """Photos a second of each way, and ratios."""
    (source,) = config.sources
    listed = photos(source)[:count]
    data = reading.read(listed)
    files = [bytes(item) for item in data if not isinstance(item, Exception)]
    with Image.open(io.BytesIO(files[0])) as first:
        size = first.size
    ways: dict[str, Callable[[int], object]] = {
        "plain": lambda i: [recode(file, None) for file in files[i : i + _CHUNK]],
        "crop": lambda i: [recode(file, config.crop_size) for file in files[i : i + _CHUNK]],
        "ingest": worker(config, source, listed, detect=False),
    }
    seconds = in_turns(ways, range(0, len(files), _CHUNK))
    few = {"detect": worker(config, source, listed[:detected], detect=True)}
    slow = in_turns(few, range(0, min(detected, len(files)), _CHUNK))
    rates = {name: len(files) / taken for name, taken in seconds.items()}
    rates |= {name: min(detected, len(files)) / taken for name, taken in slow.items()}
    return {
        "photos": len(files),
        "mean_bytes": float(np.mean([len(file) for file in files])),
        "first_size": size,
        "per_second_and_core": rates,
        "ingest_of_plain": rates["ingest"] / rates["plain"],
        "ingest_of_crop": rates["ingest"] / rates["crop"],
    }


def in_turns(ways: dict[str, Callable[[int], object]], starts: Sequence[int]) -> dict[str, float]:
    """Seconds of processor time that each way takes for all chunks; the first chunk is done once before, uncounted."""
    seconds = dict.fromkeys(ways, 0.0)
    for way in ways.values():
        way(starts[0])
    for start in starts:
        for name, way in ways.items():
            began = time.process_time()
            way(start)
            seconds[name] += time.process_time() - began
    return seconds


def recode(file: bytes, side: int | None) -> bytes:
    """A file decoded, and the whole of it or a square of it encoded as ingest does."""
    with Image.open(io.BytesIO(file)) as picture:
        pixels = picture.convert("RGB")
    if side is not None:
        pixels = pixels.crop((0, 0, side, side))
    buffer = io.BytesIO()
    pixels.save(buffer, "JPEG", **crops._JPEG)
    return buffer.getvalue()


def worker(config: IngestConfig, source: Source, listed: list[Photo], *, detect: bool) -> Callable[[int], object]:
    """What a worker process does with the chunk that begins at photo i."""
    known = read_landmarks(source.landmarks or "")
    item = pipeline.Work(source, listed, None if detect else known)
    jobs = {
        start: next(pipeline._jobs(config, [[(item, photo) for photo in listed[start : start + _CHUNK]]]))
        for start in range(0, len(listed), _CHUNK)
    }
    return lambda start: pipeline._work(jobs[start])


def table(report: dict[str, Any]) -> str:
    """The report for people."""
    lines = [f"{'source':18} {'plain':>8} {'crop':>8} {'ingest':>8} {'detect':>8}   of plain  of crop"]
    for name, row in report["sources"].items():
        rates = " ".join(f"{row['per_second_and_core'][way]:8.0f}" for way in ("plain", "crop", "ingest", "detect"))
        lines.append(f"{name:18} {rates}   {row['ingest_of_plain']:7.0%}  {row['ingest_of_crop']:7.0%}")
    return "\n".join([*lines, f"photos/s and core; the aim is {report['aim']:.0%} of plain"])


if __name__ == "__main__":
    main()
