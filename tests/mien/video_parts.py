"""What the tests of clips share: a detector that can be made to fail, and a network that certainly hides a face."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mien.detection import Detector, Face, MTCNNDetector
from mien.video.container import Frame, Reader

Pixels = NDArray[np.uint8]


class Remembering:
    """MTCNN, asked once for each picture: the tests show the same frames many times."""

    def __init__(self, detector: MTCNNDetector) -> None:
        self.detector = detector.with_confidence(0.7)
        self.known: dict[bytes, list[Face]] = {}

    def detect(self, pixels: Pixels) -> list[Face]:
        key = pixels.tobytes()
        if key not in self.known:
            self.known[key] = self.detector.detect(pixels)
        return self.known[key]


class Blind:
    """A detector that sees nothing in chosen calls."""

    def __init__(self, detector: Detector, calls: Collection[int]) -> None:
        self.detector, self.calls, self.count = detector, calls, -1

    def detect(self, pixels: Pixels) -> list[Face]:
        self.count += 1
        return [] if self.count in self.calls else self.detector.detect(pixels)


def hiding(crops: Tensor, codes: NDArray[np.bool_] | Tensor) -> Tensor:
    """Upside down and negative: no recogniser takes it for the same person, so what still passes has slipped through.

    It stands in for a *model* in tests of what lies around the model.
    """
    return -crops.flip(2)


def frames(path: Path) -> list[Frame]:
    """All pictures of a clip."""
    with Reader(path) as reader:
        return list(reader.frames())


def others(path: Path) -> list[tuple[str, int, Any, Any, bytes]]:
    """Packets of sound and subtitles: kind, stream, time and duration in seconds, bytes."""
    import av

    out = []
    with av.open(str(path)) as clip:
        for packet in clip.demux([s for s in clip.streams if s.type in ("audio", "subtitle")]):
            if packet.size:
                assert packet.time_base is not None
                start = None if packet.pts is None else packet.pts * packet.time_base
                out.append((packet.stream.type, start, packet.duration * packet.time_base, bytes(packet)))
    return sorted(out, key=lambda row: (row[0], row[1]))


def differ(a: Pixels, b: Pixels) -> float:
    """Mean absolute difference in 8-bit levels."""
    return float(np.abs(a.astype(np.int16) - b.astype(np.int16)).mean())


def no_change(crops: Tensor, codes: NDArray[np.bool_] | Tensor) -> Tensor:
    """A network that fails silently."""
    return crops.clone()


def not_finite(crops: Tensor, codes: NDArray[np.bool_] | Tensor) -> Tensor:
    """A network that gives what is no picture."""
    return torch.full_like(crops, float("nan"))
