"""Judges: recognisers that say who is who. A new one is a class in :mod:`mien.recognisers` and a line in JUDGES."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch

from mien import recognisers
from mien.errors import ModelError
from mien.recognisers import InceptionResnet, Recogniser
from services.evaluate.distances import Floats, Pixels, to_tensor

JUDGES: Final[dict[str, Callable[[Path | None], Recogniser]]] = {
    "dlib": lambda weights: recognisers.load("dlib"),
    "mobilefacenet-ms1m": lambda weights: recognisers.load("mobilefacenet-ms1m", weights),
    "mobilefacenet-casia": lambda weights: recognisers.load("mobilefacenet-casia", weights),
    "inception-vggface2": lambda weights: _inception("vggface2", weights),
    "inception-casia": lambda weights: _inception("casia-webface", weights),
}

# What our training configs put into the loss: it is shown, marked, and never the headline.
TRAINERS: Final = frozenset({"mobilefacenet-casia"})

_CHUNK: Final = 16


@dataclass(frozen=True)
class Judge:
    """A recogniser that gives unit embeddings; ``trainer``: it was in the loss, so its word counts for little."""

    name: str
    recogniser: Recogniser
    trainer: bool = False

    def embed(self, pixels: Pixels, advance: Callable[[int], None] = lambda done: None) -> Floats:
        """Unit embeddings float ``[B, D]`` of uint8 ``[B, S, S, 3]``.

        Compared by cosine, also dlib's, which is meant for distances: its embeddings are of nearly constant length,
        and the threshold is measured on the cosines themselves.
        """
        parts: list[Floats] = []
        for start in range(0, len(pixels), _CHUNK):
            part = self._embed(pixels[start : start + _CHUNK])
            parts.append(part / np.linalg.norm(part, axis=1, keepdims=True))
            advance(len(part))
        return np.concatenate(parts) if parts else np.zeros((0, self.recogniser.embedding_size))

    @torch.no_grad()
    def _embed(self, pixels: Pixels) -> Floats:
        out: Floats = self.recogniser(to_tensor(pixels)).double().numpy()
        return out


def load(names: Sequence[str], weights: Path | None) -> tuple[dict[str, Judge], dict[str, str]]:
    """The judges that load, and of the others why they do not.

    Raises:
        ModelError: a name is unknown, or no judge beside trainers is left.
    """
    judges: dict[str, Judge] = {}
    missing: dict[str, str] = {}
    for name in names:
        if name not in JUDGES:
            raise ModelError(f"there is no judge {name!r}; there are {', '.join(JUDGES)}")
        try:
            judges[name] = Judge(name, JUDGES[name](weights), name in TRAINERS)
        except ModelError as error:
            missing[name] = str(error)
    if not any(not judge.trainer for judge in judges.values()):
        reasons = "; ".join(f"{name}: {why}" for name, why in missing.items())
        raise ModelError(f"no judge is left that is not a trainer ({reasons or 'name one with --judges'})")
    return judges, missing


def _inception(pretrained: str, weights: Path | None) -> Recogniser:
    """facenet-pytorch's, from ``inception_vggface2.safetensors`` in the folder of weights, else its own download."""
    file = weights / f"inception_{pretrained.partition('-')[0]}.safetensors" if weights else None
    if file is not None and file.exists():
        network = InceptionResnet(None)
        recognisers.load_weights(network.network, file)
        return network
    return InceptionResnet("vggface2" if pretrained == "vggface2" else "casia-webface")
