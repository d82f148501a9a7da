"""How far two pictures are apart. Batches uint8 ``[B, S, S, 3]`` in, float ``[B]`` out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]
Floats = NDArray[np.float64]
Distance = Callable[[Pixels, Pixels], Floats]


def l1(a: Pixels, b: Pixels) -> Floats:
    """Mean absolute difference on the scale [-1, 1] (twice that of [0, 1]), as in training."""
    difference: Floats = np.abs(a.astype(np.float64) - b).mean(axis=(1, 2, 3)) / 127.5
    return difference


def l2(a: Pixels, b: Pixels) -> Floats:
    """Mean squared difference on the scale [-1, 1] (four times that of [0, 1])."""
    difference: Floats = ((a.astype(np.float64) - b) ** 2).mean(axis=(1, 2, 3)) / 127.5**2
    return difference


def psnr(a: Pixels, b: Pixels) -> Floats:
    """Peak signal-to-noise ratio in dB, capped at 60 for equal pictures."""
    mse = ((a.astype(np.float64) - b) ** 2).mean(axis=(1, 2, 3))
    return np.minimum(60.0, 10 * np.log10(255**2 / np.maximum(mse, 1e-9)))


def dssim(a: Pixels, b: Pixels) -> Floats:
    """(1 - SSIM) / 2 of each pair, in [0, 1]; Wang et al. 2004's Gaussian window."""
    from skimage.metrics import structural_similarity

    scores = [
        structural_similarity(x, y, channel_axis=2, gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
        for x, y in zip(a, b, strict=True)
    ]
    return (1 - np.array(scores)) / 2


def to_tensor(pixels: Pixels) -> torch.Tensor:
    """uint8 ``[B, S, S, 3]`` to float ``[B, 3, S, S]`` in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_pixels(images: torch.Tensor) -> Pixels:
    """The inverse of :func:`to_tensor`, rounded as a file rounds."""
    scaled = ((images.detach().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return scaled.permute(0, 2, 3, 1).contiguous().numpy()


def lpips_distance(weights: Path) -> Distance:
    """LPIPS (AlexNet, v0.1) through its package, weights from a complete safetensors file."""
    network = lpips_network(weights)

    @torch.no_grad()
    def distance(a: Pixels, b: Pixels) -> Floats:
        parts = [
            network(to_tensor(a[i : i + 32]), to_tensor(b[i : i + 32])).flatten().double().numpy()
            for i in range(0, len(a), 32)
        ]
        return np.concatenate(parts) if parts else np.zeros(0)

    return distance


def lpips_network(weights: Path) -> torch.nn.Module:
    """The LPIPS network itself, in evaluation mode; raises OSError where the file is missing."""
    import lpips
    from safetensors.torch import load_file

    network: torch.nn.Module = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    network.load_state_dict(load_file(str(weights)))
    return network.eval().requires_grad_(False)


def alexnet_features(weights: Path) -> Callable[[Pixels], Floats]:
    """AlexNet's last convolution averaged over the picture, float ``[B, 256]``: ImageNet features, as FID's are."""
    network = lpips_network(weights)

    @torch.no_grad()
    def features(pixels: Pixels) -> Floats:
        parts = []
        for i in range(0, len(pixels), 32):
            maps = network.net.forward(network.scaling_layer(to_tensor(pixels[i : i + 32])))  # type: ignore[operator]
            parts.append(maps[-1].mean(dim=(2, 3)).double().numpy())
        return np.concatenate(parts)

    return features


def frechet(a: Floats, b: Floats) -> float:
    """Frechet distance between Gaussians fitted to features ``[M, D]`` and ``[K, D]`` (Heusel et al. 2017)."""
    mean_a, mean_b = a.mean(axis=0), b.mean(axis=0)
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    # trace(sqrt(AB)) from the eigenvalues of the symmetric sqrt(A) B sqrt(A): no complex square roots.
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ cov_b @ root), 0)).sum()
    return float(((mean_a - mean_b) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * cross)
