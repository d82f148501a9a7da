"""A cover transformer at a size that costs nothing, fitted to crops of one photo or fresh, and what is done with it."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from mien import networks
from mien.networks.cover import CoverConfig, CoverTransformer, stretch
from mien.networks.painter import PainterConfig

BITS, SIZE = 16, 64
# A crop of 64 px has 312 blocks inside a face.
CONFIG = CoverConfig(
    leading_luma=3, leading_colour=2, landmarks=0, luma=40, colour=12, robust=(30, 8), likenesses=16, carriers=300,
    widths=(8, 16), features=32, painter=PainterConfig(widths=(8, 16)),
)  # fmt: skip


def fresh(*, painting: bool = False, config: CoverConfig = CONFIG, bits: int = BITS) -> CoverTransformer:
    """Random eigenfaces and likenesses; a painter that paints nothing, or something, the same every time."""
    torch.manual_seed(3)
    network = networks.build(config, bits=bits, size=SIZE).eval()
    assert isinstance(network, CoverTransformer)
    if painting:
        _paint(network)
    return network


def fitted(folder: Path) -> tuple[CoverTransformer, Tensor]:
    """A network fitted to 96 crops of skimage's astronaut, with a painter that paints, and 8 others of the crops."""
    from tests.training.conftest import write_shards
    from training.cover import fit
    from training.data import FaceShards
    from training.samples import from_uint8

    write_shards(folder, {"train": 96, "val": 8}, size=SIZE)
    train, val = FaceShards(folder, "train"), FaceShards(folder, "val")
    network = fresh()
    fit(network, train, val, steps=100, batch=32, seed=0, device=torch.device("cpu"))
    _paint(network)
    return network, from_uint8(val.decode(np.arange(8)).images)


@torch.no_grad()
def _paint(network: CoverTransformer) -> None:
    assert network.painter is not None
    network.painter.head.weight.normal_(std=0.02, generator=torch.Generator().manual_seed(4))


def draw(count: int, *, bits: int = BITS, seed: int = 1) -> Tensor:
    """Codes float ``[count, bits]`` in {-0.5, +0.5}."""
    generator = torch.Generator().manual_seed(seed)
    return networks.codes_to_tensor(torch.randint(0, 2, (count, bits), generator=generator))


def blurred(count: int = 4) -> Tensor:
    """Smooth pictures of no face, of 8 bits."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(count, 3, 8, 8, generator=generator) * 1.2 - 0.6
    return saved(F.interpolate(noise, size=SIZE, mode="bicubic", align_corners=False))


def _bytes(images: Tensor) -> np.ndarray:
    return ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()


def _floats(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def saved(images: Tensor) -> Tensor:
    """Images as an 8-bit file without loss gives them back."""
    return _floats(_bytes(images))


def jpeg(images: Tensor, quality: int = 90) -> Tensor:
    """Images as a JPEG with halved colours (4:2:0) gives them back."""
    out = []
    for picture in _bytes(images):
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "JPEG", quality=quality, subsampling=2)
        out.append(np.asarray(Image.open(buffer)))
    return _floats(np.stack(out))


@torch.inference_mode()
def transform(network: CoverTransformer, images: Tensor, codes: Tensor) -> Tensor:
    """T_p, saved."""
    return saved(network(images, codes))


@torch.inference_mode()
def found(network: CoverTransformer, images: Tensor, codes: Tensor) -> Tensor:
    """Whether a face is hidden in each picture under ``codes``, bool ``[B]``."""
    stretched = stretch(images)
    seen = network.observe(stretched)
    return network.uncover(stretched, seen, network.paint(seen, network.likenesses(codes)), codes)[1]


def face(network: CoverTransformer) -> Tensor:
    """The pixels inside the outline of the face, bool ``[S, S]``."""
    return F.interpolate(network.area[None, None], scale_factor=2)[0, 0] > 0


def psnr(network: CoverTransformer, one: Tensor, other: Tensor) -> Tensor:
    """Of the pixels of the face, dB, float ``[B]``."""
    return -10 * ((one - other)[..., face(network)] / 2).square().mean(dim=(1, 2)).log10()
