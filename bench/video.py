"""Frames a second of clips, beside decoding and encoding the same clip in the same run: ``python -m bench.video``.

- *copy*: every frame decoded to RGB and encoded again as the anonymized clip is: what no tool can do without,
- *first pass*: decoding, detecting (in every k-th frame) and tracking,
- *second pass*: decoding, cutting out, the network in batches over frames, putting back, encoding,
- *anonymize*: both, as ``mien anonymize`` does them,
- *one at a time*: the second pass with the network given one crop at a time instead of a batch over frames.

As many threads work in each as fill the cores; FFmpeg's own do in *copy*. Frames a second of one machine do not travel;
the ratios to *copy* do, somewhat. A clip is made of one face that moves.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "mien-128")
    parser.add_argument("--frames", type=int, default=75)
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--rounds", type=int, default=3, help="in which all take turns")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "video.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = measure(Path(folder), options)
    options.out.write_text(json.dumps(report, indent=2) + "\n")
    print(table(report))  # noqa: T201
    print(f"Written: {options.out}")  # noqa: T201


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    from skimage import data

    import mien
    from mien.video import clips, synthetic
    from mien.video.stages import usual_workers
    from mien.video.tracking import TrackerConfig

    # As the command does: a core for each of several frames.
    torch.set_num_threads(1)
    model = mien.load(str(options.model))
    picture = data.astronaut()
    (face,) = model.detector.detect(picture)
    height, width = options.height, options.height * 16 // 9 // 2 * 2
    source = folder / "clip.mp4"
    shots = synthetic.shots(
        picture, face.landmarks, "move", frames=options.frames, size=(height, width), eyes=height / 8
    )
    synthetic.write(source, (shot.pixels for shot in shots))
    code = model.code_for("anonymize", "bench")
    detector = clips.video_detector(model)
    batches: list[int] = []

    def batched(crops: torch.Tensor, codes: Any) -> torch.Tensor:
        batches.append(len(crops))
        return model.transform_float(crops, codes)

    def singly(crops: torch.Tensor, codes: NDArray[np.bool_]) -> torch.Tensor:
        return torch.cat([model.transform_float(crops[i : i + 1], codes[i : i + 1]) for i in range(len(crops))])

    def first(every: int) -> Callable[[], object]:
        return lambda: clips.find_tracks(source, detector, size=model.crop_size, config=TrackerConfig(every=every))

    anonymized = folder / "anonymized.mkv"

    def both(every: int) -> Callable[[], object]:
        return lambda: clips.anonymize(
            model, source, anonymized, code, config=TrackerConfig(every=every), transform=batched
        )

    both(5)()
    what: dict[str, Callable[[], object]] = {
        "copy": lambda: copy(source, folder / "copy.mkv", "lossless"),
        "first pass": first(1),
        "first pass, every 5th": first(5),
        # Recovering reads the geometry: a second pass alone.
        "second pass": lambda: recover(model, anonymized, folder / "back.mkv", ~code, batched),
        "second pass, one at a time": lambda: recover(model, anonymized, folder / "back.mkv", ~code, singly),
        "anonymize": both(1),
        "anonymize, every 5th": both(5),
    }
    taken: dict[str, list[float]] = {name: [] for name in what}
    for round_ in range(options.rounds):
        for name, call in what.items():
            began = time.perf_counter()
            call()
            taken[name].append(options.frames / (time.perf_counter() - began))
        print(f"... round {round_ + 1} of {options.rounds}", file=sys.stderr, flush=True)  # noqa: T201
    rates = {name: statistics.median(values) for name, values in taken.items()}
    return {
        "machine": {"cpu": _cpu(), "threads": usual_workers()},
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "model": {"digest": model.digest, "architecture": model.config.architecture.name},
        "clip": {"frames": options.frames, "width": width, "height": height, "faces": 1},
        "largest_batch": max(batches),
        "frames_per_second": rates,
        "of_copy": {name: rate / rates["copy"] for name, rate in rates.items()},
    }


def copy(source: Path, target: Path, codec: str) -> None:
    """Decode to RGB and encode, through the same reader and writer."""
    from mien.video.codecs import CODECS
    from mien.video.container import Reader, Writer

    with Reader(source) as reader:
        chosen = CODECS[codec]  # type: ignore[index]
        with Writer(
            target, container="matroska", source=reader, codec=chosen, crf=None, colour=reader.clip.colour, tags={}
        ) as writer:
            for frame in reader.frames():
                writer.write(frame)


def recover(model: Any, source: Path, target: Path, code: NDArray[np.bool_], transform: Any) -> None:
    from mien.video import clips

    clips.recover(model, source, target, code, codec="lossless", transform=transform)


def table(report: dict[str, Any]) -> str:
    clip = report["clip"]
    lines = [
        f"{clip['width']}x{clip['height']}, {clip['frames']} frames, one face; {report['model']['architecture']}, "
        f"{report['machine']['cpu']}, {report['machine']['threads']} threads; largest batch {report['largest_batch']}",
        "",
        "| what | frames/s | of decoding and encoding alone |",
        "| --- | --- | --- |",
    ]
    for name, rate in report["frames_per_second"].items():
        lines.append(f"| {name} | {rate:.1f} | {report['of_copy'][name]:.2f} |")
    return "\n".join(lines)


def _cpu() -> str:
    names = [line.split(":")[1] for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    return names[0].strip() if names else platform.processor()


if __name__ == "__main__":
    main()
