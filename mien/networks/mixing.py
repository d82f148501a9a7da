"""A keyed orthonormal mixing, and the cipher that gives its signs.

Signs that are a function of the code alone would be the same in all pictures of a password. Then a few dozen pairs of
originals and anonymized pictures, or some hundred anonymized pictures alone, tell them (docs/threat-model.md). So they
come from a stream cipher, keyed with the code, that begins anew with every number that a picture has.
"""

from __future__ import annotations

from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_WORD: Final = 0xFFFF_FFFF
# "expand 32-byte k", little-endian.
_CONSTANTS: Final = (0x61707865, 0x3320646E, 0x79622D32, 0x6B206574)
_ROUNDS: Final = 8
_KEY_BITS: Final = 256


class Mixing(nn.Module):
    """O: orthonormal, every number that goes in a little in every one that comes out.

    Given signs before, between and after two cosine transforms over rows and columns.
    """

    rows: Tensor
    columns: Tensor
    shuffle: Tensor

    def __init__(self, size: int, *, seed: int) -> None:
        super().__init__()
        side = int(size**0.5)
        self.size = side * (size // side)
        """How many numbers are mixed: as many of ``size`` as make a rectangle."""
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer("rows", _cosines(side), persistent=False)
        self.register_buffer("columns", _cosines(size // side), persistent=False)
        self.register_buffer("shuffle", torch.randperm(self.size, generator=generator), persistent=False)

    def forward(self, x: Tensor, signs: Tensor) -> Tensor:
        """O x; x float ``[B, size]``, signs +1 and -1 float ``[B, 3, size]``."""
        x = self._transform(x * signs[:, 0])[:, self.shuffle]
        return self._transform(x * signs[:, 1]) * signs[:, 2]

    def inverse(self, x: Tensor, signs: Tensor) -> Tensor:
        """O^T x."""
        x = self._transform(x * signs[:, 2], back=True) * signs[:, 1]
        mixed = torch.empty_like(x)
        mixed[:, self.shuffle] = x
        return self._transform(mixed, back=True) * signs[:, 0]

    def _transform(self, x: Tensor, *, back: bool = False) -> Tensor:
        rows, columns = (self.rows.T, self.columns.T) if back else (self.rows, self.columns)
        out: Tensor = (rows @ x.view(len(x), len(rows), len(columns)) @ columns.T).flatten(1)
        return out


def _cosines(size: int) -> Tensor:
    """The orthonormal cosine transform (type II), float ``[size, size]``."""
    n = torch.arange(size, dtype=torch.float64)
    basis = torch.cos((2 * n[None, :] + 1) * n[:, None] * (torch.pi / (2 * size))) * (2 / size) ** 0.5
    basis[0] *= 0.5**0.5
    out: Tensor = basis.float()
    return out


def signs(codes: Tensor, number: Tensor, count: int) -> Tensor:
    """+1 and -1 of each code and number, float ``[B, count]``: those of one pair say nothing of another's.

    Args:
        codes: set where positive, ``[B, N]``. The cipher's key, filled up with zeros to 256 bits; of longer ones the
            parts of 256 are added, bit by bit.
        number: of the picture, int64 ``[B]``, at least 0, below 2^32.
        count: how many.
    """
    bits = F.pad((codes > 0).long(), (0, -codes.shape[1] % _KEY_BITS)).view(len(codes), -1, 8, 32).sum(dim=1) & 1
    shifts = torch.arange(32, device=codes.device)
    words = keystream((bits << shifts).sum(dim=2), F.pad(number[:, None], (0, 2)), blocks=-(-count // 512))
    drawn = ((words[:, :, None] >> shifts) & 1).flatten(1)[:, :count]
    return 1 - 2 * drawn.to(codes.dtype)


def keystream(key: Tensor, nonce: Tensor, *, blocks: int, first: int = 0, rounds: int = _ROUNDS) -> Tensor:
    """ChaCha (Bernstein 2008; RFC 8439, of 20 rounds): int64 ``[B, 16 * blocks]``, each of 32 bits.

    Args:
        key: int64 ``[B, 8]``, each of 32 bits.
        nonce: int64 ``[B, 3]``.
        blocks: of 16 words.
        first: the counter of the first.
        rounds: an even number; of 8 no attack is known that is better than trying keys (Aumasson 2019).
    """
    constants = [torch.full_like(key[:, :1], word) for word in _CONSTANTS]
    state = torch.cat([*constants, key, torch.zeros_like(key[:, :1]), nonce], dim=1)
    state = state.T[:, :, None].repeat(1, 1, blocks)  # [16, B, blocks]
    state[12] += torch.arange(first, first + blocks, device=key.device)
    a, b, c, d = state.view(4, 4, len(key), blocks).unbind(dim=0)
    for _ in range(rounds // 2):
        a, b, c, d = _quarter(a, b, c, d)
        a, b, c, d = _quarter(a, b.roll(-1, dims=0), c.roll(-2, dims=0), d.roll(-3, dims=0))
        b, c, d = b.roll(1, dims=0), c.roll(2, dims=0), d.roll(3, dims=0)
    out = (torch.cat([a, b, c, d]) + state) & _WORD
    return out.permute(1, 2, 0).flatten(1)


def _quarter(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A quarter round of four columns, or diagonals, at once."""
    a = (a + b) & _WORD
    d = _turned(d ^ a, 16)
    c = (c + d) & _WORD
    b = _turned(b ^ c, 12)
    a = (a + b) & _WORD
    d = _turned(d ^ a, 8)
    c = (c + d) & _WORD
    b = _turned(b ^ c, 7)
    return a, b, c, d


def _turned(word: Tensor, left: int) -> Tensor:
    return ((word << left) | (word >> (32 - left))) & _WORD
