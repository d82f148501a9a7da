"""A reversible transformer made of a face's statistics: the face goes into the grain of its colours, another comes out.

Seen through an invertible map U, a crop is a *face* z (some hundred numbers that say who it is) and a *grain* g (some
thousand numbers of fine colour detail that an eye does not read). With rotations O_p that a code picks, and a fixed
exchange X of z with as many numbers of the grain (X X = 1),

    M_p = O_{-p}^T X O_p             T_p = U^{-1} o (M_p ((z, g) - s(-p)) + s(p)) o U

s(p) being one of many *likenesses* that the code picks. T_{-p} is the inverse of T_p for every p and any U, so that
T_{-p} T_p I = I (paper, eq. 4) holds by construction. And what any T_p gives is the face s(p) with a little noise,
whatever it was given: so A, a wrong password's WR and every longer chain are equally believable, and codes that differ
in one bit give faces as different as any two codes.

All of this stays true where s(p) depends on what M_p never touches, so a *painter* (:mod:`mien.networks.painter`) may
fit the likeness into the picture: it sees the picture with the mean face in it and the likeness's, and changes the
latter. It alone is trained against losses, by ``python -m training``; everything else here is fitted.

U is linear but for its squashings, and :mod:`training.eigenface` fits it:

1. Luma and two colours are taken as means of 2x2 blocks, and as what the blocks hold beyond what interpolated means
   foretell (Haar's details of a lifted pyramid). The means, where :func:`face_mask` is not 0, are split into symmetric
   and antisymmetric halves, and these into eigenfaces (Sirovich and Kirby 1987), luma and colour together.
2. What is around the face, the leading eigenfaces, which are light, pose and complexion, and a few directions that
   landmarks are read from best, never change. From them a small network predicts the mean of the other coordinates, so
   that hair, skin, age and sex go on fitting the face.
3. z is what is left over, in standard deviations, tails drawn in (asinh), and the details of luma; g is what the
   eigenfaces of colour do not span, where photos have least of it, and the details of colour. The exchange is twofold:
   the strongest of z with the first, where JPEG with whole colour leaves them, the weak ones and the details with the
   details, which only a lossless file keeps.

Likenesses alone may have a recogniser's help (:mod:`training.likenesses`); nothing else was made to deceive one.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Final, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from mien.networks.painter import Painter, PainterConfig

# Luma of ITU-R BT.601, of the stretched channels.
_LUMA: Final = (0.299, 0.587, 0.114)

# As in mien.networks.coupling: changes are added to atanh(0.9 x), so that little is clipped when the picture is saved.
_SQUEEZE: Final = 0.9
_LIMIT: Final = 0.9999

# The mask below which a pixel is context.
_EDGE: Final = 2e-3

# What a painter makes of a likeness stays within so many of its room: what hides under it is as strong as it is.
_REACH: Final = 5.0

Pair = tuple[PositiveInt, PositiveInt]


class EigenfaceConfig(BaseModel):
    """Options of the eigenface transformer; pairs are (symmetric, antisymmetric)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Literal["eigenface"] = "eigenface"
    leading_luma: Pair = (6, 4)
    """Eigenfaces of luma that are context: light and pose."""
    leading_colour: Pair = (3, 1)
    """Eigenfaces of colour that are context: complexion and coloured light."""
    landmarks: tuple[NonNegativeInt, NonNegativeInt] = (2, 2)
    """Directions of luma that landmarks are read from best, which are context too: the pose once more."""
    turned: Pair = (620, 420)
    """Coordinates of the face, z."""
    colour: Pair = (150, 90)
    """Eigenfaces of colour that z is made of, besides those of luma."""
    robust: Pair = (260, 190)
    """How many of these, the strongest, are exchanged with the grain; the others with the fine colour."""
    grain: Pair = (1350, 1400)
    """Coordinates of the grain, g."""
    grain_deviation: PositiveFloat = 13 / 127.5
    """Of a grain coordinate, on the stretched scale: what the face is hidden under; how strong the hidden face is."""
    fine_edge: PositiveFloat = 0.5
    """Mask above which the finest luma is exchanged with the finest colour."""
    fine_deviation: PositiveFloat = 8 / 127.5
    """Of a coordinate of either."""
    likenesses: int = Field(256, ge=2)
    """Faces s that codes choose from; a power of two."""
    colour_weight: PositiveFloat = 1.5
    """Of colour against luma when eigenfaces of both are put in one order."""
    rounds: tuple[PositiveInt, PositiveInt] = (10, 12)
    """Layers of plane rotations in O_p, of z and of g; a coordinate meets 2^rounds others."""
    fine_rounds: PositiveInt = 8
    """The same of what is exchanged with the fine colour."""
    tails: tuple[PositiveFloat, PositiveFloat] = (0.5, 1.0)
    """How strongly the tails of eigenfaces, and of all other coordinates, are drawn in: asinh(tail e) / tail."""
    widths: tuple[PositiveInt, ...] = (32, 64, 96, 128)
    features: PositiveInt = 320
    painter: PainterConfig | None = None
    """Fits likenesses into the picture; None shows them as they are."""

    @property
    def leading(self) -> tuple[int, int]:
        """How many coordinates of luma are context."""
        return self.leading_luma[0] + self.landmarks[0], self.leading_luma[1] + self.landmarks[1]

    @model_validator(mode="after")
    def _fits(self) -> EigenfaceConfig:
        if self.likenesses & (self.likenesses - 1):
            raise ValueError(f"likenesses must be a power of two, not {self.likenesses}")
        if any(a > b for a, b in zip(self.robust, self.turned, strict=True)):
            raise ValueError(f"of {self.turned} coordinates of the face not {self.robust} can be robust")
        if sum(self.robust) > sum(self.grain):
            raise ValueError(f"a grain of {sum(self.grain)} numbers cannot hold a face of {sum(self.robust)}")
        return self


