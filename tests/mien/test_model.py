from __future__ import annotations

import io
import logging
import subprocess
import sys
import traceback
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

import mien
from mien import errors, networks, passwords, pictures, store
from mien.detection import MTCNNDetector
from mien.errors import InvalidImage, ModelError, NoSuchFace, TooManyFaces
from mien.model import Model, Operation, Selection, load
from mien.networks import ResNetConfig
from mien.networks.blocks import head_mask
from mien.pictures import FaceGeometry, Limits

PASSWORD = "correct horse 🔋"
# The head of the astronaut, without hair and background.
FACE = (slice(75, 170), slice(185, 265))


def rms(a: object, b: object) -> float:
    return float(np.sqrt(np.mean((np.asarray(a, np.float64) - np.asarray(b, np.float64)) ** 2)))


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def safe(model: Model, photo: Image.Image) -> Image.Image:
    return model.anonymize(photo, PASSWORD)


@pytest.fixture(scope="module")
def safe_file(safe: Image.Image, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("safe") / "safe.png"
    safe.save(path)
    return path


# Faces. ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["coupling", "resnet"])
def any_model(request: pytest.FixtureRequest, model: Model) -> Model:
    if request.param == "coupling":
        return model
    architecture = ResNetConfig(width=8, blocks=2)
    torch.manual_seed(0)
    network = networks.build(architecture, bits=16, size=128)
    return Model(network, store.ModelConfig(architecture=architecture, bits=16), device="cpu")


def test_a_face_is_transformed_alike_alone_in_a_batch_and_in_another_order(any_model: Model) -> None:
    rng = np.random.default_rng(0)
    faces = torch.from_numpy(rng.uniform(-1, 1, (64, 3, 128, 128))).float()
    codes = passwords.random_codes(64, 16, rng)
    together = any_model.transform_float(faces, codes)
    order = rng.permutation(64)
    shuffled = any_model.transform_float(faces[order], codes[order])
    assert (shuffled - together[order]).abs().max() < 1e-5
    for i in (0, 31, 63):
        assert (any_model.transform_float(faces[i : i + 1], codes[i : i + 1]) - together[i]).abs().max() < 1e-5


def test_transform_takes_and_gives_bytes_and_the_inverse_code_undoes_it(model: Model) -> None:
    rng = np.random.default_rng(1)
    smooth = np.kron(rng.integers(40, 215, (3, 8, 8, 3)), np.ones((1, 16, 16, 1))).astype(np.uint8)
    codes = passwords.random_codes(3, 16, rng)
    out = model.transform(smooth, codes)
    assert out.dtype == np.uint8 and out.shape == smooth.shape and rms(out, smooth) > 1
    assert rms(model.transform(out, ~codes), smooth) < 1
    assert rms(model.transform(out, codes), smooth) > 1


@pytest.mark.parametrize(
    ("faces", "codes"),
    [
        (np.zeros((1, 128, 128, 3), np.float32), np.zeros((1, 16), bool)),
        (np.zeros((1, 64, 64, 3), np.uint8), np.zeros((1, 16), bool)),
        (np.zeros((128, 128, 3), np.uint8), np.zeros((1, 16), bool)),
        (np.zeros((2, 128, 128, 3), np.uint8), np.zeros((1, 16), bool)),
        (np.zeros((1, 128, 128, 3), np.uint8), np.zeros((1, 8), bool)),
        (np.zeros((1, 128, 128, 3), np.uint8), np.zeros((1, 16), np.uint8)),
    ],
    ids=["float faces", "another size", "no batch", "too few codes", "short codes", "numbers as codes"],
)
def test_transform_refuses_other_shapes_and_types(model: Model, faces: NDArray[Any], codes: NDArray[Any]) -> None:
    with pytest.raises(ValueError, match="expected"):
        model.transform(faces, codes)


# Pictures. -------------------------------------------------------------------------------------------------------


def test_anonymizing_changes_the_face_and_keeps_the_background_bit_for_bit(
    safe: Image.Image, astronaut: NDArray[np.uint8]
) -> None:
    out = np.asarray(safe)
    assert rms(out[FACE], astronaut[FACE]) > 5
    same = (out == astronaut).all(axis=-1)
    assert same.mean() > 0.85
    assert same[:, 350:].all() and same[300:].all() and same[:, :80].all()


def test_a_saved_png_is_recovered_by_its_password_alone(
    model: Model, safe: Image.Image, safe_file: Path, astronaut: NDArray[np.uint8]
) -> None:
    saved = Image.open(safe_file)
    right, wrong = model.recover(saved, PASSWORD), model.recover(saved, PASSWORD + "!")
    changed = rms(np.asarray(safe)[FACE], astronaut[FACE])
    assert rms(np.asarray(right)[FACE], astronaut[FACE]) < changed / 3
    assert rms(np.asarray(wrong)[FACE], astronaut[FACE]) > changed / 2
    assert rms(np.asarray(wrong)[FACE], np.asarray(safe)[FACE]) > changed / 2
    # In memory, without the file, it is the same.
    np.testing.assert_array_equal(np.asarray(model.recover(safe, PASSWORD)), np.asarray(right))


def test_right_and_wrong_passwords_give_results_of_one_kind(model: Model, safe_file: Path) -> None:
    results = [model.recover_bytes(safe_file.read_bytes(), p) for p in (PASSWORD, "wrong")]
    shapes = [(r.format, r.width, r.height, r.faces, r.digest) for r in results]
    assert shapes[0] == shapes[1]
    assert b"mien" not in results[0].data and b"mien" not in results[1].data


def test_faces_are_recovered_by_detection_where_metadata_was_stripped(
    model: Model, safe_file: Path, astronaut: NDArray[np.uint8], safe: Image.Image
) -> None:
    stripped = Image.fromarray(np.asarray(Image.open(safe_file)))
    again = model.recover(stripped, PASSWORD)
    assert rms(np.asarray(again)[FACE], astronaut[FACE]) < rms(np.asarray(safe)[FACE], astronaut[FACE])


@pytest.mark.parametrize(("scale", "angle"), [(0.75, 0), (1.6, 12), (2.5, -12)])
def test_faces_of_other_sizes_and_tilts_come_back_too(
    model: Model, photo: Image.Image, scale: float, angle: float
) -> None:
    head = photo.crop((96, 0, 352, 256)).rotate(angle, Image.Resampling.BICUBIC, fillcolor=(200, 190, 190))
    side = round(256 * scale)
    picture = head.resize((side, side), Image.Resampling.LANCZOS)
    hidden = model.anonymize(picture, PASSWORD)
    back = model.recover(Image.open(io.BytesIO(png(hidden))), PASSWORD)
    middle = (slice(round(side * 0.3), round(side * 0.65)), slice(round(side * 0.35), round(side * 0.65)))
    before, after = (
        rms(np.asarray(hidden)[middle], np.asarray(picture)[middle]),
        rms(np.asarray(back)[middle], np.asarray(picture)[middle]),
    )
    assert after < before / 2


def _crowd(photo: Image.Image, columns: int, rows: int, step: int) -> Image.Image:
    head = photo.crop((96, 0, 352, 256)).resize((step, step), Image.Resampling.LANCZOS)
    crowd = Image.new("RGB", (columns * step, rows * step))
    for i in range(columns * rows):
        crowd.paste(head, ((i % columns) * step, (i // columns) * step))
    return crowd


def test_a_hundred_faces_are_all_changed_and_all_come_back(model: Model, photo: Image.Image) -> None:
    crowd = _crowd(photo, 10, 10, 96)
    result = model.anonymize_bytes(png(crowd), PASSWORD)
    assert len(result.faces) == 100
    hidden = np.asarray(Image.open(io.BytesIO(result.data)))
    back = np.asarray(Image.open(io.BytesIO(model.recover_bytes(result.data, PASSWORD).data)))
    original = np.asarray(crowd)
    for row in range(10):
        for column in range(10):
            cell = (slice(row * 96 + 30, row * 96 + 60), slice(column * 96 + 35, column * 96 + 61))
            changed = rms(hidden[cell], original[cell])
            assert changed > 2
            assert rms(back[cell], original[cell]) < changed


def test_overlapping_faces_are_undone_in_reverse_order(model: Model, photo: Image.Image) -> None:
    """With a change that undoes itself and does not commute with its neighbour: the head mirrored, 40 px apart."""
    mask = (head_mask(128) > 0).float()

    def run(picture: pictures.Picture, operation: Operation) -> pictures.Picture:
        steps = model.steps(picture, plan, operation)
        try:
            crops = next(steps)
            while True:
                images = crops.images
                crops = steps.send(mask * images.flip(-1) + (1 - mask) * images)
        except StopIteration as finished:
            done: pictures.Picture = finished.value
            return done

    picture = pictures.from_pil(photo)
    found = model.plan(picture, "anonymize")
    beside = tuple((a, b, c - 40) for a, b, c in found.faces[0].matrix)
    plan = found.model_copy(update={"faces": (found.faces[0], found.faces[0].model_copy(update={"matrix": beside}))})
    hidden = run(picture, "anonymize")
    right, misordered = run(hidden, "recover"), run(hidden, "anonymize")
    assert rms(hidden.pixels, picture.pixels) > 20
    assert rms(right.pixels, picture.pixels) < 3
    assert rms(misordered.pixels, picture.pixels) > 10


def test_alpha_stays_as_it_was(model: Model, astronaut: NDArray[np.uint8]) -> None:
    alpha = np.tile(np.arange(512) // 2, (512, 1)).astype(np.uint8)
    data = png(Image.fromarray(np.dstack([astronaut, alpha])))
    for out in (model.anonymize_bytes(data, PASSWORD), model.anonymize_bytes(data, PASSWORD, format="WEBP")):
        with Image.open(io.BytesIO(out.data)) as image:
            assert image.mode == "RGBA"
            np.testing.assert_array_equal(np.asarray(image)[..., 3], alpha)


def test_only_chosen_faces_change(model: Model, photo: Image.Image) -> None:
    crowd = _crowd(photo, 2, 1, 128).resize((512, 256))
    result = model.anonymize_bytes(png(crowd), PASSWORD, faces=[1])
    everything = model.anonymize_bytes(png(crowd), PASSWORD)
    assert len(result.faces) == 1 and len(everything.faces) == 2
    assert result.faces[0] == everything.faces[1]
    x0, y0, x1, y1 = (int(v) for v in everything.faces[0].box)
    left = (slice(y0, y1), slice(x0, x1))
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(result.data)))[left], np.asarray(crowd)[left])
    for wrong in ([2], [-1], []):
        with pytest.raises(errors.NoSuchFace):
            model.anonymize_bytes(png(crowd), PASSWORD, faces=wrong)


def test_recovering_one_of_two_faces_leaves_the_other_recoverable(model: Model, photo: Image.Image) -> None:
    crowd = _crowd(photo, 2, 1, 128).resize((512, 256))
    hidden = model.anonymize_bytes(png(crowd), PASSWORD)
    first = model.recover_bytes(hidden.data, PASSWORD, faces=[0])
    carried = pictures.decode(first.data).geometry
    assert carried is not None and carried.faces == hidden.faces[1:]
    both = pictures.decode(model.recover_bytes(first.data, PASSWORD).data)
    assert both.geometry is None
    assert rms(both.pixels, crowd) < rms(pictures.decode(hidden.data).pixels, crowd) / 2


def test_a_raw_code_stands_in_for_a_password(model: Model, photo: Image.Image, safe: Image.Image) -> None:
    code = passwords.derive_code(PASSWORD)
    np.testing.assert_array_equal(np.asarray(model.anonymize(photo, code=code)), np.asarray(safe))
    for wrong in ({}, {"password": "x", "code": code}, {"code": code[:8]}, {"code": code.astype(int)}):
        with pytest.raises(errors.InvalidPassword):
            model.anonymize(photo, **wrong)  # type: ignore[arg-type]


def test_the_realm_separates_deployments(model: Model, model_folder: Path, detector: MTCNNDetector) -> None:
    other = mien.load(model_folder, realm="elsewhere", device="cpu", detector=detector)
    assert not np.array_equal(other.code_for("anonymize", PASSWORD), model.code_for("anonymize", PASSWORD))
    assert np.array_equal(model.code_for("recover", PASSWORD), ~model.code_for("anonymize", PASSWORD))


# What goes wrong. ------------------------------------------------------------------------------------------------


def test_no_face_is_said_so(model: Model) -> None:
    with pytest.raises(errors.NoFaceFound):
        model.anonymize(Image.new("RGB", (200, 200), (90, 120, 60)), PASSWORD)


def test_too_many_faces_are_refused(model: Model, photo: Image.Image) -> None:
    with pytest.raises(errors.TooManyFaces, match="3 faces"):
        model.anonymize_bytes(png(_crowd(photo, 3, 1, 128)), PASSWORD, limits=Limits(max_faces=2))


@pytest.mark.parametrize("password", ["", "x" * 10_000])
def test_unusable_passwords_are_refused(model: Model, photo: Image.Image, password: str) -> None:
    with pytest.raises(errors.InvalidPassword):
        model.anonymize(photo, password)


def test_a_picture_of_another_model_is_not_recovered_into_nonsense(model: Model, safe_file: Path) -> None:
    picture = pictures.decode(safe_file.read_bytes())
    assert picture.geometry is not None
    foreign = picture.with_pixels(picture.pixels, picture.geometry.model_copy(update={"model": "0" * 64}))
    with pytest.raises(errors.WrongModel, match="000000000000"):
        model.recover_bytes(pictures.encode(foreign), PASSWORD)


@pytest.mark.parametrize(
    "broken",
    [
        lambda crops: crops,
        lambda crops: crops * float("nan"),
        lambda crops: crops[:, :, :64],
    ],
    ids=["unchanged", "not numbers", "another shape"],
)
def test_a_face_that_was_not_transformed_never_leaves(model: Model, photo: Image.Image, broken: Any) -> None:
    picture = pictures.from_pil(photo)
    steps = model.steps(picture, model.plan(picture, "anonymize"), "anonymize")
    with pytest.raises(errors.ModelError):
        steps.send(broken(next(steps).images))


def test_steps_driven_from_outside_give_what_the_model_gives(
    model: Model, photo: Image.Image, safe: Image.Image
) -> None:
    picture = pictures.from_pil(photo)
    steps = model.steps(picture, model.plan(picture, "anonymize"), "anonymize")
    code = model.code_for("anonymize", PASSWORD)
    crops = next(steps)
    assert crops.faces == (0,)
    assert crops.images.shape == (1, 3, 128, 128) and crops.images.abs().max() <= 1
    with pytest.raises(StopIteration) as finished:
        steps.send(model.transform_float(crops.images, code[None]))
    np.testing.assert_array_equal(finished.value.value.pixels, np.asarray(safe))


def test_the_password_is_in_no_repr_log_or_traceback(
    model: Model, photo: Image.Image, caplog: pytest.LogCaptureFixture
) -> None:
    secret = "hunter-two-and-a-half"
    with caplog.at_level(logging.DEBUG):
        safe = model.anonymize(photo, secret)
        try:
            model.anonymize(Image.new("RGB", (64, 64)), secret)
        except errors.NoFaceFound as error:
            shown = "".join(traceback.format_exception(error)) + repr(error)
    assert secret not in shown + caplog.text + repr(model) + repr(vars(model)) + repr(safe.info)


def test_importing_mien_is_fast_and_loads_nothing_heavy() -> None:
    code = (
        "import sys, time; t = time.process_time(); import mien; t = time.process_time() - t; "
        "heavy = {'torch', 'torchvision', 'facenet_pytorch', 'PIL', 'mlflow', 'bentoml', 'numpy'} & set(sys.modules); "
        "print(t, sorted(heavy), mien.__version__, len(dir(mien)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=280)
    seconds, heavy, *_ = done.stdout.split()
    assert float(seconds) < 0.3 and heavy == "[]"


def test_every_name_mien_offers_exists() -> None:
    for name in mien.__all__:
        assert getattr(mien, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'anonymise'"):
        _ = mien.anonymise  # type: ignore[attr-defined]


# -- which faces --------------------------------------------------------------------------------------------------


def face_at(x: float, y: float, side: float = 40) -> FaceGeometry:
    matrix = ((1.0, 0.0, -x), (0.0, 1.0, -y))
    return FaceGeometry(box=(x, y, x + side, y + side), matrix=matrix)


ROW = [face_at(0, 0), face_at(100, 0), face_at(200, 0)]


@pytest.mark.parametrize(
    ("selection", "chosen"),
    [
        (Selection(), [0, 1, 2]),
        (Selection(faces=[2, 0, 2]), [0, 2]),
        (Selection(boxes=[(90, -10, 150, 50)]), [1]),
        (Selection(faces=[0], boxes=[(205, 5, 238, 38)]), [0, 2]),
        (Selection(exclude_faces=[1]), [0, 2]),
        (Selection(exclude_boxes=[(95, 0, 245, 42)]), [0]),
        (Selection(exclude_boxes=[(130, 0, 150, 40)]), [0, 1, 2]),
        (Selection(faces=[0, 1], exclude_faces=[1, 2]), [0]),
    ],
)
def test_faces_are_chosen_by_number_and_by_place(selection: Selection, chosen: list[int]) -> None:
    assert selection.choose(ROW) == chosen


@pytest.mark.parametrize(
    "selection",
    [
        Selection(faces=[3]),
        Selection(faces=[]),
        Selection(exclude_faces=[3]),
        Selection(boxes=[(0, 0, 40, 40), (60, 0, 80, 40)]),
        Selection(exclude_faces=[0, 1, 2]),
        Selection(exclude_boxes=[(-5, -5, 300, 60)]),
    ],
)
def test_a_choice_of_no_face_is_an_error_and_never_means_all(selection: Selection) -> None:
    with pytest.raises(NoSuchFace):
        selection.choose(ROW)


def test_aligned_crops_are_changed_whole_without_detection_and_come_back(model: Model, photo: Image.Image) -> None:
    crop = np.asarray(photo)[40:168, 160:288]
    strip = pictures.Picture(np.concatenate([crop, crop[:, ::-1], crop]))
    code = model.code_for("anonymize", PASSWORD)
    codes = np.stack([code, code, ~code])

    def run(picture: pictures.Picture, operation: str, codes: NDArray[np.bool_]) -> pictures.Picture:
        plan = model.find_aligned(picture, operation)  # type: ignore[arg-type]
        steps = model.steps(picture, plan, operation, aligned=True)  # type: ignore[arg-type]
        try:
            crops = next(steps)
            while True:
                crops = steps.send(model.transform_float(crops.images, codes[list(crops.faces)]))
        except StopIteration as finished:
            done: pictures.Picture = finished.value
            return done

    safe = run(strip, "anonymize", codes)
    expected = model.transform(strip.pixels.reshape(3, 128, 128, 3), codes).reshape(384, 128, 3)
    assert np.abs(safe.pixels.astype(int) - expected).max() <= 1
    assert safe.geometry is not None and len(safe.geometry.faces) == 3
    reread = pictures.decode(pictures.encode(safe))
    back = run(reread, "recover", ~codes)
    assert back.geometry is None
    assert rms(back.pixels, strip.pixels) < rms(safe.pixels, strip.pixels) / 4


def test_aligned_crops_must_have_the_models_size(model: Model) -> None:
    for shape in ((128, 127, 3), (200, 128, 3)):
        with pytest.raises(InvalidImage, match="128"):
            model.find_aligned(pictures.Picture(np.zeros(shape, np.uint8)), "anonymize")
    with pytest.raises(TooManyFaces):
        tall = pictures.Picture(np.zeros((4 * 128, 128, 3), np.uint8))
        model.find_aligned(tall, "anonymize", limits=Limits(max_faces=3))


# -- where models come from ---------------------------------------------------------------------------------------


def test_a_scheme_that_nothing_knows_is_said_so() -> None:
    with pytest.raises(ModelError, match="nothing installed can load a model from carrier-pigeon"):
        load("carrier-pigeon:/mien")


def test_an_extra_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = metadata.EntryPoint("models", "a_module_that_is_not_there:fetch", "mien.models")
    monkeypatch.setattr(metadata, "entry_points", lambda **_: [entry])
    with pytest.raises(ModelError, match=r"mien\[serve\]"):
        load("models:/mien@champion")
