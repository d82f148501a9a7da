"""A transformer that paints another face over the real one and hides the real one in what the eye does not read.

Of a crop, some is *context* and never changes: what lies around the face, and a few numbers of the face itself that say
how it is lit, held and coloured (its leading eigenfaces, and directions that landmarks are read from). From the context
c and a code p alone, a generator paints a face f(c, p). With an orthonormal mixing O_p,k,
keyed with the code and a number k of the picture,

    T_p x = f(c, p) + O_p,k E (x - m(c))       where x does not show f(c, -p)
            m(c) + E^+ O_-p,k^T (x - f(c, -p))    where it does

m(c) is the mean face of the context, E scales what is hidden down to a few grey levels, and whether x shows the
face of -p with something hidden under it is read from a known pattern that is hidden with the face. k lies in clear
beside it, for who paints f to read: so what is known of some pictures of a password opens no others. Thus

- T_-p T_p I = I but for what 8 bits round away, for f(c, p) can be painted again, exactly, from what is left of I;
- any other password finds nothing, and paints a third face over the first: A, WR and every longer chain are equally
  believable, and codes that differ in one bit give faces as different as any two;
- f need not be invertible: it is a likeness (one of many, that the code picks) in eigenfaces, made real by a network
  that is trained against the paper's losses.

What is hidden comes in two parts. The *robust* one, the face's strongest coordinates (Sirovich and Kirby 1987), lies in
the luma of 2x2 blocks, which JPEG leaves, whatever it does to colour. The *fine* one, everything else, lies in single
pixels and colours, which a lossless file keeps; how much of it is left is measured, and what is lost is left out.
Towards the outline of the face nothing is hidden: there the picture passes over into the painted face.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Final, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from mien.networks.mixing import Mixing, signs
from mien.networks.painter import Painter, PainterConfig

# Luma of ITU-R BT.601, of the stretched channels.
_LUMA: Final = (0.299, 0.587, 0.114)

# Changes are added to atanh(0.9 x), so that little is clipped when the picture is saved.
_SQUEEZE: Final = 0.9
_LIMIT: Final = 0.9999
_WHITE: Final = 1.4722  # atanh(0.9)
# One of 256 grey levels in the middle of that scale.
_LEVEL: Final = _SQUEEZE / 127.5

# Painted faces are held within this (x within 0.94): room for what is hidden under them. Real ones may be brighter:
# leading coordinates are read as if they were folded back from the second value on, so that both can have the same.
_BRIGHTEST: Final = 1.22
_FOLDED: Final = 1.3
# Of leading coordinates, the deviation of what folding took from them.
_BRIGHTER: Final = 0.1
# How often a painted face is brought back there and given its leading coordinates again.
_HELD: Final = 3

# Radius of the face's outline is 1; within this one all is painted, and between them the picture passes over.
_INNER: Final = 0.84
# What of the real picture is left at the inner radius, to be taken up again from there.
_LEFT: Final = 0.125

# Of the known pattern: how many numbers of each part, and the cosine with it from which on it is taken as found.
_PATTERN: Final = 96
_FOUND: Final = 0.5

# The number of a picture: its bits, the share of the robust carriers that has them, and how much louder they are.
_NUMBER: Final = 16
_CLEAR: Final = 1 / 6
_LOUDER: Final = 1.5

# What a painter sees: the blocks around the face, the face's means without and with the likeness, where it is; and what
# it changes: means, and details of luma.
_GIVEN: Final = 12 + 3 + 3 + 2
_MADE: Final = 3 + 3


class CoverConfig(BaseModel):
    """Options of the cover transformer."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Literal["cover"] = "cover"
    leading_luma: PositiveInt = 10
    """Eigenfaces of luma that are context: light and pose."""
    leading_colour: PositiveInt = 4
    """Eigenfaces of colour that are context: complexion and coloured light."""
    landmarks: NonNegativeInt = 7
    """Directions of luma that landmarks are read from best, which are context too: the pose once more."""
    luma: PositiveInt = 480
    """Coordinates of a face in luma."""
    colour: PositiveInt = 60
    """Coordinates of a face in colour."""
    robust: tuple[PositiveInt, PositiveInt] = (320, 36)
    """How many of these, the first, are hidden where JPEG and resampling leave them."""
    carriers: PositiveInt = 600
    """In how many smooth patterns of luma."""
    robust_levels: PositiveFloat = 3.0
    """What hides them, root mean square of grey levels of a pixel."""
    fine_levels: PositiveFloat = 1.0
    """The same of what hides all the rest."""
    likenesses: int = Field(256, ge=2)
    """Faces that codes choose from; a power of two."""
    widths: tuple[PositiveInt, ...] = (32, 64, 96, 128)
    features: PositiveInt = 320
    painter: PainterConfig | None = PainterConfig()
    """Makes likenesses real; None shows them as they are."""

    @model_validator(mode="after")
    def _fits(self) -> CoverConfig:
        if self.likenesses & (self.likenesses - 1):
            raise ValueError(f"likenesses must be a power of two, not {self.likenesses}")
        if self.robust[0] > self.luma or self.robust[1] > self.colour:
            raise ValueError(f"of {self.luma} and {self.colour} coordinates not {self.robust} can be robust")
        return self


