"""Every attacker is tried on a model where it must succeed and on one where it must not: an attack that cannot succeed
would call every model safe, one that cannot fail would call none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from skimage.transform import resize

from mien.networks import CoverTransformer
from mien.networks.mixing import Mixing, signs
from services.evaluate import attackers, covers, keys
from services.evaluate.chain import Chain, Subject
from services.evaluate.context import Context
from services.evaluate.distances import Pixels, to_pixels, to_tensor
from services.evaluate.faces import Faces
from services.evaluate.figures import Result
from services.evaluate.parts import attacks, attacks_cover, attacks_known, attacks_trained
from tests.mien.cover_parts import CONFIG, fresh
from tests.services.stand_ins import BITS, SIZE, context_of, perfect, two_photos_each

Codes = NDArray[np.bool_]
Transform = Callable[[Pixels, Codes], Pixels]

SWEEP = {"sweep_faces": 4, "sweep_codes": 256, "climbs": 6, "known_codes": 64, "linking": 40}
LEARN = {"attack_train": 96, "attack_images": 480, "attack_test": 64}


def identity(images: Pixels, codes: Codes) -> Pixels:
    return images


def forget(images: Pixels, codes: Codes) -> Pixels:
    """Another random picture for every picture and code: nothing is left to attack."""
    out = []
    for image, code in zip(images, codes, strict=True):
        seed = np.frombuffer(image.tobytes()[:64] + np.packbits(code).tobytes() + b"\0" * 3, dtype=np.uint32)
        out.append(np.random.default_rng(seed).integers(0, 256, size=image.shape, dtype=np.uint8))
    return np.stack(out)


def ignore(images: Pixels, codes: Codes) -> Pixels:
    """Hides, but every password is right."""
    return perfect(images, np.zeros((len(images), BITS), dtype=bool))


def steps(images: Pixels, codes: Codes) -> Pixels:
    """Every bit adds or takes away a pattern of its own: each bit that is right makes the picture a little better."""
    patterns = np.random.default_rng(3).integers(-15, 16, size=(codes.shape[1], SIZE, SIZE, 3))
    signed = np.where(codes, 1, -1) @ patterns.reshape(len(patterns), -1)
    return np.clip(images + signed.reshape(images.shape), 0, 255).astype(np.uint8)


def smooth_faces(people: int = 160) -> Faces:
    """As two_photos_each, but smooth pictures in the middle of the range."""
    rng = np.random.default_rng(1)
    coarse = rng.uniform(0, 1, size=(people, 5, 5, 3))
    first = np.stack([resize(c, (SIZE, SIZE, 3), order=3, mode="edge") for c in coarse])
    second = first + rng.normal(0, 0.01, size=first.shape)
    both = (np.concatenate([first, second]).clip(0, 1) * 80 + 88).astype(np.uint8)
    names = list(range(people))
    return Faces(both, [*names, *names], [f"photo {i}" for i in range(2 * people)])


@pytest.fixture(scope="module")
def noise() -> Faces:
    return two_photos_each()


@pytest.fixture(scope="module")
def smooth() -> Faces:
    return smooth_faces()


@pytest.fixture(scope="module")
def many() -> Faces:
    """More people than are judged: attackers learn from the others."""
    return smooth_faces(240)


def figures(part: Callable[[Context], Result], transform: Transform, faces: Faces, **sizes: int) -> dict[str, float]:
    """What a part measures, every key of it in the documented table."""
    result = part(context_of(transform, faces, **sizes))
    assert result.figures, result.skipped
    assert keys.unknown(result.figures) == []
    return result.figures


# The sweep and hill climbing. --------------------------------------------------------------------------------------


def test_a_sweep_finds_the_person_behind_a_perfect_cipher_of_few_bits(noise: Faces) -> None:
    found = figures(attacks.sweep, perfect, noise, **SWEEP)
    assert found["attack.sweep.success"] == 1 and found["attack.sweep.codes-tried"] == 256
    assert found["attack.sweep.right-code-first"] == 1 and found["attack.sweep.wrong-codes-above"] == 0
    assert found["attack.sweep.without-sweep"] <= 0.25, "without the sweep the picture tells nothing"
    assert found["attack.sweep.chance"] == pytest.approx(1 / found["attack.sweep.gallery"])


def test_a_sweep_finds_nobody_where_nothing_is_left(noise: Faces) -> None:
    found = figures(attacks.sweep, forget, noise, **SWEEP)
    assert found["attack.sweep.success"] <= 0.25 and found["attack.sweep.right-code-first"] <= 0.25
    assert found["attack.sweep.wrong-codes-above"] > 20


def test_hill_climbing_succeeds_where_every_right_bit_helps(smooth: Faces) -> None:
    found = figures(attacks.climb, steps, smooth, **SWEEP)
    assert found["attack.hill-climbing.success"] >= 0.8 and found["attack.hill-climbing.named"] >= 0.8
    assert found["attack.hill-climbing.chance"] < 0.5


def test_hill_climbing_fails_where_one_wrong_bit_is_as_bad_as_all(noise: Faces) -> None:
    found = figures(attacks.climb, forget, noise, **SWEEP)
    assert found["attack.hill-climbing.success"] <= 0.35 and found["attack.hill-climbing.named"] <= 0.2


# The right one among candidates. -----------------------------------------------------------------------------------


def test_candidates_betray_themselves_where_only_the_right_one_is_smooth(smooth: Faces) -> None:
    found = figures(attacks.candidates, perfect, smooth, candidates_faces=8, candidates_codes=12)
    # A code and its inverse give the same picture here, so the right one may be tied with another.
    assert found["attack.smoothest.success"] >= 0.7 and found["attack.smoothest.auc"] >= 0.95
    assert found["attack.smoothest.several.success"] >= 0.9
    assert found["attack.shortest.success"] >= 0.7 and found["attack.shortest.auc"] >= 0.95


def test_candidates_say_nothing_where_all_look_alike(noise: Faces) -> None:
    found = figures(attacks.candidates, perfect, noise, candidates_faces=10, candidates_codes=12)
    assert found["attack.smoothest.success"] <= 0.4 and 0.25 <= found["attack.smoothest.auc"] <= 0.75
    assert found["attack.shortest.success"] <= 0.4 and 0.25 <= found["attack.shortest.auc"] <= 0.75
    assert found["attack.round-trip.auc"] == 0.5, "XOR goes back under every code"
    same = figures(attacks.candidates, ignore, smooth_faces(), candidates_faces=8, candidates_codes=12)
    assert same["attack.smoothest.success"] == pytest.approx(1 / 12), "equal candidates are guessed among"
    assert same["attack.smoothest.several.success"] == pytest.approx(same["attack.smoothest.several.chance"])


def test_the_round_trip_and_the_grid_betray_a_key_that_alone_goes_back(smooth: Faces) -> None:
    def clipping(images: Pixels, codes: Codes) -> Pixels:
        """Wrong keys lose what they push out of the range."""
        strong = np.random.default_rng(3).integers(-70, 71, size=(2**BITS, SIZE, SIZE, 3))
        numbers = codes @ (1 << np.arange(BITS))
        inverse = codes[:, 0]
        shift = np.where(inverse[:, None, None, None], strong[numbers], -strong[2**BITS - 1 - numbers])
        return np.clip(images + shift, 0, 255).astype(np.uint8)

    context = context_of(clipping, smooth, candidates_faces=12, candidates_codes=12)
    right = {c.tobytes() for c in context.chain.codes["right"]}
    rng = np.random.default_rng(4)

    def between_steps(images: torch.Tensor, codes: Codes) -> torch.Tensor:
        whole = to_tensor(clipping(to_pixels(images), codes))
        off = torch.from_numpy(rng.uniform(-1, 1, size=whole.shape)).float() / 127.5
        return torch.stack([w if c.tobytes() in right else w + o for w, o, c in zip(whole, off, codes, strict=True)])

    context.subject = replace(context.subject, transform_float=between_steps)
    found = attacks.candidates(context).figures
    assert found["attack.round-trip.success"] >= 0.75 and found["attack.round-trip.auc"] >= 0.9
    assert found["attack.grid.success"] >= 0.4 and found["attack.grid.auc"] >= 0.8
    context.subject = replace(context.subject, transform_float=lambda x, codes: x + 0.3 / 127.5)
    assert attacks.candidates(context).figures["attack.grid.auc"] == 0.5


# Known plaintext. --------------------------------------------------------------------------------------------------


def test_a_known_original_tells_the_code_and_opens_other_pictures(smooth: Faces) -> None:
    found = figures(attacks_known.known_plaintext, steps, smooth, **SWEEP)
    assert found["attack.known-plaintext.success"] == 1 and found["attack.known-plaintext.hours-for-all-codes"] > 0
    assert found["attack.known-plaintext.climb.success"] == 1, "every right bit helps here"
    assert found["attack.known-plaintext.climb.other-picture.success"] == 1
    assert found["attack.known-plaintext.climb.bits-wrong"] == 0
    assert found["attack.known-plaintext.climb.other-picture.chance"] < 0.6


def test_a_known_original_is_no_help_where_codes_cannot_be_climbed_or_told_apart(noise: Faces) -> None:
    hard = figures(attacks_known.known_plaintext, forget, noise, **SWEEP)
    assert hard["attack.known-plaintext.climb.success"] <= 0.5 and hard["attack.known-plaintext.success"] == 1
    assert hard["attack.known-plaintext.climb.other-picture.success"] == 0, "nobody gets anything back"
    same = figures(attacks_known.known_plaintext, ignore, noise, **SWEEP)
    assert same["attack.known-plaintext.success"] == pytest.approx(1 / 64), "all codes are right: none can be told"
    assert same["attack.known-plaintext.climb.other-picture.success"] == 1, "and any opens everything"
    assert same["attack.known-plaintext.climb.other-picture.chance"] == 1


def test_pictures_of_one_person_are_linked_where_one_password_gives_one_face(noise: Faces) -> None:
    linked = figures(attacks_known.linking, perfect, noise, **SWEEP)
    assert linked["attack.linking.unprotected"] == 1
    assert linked["attack.linking.two-passwords"] <= 0.05
    kept = figures(attacks_known.linking, identity, noise, **SWEEP)
    assert kept["attack.linking.success"] == kept["attack.linking.two-passwords"] == 1
    assert kept["attack.linking.chance"] <= 0.02
    lost = figures(attacks_known.linking, forget, noise, **SWEEP)
    assert lost["attack.linking.success"] <= 0.1


# The cover transformer. ---------------------------------------------------------------------------------------------


def cover_context(bits: int, people: int = 160, **sizes: int) -> Context:
    """The smallest transformer of the kind, its eigenfaces random, on smooth faces of 64 px."""
    config = CONFIG.model_copy(update={"luma": 120, "colour": 40, "robust": (100, 30)})
    network = fresh(painting=True, bits=bits, config=config)
    # As faces are: what is hidden of them of mean square 1, and likenesses as far apart as before.
    network.deviation.fill_(0.13)
    network.likenesses.faces.mul_(2.3)
    rng = np.random.default_rng(2)
    first = np.stack([resize(c, (64, 64, 3), order=1, mode="edge") for c in rng.uniform(size=(people, 9, 9, 3))])
    second = first + rng.normal(0, 0.01, size=first.shape)
    pixels = (np.concatenate([first, second]).clip(0, 1) * 100 + 78).astype(np.uint8)
    names = list(range(people))
    faces = Faces(pixels, [*names, *names], ["made"] * 2 * people)

    @torch.no_grad()
    def transform(images: Pixels, codes: Codes) -> Pixels:
        return to_pixels(network(to_tensor(images), covers.signed(codes)))

    context = context_of(transform, faces, candidates_faces=8, attack_test=40, latent_codes=256, linking=60, **sizes)
    context.model = network
    return judged(context, transform, bits)


def judged(context: Context, transform: Transform, bits: int) -> Context:
    """The context with another transform, and pictures made by that."""
    context.subject = Subject(transform=transform, bits=bits, architecture="cover")
    context.chain = Chain(context.subject, context.sample.faces.images, seed=0, progress=context.progress)
    return context


def one_password_each(context: Context) -> Context:
    """Every picture under a code of its own, whatever is asked for: pairs of one password are of many."""
    transform, bits, rng = context.subject.transform, context.subject.bits, np.random.default_rng(3)

    def apart(images: Pixels, codes: Codes) -> Pixels:
        return transform(images, rng.integers(0, 2, size=codes.shape).astype(np.bool_))

    return judged(context, apart, bits)


def measured(part: Callable[[Context], Result], context: Context) -> dict[str, float]:
    result = part(context)
    assert result.figures, result.skipped
    assert keys.unknown(result.figures) == []
    return result.figures


@pytest.mark.parametrize("bits", [8, 64])
def test_the_likeness_that_is_shown_tells_bits_and_the_pattern_tells_the_right_code(bits: int) -> None:
    context = cover_context(bits)
    shown = measured(attacks_cover.likeness, context)
    assert shown["attack.likeness.success"] >= 0.9 and shown["attack.likeness.bits-told"] == 4
    tried = measured(attacks_cover.pattern, context)
    assert tried["attack.pattern.success"] == 1 and tried["attack.pattern.codes-left"] == 2.0 ** (bits - 4)
    assert tried["attack.pattern.right.cosine"] > 0.7 > tried["attack.pattern.wrong.cosine"] + 0.2
    assert tried["attack.pattern.codes-tried"] == {8: 16, 64: 256}[bits]
    years = tried["attack.pattern.hours-for-all-codes"] / 8766
    assert years < 1e-6 if bits == 8 else years > 1e3
    # Pictures that were never anonymized show no likeness of their code's, and hide nothing.
    blank = judged(context, identity, bits)
    assert measured(attacks_cover.likeness, blank)["attack.likeness.success"] <= 0.3
    nothing = measured(attacks_cover.pattern, blank)
    assert nothing["attack.pattern.success"] <= 0.3 and nothing["attack.pattern.right.cosine"] < 0.3


def test_codes_are_turned_into_others_that_pick_one_likeness() -> None:
    network = cover_context(64, people=40).model
    assert isinstance(network, CoverTransformer)
    codes = np.random.default_rng(0).integers(0, 2, size=(100, 64)).astype(np.bool_)
    for number in (0, 5, 15):
        turned = covers.with_number(network, codes, number)
        assert (covers.number_of(network, turned) == number).all()
        same = covers.number_of(network, codes) == number
        assert (turned[same] == codes[same]).all() and len(np.unique(turned, axis=0)) == len(codes)
        assert (turned != codes).sum(axis=1).max() <= 8


def numberless(context: Context) -> Context:
    """The same network, all of whose pictures have one number."""
    network = context.model
    assert isinstance(network, CoverTransformer)
    network.coarse.zero_()
    return judged(context, context.subject.transform, context.subject.bits)


def test_pairs_of_one_password_open_its_other_pictures_only_where_all_have_one_number() -> None:
    context = cover_context(64, people=400)
    found = measured(attacks_cover.known_pairs, context)
    assert found["attack.known-pairs.64.explained"] < 0.1
    bare = measured(attacks_cover.known_pairs, numberless(context))
    assert bare["attack.known-pairs.64.explained"] > max(bare["attack.known-pairs.1.explained"], 0) + 0.3
    assert bare["attack.known-pairs.64.psnr"] > bare["attack.known-pairs.1.psnr"]


def test_pairs_made_for_a_picture_open_it_where_one_password_is_for_all_and_not_where_each_has_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    context = cover_context(64, people=400)
    monkeypatch.setattr(attacks_cover, "_CHOSEN", 2)
    few = measured(attacks_cover.chosen_pairs, context)
    assert few["attack.chosen-pairs.64.seconds"] < 20 and few["attack.chosen-pairs.same-number"] > 0.5
    # This small a network hides so little that it takes more of them.
    monkeypatch.setattr(attacks_cover, "FEW_PAIRS", (16, 160))
    found = attacks_cover.chosen_pairs(context).figures
    assert found["attack.chosen-pairs.160.explained"] > 0.8 > found["attack.chosen-pairs.16.explained"]
    many = attacks_cover.chosen_pairs(one_password_each(context)).figures
    assert many["attack.chosen-pairs.160.explained"] < 0.1


def test_all_signs_of_one_code_and_number_are_solved_for_from_32_pairs_and_not_from_4() -> None:
    mixing = Mixing(400, seed=1)
    rng = np.random.default_rng(0)
    code = covers.signed(rng.integers(0, 2, size=(1, 64)).astype(np.bool_))
    truth = signs(code, torch.tensor([7]), 3 * mixing.size).view(1, 3, -1)
    x = np.concatenate([rng.normal(size=(32, 300)) * np.linspace(2, 0.3, 300), np.ones((32, 96))], axis=1)
    given = torch.nn.functional.pad(torch.from_numpy(x).float(), (0, 4))
    mixed = mixing(given, truth.expand(32, -1, -1)).double().numpy()
    mixed += 0.1 * rng.normal(size=mixed.shape)
    solved = covers.signs_of(mixing, x, mixed)
    # Each layer may be turned as a whole.
    assert ((solved * truth).mean(dim=2).abs() > 0.97).all()
    assert ((covers.signs_of(mixing, x[:4], mixed[:4]) * truth).mean(dim=2).abs() < 0.5).all()


def test_the_outline_is_given_back_without_a_code_to_who_knows_the_likeness() -> None:
    context = cover_context(64)
    network, images, hidden = context.model, context.chain("I"), context.chain("A")
    assert isinstance(network, CoverTransformer)
    numbers = covers.shown_likeness(network, hidden)
    passing = ((network.left > 0) & (network.left < 1))[0, 0].numpy()
    assert passing.mean() > 0.05

    def away(pictures: Pixels) -> float:
        return float(np.abs(pictures[:, passing].astype(float) - images[:, passing]).mean())

    read = away(covers.opened(network, hidden, numbers, None))
    assert read < 0.1 * away(hidden)
    assert away(covers.opened(network, hidden, (numbers + 1) % 16, None)) > 3 * read
    # With the real coordinates the middle comes too.
    truth = covers.secrets(network, images)
    right, guessed = (covers.opened(network, hidden, numbers, x).astype(float) for x in (truth, None))
    assert np.abs(right - images).mean() < np.abs(guessed - images).mean()
    found = measured(attacks_cover.outline, context)
    assert found["attack.outline.psnr"] > 20 and 0 <= found["attack.outline.success"] <= 1


def test_what_one_password_hides_under_one_number_is_linked_and_what_two_hide_is_not() -> None:
    mixed = measured(attacks_cover.hidden_linking, context := cover_context(64))
    assert mixed["attack.hidden-linking.two-passwords"] <= 0.1
    found = measured(attacks_cover.hidden_linking, numberless(context))
    assert found["attack.hidden-linking.success"] >= 0.8 and found["attack.hidden-linking.of-input"] >= 0.8
    assert found["attack.hidden-linking.two-passwords"] <= 0.1
    assert found["attack.hidden-linking.chance"] == pytest.approx(1 / 60)


def test_what_no_code_changes_is_matched_and_other_kinds_of_network_are_left_alone() -> None:
    context = cover_context(8)
    found = measured(attacks_cover.invariants, context)
    assert found["attack.invariants.success"] >= 0.5 > found["attack.invariants.chance"]
    blank = judged(context, lambda images, codes: np.full_like(images, 128), 8)
    assert measured(attacks_cover.invariants, blank)["attack.invariants.success"] <= 0.05
    other = context_of(perfect, two_photos_each(), climbs=4)
    for name in (
        "known_pairs", "chosen_pairs", "pattern", "likeness", "outline", "hidden_linking", "invariants",
    ):  # fmt: skip
        part = getattr(attacks_cover, name)
        assert not part(other).figures and "of another" in " ".join(part(other).skipped.values())


# What is trained. --------------------------------------------------------------------------------------------------


def test_an_inverter_undoes_what_needs_no_password(many: Faces) -> None:
    found = figures(attacks_trained.inverter, lambda images, codes: 255 - images, many, **LEARN)
    assert found["attack.inverter.success"] >= 0.6 and found["attack.inverter.chance"] <= 0.1
    assert found["attack.inverter.psnr"] > found["attack.inverter.nothing-done.psnr"] + 5


def test_an_inverter_learns_nothing_where_nothing_is_left(many: Faces) -> None:
    found = figures(attacks_trained.inverter, forget, many, **LEARN)
    assert found["attack.inverter.success"] <= 0.15


def test_a_predictor_reads_a_code_that_shows_and_not_one_that_does_not(many: Faces) -> None:
    def shown(images: Pixels, codes: Codes) -> Pixels:
        out = images.copy()
        for row, code in zip(out, codes, strict=True):
            for bit, value in enumerate(code):
                row[4 * bit : 4 * bit + 4] = 255 * value if bit % 2 else row[4 * bit : 4 * bit + 4] // (1 + value)
        return out

    read = figures(attacks_trained.code_predictor, shown, many, **LEARN)
    assert read["attack.code-predictor.bits"] >= 0.75
    blind = figures(attacks_trained.code_predictor, forget, many, **LEARN)
    assert 0.4 <= blind["attack.code-predictor.bits"] <= 0.6 and blind["attack.code-predictor.success"] <= 0.05


def test_a_classifier_tells_right_from_wrong_recovery_only_where_they_differ(many: Faces) -> None:
    told = figures(attacks_trained.recovery_classifier, perfect, many, **LEARN)
    assert told["attack.recovery-classifier.success"] >= 0.9 and told["attack.recovery-classifier.auc"] >= 0.95
    same = figures(attacks_trained.recovery_classifier, ignore, many, **LEARN)
    assert same["attack.recovery-classifier.success"] == 0.5 and same["attack.recovery-classifier.auc"] == 0.5


def test_who_has_nothing_to_learn_from_is_told_so(smooth: Faces) -> None:
    for part in (attacks_trained.inverter, attacks_trained.code_predictor, attacks_trained.recovery_classifier):
        result = part(context_of(perfect, smooth))
        assert not result.figures and "--train-data" in " ".join(result.skipped.values())


# Denial, and the climb itself. -------------------------------------------------------------------------------------


def test_recompression_denies_recovery_to_a_cipher_and_not_to_the_identity(noise: Faces) -> None:
    cipher = figures(attacks.denial, perfect, noise)
    assert cipher["attack.denial.jpeg75.success"] == 1 and cipher["attack.denial.half.success"] >= 0.5
    assert cipher["attack.denial.png.success"] == cipher["attack.denial.chance"] == 0
    plain = figures(attacks.denial, identity, smooth_faces())
    assert plain["attack.denial.jpeg75.success"] == 0


def test_attackers_repeat_themselves_with_the_same_seed() -> None:
    pictures = np.random.default_rng(0).integers(0, 256, size=(16, SIZE, SIZE, 3), dtype=np.uint8)
    labels = np.random.default_rng(1).integers(0, 2, size=(16, 3)).astype(np.float64)
    first, second = (
        attackers.train_classifier(pictures, labels, images=32, seed=5, advance=lambda n: None) for _ in range(2)
    )
    assert np.array_equal(attackers.scores(first, pictures), attackers.scores(second, pictures))