def face_mask(size: int) -> Tensor:
    """Brows to chin and cheek to cheek: 1 in the middle of the face, smoothly 0 at its outline; float ``[S, S]``."""
    position = (torch.arange(size, dtype=torch.float64) + 0.5) / size
    y, x = torch.meshgrid(position, position, indexing="ij")
    radius = (((x - 0.5) / 0.32).abs() ** 2.5 + ((y - 0.60) / 0.40).abs() ** 2.5) ** (1 / 2.5)
    ramp = ((1 - radius) / 0.35).clamp(0, 1)
    return (ramp * ramp * (3 - 2 * ramp)).float()


def coarse_mask(size: int) -> Tensor:
    """:func:`face_mask` of the 2x2 blocks, float ``[S / 2, S / 2]``."""
    return F.avg_pool2d(face_mask(size)[None, None], 2)[0, 0]


def inside(mask: Tensor) -> Tensor:
    """Indices (int64 ``[P]``) of the face's pixels in the flattened left half ``[S, S / 2]`` of a mask ``[S, S]``."""
    return (mask[:, : mask.shape[1] // 2].reshape(-1) > _EDGE).nonzero()[:, 0]


def stretch(images: Tensor) -> Tensor:
    """Images float in [-1, 1] to the scale on which changes are added."""
    return torch.atanh((_SQUEEZE * images).clamp(-_LIMIT, _LIMIT))


def unstretch(stretched: Tensor) -> Tensor:
    """The inverse of :func:`stretch`: images float in (-1.12, 1.12)."""
    return torch.tanh(stretched) / _SQUEEZE


def planes_of(stretched: Tensor) -> Tensor:
    """Luma, red less luma and blue less luma, float ``[B, 3, S, S]``."""
    luma = torch.einsum("bchw,c->bhw", stretched, stretched.new_tensor(_LUMA))[:, None]
    return torch.cat([luma, stretched[:, [0, 2]] - luma], dim=1)


def stretched_of(planes: Tensor) -> Tensor:
    """The inverse of :func:`planes_of`; colour changes no luma, for green makes up for it."""
    luma, red, blue = planes[:, :1], planes[:, 1:2], planes[:, 2:]
    green = -(_LUMA[0] * red + _LUMA[2] * blue) / _LUMA[1]
    out: Tensor = luma + torch.cat([red, green, blue], dim=1)
    return out


# Haar's transform of a 2x2 block: rows are its mean, and what differs across, down and crosswise.
_HAAR: Final = ((0.25, 0.25, 0.25, 0.25), (0.5, -0.5, 0.5, -0.5), (0.5, 0.5, -0.5, -0.5), (0.5, -0.5, -0.5, 0.5))
_UNHAAR: Final = ((1, 0.5, 0.5, 0.5), (1, -0.5, 0.5, -0.5), (1, 0.5, -0.5, -0.5), (1, -0.5, -0.5, 0.5))


def analyse_blocks(planes: Tensor) -> Tensor:
    """Means (first) and details of the 2x2 blocks of float ``[B, 3, S, S]``: float ``[B, 3, 4, S / 2, S / 2]``."""
    blocks = F.pixel_unshuffle(planes, 2)
    blocks = blocks.view(len(blocks), 3, 4, *blocks.shape[2:])
    return torch.einsum("kj,bcjhw->bckhw", blocks.new_tensor(_HAAR), blocks)


def synthesise_blocks(blocks: Tensor) -> Tensor:
    """The inverse of :func:`analyse_blocks`."""
    return F.pixel_shuffle(torch.einsum("jk,bckhw->bcjhw", blocks.new_tensor(_UNHAAR), blocks).flatten(1, 2), 2)


def foretold(low: Tensor) -> Tensor:
    """The details that means ``[B, 3, S / 2, S / 2]`` lead one to expect, by bicubic interpolation; linear.

    float ``[B, 3, 3, S / 2, S / 2]``.
    """
    return analyse_blocks(F.interpolate(low, scale_factor=2, mode="bicubic", align_corners=False))[:, :, 1:]


def halves(picture: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """The symmetric and the antisymmetric part of ``[B, C, S, S]`` at ``pixels`` of the left half, each ``[B, C P]``.

    Together they are as long as the two halves were, so that orthonormal eigenfaces stay orthonormal.
    """
    half = picture.shape[3] // 2
    left, right = (p[..., :half].flatten(2)[..., pixels].flatten(1) for p in (picture, picture.flip(3)))
    return (left + right) * 0.5**0.5, (left - right) * 0.5**0.5


def whole(parts: tuple[Tensor, Tensor], pixels: Tensor, size: int, channels: int) -> Tensor:
    """What :func:`halves` took apart, ``[B, C, S, S]``, and 0 where no pixel is."""
    symmetric, antisymmetric = (part.view(len(part), channels, -1) * 0.5**0.5 for part in parts)
    sides = []
    for side in (symmetric + antisymmetric, symmetric - antisymmetric):
        half = side.new_zeros(len(side), channels, size * size // 2)
        half[..., pixels] = side
        sides.append(half.view(len(side), channels, size, size // 2))
    return torch.cat([sides[0], sides[1].flip(3)], dim=3)


class Turn(nn.Module):
    """O_p: plane rotations, layer after layer over fixed shuffles, by angles that every bit of the code moves.

    The angles are a fixed random linear function of the code; one bit moves each by radians, not by a little.
    """

    angles: Tensor
    onwards: Tensor
    backwards: Tensor

    def __init__(self, size: int, *, bits: int, rounds: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        shuffles = [torch.randperm(size, generator=generator) for _ in range(rounds)]
        angles = torch.randn(rounds, size // 2, bits, generator=generator) * 2
        self.register_buffer("angles", angles.transpose(1, 2).contiguous(), persistent=False)
        # Layer after layer, pairs lie half the size apart; between two layers one shuffle is undone and the next done.
        self.register_buffer("onwards", _between(shuffles), persistent=False)
        self.register_buffer("backwards", _between(shuffles[::-1]), persistent=False)

    def planes(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of a code's angles, float ``[rounds, B, size / 2]`` each; codes float ``[B, N]``."""
        angles = codes @ self.angles
        return angles.cos(), angles.sin()

    def forward(self, x: Tensor, planes: tuple[Tensor, Tensor]) -> Tensor:
        """O_p x; x float ``[B, size]``, with :meth:`planes` of p."""
        return self._layers(x, self.onwards, *planes)

    def opposite(self, x: Tensor, planes: tuple[Tensor, Tensor]) -> Tensor:
        """O_{-p}^T x with :meth:`planes` of p: the layers the other way round, by the same angles."""
        cos, sin = planes
        return self._layers(x, self.backwards, cos.flip(0), sin.flip(0))

    @staticmethod
    def _layers(x: Tensor, shuffles: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        half = cos.shape[2]
        for layer in range(len(cos)):
            x = x.index_select(1, shuffles[layer])
            a, b, c, s = x[:, :half], x[:, half : 2 * half], cos[layer], sin[layer]
            x = torch.cat([c * a - s * b, s * a + c * b, x[:, 2 * half :]], dim=1)
        return x.index_select(1, shuffles[-1])


def _between(shuffles: list[Tensor]) -> Tensor:
    """The first shuffle, of each two neighbours the way from one to the next, and the way back from the last."""
    ways = [shuffles[0], *(one.argsort()[two] for one, two in pairwise(shuffles)), shuffles[-1].argsort()]
    return torch.stack(ways)


class Likenesses(nn.Module):
    """s: the face that a code picks, float ``[B, N]`` to ``[B, size]``.

    Its number is the exclusive or of random numbers other than 0, one for every bit that is set (Zobrist 1970), so that
    codes one bit apart never pick the same.
    """

    faces: Tensor
    table: Tensor

    def __init__(self, count: int, size: int, *, bits: int, seed: int) -> None:
        super().__init__()
        self.register_buffer("faces", torch.randn(count, size) * 0.3)
        digits = count.bit_length() - 1  # a power of two
        generator = torch.Generator().manual_seed(seed)
        numbers = torch.randint(1, count, (bits,), generator=generator)
        # The numbers as binary digits: [N, digits].
        self.register_buffer("table", ((numbers[:, None] >> torch.arange(digits)) & 1).float(), persistent=False)

    def forward(self, codes: Tensor) -> Tensor:
        digits = ((codes > 0).float() @ self.table).long() & 1
        number = (digits << torch.arange(digits.shape[1], device=digits.device)).sum(dim=1)
        return self.faces[number]


class Side(nn.Module):
    """U and its inverse for the symmetric or the antisymmetric half.

    Args:
        luma: pixels of a half.
        side: 0 symmetric, 1 antisymmetric.
    """

    luma: Tensor
    leading: Tensor
    colour: Tensor
    axes: Tensor
    order: Tensor
    quiet: Tensor
    complement: Tensor

    def __init__(self, config: EigenfaceConfig, side: int, luma: int) -> None:
        super().__init__()
        colour = 2 * luma
        lead, lead_colour = config.leading[side], config.leading_colour[side]
        turned, colours, grain = config.turned[side], config.colour[side], config.grain[side]
        if lead + turned > luma or lead_colour + colours + grain > colour:
            raise ValueError(f"a half of {luma} pixels and {colour} of colour has not as many coordinates")
        self.lead, self.weight = lead_colour, config.colour_weight
        # Columns of eigenfaces: luma as z has it, the leading ones of luma, those of colour (the leading ones first).
        basis = torch.linalg.qr(torch.randn(luma, lead + turned))[0]
        # A face is orthonormal in luma and colour together; a fresh one is of luma alone.
        self.register_buffer("leading", basis[:, :lead].contiguous())
        self.register_buffer("luma", basis[:, lead:].contiguous())
        self.register_buffer("colour", torch.linalg.qr(torch.randn(colour, lead_colour + colours))[0])
        self.register_buffer("axes", torch.zeros(colours, turned))
        # Rows of `colour` in the order in which its complement is made, and which of that are the grain.
        self.register_buffer("order", torch.arange(colour))
        self.register_buffer("quiet", torch.arange(grain))
        self.register_buffer("complement", torch.empty(0), persistent=False)

    def analyse(self, luma: Tensor, colour: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Leading coordinates, coordinates of the face and of the grain, of float ``[B, P]`` and ``[B, Q]``."""
        spectrum = colour @ self.colour
        leading = torch.cat([luma @ self.leading, spectrum[:, : self.lead]], dim=1)
        return leading, self._face(luma, spectrum), colour @ self.grain()

    def face(self, luma: Tensor, colour: Tensor) -> Tensor:
        """Coordinates of the face alone."""
        return self._face(luma, colour @ self.colour)

    def _face(self, luma: Tensor, spectrum: Tensor) -> Tensor:
        return luma @ self.luma + self.weight * (spectrum[:, self.lead :] @ self.axes)

    def synthesise(self, face: Tensor, grain: Tensor) -> tuple[Tensor, Tensor]:
        """Changes of luma and colour for changes of the coordinates."""
        spectrum = face @ self.axes.T / self.weight
        return face @ self.luma.T, spectrum @ self.colour[:, self.lead :].T + grain @ self.grain().T

    def grain(self) -> Tensor:
        """Orthonormal columns that span nothing of :attr:`colour`, float ``[Q, grain]``.

        Of the complement of Householder's QR, whose columns are each about one pixel; not stored, for it is large.
        """
        if len(self.complement) == 0:
            self.complement = self.complete()[:, self.quiet.cpu()].to(self.colour).contiguous()
        return self.complement

    def complete(self) -> Tensor:
        """The whole complement of :attr:`colour`, float64 ``[Q, Q - columns]`` on the CPU."""
        basis, order = self.colour.detach().double().cpu(), self.order.cpu()
        q, _ = torch.linalg.qr(basis[order], mode="complete")
        out = torch.empty(len(q), q.shape[1] - basis.shape[1], dtype=q.dtype)
        out[order] = q[:, basis.shape[1] :]
        return out

    def forget(self) -> None:
        """Make the grain anew when it is next needed: the eigenfaces of colour are other ones now."""
        self.complement = self.colour.new_empty(0)

    def _load_from_state_dict(self, *arguments: Any, **more: Any) -> None:
        super()._load_from_state_dict(*arguments, **more)
        self.forget()


class Context(nn.Module):
    """Predicts the mean of the face's coordinates from what never changes.

    Called with the picture around the face, float ``[B, 4, 64, 64]``, and the leading coordinates; gives float
    ``[B, symmetric + antisymmetric]``.
    """

    def __init__(self, config: EigenfaceConfig) -> None:
        super().__init__()
        widths, out = (4, *config.widths), sum(config.turned)
        leading = sum(config.leading) + sum(config.leading_colour)
        layers: list[nn.Module] = []
        for a, b in pairwise(widths):
            layers += [nn.Conv2d(a, b, 3, stride=2, padding=1), nn.GroupNorm(8, b), nn.SiLU()]
        side = 64 // 2 ** len(config.widths)
        self.around = nn.Sequential(*layers, nn.Conv2d(widths[-1], 64, 1), nn.Flatten(), nn.SiLU(), nn.Dropout(0.2))
        self.leading = nn.Sequential(nn.Linear(leading, 128), nn.SiLU())
        self.hidden = nn.Sequential(nn.Linear(64 * side * side + 128, config.features), nn.SiLU(), nn.Dropout(0.25))
        self.out = nn.Linear(config.features, out)
        self.direct = nn.Linear(leading, out)

    def forward(self, around: Tensor, leading: Tensor) -> Tensor:
        hidden = self.hidden(torch.cat([self.around(around), self.leading(leading)], dim=1))
        out: Tensor = self.out(hidden) + self.direct(leading)
        return out


class Parts(NamedTuple):
    """What :meth:`EigenfaceTransformer.analyse` finds in pictures."""

    leading: Tensor
    """Leading eigenfaces, which never change, float ``[B, .]``."""
    face: Tensor
    """Coordinates of the other eigenfaces, float ``[B, K]``."""
    grain: Tensor
    """Coordinates of the grain, float ``[B, .]``."""
    fine: Tensor
    """Details of luma in the inner blocks beyond what is foretold, float ``[B, F]``."""
    fine_colour: Tensor
    """Of the two colours, float ``[B, 2 F]``."""


class EigenfaceTransformer(nn.Module):
    """See the module's docstring; called as :mod:`mien.networks` says. A fresh one has random eigenfaces."""

    mean: Tensor
    leading_scale: Tensor
    deviation: Tensor
    share: Tensor
    pixels: Tensor
    blocks: Tensor
    inner: Tensor
    around: Tensor
    order: Tensor

    def __init__(self, config: EigenfaceConfig, *, bits: int, size: int) -> None:
        super().__init__()
        if size % 64:
            raise ValueError(f"the context is seen at 64 px: a crop of {size} px is no multiple of that")
        self.config = config
        mask = coarse_mask(size)
        self.register_buffer("pixels", inside(mask), persistent=False)
        self.register_buffer("blocks", (mask > _EDGE).float(), persistent=False)
        self.register_buffer("inner", (mask > config.fine_edge).reshape(-1).nonzero()[:, 0], persistent=False)
        self.register_buffer("around", (mask <= _EDGE).float(), persistent=False)
        # Of luma and the two colours.
        self.register_buffer("mean", torch.zeros(3, size // 2, size // 2))
        self.register_buffer("leading_scale", torch.ones(sum(config.leading) + sum(config.leading_colour)))
        total = sum(config.turned)
        # Of the coordinates left over, and how much of the grain's room each is given.
        self.register_buffer("deviation", torch.full((total,), 0.3))
        self.register_buffer("share", torch.ones(total))
        # The robust coordinates of both sides first.
        start = config.turned[0]
        robust = [torch.arange(config.robust[0]), start + torch.arange(config.robust[1])]
        others = [torch.arange(config.robust[0], start), torch.arange(start + config.robust[1], total)]
        self.register_buffer("order", torch.cat(robust + others), persistent=False)
        self.sides = nn.ModuleList(Side(config, side, len(self.pixels)) for side in range(2))
        self.context = Context(config)
        self.likenesses = Likenesses(config.likenesses, total, bits=bits, seed=0)
        self.painter = Painter(config.painter) if config.painter else None
        if self.painter:
            self.context.requires_grad_(False)
        face, grain = config.rounds
        self.turn_face = Turn(sum(config.robust), bits=bits, rounds=face, seed=1)
        self.turn_grain = Turn(sum(config.grain), bits=bits, rounds=grain, seed=2)
        fine = 3 * len(self.inner)
        self.turn_fine = Turn(total - sum(config.robust) + fine, bits=bits, rounds=config.fine_rounds, seed=3)
        self.turn_colour = Turn(2 * fine, bits=bits, rounds=config.fine_rounds, seed=4)

    def train(self, mode: bool = True) -> EigenfaceTransformer:
        """Set training mode; what a painter stands on stays as it was fitted."""
        super().train(mode)
        if self.painter:
            self.context.eval()
        return self

    def forward(self, images: Tensor, codes: Tensor) -> Tensor:
        # In float32 even under autocast: what the chain rounds, recovery could not undo.
        with torch.autocast(images.device.type, enabled=False):
            stretched, codes = stretch(images.float()), codes.float()
            parts = self.analyse(stretched)
            mean = self.predict(stretched, parts.leading)
            z, g = self.unfold(parts, mean)
            low = self._plain(stretched, parts, mean) if self.painter else None
            with torch.no_grad():  # what is hidden is not what is seen: no loss has a say in it
                hidden = z - self.shown(-codes, low)
            z, g = self.exchange(hidden, g, codes)
            return self.changed(stretched, parts, mean, z + self.shown(codes, low), g)

    def shown(self, codes: Tensor, low: Tensor | None) -> Tensor:
        """s(p) as :meth:`unfold` has faces, float ``[B, .]``: the likeness, fitted into the picture by a painter.

        Args:
            codes: float ``[B, N]``.
            low: means of the blocks of the picture with the mean face in it, float ``[B, 3, S / 2, S / 2]``; read
                only by a painter.
        """
        likeness: Tensor = self.likenesses(codes)
        if self.painter is not None and low is not None:
            face = self._face(likeness)
            seen = self._low(face, likeness.new_zeros(len(face), sum(self.config.grain)))
            # Half precision costs nothing while it is trained; what is served must come out the same twice.
            with torch.autocast(codes.device.type, dtype=torch.bfloat16, enabled=self.training and codes.is_cuda):
                planes = self.painter(low, seen).float()
            sides = zip(self._sides(), self._halves(planes), strict=True)
            moved = torch.cat([side.face(y, c) for side, (y, c) in sides], dim=1)
            room = _REACH * self.share
            likeness = room * torch.tanh((likeness + moved / self.deviation * self.share) / room)
        return F.pad(likeness[:, self.order], (0, 3 * len(self.inner)))

    def analyse(self, stretched: Tensor) -> Parts:
        """Take :func:`stretch`'s pictures apart."""
        blocks = analyse_blocks(planes_of(stretched))
        low = blocks[:, :, 0]
        sides = [side.analyse(y, c) for side, (y, c) in zip(self._sides(), self._halves(low - self.mean), strict=True)]
        leading, face, grain = (torch.cat(parts, dim=1) for parts in zip(*sides, strict=True))
        fine = (blocks[:, :, 1:] - foretold(low)).flatten(3)[..., self.inner]
        return Parts(leading, face, grain, fine[:, 0].flatten(1), fine[:, 1:].flatten(1))

    def synthesise(self, change: Parts) -> Tensor:
        """The change of a stretched picture for changes of its parts, leading ones aside, float ``[B, 3, S, S]``."""
        low = self._low(change.face, change.grain)
        details = foretold(low) * self.blocks
        fine = torch.cat([change.fine, change.fine_colour], dim=1).view(len(low), 3, 3, -1)
        details = details.flatten(3).index_add(3, self.inner, fine).view_as(details)
        return stretched_of(synthesise_blocks(torch.cat([low[:, :, None], details], dim=2)))

    def changed(self, stretched: Tensor, parts: Parts, mean: Tensor, z: Tensor, g: Tensor) -> Tensor:
        """Pictures float ``[B, 3, S, S]`` in (-1.1, 1.1) with another face and grain in them (see :meth:`unfold`)."""
        after = self.fold(parts.leading, z, g, mean)
        change = Parts(*(new - old for new, old in zip(after, parts, strict=True)))
        return unstretch(stretched + self.synthesise(change))

    def unfold(self, parts: Parts, mean: Tensor) -> tuple[Tensor, Tensor]:
        """The whole face z and the whole grain g, about as strong everywhere.

        z are the eigenfaces less their mean, the robust ones first, and the details of luma; g are the grain and the
        details of colour.
        """
        tail = self.config.tails[0]
        z = torch.asinh((parts.face - mean) / self.deviation * tail) / tail * self.share
        fine = self.config.fine_deviation
        return (
            torch.cat([z[:, self.order], self._drawn(parts.fine, fine)], dim=1),
            torch.cat(
                [self._drawn(parts.grain, self.config.grain_deviation), self._drawn(parts.fine_colour, fine)], dim=1
            ),
        )

    def fold(self, leading: Tensor, z: Tensor, g: Tensor, mean: Tensor) -> Parts:
        """The inverse of :meth:`unfold`."""
        total, grain, fine = len(self.order), sum(self.config.grain), self.config.fine_deviation
        face = z.new_empty(len(z), total)
        face[:, self.order] = z[:, :total]
        return Parts(
            leading,
            mean + self._face(face),
            self._let_out(g[:, :grain], self.config.grain_deviation),
            self._let_out(z[:, total:], fine),
            self._let_out(g[:, grain:], fine),
        )

    def exchange(self, z: Tensor, g: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        """M_p: what is robust with the grain, the rest with the details of colour."""
        robust, grain = sum(self.config.robust), sum(self.config.grain)
        one = self._exchange(self.turn_face, self.turn_grain, z[:, :robust], g[:, :grain], codes)
        two = self._exchange(self.turn_fine, self.turn_colour, z[:, robust:], g[:, grain:], codes)
        return torch.cat([one[0], two[0]], dim=1), torch.cat([one[1], two[1]], dim=1)

    def hidden(self, g: Tensor, codes: Tensor) -> Tensor:
        """What recovery under ``codes`` finds in a grain: robust coordinates of the face, less the code's likeness."""
        none = g.new_zeros(len(g), sum(self.config.robust))
        return self._exchange(self.turn_face, self.turn_grain, none, g[:, : sum(self.config.grain)], codes)[0]

    def predict(self, stretched: Tensor, leading: Tensor) -> Tensor:
        """The mean of the face's coordinates given the context, float ``[B, K]``."""
        out: Tensor = self.context(self.surroundings(stretched), leading / self.leading_scale)
        return out

    def surroundings(self, stretched: Tensor) -> Tensor:
        """What is around the face: luma, its colours and where it is, float ``[B, 4, 64, 64]``."""
        low = (F.avg_pool2d(planes_of(stretched), 2) - self.mean) * self.around
        seen = torch.cat([low, self.around.expand(len(low), 1, -1, -1)], dim=1)
        return F.interpolate(seen, size=64, mode="area")

    def _plain(self, stretched: Tensor, parts: Parts, mean: Tensor) -> Tensor:
        """Means of the blocks of pictures with the mean face and no grain in them."""
        low = F.avg_pool2d(planes_of(stretched), 2)
        return low + self._low(mean - parts.face, -parts.grain)

    def _low(self, face: Tensor, grain: Tensor) -> Tensor:
        """The change of the blocks' means for changes of face and grain, float ``[B, 3, S / 2, S / 2]``."""
        faces, grains = (
            x.split_with_sizes(n, dim=1) for x, n in ((face, self.config.turned), (grain, self.config.grain))
        )
        sides = [side.synthesise(f, g) for side, f, g in zip(self._sides(), faces, grains, strict=True)]
        halved = [torch.cat(side, dim=1) for side in sides]
        return whole((halved[0], halved[1]), self.pixels, self.mean.shape[-1], 3)

    def _halves(self, low: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Luma and colour of the symmetric and of the antisymmetric half."""
        count = len(self.pixels)
        return [(half[:, :count], half[:, count:]) for half in halves(low, self.pixels)]

    def _face(self, z: Tensor) -> Tensor:
        """Coordinates of eigenfaces less their mean, of what :meth:`unfold` makes of them (in the network's order)."""
        tail = self.config.tails[0]
        return torch.sinh(z / self.share * tail) / tail * self.deviation

    def _drawn(self, x: Tensor, deviation: float) -> Tensor:
        tail = self.config.tails[1]
        return torch.asinh(x / deviation * tail) / tail

    def _let_out(self, x: Tensor, deviation: float) -> Tensor:
        tail = self.config.tails[1]
        return torch.sinh(x * tail) / tail * deviation

    @staticmethod
    def _exchange(one: Turn, two: Turn, z: Tensor, g: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        of_one, of_two = one.planes(codes), two.planes(codes)
        z, g = one(z, of_one), two(g, of_two)
        count = z.shape[1]
        z, g = g[:, :count], torch.cat([z, g[:, count:]], dim=1)
        return one.opposite(z, of_one), two.opposite(g, of_two)

    def _sides(self) -> list[Side]:
        return [side for side in self.sides if isinstance(side, Side)]
