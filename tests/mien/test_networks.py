"""The architectures: the paper's size, no word from batch-mates, exact reversal where it is promised."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mien import networks
from mien.networks.blocks import head_mask
from mien.networks.painter import PainterConfig
from mien.networks.wavelet import analyse, synthesise

BITS, SIZE = 16, 128
SMALL: dict[str, networks.AnyConfig] = {
    "resnet": networks.ResNetConfig(width=8, blocks=2),
    "resnet-batch": networks.ResNetConfig(width=8, blocks=2, norm="batch"),
    "unet": networks.UNetConfig(widths=(8, 16, 16)),
    "coupling": networks.CouplingConfig(widths=(16, 16)),
    "cover": networks.CoverConfig(
        leading_luma=3,
        leading_colour=2,
        landmarks=2,
        luma=40,
        colour=12,
        robust=(30, 8),
        likenesses=16,
        carriers=300,
        widths=(8, 16),
        features=32,
        painter=PainterConfig(widths=(8, 16)),
    ),
}


def _network(name: str, size: int = 64) -> nn.Module:
    torch.manual_seed(3)
    network = networks.build(SMALL[name], bits=BITS, size=size).eval()
    for parameter in network.parameters():  # heads start at zero; a test of the identity would prove nothing
        if not parameter.any():
            nn.init.normal_(parameter, 0, 0.05)
    return network


def _input(batch: int, size: int = 64, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(batch, 3, size, size, generator=generator) * 2 - 1
    codes = networks.codes_to_tensor(torch.randint(0, 2, (batch, BITS), generator=generator))
    return images, codes


def test_the_papers_transformer_has_the_papers_size() -> None:
    network = networks.build(networks.ResNetConfig(norm="batch"), bits=BITS, size=SIZE)
    assert networks.count_parameters(network) / 1e6 == pytest.approx(11.43, abs=0.005)
    assert networks.count_macs(network, bits=BITS, size=SIZE) / 1e9 == pytest.approx(15.0, abs=0.05)


def test_multiply_adds_are_counted_as_by_hand() -> None:
    layers = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=8))

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = layers

        def forward(self, images: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.layers(images)
            return out

    expected = 8 * 3 * 9 * 16 * 16 + 8 * 1 * 9 * 16 * 16
    assert networks.count_macs(Plain(), bits=4, size=32) == expected


def test_the_default_norm_has_no_batch_statistics() -> None:
    for config in (networks.ResNetConfig(), networks.UNetConfig(), networks.CouplingConfig()):
        network = networks.build(config, bits=BITS, size=SIZE)
        assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in network.modules())


@pytest.mark.parametrize("name", SMALL)
def test_a_face_comes_out_the_same_alone_in_a_batch_of_64_and_in_another_order(name: str) -> None:
    network = _network(name)
    images, codes = _input(64)
    images = images * 0.6  # white noise that fills the range is nothing that a camera sees
    with torch.inference_mode():
        together = network(images, codes)
        order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
        shuffled = network(images[order], codes[order])
        for i in (0, 17, 63):
            alone = network(images[i : i + 1], codes[i : i + 1])[0]
            assert torch.allclose(alone, together[i], atol=1e-5)
    assert torch.allclose(shuffled, together[order], atol=1e-5)


@pytest.mark.parametrize("name", SMALL)
def test_the_code_changes_the_face(name: str) -> None:
    network = _network(name)
    images, codes = _input(2)
    with torch.inference_mode():
        one, other = network(images, codes), network(images, -codes)
    # In units of the output: a fresh paper network, initialised with N(0, 0.02), gives a nearly constant picture.
    assert (one - other).abs().mean() > 1e-3 * one.std()


def test_the_coupling_network_recovers_by_construction_whatever_its_weights() -> None:
    network = _network("coupling").double()
    images, codes = (x.double() for x in _input(4))
    with torch.inference_mode():
        changed = network(images, codes)
        assert (changed - images).abs().mean() > 0.01
        assert torch.allclose(network(changed, -codes), images, atol=1e-9)
        near_miss = -codes.clone()
        near_miss[:, 0] *= -1
        assert (network(changed, near_miss) - images).abs().mean() > 1e-3


@pytest.mark.parametrize("name", ["unet", "coupling"])
def test_networks_that_edit_in_place_start_near_the_identity_and_keep_the_border(name: str) -> None:
    images, codes = _input(2, SIZE)
    fresh = networks.build(SMALL[name], bits=BITS, size=SIZE)
    start = (fresh(images, codes) - images).abs().mean()
    assert 0 < start < 0.2  # near, but not at it: the code must be felt for Q to learn
    changed = _network(name, SIZE)(images, codes)
    ring = torch.ones(SIZE, SIZE, dtype=torch.bool)
    ring[2:-2, 2:-2] = False
    assert torch.allclose(changed[..., ring], images[..., ring], atol=1e-5)
    assert not torch.allclose(changed[..., ~ring], images[..., ~ring], atol=1e-2)


def test_the_head_mask_is_one_over_the_face_and_zero_at_the_border() -> None:
    mask = head_mask(SIZE)[0, 0]
    assert mask.min() == 0 and mask.max() == 1
    assert mask[45:105, 35:93].min() == 1  # eyes to chin
    assert max(mask[0].max(), mask[-1].max(), mask[:, 0].max(), mask[:, -1].max()) == 0


def test_the_wavelet_is_inverted_exactly_and_its_low_band_is_smooth() -> None:
    x = torch.rand(2, 3, 64, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    low, details = analyse(x)
    assert low.shape == (2, 3, 32, 24) and details.shape == (2, 9, 32, 24)
    assert torch.allclose(synthesise(low, details), x, atol=1e-12)
    # A plane has no details, away from the edge where it is extended by its mirror image.
    ramp = torch.arange(32.0, dtype=torch.float64).expand(1, 1, 32, 32)
    assert analyse(ramp)[1][..., :-1, :-1].abs().max() < 1e-12
    # One coefficient of the low band is a hat of linear slopes.
    spike = torch.zeros(1, 1, 8, 8, dtype=torch.float64)
    spike[..., 4, 4] = 1
    row = synthesise(spike, torch.zeros(1, 3, 8, 8, dtype=torch.float64))[0, 0, 8]
    assert row[6:11].tolist() == [0, 0.5, 1, 0.5, 0]


def test_sizes_that_cannot_be_folded_are_refused() -> None:
    for config in (networks.UNetConfig(), networks.CouplingConfig(widths=(32, 64, 96, 128))):
        with pytest.raises(ValueError, match="100 px"):
            networks.build(config, bits=BITS, size=100)