def radius(size: int) -> Tensor:
    """Distance from the middle of the face, 1 at its outline from brow to chin; float ``[size, size]`` of a crop."""
    position = (torch.arange(size, dtype=torch.float64) + 0.5) / size
    y, x = torch.meshgrid(position, position, indexing="ij")
    return ((((x - 0.5) / 0.32).abs() ** 2.5 + ((y - 0.60) / 0.40).abs() ** 2.5) ** (1 / 2.5)).float()


def _left_over(away: Tensor, size: int) -> Tensor:
    """The share of the real picture that a painted one shows, float ``[S, S]``: 0 in inner blocks, 1 outside."""
    ramp = ((radius(size) - _INNER) / (1 - _INNER)).clamp(0, 1)
    left = _LEFT + (1 - _LEFT) * ramp * ramp * (3 - 2 * ramp)
    blocks = away.repeat_interleave(2, dim=0).repeat_interleave(2, dim=1)
    return torch.where(blocks < _INNER, 0.0, torch.where(blocks < 1, left, 1.0))


def stretch(images: Tensor) -> Tensor:
    """Images float in [-1, 1] to the scale on which changes are added."""
    return torch.atanh((_SQUEEZE * images).clamp(-_LIMIT, _LIMIT))


def unstretch(stretched: Tensor) -> Tensor:
    """The inverse of :func:`stretch`: images float in (-1.12, 1.12)."""
    return torch.tanh(stretched) / _SQUEEZE


def planes_of(stretched: Tensor) -> Tensor:
    """Luma, red less luma and blue less luma, float ``[B, 3, S, S]``."""
    red, green, blue = stretched[:, :1], stretched[:, 1:2], stretched[:, 2:]
    luma = _LUMA[0] * red + _LUMA[1] * green + _LUMA[2] * blue
    return torch.cat([luma, red - luma, blue - luma], dim=1)


def stretched_of(planes: Tensor) -> Tensor:
    """The inverse of :func:`planes_of`; colour changes no luma, for green makes up for it."""
    luma, red, blue = planes[:, :1], planes[:, 1:2], planes[:, 2:]
    green = -(_LUMA[0] * red + _LUMA[2] * blue) / _LUMA[1]
    out: Tensor = luma + torch.cat([red, green, blue], dim=1)
    return out


def analyse_blocks(planes: Tensor) -> Tensor:
    """Haar's transform of the 2x2 blocks of float ``[B, 3, S, S]``: float ``[B, 3, 4, S / 2, S / 2]``.

    First the mean, then what differs across, down and crosswise.
    """
    a, b, c, d = planes[..., ::2, ::2], planes[..., ::2, 1::2], planes[..., 1::2, ::2], planes[..., 1::2, 1::2]
    up, down, left, right = a + b, c + d, a - b, c - d
    return torch.stack([(up + down) / 4, (left + right) / 2, (up - down) / 2, (left - right) / 2], dim=2)


def synthesise_blocks(blocks: Tensor) -> Tensor:
    """The inverse of :func:`analyse_blocks`."""
    mean, across, down, crosswise = blocks.unbind(dim=2)
    up, low, left, right = mean + down / 2, mean - down / 2, (across + crosswise) / 2, (across - crosswise) / 2
    pixels = torch.stack([up + left, up - left, low + right, low - right], dim=2)
    return F.pixel_shuffle(pixels.flatten(1, 2), 2)


def foretold(low: Tensor) -> Tensor:
    """The details that means ``[B, 3, S / 2, S / 2]`` lead one to expect, by bicubic interpolation; linear.

    float ``[B, 3, 3, S / 2, S / 2]``.
    """
    return analyse_blocks(F.interpolate(low, scale_factor=2, mode="bicubic", align_corners=False))[:, :, 1:]


