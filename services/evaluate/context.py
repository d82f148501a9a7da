"""What every part is given."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from mien.detection import MTCNNDetector
from services.evaluate import distances
from services.evaluate.chain import Chain, Subject
from services.evaluate.distances import Distance
from services.evaluate.faces import Faces, Sample
from services.evaluate.judges import Judge
from services.evaluate.progress import Progress


@dataclass(frozen=True)
class Sizes:
    """How much is measured, chosen so that all of it takes half an hour on two cores; in faces unless it says else."""

    near: int = 240  # codes wrong by 2 and by 4 bits; by 1 all faces
    lossy: int = 120  # recovery through JPEG and resizing
    gallery: int = 1000  # people in the gallery of re-identification
    pairs: int = 400  # standard LFW pairs
    detector: int = 240
    reference: int = 600  # real faces for Frechet distances
    diversity: int = 16
    passwords: int = 32
    bits: int = 12  # faces whose every bit is flipped
    photos: int = 24  # whole pictures
    sweep_faces: int = 6
    sweep_codes: int = 1024  # 65536 is all of them
    candidates_faces: int = 24
    candidates_codes: int = 32
    climbs: int = 8
    known_codes: int = 256
    linking: int = 100
    latent_train: int = 2100
    latent_codes: int = 2048
    attack_train: int = 1200  # faces attackers learn from
    attack_images: int = 1600  # images they see
    attack_test: int = 200
    baseline_faces: int = 120
    ablation_faces: int = 120

    def quick(self) -> Sizes:
        """A few of everything: to see that it runs, not to measure."""
        small = {name: max(2, min(value, 8)) for name, value in self.__dict__.items()}
        return replace(self, **{**small, "gallery": 64, "pairs": 20, "attack_images": 32, "attack_train": 32,
                                "reference": 40, "passwords": 6, "candidates_codes": 6, "sweep_codes": 16})  # fmt: skip


@dataclass
class Context:
    """The model, the faces, the judges, and where the optional material lies."""

    subject: Subject
    sample: Sample
    judges: dict[str, Judge]
    missing_judges: dict[str, str]
    chain: Chain
    progress: Progress
    seed: int = 0
    fpr: float = 1e-3
    sizes: Sizes = Sizes()
    weights: Path | None = None
    pairs: Path | None = None
    photos: Path | None = None
    everyone: Faces | None = None
    train_data: str | None = None
    baselines: Path | None = None
    ablations: Path | None = None
    clips: Path | None = None
    model_path: str = ""
    model: object | None = None
    memo: dict[str, Any] = field(default_factory=dict)  # what several parts need and one makes

    @cached_property
    def distances(self) -> dict[str, Distance]:
        """L1, L2, PSNR, DSSIM, and LPIPS where its weights are."""
        found: dict[str, Distance] = {
            "l1": distances.l1, "l2": distances.l2, "psnr": distances.psnr, "dssim": distances.dssim
        }  # fmt: skip
        if self.lpips_file is not None:
            found = {"lpips": distances.lpips_distance(self.lpips_file), **found}
        return found

    @property
    def lpips_file(self) -> Path | None:
        """The LPIPS weights, where they are."""
        file = self.weights / "lpips_alex.safetensors" if self.weights else None
        return file if file is not None and file.exists() else None

    @cached_property
    def detector(self) -> MTCNNDetector:
        """MTCNN, loaded once."""
        return MTCNNDetector()

    @property
    def groups(self) -> list[object]:
        """The person of every face, for intervals; who has no name is alone."""
        return person_groups(self.sample.faces)

    @property
    def headline(self) -> Judge:
        """The first judge that was in no loss."""
        return next(judge for judge in self.judges.values() if not judge.trainer)


def person_groups(faces: Faces) -> list[object]:
    """A hashable person for every face; who has no name is alone."""
    return [("nobody", i) if identity is None else identity for i, identity in enumerate(faces.identities)]
