"""The figures: every picture goes through 8 bits, every face is judged by recognisers that were in no loss."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from mien import manifest, passwords
from mien.recognisers import Recogniser

Pixels = NDArray[np.uint8]
# uint8 [B, S, S, 3] and bool [B, N] -> uint8 [B, S, S, 3]: a model's transform, or a stand-in that a test knows all of
Transform = Callable[[Pixels, NDArray[np.bool_]], Pixels]
# Two batches of uint8 [B, S, S, 3] -> float [B]
Distance = Callable[[Pixels, Pixels], NDArray[np.float64]]

PAIRS = {
    "I-A": ("I", "A"),
    "I-R": ("I", "R"),
    "I-WR": ("I", "WR"),
    "I-WR one bit off": ("I", "WR1bit"),
    "A-WR": ("A", "WR"),
    "A1-A2": ("A", "A2"),
    "WR1-WR2": ("WR", "WR2"),
}


@dataclass(frozen=True)
class Faces:
    """Aligned crops with their identities (None: unlabelled)."""

    images: Pixels
    identities: list[int | None]


def read_shards(prefix: Path, split: manifest.Split, limit: int | None, seed: int) -> Faces:
    """Crops of a split, a seeded sample of ``limit`` of them.

    Raises:
        mien.manifest.ShardError: there is no manifest at ``prefix``, or it is not one.
        ValueError: the split is empty.
    """
    images: dict[str, bytes] = {}
    labels: dict[str, int | None] = {}
    for shard in manifest.read(prefix).of(split):
        with tarfile.open(prefix / shard.name) as tar:
            for member in tar:
                file = tar.extractfile(member)
                key, _, extension = member.name.partition(".")
                if file is None:
                    continue
                if extension == "json":
                    labels[f"{shard.name}/{key}"] = json.load(file)["identity"]
                else:
                    images[f"{shard.name}/{key}"] = file.read()
    keys = sorted(images)
    if not keys:
        raise ValueError(f"{prefix} has no sample in split {split!r}")
    if limit is not None and limit < len(keys):
        chosen = np.random.default_rng(seed).choice(len(keys), size=limit, replace=False)
        keys = [keys[i] for i in np.sort(chosen)]
    decoded = [np.asarray(Image.open(io.BytesIO(images[k])).convert("RGB")) for k in keys]
    return Faces(np.stack(decoded), [labels[k] for k in keys])


def make(transform: Transform, images: Pixels, bits: int, seed: int, batch: int = 16) -> Iterator[dict[str, Pixels]]:
    """The chain of every face under its own codes, in batches: I, A, A2, R, WR, WR2, WR1bit, as saved 8-bit pixels."""
    rng = np.random.default_rng([seed, 1])
    for start in range(0, len(images), batch):
        part = images[start : start + batch]
        code, other, wrong, other_wrong = (passwords.random_codes(len(part), bits, rng) for _ in range(4))
        right = ~code
        near = np.stack([passwords.flip_bits(c, 1, rng) for c in right])
        anonymized = transform(part, code)
        yield {
            "I": part,
            "A": anonymized,
            "A2": transform(part, other),
            "R": transform(anonymized, right),
            "WR": transform(anonymized, wrong),
            "WR2": transform(anonymized, other_wrong),
            "WR1bit": transform(anonymized, near),
        }


@torch.no_grad()
def embed(judge: Recogniser, images: Pixels) -> NDArray[np.float64]:
    """Unit embeddings float ``[B, D]``, by cosine; dlib's, which compares by distance, is of nearly constant length."""
    crops = torch.from_numpy(images.copy()).permute(0, 3, 1, 2).float() / 127.5 - 1
    e = judge(crops).double().numpy()
    unit: NDArray[np.float64] = e / np.linalg.norm(e, axis=1, keepdims=True)
    return unit


def threshold_at(fpr: float, embeddings: NDArray[np.float64], identities: list[int | None]) -> float:
    """The cosine above which a share ``fpr`` of pairs of *different* people lies.

    Raises:
        ValueError: fewer than 10 / fpr such pairs: the quantile would be noise.
    """
    known = np.array([i for i, identity in enumerate(identities) if identity is not None], dtype=np.int64)
    labels = np.array([identities[i] for i in known])
    cosines = embeddings[known] @ embeddings[known].T
    rows, columns = np.triu_indices(len(known), k=1)
    impostors = cosines[rows, columns][labels[rows] != labels[columns]]
    if len(impostors) < 10 / fpr:
        raise ValueError(f"{len(impostors)} pairs of different people are too few for a threshold at FPR {fpr}")
    return float(np.quantile(impostors, 1 - fpr))