class Likenesses(nn.Module):
    """The face that a code picks, float ``[B, N]`` to ``[B, size]``, in deviations from the mean of the context.

    Its number is the exclusive or of random numbers other than 0, one for every bit that is set (Zobrist 1970), so that
    codes one bit apart never pick the same.
    """

    table: Tensor

    def __init__(self, count: int, size: int, *, bits: int, seed: int) -> None:
        super().__init__()
        # Fitted; training moves them where it is told to.
        self.faces = nn.Parameter(torch.randn(count, size) * 0.3, requires_grad=False)
        digits = count.bit_length() - 1  # a power of two
        generator = torch.Generator().manual_seed(seed)
        numbers = torch.randint(1, count, (bits,), generator=generator)
        # The numbers as binary digits: [N, digits].
        self.register_buffer("table", ((numbers[:, None] >> torch.arange(digits)) & 1).float(), persistent=False)

    def number(self, codes: Tensor) -> Tensor:
        """Which face, int64 ``[B]``."""
        return _as_number(((codes > 0).float() @ self.table).long() & 1)

    def forward(self, codes: Tensor) -> Tensor:
        return self.faces[self.number(codes)]


class Complement:
    """The orthogonal complement of a few orthonormal columns, as an isometry that is cheap to apply.

    By the Householder reflections of their QR decomposition, in the compact form I - V T V^T (Schreiber and Van Loan
    1989).

    Args:
        columns: float ``[n, a]``.
    """

    def __init__(self, columns: Tensor) -> None:
        self.count = columns.shape[1]
        packed, tau = torch.geqrf(columns.detach().double().cpu())
        v = packed.tril(-1)
        v[range(self.count), range(self.count)] = 1
        t = torch.zeros(self.count, self.count, dtype=v.dtype)
        for i in range(self.count):
            t[:i, i] = -tau[i] * t[:i, :i] @ (v[:, :i].T @ v[:, i])
            t[i, i] = tau[i]
        self.v, self.t = v.to(columns), t.to(columns)

    def into(self, x: Tensor) -> Tensor:
        """Coordinates float ``[B, n - a]`` to vectors ``[B, n]`` that are orthogonal to the columns."""
        x = F.pad(x, (self.count, 0))
        return x - ((x @ self.v) @ self.t.T) @ self.v.T

    def of(self, y: Tensor) -> Tensor:
        """Coordinates of the part of vectors that is orthogonal to the columns: the inverse of :meth:`into`."""
        return (y - ((y @ self.v) @ self.t) @ self.v.T)[:, self.count :]


class Context(nn.Module):
    """Predicts the mean of the face's coordinates from what never changes.

    Called with the picture around the face, float ``[B, 4, 64, 64]``, and the leading coordinates; gives float
    ``[B, luma + colour]`` in deviations.
    """

    def __init__(self, config: CoverConfig) -> None:
        super().__init__()
        widths, out = (4, *config.widths), config.luma + config.colour
        leading = config.leading_luma + config.landmarks + config.leading_colour
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


class Seen(NamedTuple):
    """What :meth:`CoverTransformer.observe` takes from a picture: the context, and nothing else."""

    outside: Tensor
    """Blocks around the face, 0 in it, float ``[B, 3, 4, S / 2, S / 2]``."""
    leading: Tensor
    """Leading coordinates, of luma and of colour, float ``[B, .]``."""
    mean: Tensor
    """Mean of the face's coordinates, in deviations, float ``[B, luma + colour]``."""


class _WorkedOut(NamedTuple):
    """What follows from the leading eigenfaces and is not stored."""

    smooth: Tensor
    """Orthonormal smooth patterns of the luma of inner blocks, orthogonal to the leading ones, ``[n, carriers]``."""
    colour: Complement
    patterns: Tensor
    """Smooth planes that raise one leading coordinate by 1 and no other, float ``[leading, 3 S S]``."""


