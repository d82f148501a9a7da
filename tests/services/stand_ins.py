"""Subjects and a judge whose right answers are known, at a size that costs nothing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from mien.recognisers import Recogniser
from services.evaluate.chain import Chain, Subject
from services.evaluate.context import Context, Sizes
from services.evaluate.distances import Pixels
from services.evaluate.faces import Faces, draw
from services.evaluate.judges import Judge
from services.evaluate.progress import Progress

BITS, SIZE, PEOPLE = 8, 32, 160

# MTCNN's for the face of skimage's astronaut.
_EYES_NOSE_MOUTH = np.array([[205.13, 102.63], [247.75, 104.64], [226.19, 128.68], [202.76, 140.69], [245.75, 142.3]])


class Projection(Recogniser):
    """A recogniser that sees a random projection of the picture: same picture, same person."""

    def __init__(self) -> None:
        super().__init__(name="projection", embedding_size=64, threshold=None, matrix=np.eye(3)[:2], size=(SIZE, SIZE))
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("matrix", torch.randn(3 * SIZE * SIZE, 64, generator=generator))

    def forward(self, crops: Tensor) -> Tensor:
        return self.embed(crops)

    def embed(self, aligned: Tensor) -> Tensor:
        assert isinstance(self.matrix, Tensor)
        return adaptive_avg_pool2d(aligned, SIZE).flatten(1) @ self.matrix


def two_photos_each(people: int = PEOPLE) -> Faces:
    """Two slightly different photos of each of many people."""
    rng = np.random.default_rng(0)
    first = rng.integers(0, 256, size=(people, SIZE, SIZE, 3), dtype=np.uint8)
    second = np.clip(first.astype(int) + rng.integers(-20, 21, size=first.shape), 0, 255).astype(np.uint8)
    names = list(range(people))
    return Faces(np.concatenate([first, second]), [*names, *names], [f"photo {i}" for i in range(2 * people)])


def _mask(code: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """A pattern to XOR a picture with, the same for a code and its inverse: a perfect transformer of noise."""
    canonical = code if code[0] else ~code
    seed = int("".join("1" if b else "0" for b in canonical), 2)
    return np.random.default_rng(seed).integers(0, 256, size=(SIZE, SIZE, 3), dtype=np.uint8)


def perfect(images: Pixels, codes: NDArray[np.bool_]) -> Pixels:
    """Hides and gives back without loss; every code is another person."""
    return np.stack([x ^ _mask(c) for x, c in zip(images, codes, strict=True)])


def context_of(transform: object, faces: Faces, judge: str = "dlib", people: int = PEOPLE, **sizes: int) -> Context:
    """What parts are given; the judge bears the name of a real one, so that keys and gates know it."""
    subject = Subject(transform=transform, bits=BITS)  # type: ignore[arg-type]
    sample = draw(faces, people, seed=0)
    progress = Progress()
    return Context(
        subject=subject,
        sample=sample,
        judges={judge: Judge(judge, Projection().eval())},
        missing_judges={},
        chain=Chain(subject, sample.faces.images, seed=0, progress=progress),
        progress=progress,
        sizes=Sizes(**{"lossy": 8, "gallery": 200, **sizes}),
        everyone=faces,
    )


def astronaut_shards(folder: Path, people: int = 24) -> Path:
    """Shards with one split, test: skimage's astronaut (NASA) plays everybody, tinted, in two photos each."""
    from skimage import data

    from services.ingest import IngestConfig, Source, run

    photo = data.astronaut()[0:256, 96:356]
    rows = []
    for person in range(people):
        tint = np.random.default_rng(person).uniform(0.5, 1.2, size=3)
        for number in (1, 2):
            name = f"Person_{person}/Person_{person}_{number:04d}.jpg"
            (folder / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.clip(photo * tint * (1.05 - 0.05 * number), 0, 255).astype(np.uint8)).save(
                folder / "photos" / name, quality=92
            )
            rows.append({"file": name, "landmarks": (_EYES_NOSE_MOUTH - [96, 0]).tolist(), "prob": 0.99})
    lines = folder / "landmarks.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = Source(name="astronaut", path=folder / "photos", landmarks=lines, licence="public domain (NASA)")
    run(IngestConfig(sources=(source,), split=(0, 0, 100)), folder / "shards")
    return folder / "shards"