def interval(values: NDArray[np.float64], seed: int = 0, draws: int = 1000) -> tuple[float, float]:
    """95 % bootstrap interval of the mean of ``values`` float ``[M]``."""
    rng = np.random.default_rng(seed)
    means = values[rng.integers(0, len(values), size=(draws, len(values)))].mean(axis=1)
    return float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))


def dssim(a: Pixels, b: Pixels) -> NDArray[np.float64]:
    """(1 - SSIM) / 2 of each pair, in [0, 1]; Wang et al. 2004's Gaussian window."""
    from skimage.metrics import structural_similarity

    scores = [
        structural_similarity(x, y, channel_axis=2, gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
        for x, y in zip(a, b, strict=True)
    ]
    return (1 - np.array(scores)) / 2


def l1(a: Pixels, b: Pixels) -> NDArray[np.float64]:
    """Mean absolute difference on the scale [-1, 1] (twice that of [0, 1]), as in training."""
    difference: NDArray[np.float64] = np.abs(a.astype(np.float64) - b).mean(axis=(1, 2, 3)) / 127.5
    return difference


def psnr(a: Pixels, b: Pixels) -> NDArray[np.float64]:
    """Peak signal-to-noise ratio in dB, capped at 60 for equal pictures."""
    mse = ((a.astype(np.float64) - b) ** 2).mean(axis=(1, 2, 3))
    return np.minimum(60.0, 10 * np.log10(255**2 / np.maximum(mse, 1e-9)))


def lpips_distance(weights: Path) -> Distance:
    """LPIPS (AlexNet, v0.1) through its package, weights from a complete safetensors file."""
    import lpips
    from safetensors.torch import load_file

    network = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    network.load_state_dict(load_file(str(weights)))
    network.eval()

    @torch.no_grad()
    def distance(a: Pixels, b: Pixels) -> NDArray[np.float64]:
        x, y = (torch.from_numpy(p.copy()).permute(0, 3, 1, 2).float() / 127.5 - 1 for p in (a, b))
        out: NDArray[np.float64] = network(x, y).flatten().double().numpy()
        return out

    return distance


def report(
    transform: Transform,
    faces: Faces,
    *,
    bits: int,
    judges: dict[str, Recogniser],
    distances: dict[str, Distance],
    fpr: float = 1e-3,
    seed: int = 0,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, float | int]:
    """Flat figures: ``verification/JUDGE/PAIR`` (share passing as one person), ``.../cosine``, ``recovery/NAME``.

    Every share and mean has ``/low`` and ``/high``, a 95 % bootstrap interval.
    """
    embedded: dict[str, dict[str, list[NDArray[np.float64]]]] = {j: {} for j in judges}
    measured: dict[str, list[NDArray[np.float64]]] = {}
    done = 0
    for made in make(transform, faces.images, bits, seed):
        for name, judge in judges.items():
            for kind, pixels in made.items():
                embedded[name].setdefault(kind, []).append(embed(judge, pixels))
        for name, distance in distances.items():
            measured.setdefault(f"recovery/{name}", []).append(distance(made["I"], made["R"]))
            measured.setdefault(f"change/{name}", []).append(distance(made["I"], made["A"]))
        done += len(made["I"])
        progress(done)

    out: dict[str, float | int] = {"faces": len(faces.images), "bits": bits}
    values = {name: np.concatenate(parts) for name, parts in measured.items()}
    for judge_name, kinds in embedded.items():
        e = {kind: np.concatenate(parts) for kind, parts in kinds.items()}
        threshold = threshold_at(fpr, e["I"], faces.identities)
        out[f"verification/{judge_name}/threshold"] = threshold
        for pair, (a, b) in PAIRS.items():
            cosines = (e[a] * e[b]).sum(axis=1)
            values[f"verification/{judge_name}/{pair}/same"] = (cosines >= threshold).astype(np.float64)
            values[f"verification/{judge_name}/{pair}/cosine"] = cosines
    for name, value in values.items():
        out[name] = float(value.mean())
        out[f"{name}/low"], out[f"{name}/high"] = interval(value)
    return out
