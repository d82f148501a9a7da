"""An eigenface transformer whose likenesses are fitted into the picture."""

import torch

from mien import networks
from mien.networks.painter import PainterConfig

BITS, SIZE = 16, 64
CONFIG = networks.EigenfaceConfig(
    turned=(60, 40), robust=(50, 35), colour=(20, 12), grain=(150, 160), likenesses=16, widths=(8, 16), features=32,
    painter=PainterConfig(widths=(8, 16)),
)  # fmt: skip


def _network(*, painting: bool) -> networks.EigenfaceTransformer:
    torch.manual_seed(0)
    network = networks.build(CONFIG, bits=BITS, size=SIZE).eval()
    assert isinstance(network, networks.EigenfaceTransformer) and network.painter is not None
    with torch.no_grad():
        network.likenesses.faces.mul_(0.3)
        if painting:
            network.painter.head.weight.normal_(std=0.02)
    return network


def _input() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.rand(2, 3, SIZE, SIZE) * 0.6 - 0.3, networks.codes_to_tensor(torch.rand(2, BITS) < 0.5)


@torch.no_grad()
def test_a_painted_face_is_recovered_by_construction() -> None:
    network, (images, codes) = _network(painting=True), _input()
    changed = network(images, codes)
    assert (network(changed, -codes) - images).abs().max() < 2e-3
    assert (changed - _network(painting=False)(images, codes)).abs().max() > 0.01  # it was painted


@torch.no_grad()
def test_a_fresh_painter_shows_likenesses_nearly_as_they_are() -> None:
    network, (_, codes) = _network(painting=False), _input()
    likeness = network.likenesses(codes)
    shown = network.shown(codes, torch.zeros(2, 3, SIZE // 2, SIZE // 2))
    likeness = torch.nn.functional.pad(likeness[:, network.order], (0, shown.shape[1] - likeness.shape[1]))
    assert (shown - likeness).abs().max() < 0.02 * likeness.abs().max()


def test_only_the_painter_learns_and_only_from_what_is_seen() -> None:
    network, (images, codes) = _network(painting=True).train(), _input()
    assert not network.context.training
    network(images, codes).square().mean().backward()
    learning = {n.split(".")[0] for n, p in network.named_parameters() if p.grad is not None}
    assert learning == {"painter"}
