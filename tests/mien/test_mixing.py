"""The mixing that hides a face, and the cipher that keys it."""

from __future__ import annotations

import pytest
import torch

from mien.networks.mixing import Mixing, keystream, signs
from tests.mien.cover_parts import draw


def _words(text: str) -> list[int]:
    data = bytes.fromhex(text)
    return [int.from_bytes(data[i : i + 4], "little") for i in range(0, len(data), 4)]


def test_the_keystream_is_the_one_of_rfc_8439() -> None:
    key = torch.tensor([_words(bytes(range(32)).hex())])
    nonce = torch.tensor([_words("000000090000004a00000000")])
    block = _words(
        "10f1e7e4d13b5915500fdd1fa32071c4c7d1f4c733c068030422aa9ac3d46c4e"
        "d2826446079faa0914c2d705d98b02a2b5129cd1de164eb9cbd083e8a2503c4e"
    )
    both = keystream(key.repeat(2, 1), torch.cat([nonce, nonce + 1]), blocks=2, rounds=20)
    assert both.shape == (2, 32) and both[0, 16:].tolist() == block
    assert keystream(key, nonce, blocks=1, first=1, rounds=20)[0].tolist() == block
    assert (both[0] != both[1]).all()


def test_signs_of_another_code_or_number_are_half_others() -> None:
    codes, number = draw(3, bits=64), torch.tensor([5, 5, 9])
    drawn = signs(codes, number, 4000)
    assert drawn.shape == (3, 4000) and set(drawn.unique().tolist()) == {-1, 1}
    assert drawn.mean(dim=1).abs().max() < 0.08
    assert torch.equal(drawn, torch.cat([signs(c[None], n[None], 4000) for c, n in zip(codes, number, strict=True)]))
    assert torch.equal(signs(codes, number, 100), drawn[:, :100])
    others = [signs(codes, number + 1, 4000)]
    for bit in range(64):
        near = codes.clone()
        near[:, bit] *= -1
        others.append(signs(near, number, 4000))
    for other in others:
        assert ((other != drawn).float().mean(dim=1) - 0.5).abs().max() < 0.05


@pytest.mark.parametrize("size", [168, 306, 484])
def test_mixing_is_orthonormal_and_spreads_every_number(size: int) -> None:
    mixing = Mixing(size, seed=1)
    assert size - 22 < mixing.size <= size
    drawn = signs(draw(1, bits=64), torch.tensor([7]), 3 * mixing.size).view(1, 3, -1)
    matrix = mixing(torch.eye(mixing.size), drawn)
    assert (matrix @ matrix.T - torch.eye(mixing.size)).abs().max() < 1e-4
    # To each goes 1/size of its power on average, to none 40 times that.
    assert matrix.square().max() < 40 / mixing.size
    x = torch.randn(3, mixing.size, generator=torch.Generator().manual_seed(0))
    assert (mixing.inverse(mixing(x, drawn), drawn) - x).abs().max() < 1e-5
    assert (mixing(x, drawn) - x @ matrix).abs().max() < 1e-4
    other = signs(draw(1, bits=64), torch.tensor([8]), 3 * mixing.size).view(1, 3, -1)
    assert torch.cosine_similarity(mixing.inverse(mixing(x, drawn), other), x).abs().max() < 0.35