class CoverTransformer(nn.Module):
    """See the module's docstring; called as :mod:`mien.networks` says. A fresh one has random eigenfaces."""

    mean: Tensor
    luma: Tensor
    colour: Tensor
    luma_ring: Tensor
    colour_ring: Tensor
    leading_scale: Tensor
    deviation: Tensor
    rest_deviation: Tensor
    area: Tensor
    outside: Tensor
    within: Tensor
    face: Tensor
    left: Tensor
    inner: Tensor
    ring: Tensor
    scattered: Tensor
    coarse: Tensor

    def __init__(self, config: CoverConfig, *, bits: int, size: int) -> None:
        super().__init__()
        if size % 64:
            raise ValueError(f"the context is seen at 64 px: a crop of {size} px is no multiple of that")
        self.config = config
        half = size // 2
        away = radius(half)
        self.register_buffer("area", (away < 1).float(), persistent=False)
        self.register_buffer("outside", (away >= 1).float(), persistent=False)
        self.register_buffer("within", (away < _INNER).float(), persistent=False)
        self.register_buffer("inner", (away < _INNER).reshape(-1).nonzero()[:, 0], persistent=False)
        self.register_buffer("ring", ((away >= _INNER) & (away < 1)).reshape(-1).nonzero()[:, 0], persistent=False)
        self.register_buffer("face", F.interpolate(self.area[None, None], scale_factor=2.0) > 0, persistent=False)
        self.register_buffer("left", _left_over(away, size)[None, None], persistent=False)
        n, around = len(self.inner), len(self.ring)
        lead, lead_colour = config.leading_luma + config.landmarks, config.leading_colour
        columns, colours = lead + config.luma, lead_colour + config.colour
        if columns > n or colours > 2 * n:
            raise ValueError(f"{n} blocks of a face have not as many coordinates")
        # Of luma and the two colours.
        self.register_buffer("mean", torch.zeros(3, half, half))
        # Columns: the leading eigenfaces, then those of a face; and how they go on beyond the inner radius.
        self.register_buffer("luma", torch.linalg.qr(torch.randn(n, columns))[0].contiguous())
        self.register_buffer("colour", torch.linalg.qr(torch.randn(2 * n, colours))[0].contiguous())
        self.register_buffer("luma_ring", torch.zeros(around, columns))
        self.register_buffer("colour_ring", torch.zeros(2 * around, colours))
        self.register_buffer("leading_scale", torch.ones(lead + lead_colour))
        self.register_buffer("deviation", torch.full((config.luma + config.colour,), 0.3))
        # Of what eigenfaces leave of luma, of colour, and of the details of luma.
        self.register_buffer("rest_deviation", torch.full((3,), 0.05))
        self.context = Context(config)
        self.likenesses = Likenesses(config.likenesses, config.luma + config.colour, bits=bits, seed=0)
        self.painter = Painter(config.painter, given=_GIVEN, made=_MADE) if config.painter else None
        if self.painter:
            self.painter.to(memory_format=torch.channels_last)  # type: ignore[call-overload] # a fifth faster on CPUs
            self.context.requires_grad_(False)
        self.scatter = Mixing(config.carriers, seed=0)
        self.repeated = int(self.scatter.size * _CLEAR) // _NUMBER
        """How many carriers have each bit of the number."""
        self.mix_robust = Mixing(self.scatter.size - _NUMBER * self.repeated, seed=1)
        self.mix_fine = Mixing(11 * n - lead_colour, seed=2)
        generator = torch.Generator().manual_seed(3)
        scattered = 2.0 * torch.randint(2, (1, 3, self.scatter.size), generator=generator) - 1
        self.register_buffer("scattered", scattered, persistent=False)
        self.register_buffer("coarse", torch.randn(lead + lead_colour, _NUMBER, generator=generator), persistent=False)
        self._ready: _WorkedOut | None = None
        secrets = sum(config.robust) + lead + lead_colour
        if secrets + _PATTERN > self.mix_robust.size or config.carriers > n - lead:
            raise ValueError(f"{config.carriers} patterns of {n} blocks cannot hide {secrets} numbers")

    def train(self, mode: bool = True) -> CoverTransformer:
        """Set training mode; what the painter stands on stays as it was fitted."""
        super().train(mode)
        if self.painter:
            self.context.eval()
        return self

    def forward(self, images: Tensor, codes: Tensor) -> Tensor:
        """T_p; while a painter is trained, what it paints alone: no loss has a say in what is hidden."""
        if self.training and self.painter:
            return self.painted(images, self.likenesses(codes))
        # In float32 even under autocast: what the chain rounds, recovery could not undo.
        with torch.autocast(images.device.type, enabled=False):
            stretched, codes = stretch(images.float()), codes.float()
            seen = self.observe(stretched)
            # Both ways for every picture, so that time does not tell whether a password is right.
            expected = self.paint(seen, self.likenesses(-codes))
            shown = self.paint(seen, self.likenesses(codes))
            real, found = self.uncover(stretched, seen, expected, -codes)
            out = torch.where(found[:, None, None, None], real, self.cover(stretched, seen, shown, codes))
            return unstretch(out)

    def painted(self, images: Tensor, likeness: Tensor) -> Tensor:
        """Pictures with likenesses painted into them and nothing hidden; for training, with gradients.

        Args:
            images: float ``[B, 3, S, S]`` in [-1, 1].
            likeness: in deviations from the mean of the context, float ``[B, luma + colour]``.
        """
        with torch.autocast(images.device.type, enabled=False):
            with torch.no_grad():
                stretched = stretch(images.float())
                seen = self.observe(stretched)
            return self.shown(stretched, self.paint(seen, likeness))

    def shown(self, stretched: Tensor, painted: Tensor) -> Tensor:
        """The picture of a painted one that passes over into the real one: float ``[B, 3, S, S]``, not clamped."""
        return unstretch(painted + self.left * (stretched - painted))

    @torch.no_grad()
    def own(self, images: Tensor) -> Tensor:
        """The likeness of each picture's own face; for training.

        Args:
            images: float ``[B, 3, S, S]`` in [-1, 1].
        """
        with torch.autocast(images.device.type, enabled=False):
            stretched = stretch(images.float())
            return self.coordinates(stretched, self.observe(stretched))

    # -- the context ------------------------------------------------------------------------------------------------

    def observe(self, stretched: Tensor) -> Seen:
        """The context of :func:`stretch`'s pictures."""
        blocks = analyse_blocks(planes_of(stretched))
        luma, colour = self.inside(F.avg_pool2d(planes_of(_folded(stretched)), 2) - self.mean)
        a, b = self._leads()
        leading = torch.cat([luma @ self.luma[:, :a], colour @ self.colour[:, :b]], dim=1)
        mean = self.context(self.surroundings(blocks[:, :, 0]), leading / self.leading_scale)
        return Seen(blocks * self.outside, leading, mean)

    def surroundings(self, low: Tensor) -> Tensor:
        """What is around the face: luma, its colours and where it is, float ``[B, 4, 64, 64]``.

        Args:
            low: means of blocks, float ``[B, 3, S / 2, S / 2]``.
        """
        seen = torch.cat([(low - self.mean) * self.outside, self.outside.expand(len(low), 1, -1, -1)], dim=1)
        return F.interpolate(seen, size=64, mode="area")

    def coordinates(self, stretched: Tensor, seen: Seen) -> Tensor:
        """A face's own likeness, in deviations from the mean of its context, float ``[B, luma + colour]``."""
        luma, colour = self.inside(F.avg_pool2d(planes_of(stretched), 2) - self.mean)
        a, b = self._leads()
        face = torch.cat([luma @ self.luma[:, a:], colour @ self.colour[:, b:]], dim=1)
        return face / self.deviation - seen.mean

    # -- the face that is seen ----------------------------------------------------------------------------------------

    def plan(self, seen: Seen, likeness: Tensor) -> Tensor:
        """Means of blocks of the picture with a likeness in it, float ``[B, 3, S / 2, S / 2]``."""
        face = (seen.mean + likeness) * self.deviation
        a, b = self._leads()
        luma = torch.cat([seen.leading[:, :a], face[:, : self.config.luma]], dim=1)
        colour = torch.cat([seen.leading[:, a : a + b], face[:, self.config.luma :]], dim=1)
        count, half = len(face), self.mean.shape[-1]
        low = face.new_zeros(count, 3, half * half)
        low[:, 0, self.inner] = luma @ self.luma.T
        low[:, 0, self.ring] = luma @ self.luma_ring.T
        low[:, 1:, self.inner] = (colour @ self.colour.T).view(count, 2, -1)
        low[:, 1:, self.ring] = (colour @ self.colour_ring.T).view(count, 2, -1)
        return low.view(count, 3, half, half) + self.mean * self.area + seen.outside[:, :, 0]

    def paint(self, seen: Seen, likeness: Tensor) -> Tensor:
        """f: the stretched picture with a likeness painted into it, float ``[B, 3, S, S]``."""
        low = self.plan(seen, likeness)
        fine = foretold(low) * self.area
        if self.painter:
            plain = self.plan(seen, torch.zeros_like(likeness))
            masks = torch.stack([self.outside, F.avg_pool2d(self.left, 2)[0, 0]]).expand(len(low), -1, -1, -1)
            given = torch.cat([seen.outside.flatten(1, 2), plain, low, masks], dim=1)
            given = given.contiguous(memory_format=torch.channels_last)
            # Half precision costs nothing while it is trained; what is served must come out the same twice.
            with torch.autocast(low.device.type, dtype=torch.bfloat16, enabled=self.training and low.is_cuda):
                change = self.painter(given).float() * self.area
            low = low + change[:, :3]
            fine = foretold(low) * self.area
            fine = torch.cat([fine[:, :1] + change[:, None, 3:], fine[:, 1:]], dim=1)
        blocks = torch.cat([low[:, :, None], fine + seen.outside[:, :, 1:]], dim=2)
        stretched = stretched_of(synthesise_blocks(blocks))
        for _ in range(_HELD):
            stretched = self._led(torch.where(self.face, _held(stretched), stretched), seen.leading)
        return stretched

    def _led(self, stretched: Tensor, leading: Tensor) -> Tensor:
        """The picture with the leading coordinates that it shall have."""
        a, b = self._leads()
        luma, colour = self.inside(F.avg_pool2d(planes_of(stretched), 2) - self.mean)
        lack = leading - torch.cat([luma @ self.luma[:, :a], colour @ self.colour[:, :b]], dim=1)
        return stretched + stretched_of((lack @ self._worked_out().patterns).view_as(stretched))

    # -- the face that is hidden ------------------------------------------------------------------------------------

    def cover(self, stretched: Tensor, seen: Seen, shown: Tensor, codes: Tensor) -> Tensor:
        """The painted picture with the real one hidden in it.

        Args:
            stretched: the real one, float ``[B, 3, S, S]``.
            seen: its context.
            shown: the painted one.
            codes: that it is hidden under, float ``[B, N]``.
        """
        robust, fine = self.secrets(stretched, seen)
        b = self.config.leading_colour
        count, n = len(shown), len(self.inner)
        robust_level, fine_level = self._amplitudes()
        smooth, free_colour = self._worked_out()[:2]
        number = self.number(seen)
        robust_signs, fine_signs = self.signs(codes, number)
        mixed = self._with_number(self._mixed(self.mix_robust, robust, robust_signs), number)
        luma = F.pad(mixed * robust_level, (0, smooth.shape[1] - mixed.shape[1])) @ smooth.T
        carried = self._mixed(self.mix_fine, fine, fine_signs)
        carried = F.pad(carried, (0, 11 * n - b - carried.shape[1])) * fine_level
        colour, details = free_colour.into(carried[:, : 2 * n - b]), carried[:, 2 * n - b :].view(count, 3, 3, n)
        change = torch.cat([torch.cat([luma, colour], dim=1).view(count, 3, 1, n), details], dim=2)
        half = self.mean.shape[-1]
        blocks = change.new_zeros(count, 3, 4, half * half).index_copy(3, self.inner, change)
        hidden = stretched_of(synthesise_blocks(blocks.view(count, 3, 4, half, half)))
        return shown + hidden + self.left * (stretched - shown)

    def uncover(self, stretched: Tensor, seen: Seen, expected: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        """The real picture where one is hidden in ``stretched`` under ``codes``, and whether one is, bool ``[B]``.

        Args:
            stretched: float ``[B, 3, S, S]``.
            seen: its context.
            expected: what is painted for these codes.
            codes: that it is hidden under, float ``[B, N]``.
        """
        n, config = len(self.inner), self.config
        beyond = analyse_blocks(planes_of(stretched - expected)).flatten(3)[..., self.inner]
        low = beyond[:, :, 0].flatten(1)
        robust_level, fine_level = self._amplitudes()
        smooth, free_colour = self._worked_out()[:2]
        carried = torch.cat([free_colour.of(low[:, n:]), beyond[:, :, 1:].flatten(1)], dim=1)
        scales, fine_scales = self.scales()
        mixed, number = self.clear((low[:, :n] @ smooth) / robust_level)
        robust_signs, fine_signs = self.signs(codes, number)
        robust, found = self._read(self.mix_robust, mixed, robust_signs, scales)
        fine, _ = self._read(self.mix_fine, carried / fine_level, fine_signs, fine_scales)
        r, q = config.robust
        mean = seen.mean * self.deviation
        a, b = self._leads()
        luma = robust[:, :r] + mean[:, :r]
        colour = robust[:, r : r + q] + mean[:, config.luma : config.luma + q]
        leading = seen.leading + robust[:, r + q :]
        luma = torch.cat([leading[:, :a], luma], dim=1) @ self.luma[:, : a + r].T
        colour = torch.cat([leading[:, a:], colour], dim=1) @ self.colour[:, : b + q].T
        low_real = self.put(luma + fine[:, :n], colour + fine[:, n : 3 * n]) + self.mean * self.area
        passing = expected + (stretched - expected) / self.left.clamp_min(_LEFT)
        whole = analyse_blocks(planes_of(passing))
        inner = self.within > 0
        means = torch.where(inner, low_real, whole[:, :, 0])
        half = self.mean.shape[-1]
        details = fine.new_zeros(len(fine), 3, half * half).index_copy(2, self.inner, fine[:, 3 * n :].view(-1, 3, n))
        guessed = foretold(means)
        guessed = torch.cat([guessed[:, :1] + details.view(-1, 1, 3, half, half), guessed[:, 1:]], dim=1)
        blocks = torch.cat([means[:, :, None], torch.where(inner, guessed, whole[:, :, 1:])], dim=2)
        real = stretched_of(synthesise_blocks(blocks))
        return torch.where(self.face, real, stretched), found

    def secrets(self, stretched: Tensor, seen: Seen) -> tuple[Tensor, Tensor]:
        """What is hidden of a picture, robust and fine, each divided by :meth:`scales`."""
        config, n = self.config, len(self.inner)
        blocks = analyse_blocks(planes_of(stretched))
        low = blocks[:, :, 0]
        y, c = self.inside(low - self.mean)
        a, b = self._leads()
        r, q = config.robust
        mean = seen.mean * self.deviation
        luma, colour = y @ self.luma[:, : a + r], c @ self.colour[:, : b + q]
        brighter = torch.cat([luma[:, :a], colour[:, :b]], dim=1) - seen.leading
        faces = [luma[:, a:] - mean[:, :r], colour[:, b:] - mean[:, config.luma : config.luma + q]]
        robust = torch.cat([*faces, brighter], dim=1)
        rest = [y - luma @ self.luma[:, : a + r].T, c - colour @ self.colour[:, : b + q].T]
        details = (blocks[:, :1, 1:] - foretold(low)[:, :1]).flatten(3)[..., self.inner].reshape(-1, 3 * n)
        scales, fine_scales = self.scales()
        return robust / scales, torch.cat([*rest, details], dim=1) / fine_scales

    def scales(self) -> tuple[Tensor, Tensor]:
        """What secrets are divided by: the roots of their deviations, as least errors want it, to mean square 1."""
        config, n = self.config, len(self.inner)
        r, q = config.robust
        faces = [self.deviation[:r], self.deviation[config.luma : config.luma + q]]
        robust = torch.cat([*faces, _BRIGHTER * self.leading_scale])
        fine = torch.cat([d.expand(k * n) for d, k in zip(self.rest_deviation, (1, 2, 3), strict=True)])
        # The power of one that is divided by sqrt(d) k is d / k^2.
        return robust.sqrt() * robust.mean().sqrt(), fine.sqrt() * fine.mean().sqrt()

    def _amplitudes(self) -> tuple[float, Tensor]:
        """Of a carrier, in the planes: smooth patterns of luma, and the rest."""
        config, n = self.config, len(self.inner)
        robust = config.robust_levels * _LEVEL * (n / config.carriers) ** 0.5
        fine = torch.full((11 * n - config.leading_colour,), config.fine_levels * _LEVEL, device=self.luma.device)
        fine[2 * n - config.leading_colour :] *= 2 / 3**0.5
        return robust, fine

    def _mixed(self, mixing: Mixing, secrets: Tensor, drawn: Tensor) -> Tensor:
        """Secrets and the known pattern mixed into float ``[B, mixing.size]``, of mean square 1."""
        known = secrets.new_ones(len(secrets), _PATTERN)
        spread = ((secrets.shape[1] + _PATTERN) / mixing.size) ** -0.5
        given = F.pad(torch.cat([secrets, known], dim=1), (0, mixing.size - secrets.shape[1] - _PATTERN))
        out: Tensor = mixing(given * spread, drawn)
        return out

    def _read(self, mixing: Mixing, carried: Tensor, drawn: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
        """The secrets of :meth:`_mixed`, as likely as they are after the noise that the known pattern shows.

        Args:
            carried: float ``[B, size]``.
            drawn: the signs that it is hidden under.
            scales: what secrets were divided by.

        Returns:
            float ``[B, secrets]``, and whether the pattern is there, bool ``[B]``.
        """
        secrets = len(scales)
        spread = ((secrets + _PATTERN) / mixing.size) ** -0.5
        found = mixing.inverse(carried[:, : mixing.size], drawn) / spread
        known = found[:, secrets : secrets + _PATTERN]
        mean, power = known.mean(dim=1), known.square().mean(dim=1)
        gain, noise = mean.clamp_min(0)[:, None], (power - mean.square()).clamp_min(1e-8)[:, None]
        # Of deviation d = scale^2 / c, divided by its scale, is of variance scale^2 / c^2; on average 1.
        variance = scales.square() / scales.square().mean()
        likely = gain * variance / (gain.square() * variance + noise)
        return found[:, :secrets] * likely * scales, mean > _FOUND * power.sqrt()

    # -- the number of a picture, which anybody may read ------------------------------------------------------------

    def number(self, seen: Seen) -> Tensor:
        """What keeps pictures of one password apart, int64 ``[B]``: of the context.

        So coarse that neighbouring frames of a clip have mostly the same, and what is hidden does not flicker.
        """
        return _as_number((seen.leading / self.leading_scale) @ self.coarse > 0)

    def signs(self, codes: Tensor, number: Tensor) -> tuple[Tensor, Tensor]:
        """Of the robust and of the fine mixing, of each code and number, float ``[B, 3, .]``."""
        first, second = 3 * self.mix_robust.size, 3 * self.mix_fine.size
        drawn = signs(codes, number, first + second)
        return drawn[:, :first].view(len(codes), 3, -1), drawn[:, first:].view(len(codes), 3, -1)

    def _with_number(self, mixed: Tensor, number: Tensor) -> Tensor:
        """Mixed secrets and the number, scattered, float ``[B, scatter.size]`` of mean square 1."""
        bits = (number[:, None] >> torch.arange(_NUMBER, device=number.device)) & 1
        clear = _LOUDER * (2 * bits - 1).to(mixed).repeat_interleave(self.repeated, dim=1)
        power = (mixed.shape[1] + clear.shape[1] * _LOUDER**2) / self.scatter.size
        given = F.pad(torch.cat([clear, mixed], dim=1), (0, self.scatter.size - clear.shape[1] - mixed.shape[1]))
        out: Tensor = self.scatter(given / power**0.5, self.scattered)
        return out

    def clear(self, carried: Tensor) -> tuple[Tensor, Tensor]:
        """Of carriers float ``[B, carriers]``: the mixed secrets, but for a factor, and the number int64 ``[B]``."""
        read = self.scatter.inverse(carried[:, : self.scatter.size], self.scattered)
        count = _NUMBER * self.repeated
        number = _as_number(read[:, :count].view(len(read), _NUMBER, -1).sum(dim=2) > 0)
        return read[:, count : count + self.mix_robust.size], number

    def _worked_out(self) -> _WorkedOut:
        if self._ready is None or self._ready.patterns.device != self.luma.device:
            a, b = self._leads()
            luma, colour = self.luma[:, :a].detach(), self.colour[:, :b].detach()
            low = self.put(F.pad(luma.T, (0, 0, 0, b)), F.pad(colour.T, (0, 0, a, 0)))
            smooth = F.interpolate(low, scale_factor=2.0, mode="bicubic", align_corners=False)
            y, c = self.inside(F.avg_pool2d(smooth, 2))
            moved = torch.cat([y @ luma, c @ colour], dim=1)
            patterns = torch.linalg.solve(moved.double(), smooth.flatten(1).double()).to(smooth)
            self._ready = _WorkedOut(self._smooth(luma), Complement(colour), patterns)
        return self._ready

    def _smooth(self, leading: Tensor) -> Tensor:
        """Cosines of the lowest frequencies, made orthonormal over the inner blocks in that order."""
        half = self.mean.shape[-1]
        place = self.inner.cpu()
        rows, columns = place // half, place % half
        rows, columns = rows - rows.min(), columns - columns.min()
        height, width = int(rows.max()) + 1, int(columns.max()) + 1
        up, across = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        frequency = (up.double() / height).square() + (across.double() / width).square()
        order = frequency.flatten().argsort(stable=True)[: self.config.carriers]
        waves = torch.cos((rows[:, None] + 0.5).double() * (order // width) * (torch.pi / height))
        waves = waves * torch.cos((columns[:, None] + 0.5).double() * (order % width) * (torch.pi / width))
        first = leading.double().cpu()
        basis = torch.linalg.qr(torch.cat([first, waves / waves.norm(dim=0)], dim=1))[0]
        out: Tensor = basis[:, first.shape[1] :].to(leading)
        return out

    def forget(self) -> None:
        """Work out anew what depends on the leading eigenfaces: they are other ones now."""
        self._ready = None

    def _load_from_state_dict(self, *arguments: Any, **more: Any) -> None:
        super()._load_from_state_dict(*arguments, **more)
        self.forget()

    # -- blocks of the face -------------------------------------------------------------------------------------------

    def _leads(self) -> tuple[int, int]:
        return self.config.leading_luma + self.config.landmarks, self.config.leading_colour

    def inside(self, low: Tensor) -> tuple[Tensor, Tensor]:
        """Luma float ``[B, n]`` and the two colours ``[B, 2 n]`` of the inner blocks."""
        values = low.flatten(2)[..., self.inner]
        return values[:, 0], values[:, 1:].flatten(1)

    def put(self, luma: Tensor, colour: Tensor) -> Tensor:
        """The inverse of :meth:`inside`, float ``[B, 3, S / 2, S / 2]``, 0 elsewhere."""
        half = self.mean.shape[-1]
        values = torch.cat([luma, colour], dim=1).view(len(luma), 3, -1)
        return values.new_zeros(len(values), 3, half * half).index_copy(2, self.inner, values).view(-1, 3, half, half)


def _held(stretched: Tensor) -> Tensor:
    return stretched.clamp(-_BRIGHTEST, _BRIGHTEST)


def _folded(stretched: Tensor) -> Tensor:
    size = stretched.abs()
    back = _FOLDED - (size - _FOLDED) * ((_FOLDED - _BRIGHTEST) / (_WHITE - _FOLDED))
    return torch.where(size > _FOLDED, back.clamp_min(_BRIGHTEST) * stretched.sign(), stretched)


def _as_number(bits: Tensor) -> Tensor:
    """Bits ``[B, count]``, the least significant first, as int64 ``[B]``."""
    out: Tensor = (bits.long() << torch.arange(bits.shape[1], device=bits.device)).sum(dim=1)
    return out
