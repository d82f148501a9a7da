"""The cover transformer: what it hides and gives back, and to whom."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from mien import networks, store
from mien.networks import cover
from mien.networks.cover import Complement, CoverTransformer, Likenesses
from tests.mien.cover_parts import (
    BITS,
    CONFIG,
    SIZE,
    blurred,
    draw,
    face,
    fitted,
    found,
    fresh,
    jpeg,
    psnr,
    saved,
    transform,
)  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[CoverTransformer, Tensor]:
    """A fitted network that paints, and pictures that it was not fitted to."""
    return fitted(tmp_path_factory.mktemp("cover") / "faces")


# There and back. -----------------------------------------------------------------------------------------------------


def test_the_right_code_gives_the_face_back_through_a_file(trained: tuple[CoverTransformer, Tensor]) -> None:
    network, images = trained
    codes = draw(8)
    hidden = transform(network, images, codes)
    assert psnr(network, hidden, images).max() < 21  # it is another face: 15 to 18 dB
    assert psnr(network, transform(network, hidden, -codes), images).min() > 34  # 36.5 to 38.3 dB
    assert found(network, hidden, codes).all()
    # A code is as good as its inverse.
    other = transform(network, images, -codes)
    assert psnr(network, transform(network, other, codes), images).min() > 34


@pytest.mark.parametrize("painting", [False, True])
def test_recovery_needs_no_fit(painting: bool) -> None:
    network, images, codes = fresh(painting=painting), blurred(), draw(4)
    hidden = transform(network, images, codes)
    assert psnr(network, hidden, images).max() < 20
    assert psnr(network, transform(network, hidden, -codes), images).min() > 38  # 40 dB and more


def test_a_wrong_password_finds_nothing_and_shows_a_third_face(trained: tuple[CoverTransformer, Tensor]) -> None:
    network, images = trained
    codes, wrong = draw(8), draw(8, seed=2)
    hidden = transform(network, images, codes)
    assert not found(network, hidden, wrong).any()
    third = transform(network, hidden, -wrong)
    assert psnr(network, third, images).max() < 21 and psnr(network, third, hidden).max() < 25
    assert not found(network, images, codes).any()  # nothing is hidden in a photo


def test_each_single_bit_is_needed_and_a_near_miss_is_as_far_off_as_any_other_code(
    trained: tuple[CoverTransformer, Tensor],
) -> None:
    network, images = trained
    codes = draw(8)
    hidden = transform(network, images, codes)
    wrong = (transform(network, hidden, -draw(8, seed=2)) - images)[..., face(network)].abs().mean()
    for bit in range(BITS):
        near = codes.clone()
        near[:, bit] *= -1
        assert not found(network, hidden, near).any()
        missed = (transform(network, hidden, -near) - images)[..., face(network)].abs().mean()
        assert missed > 0.7 * wrong


def test_a_code_that_picks_the_same_likeness_finds_nothing(trained: tuple[CoverTransformer, Tensor]) -> None:
    network, images = trained
    codes = draw(8)
    hidden = transform(network, images, codes)
    everything = networks.codes_to_tensor((torch.arange(2**BITS)[:, None] >> torch.arange(BITS)) & 1)
    numbers = network.likenesses.number(everything)
    for i in range(4):
        same = everything[numbers == network.likenesses.number(codes[i : i + 1])]
        same = same[(same != codes[i]).any(dim=1)][:: 2**BITS // CONFIG.likenesses // 100]
        assert len(same) > 90
        shown = network.likenesses(same) - network.likenesses(codes[i : i + 1])
        assert not shown.any()
        assert not found(network, hidden[i : i + 1].expand(len(same), -1, -1, -1), same).any()


def test_right_and_wrong_codes_in_one_batch_do_not_disturb_each_other(
    trained: tuple[CoverTransformer, Tensor],
) -> None:
    network, images = trained
    codes = draw(8)
    hidden = transform(network, images, codes)
    tried = -codes
    tried[::2, 3] *= -1
    out = transform(network, hidden, tried)
    assert psnr(network, out[1::2], images[1::2]).min() > 34
    assert psnr(network, out[::2], images[::2]).max() < 21
    for i in (0, 1):
        assert (out[i] - transform(network, hidden[i : i + 1], tried[i : i + 1])[0]).abs().max() < 1.5 / 127.5


def test_of_two_anonymizations_one_after_the_other_only_the_last_is_undone(
    trained: tuple[CoverTransformer, Tensor],
) -> None:
    """A face that carries a hidden one does not come back exactly enough to be read from once more but coarsely."""
    network, images = trained
    first, second = draw(8), draw(8, seed=2)
    once = transform(network, images, first)
    twice = transform(network, once, second)
    assert not found(network, twice, first).any()  # in the wrong order nothing is found
    back = transform(network, twice, -second)
    assert psnr(network, back, once).min() > 32  # 34.8 to 38.3 dB
    again = psnr(network, transform(network, back, -first), images)
    assert again.median() > 20 and again.max() < 30  # 23 to 26 dB, or nothing: the person, not the picture


# The number of a picture. --------------------------------------------------------------------------------------------


def _carried(network: CoverTransformer, pictures: Tensor, codes: Tensor) -> Tensor:
    """What pictures have beyond their painted faces: coordinates of the smooth patterns."""
    stretched = cover.stretch(pictures)
    shown = network.paint(network.observe(stretched), network.likenesses(codes))
    low = torch.nn.functional.avg_pool2d(cover.planes_of(stretched - shown), 2)
    return network.inside(low)[0] @ network._worked_out().smooth


@torch.inference_mode()
def test_the_number_of_a_picture_is_read_from_its_files(trained: tuple[CoverTransformer, Tensor]) -> None:
    network, images = trained
    codes = draw(8)
    number = network.number(network.observe(cover.stretch(images)))
    assert number.dtype == torch.int64 and number.min() >= 0 and number.max() < 2**16
    assert len(number.unique()) > 4  # crops of one photo, tinted alike or not
    hidden = transform(network, images, codes)
    for file in (hidden, jpeg(hidden)):
        assert torch.equal(network.clear(_carried(network, file, codes))[1], number)
    # Without the painted face it is not read; it says nothing that the context does not say.
    assert not torch.equal(network.clear(_carried(network, hidden, draw(8, seed=2)))[1], number)


@torch.inference_mode()
def test_pictures_of_other_numbers_are_mixed_otherwise_under_one_code(trained: tuple[CoverTransformer, Tensor]) -> None:
    network, images = trained
    code = draw(1).expand(8, -1)
    real = torch.cat([network.secrets(s := cover.stretch(images), network.observe(s))[0], torch.ones(8, 96)], dim=1)
    mixed, number = network.clear(_carried(network, transform(network, images, code), code))
    robust, fine = network.signs(code, number)
    assert robust.shape == (8, 3, network.mix_robust.size) and fine.shape == (8, 3, network.mix_fine.size)
    for i in range(8):
        for j in range(8):
            read = network.mix_robust.inverse(mixed[i : i + 1], robust[j : j + 1])[:, : real.shape[1]]
            alike = torch.cosine_similarity(read, real[i : i + 1]).item()
            assert alike > 0.95 if number[i] == number[j] else abs(alike) < 0.4


# What a picture keeps. -----------------------------------------------------------------------------------------------


def test_outside_the_face_nothing_changes_bit_for_bit(trained: tuple[CoverTransformer, Tensor]) -> None:
    network, images = trained
    outside = ~face(network)
    assert 0.4 < outside.float().mean() < 0.8
    codes = draw(8)
    hidden = transform(network, images, codes)
    for made in (hidden, transform(network, hidden, -codes), transform(network, hidden, codes)):
        assert torch.equal(made[..., outside], images[..., outside])
        assert not torch.equal(made[..., ~outside], images[..., ~outside])


def test_the_leading_coordinates_are_kept(trained: tuple[CoverTransformer, Tensor]) -> None:
    network, images = trained
    with torch.inference_mode():
        before = network.observe(cover.stretch(images))
        after = network.observe(cover.stretch(network(images, draw(8))))
        filed = network.observe(cover.stretch(transform(network, images, draw(8))))
    strength = before.leading.abs().max()
    assert strength > 1
    assert (before.leading - after.leading).abs().max() < 1e-3 * strength
    assert (before.leading - filed.leading).abs().max() < 0.02 * strength
    assert torch.equal(before.outside, filed.outside)


def test_images_stay_in_range_whatever_they_are_of(trained: tuple[CoverTransformer, Tensor]) -> None:
    network, images = trained
    noise = torch.where(torch.rand(8, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)) < 0.5, -1.0, 1.0)
    with torch.inference_mode():
        for given in (noise, torch.ones_like(noise), -torch.ones_like(noise), (images * 3).clamp(-1, 1)):
            made = network(given, draw(8))
            assert made.isfinite().all() and made.abs().max() < 1.12
        made = network(images, draw(8))
    # Of a photo, hardly anything is clipped when it is saved.
    assert (made[..., face(network)].abs() > 1).float().mean() < 0.005


def test_a_jpeg_with_halved_colours_keeps_the_robust_part_and_the_fine_one_is_left_out(
    trained: tuple[CoverTransformer, Tensor],
) -> None:
    network, images = trained
    codes = draw(8)
    hidden = transform(network, images, codes)
    lossy = jpeg(hidden)
    assert found(network, lossy, codes).all()
    exact, coarse, wrong = (
        transform(network, x, p) for x, p in ((hidden, -codes), (lossy, -codes), (lossy, -draw(8, seed=2)))
    )

    def secrets(pictures: Tensor) -> Tensor:
        stretched = cover.stretch(pictures)
        return network.secrets(stretched, network.observe(stretched))[0]

    with torch.inference_mode():
        real = secrets(images)
        left = [((secrets(x) - real).square().sum() / real.square().sum()).item() for x in (exact, coarse, wrong)]
        strengths = [_details(network, x).square().mean() for x in (images, exact, coarse)]
    # Shares of the face's strongest coordinates that are lost: 0.4 %, 31 %, 238 %.
    assert left[0] < 0.02 < left[1] < 0.5 < 1 < left[2]
    assert strengths[1] > 0.8 * strengths[0] and strengths[2] < 0.1 * strengths[0]
    assert psnr(network, coarse, images).mean() > psnr(network, wrong, images).mean() + 4


def _details(network: CoverTransformer, pictures: Tensor) -> Tensor:
    """Of luma, beyond what the means of blocks foretell, in the face."""
    blocks = cover.analyse_blocks(cover.planes_of(cover.stretch(pictures)))
    return (blocks[:, 0, 1:] - cover.foretold(blocks[:, :, 0])[:, 0]).flatten(2)[..., network.inner]


def test_a_loaded_network_gives_the_same_bits(trained: tuple[CoverTransformer, Tensor], tmp_path: Path) -> None:
    network, images = trained
    codes = draw(8)
    config = store.ModelConfig(architecture=CONFIG, bits=BITS, crop_size=SIZE)
    store.save(tmp_path, network, config, card="x")
    loaded, _ = store.load(tmp_path)
    with torch.inference_mode():
        hidden = network(images, codes)
        assert torch.equal(hidden, loaded(images, codes))
        assert torch.equal(network(hidden, -codes), loaded(hidden, -codes))
        # One that was already used takes other weights whole, what it worked out before them included.
        other = fresh(painting=True)
        assert not torch.equal(other(images, codes), hidden)
        other.load_state_dict(network.state_dict())
        assert torch.equal(other(images, codes), hidden)


# The parts. ----------------------------------------------------------------------------------------------------------


def test_blocks_planes_and_the_stretch_are_inverted() -> None:
    images = saved(torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)) * 2 - 1)
    stretched = cover.stretch(images)
    assert (cover.unstretch(stretched) - images).abs().max() < 1e-5
    planes = cover.planes_of(stretched)
    assert (cover.stretched_of(planes) - stretched).abs().max() < 1e-5
    assert (cover.synthesise_blocks(cover.analyse_blocks(planes)) - planes).abs().max() < 1e-5
    # Colour changes no luma.
    coloured = torch.cat([planes[:, :1], planes[:, 1:] + 0.3], dim=1)
    assert (cover.planes_of(cover.stretched_of(coloured))[:, 0] - planes[:, 0]).abs().max() < 1e-5


def test_details_are_foretold_of_what_is_smooth() -> None:
    smooth = cover.planes_of(cover.stretch(blurred()))
    blocks = cover.analyse_blocks(smooth)
    # Bicubic interpolation has the border repeated.
    away = (slice(None), slice(None), slice(None), slice(2, -2), slice(2, -2))
    missed = (blocks[:, :, 1:] - cover.foretold(blocks[:, :, 0]))[away].square().mean()
    assert missed < 0.05 * blocks[:, :, 1:][away].square().mean()


def test_the_complement_is_an_isometry_orthogonal_to_its_columns() -> None:
    columns = torch.linalg.qr(torch.randn(90, 7, generator=torch.Generator().manual_seed(0)))[0]
    free = Complement(columns)
    x = torch.randn(5, 83, generator=torch.Generator().manual_seed(1))
    y = free.into(x)
    assert y.shape == (5, 90) and (y @ columns).abs().max() < 1e-5
    assert (y @ y.T - x @ x.T).abs().max() < 1e-4
    assert (free.of(y) - x).abs().max() < 1e-5
    # What the columns have is not read.
    assert (free.of(y + torch.randn(5, 7) @ columns.T) - x).abs().max() < 1e-5


def test_codes_one_bit_apart_never_pick_the_same_likeness() -> None:
    for bits in (16, 64):
        likenesses = Likenesses(64, 8, bits=bits, seed=0)
        codes = draw(50, bits=bits, seed=2)
        numbers = likenesses.number(codes)
        assert len(numbers.unique()) > 25 and numbers.min() >= 0 and numbers.max() < 64
        assert torch.equal(likenesses(codes), likenesses.faces[numbers])
        for bit in range(bits):
            other = codes.clone()
            other[:, bit] *= -1
            assert (likenesses.number(other) != numbers).all()


def test_faces_that_cannot_hide_what_is_asked_are_refused() -> None:
    with pytest.raises(ValueError, match="power of two"):
        networks.CoverConfig(likenesses=300)
    with pytest.raises(ValueError, match="can be robust"):
        networks.CoverConfig(luma=40, robust=(41, 8))
    with pytest.raises(ValueError, match="not as many coordinates"):
        networks.build(networks.CoverConfig(), bits=BITS, size=64)
    with pytest.raises(ValueError, match="cannot hide"):
        networks.build(CONFIG.model_copy(update={"luma": 200, "robust": (190, 8)}), bits=BITS, size=64)
    with pytest.raises(ValueError, match="100 px"):
        networks.build(networks.CoverConfig(), bits=BITS, size=100)
