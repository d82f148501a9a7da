"""A cover transformer whose likenesses are fitted into the picture."""

from __future__ import annotations

import torch

from mien.networks import cover
from mien.networks.painter import Painter, PainterConfig
from tests.mien.cover_parts import CONFIG, blurred, draw, fresh


@torch.no_grad()
def test_a_fresh_painter_shows_likenesses_as_they_are() -> None:
    plain = fresh(config=CONFIG.model_copy(update={"painter": None}))
    network, painting = fresh(), fresh(painting=True)
    for other in (network, painting):
        other.load_state_dict(plain.state_dict(), strict=False)
    images, likeness = blurred(), plain.likenesses(draw(4))
    shown = plain.painted(images, likeness)
    assert (shown - images).abs().mean() > 0.01
    assert torch.equal(network.painted(images, likeness), shown)
    assert (painting.painted(images, likeness) - shown).abs().max() > 0.01


@torch.no_grad()
def test_what_is_painted_depends_on_the_context_and_the_likeness_alone() -> None:
    network = fresh(painting=True)
    images, likeness = blurred(), network.likenesses(draw(4))
    seen = network.observe(cover.stretch(images))
    shown = network.paint(seen, likeness)
    # It can be painted again from what is left of the picture, to a quarter of a grey level.
    again = network.paint(network.observe(shown), likeness)
    assert (again - shown).abs().max() < 0.25 * 0.9 / 127.5
    assert (network.paint(seen, likeness.flip(0)) - shown).abs().max() > 0.05


def test_only_the_painter_learns_and_only_from_what_is_seen() -> None:
    network, images, codes = fresh(painting=True).train(), blurred(), draw(4)
    assert not network.context.training
    made = network(images, codes)
    assert torch.equal(made, network.painted(images, network.likenesses(codes)))  # nothing is hidden
    made.square().mean().backward()
    learning = {n.split(".")[0] for n, p in network.named_parameters() if p.grad is not None}
    assert learning == {"painter"}
    assert all(p.grad is not None and p.grad.any() for p in network.painter.head.parameters())


def test_a_painter_sees_every_part_of_what_it_is_given() -> None:
    torch.manual_seed(0)
    painter = Painter(PainterConfig(widths=(8, 16)), given=5, made=2)
    x = torch.randn(1, 5, 32, 32, requires_grad=True)
    assert not painter(x).any()
    torch.nn.init.normal_(painter.head.weight)
    out = painter(x)
    assert out.shape == (1, 2, 32, 32)
    out[0, :, 16, 16].sum().backward()
    assert x.grad is not None and (x.grad.abs().sum(dim=(0, 2, 3)) > 0).all()
    assert (x.grad[0, :, 16].abs().sum(dim=0) > 0).sum() > 16  # and far around
