"""Ingest turns photos into the shards DESIGN.md describes, the same every time, and accounts for every file."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage.data
import skimage.transform
import webdataset
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from mien import geometry
from mien import manifest as manifests
from services.ingest import IngestConfig, IngestError, ShardError, Source, run, splits, verify
from services.ingest.crops import Reason, part_inside
from services.ingest.likeness import resembling
from services.ingest.sources import Landmarks, photos, read_landmarks

# MTCNN's for the face of skimage's astronaut, who plays everybody here.
ASTRONAUT = np.array([[205.13, 102.63], [247.75, 104.64], [226.19, 128.68], [202.76, 140.69], [245.75, 142.3]])
PEOPLE = {"Ada": 3, "Bo": 1, "Cyd": 2, "Dag": 2, "Eli": 1, "Fay": 2, "Gus": 1}


def picture(number: int = 0, box: tuple[int, int, int, int] = (96, 0, 356, 256)) -> NDArray[np.uint8]:
    """A part of the astronaut around her face, a little brighter for each number."""
    x0, y0, x1, y1 = box
    pixels = skimage.data.astronaut()[y0:y1, x0:x1].astype(int)
    return np.clip(pixels + number, 0, 255).astype(np.uint8)


def jpeg(pixels: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def collection(folder: Path, people: dict[str, int] = PEOPLE) -> tuple[Path, Path]:
    """A folder of photos, one folder a person, and its landmarks file."""
    rows, number = [], 0
    for person, count in people.items():
        (folder / person).mkdir(parents=True)
        for index in range(count):
            name = f"{person}/{person}_{index + 1:04d}.jpg"
            (folder / name).write_bytes(jpeg(picture(number)))
            rows.append({"file": name, "landmarks": (ASTRONAUT - [96, 0]).tolist(), "size": [260, 256], "prob": 0.99})
            number += 1
    return folder, write_lines(folder.parent / f"{folder.name}.jsonl", rows)


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return collection(tmp_path_factory.mktemp("photos") / "faces")


def config(path: Path, landmarks: Path | None, **settings: Any) -> IngestConfig:
    of_source = {k: settings.pop(k) for k in ("layout", "namespace", "fill") if k in settings}
    source = Source(name="faces", path=path, landmarks=landmarks, licence="public domain", **of_source)
    return IngestConfig(sources=(source,), **settings)


def samples(prefix: Path) -> dict[str, tuple[str, dict[str, Any], bytes]]:
    """Source to (split, KEY.json, picture), read without Mien's code."""
    found = {}
    for path in sorted(prefix.glob("*.tar")):
        with tarfile.open(path) as tar:
            files = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
        for name in files:
            if name.endswith(".json"):
                record = json.loads(files[name])
                image = next(data for other, data in files.items() if other[:-4] == name[:-5])
                found[record["source"]] = (path.name.split("-")[0], record, image)
    return found


def contents(prefix: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(prefix.iterdir())}


# Crops and records


@pytest.mark.parametrize("angle", [0, -25])
def test_a_crop_agrees_with_an_independent_similarity_fit_and_warp(tmp_path: Path, angle: float) -> None:
    turn = skimage.transform.SimilarityTransform(rotation=np.deg2rad(angle), translation=(20, 60))
    pixels = skimage.transform.warp(skimage.data.astronaut(), turn.inverse, order=3, mode="edge")
    pixels = (pixels * 255).round().astype(np.uint8)
    landmarks = turn(ASTRONAUT)
    (tmp_path / "in" / "one").mkdir(parents=True)
    Image.fromarray(pixels).save(tmp_path / "in" / "one" / "a.png")
    lines = write_lines(tmp_path / "l.jsonl", [{"file": "one/a.png", "landmarks": landmarks.tolist()}])
    run(config(tmp_path / "in", lines, image="png"), tmp_path / "out")
    ((_, record, image),) = samples(tmp_path / "out").values()
    fit = skimage.transform.SimilarityTransform.from_estimate(landmarks, geometry.template())
    # The face shrinks by a quarter: sampled twice as finely and averaged, it does not alias.
    finer = skimage.transform.SimilarityTransform.from_estimate(landmarks, geometry.template(256))
    expected = skimage.transform.warp(pixels, finer.inverse, output_shape=(256, 256), order=1, mode="symmetric") * 255
    expected = expected.reshape(128, 2, 128, 2, 3).mean(axis=(1, 3))
    crop = np.asarray(Image.open(io.BytesIO(image)))
    assert crop.shape == (128, 128, 3)
    assert np.abs(crop - expected)[2:-2, 2:-2].max() < 1.5
    assert np.allclose(record["landmarks"], fit(landmarks), atol=0.01)
    height, width = pixels.shape[:2]
    corners = [[-0.5, -0.5], [width - 0.5, -0.5], [width - 0.5, height - 0.5], [-0.5, height - 0.5]]
    assert np.allclose(record["outline"], fit(np.array(corners)), atol=0.01)


def test_a_png_option_keeps_the_crop_exactly_and_the_jpeg_nearly(tmp_path: Path, faces: tuple[Path, Path]) -> None:
    run(config(*faces), tmp_path / "jpg")
    manifest = run(config(*faces, image="png"), tmp_path / "png")
    assert manifest.image == "png"
    verify(tmp_path / "png")
    exact, image = (
        Image.open(io.BytesIO(samples(tmp_path / kind)["faces/Ada/Ada_0001.jpg"][2])) for kind in ("png", "jpg")
    )
    assert exact.format == "PNG"
    assert image.format == "JPEG"
    assert image.layer == [(1, 1, 1, 0), (2, 1, 1, 1), (3, 1, 1, 1)]  # type: ignore[attr-defined]  # 4:4:4
    assert np.abs(np.asarray(image).astype(int) - np.asarray(exact)).mean() < 2


def test_a_tight_crop_is_mirrored_or_continued_smoothly_as_asked(tmp_path: Path) -> None:
    box = (150, 40, 300, 190)
    (tmp_path / "in").mkdir()
    Image.fromarray(picture(box=box)).save(tmp_path / "in" / "a.png")
    lines = write_lines(tmp_path / "l.jsonl", [{"file": "a.png", "landmarks": (ASTRONAUT - box[:2]).tolist()}])
    crops = {}
    for fill in ("mirror", "smooth"):
        run(config(tmp_path / "in", lines, layout="unlabelled", fill=fill), tmp_path / fill)
        ((_, record, image),) = samples(tmp_path / fill).values()
        crops[fill] = np.asarray(Image.open(io.BytesIO(image))).astype(int)
        assert 0.5 < record["inside"] < 0.95
    left, top = np.ceil(np.array(record["outline"])[0]).astype(int) + 1
    right, bottom = np.floor(np.array(record["outline"])[2]).astype(int) - 1
    within = (slice(top, bottom), slice(left, right))
    assert np.abs(crops["mirror"][within] - crops["smooth"][within]).mean() < 2
    outside = np.ones((128, 128), dtype=bool)
    outside[within] = False

    def roughness(pixels: NDArray[Any]) -> float:
        return float(np.abs(np.diff(pixels.sum(axis=2), axis=0))[outside[1:]].mean())

    assert roughness(crops["smooth"]) < 0.5 * roughness(crops["mirror"])


@given(st.floats(-300, 300), st.floats(-300, 300), st.floats(0.2, 5), st.floats(-3.1, 3.1))
def test_the_part_inside_is_the_area_of_the_overlap(x: float, y: float, scale: float, angle: float) -> None:
    cos, sin = scale * np.cos(angle), scale * np.sin(angle)
    matrix = np.array([[cos, -sin, x], [sin, cos, y]])
    # Count, for a fine grid over the photo, what falls into the crop; the two see the same area from both sides.
    width, height = 120, 90
    grid = (
        np.stack(np.meshgrid(np.arange(-0.5, width - 0.5, 0.25), np.arange(-0.5, height - 0.5, 0.25)), axis=-1) + 0.125
    )
    crop = geometry.apply(matrix, grid)
    hits = ((crop >= -0.5) & (crop <= 63.5)).all(axis=-1).mean() * width * height * scale**2 / 64**2
    assert part_inside(matrix, 64, width, height) == pytest.approx(hits, abs=0.08 * max(1.0, scale))


@pytest.mark.slow
def test_without_a_landmarks_file_the_portrayed_face_is_detected(tmp_path: Path, faces: tuple[Path, Path]) -> None:
    # A bystander, smaller and at the edge.
    pixels = np.zeros((300, 420, 3), dtype=np.uint8) + 120
    pixels[20:276, 100:360] = picture()
    pixels[100:200, 0:100] = np.asarray(Image.fromarray(picture(box=(180, 60, 270, 150))).resize((100, 100))) // 2
    (tmp_path / "in").mkdir()
    Image.fromarray(pixels).save(tmp_path / "in" / "portrait.png")
    Image.fromarray(skimage.data.coffee()[:200, :200]).save(tmp_path / "in" / "coffee.png")
    run(config(tmp_path / "in", None, layout="unlabelled"), tmp_path / "out")
    ((_, record, _),) = samples(tmp_path / "out").values()
    portrayed = geometry.apply(geometry.crop_transform(ASTRONAUT), ASTRONAUT)
    assert record["source"] == "faces/portrait.png"
    assert np.abs(np.array(record["landmarks"]) - portrayed).max() < 2
    # The crop's frame tells which of the two faces it shows: 32 px between eyes that are 43 px apart in the photo.
    outline = np.array(record["outline"])
    assert np.linalg.norm(outline[1] - outline[0]) == pytest.approx(420 * 32 / 42.7, rel=0.05)
    (rejection,) = map(json.loads, (tmp_path / "out" / "rejected.jsonl").read_text().splitlines())
    assert (rejection["file"], rejection["reason"]) == ("coffee.png", Reason.NO_FACE.value)


# Layouts


def test_a_folder_and_a_tar_of_it_give_the_same_shards(tmp_path: Path, faces: tuple[Path, Path]) -> None:
    path, landmarks = faces
    with tarfile.open(tmp_path / "faces.tar", "w") as tar:
        for photo in sorted(path.rglob("*.jpg"), reverse=True):
            tar.add(photo, photo.relative_to(path).as_posix())
    run(config(path, landmarks), tmp_path / "a")
    run(config(tmp_path / "faces.tar", landmarks), tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.mark.parametrize("layout", ["people", "lfw", "casia-webface"])
def test_one_folder_a_person_gives_that_person_one_number(
    tmp_path: Path, faces: tuple[Path, Path], layout: str
) -> None:
    manifest = run(config(*faces, layout=layout), tmp_path / "out")
    numbers: dict[str, set[int]] = {}
    for source, (_, record, _) in samples(tmp_path / "out").items():
        numbers.setdefault(source.split("/")[1], set()).add(record["identity"])
    assert {person: len(found) for person, found in numbers.items()} == dict.fromkeys(PEOPLE, 1)
    names = {people.first + i: name for people in manifest.identities.values() for i, name in enumerate(people.names)}
    assert names == {number: f"faces/{person}" for person, (number,) in numbers.items()}
    assert sorted(names) == list(range(len(PEOPLE)))
    assert manifest.identities["train"].first == 0


@pytest.mark.parametrize("layout", ["unlabelled", "ffhq"])
def test_photos_nobody_named_have_no_identity_and_are_divided_one_by_one(
    tmp_path: Path, faces: tuple[Path, Path], layout: str
) -> None:
    manifest = run(config(*faces, layout=layout, split=(50, 50, 0)), tmp_path / "out")
    found = samples(tmp_path / "out")
    assert {record["identity"] for _, record, _ in found.values()} == {None}
    assert manifest.unlabelled == manifest.samples
    assert manifest.samples["train"] > 0
    assert manifest.samples["val"] > 0
    assert not any(people.names for people in manifest.identities.values())


def test_sources_of_one_namespace_share_their_people_and_others_do_not(
    tmp_path: Path, faces: tuple[Path, Path]
) -> None:
    more, landmarks = collection(tmp_path / "more", {"Ada": 2, "Zoe": 1})
    # Other bytes than those of the first collection, or they would be duplicates.
    for number, photo in enumerate(more.rglob("*.jpg")):
        photo.write_bytes(jpeg(picture(-20 - number)))

    def people(namespace: str | None) -> tuple[str, ...]:
        sources = (
            Source(name="faces", path=faces[0], landmarks=faces[1]),
            Source(name="more", path=more, landmarks=landmarks, namespace=namespace),
        )
        out = tmp_path / f"out-{namespace}"
        return run(IngestConfig(sources=sources, split=(100, 0, 0)), out).identities["train"].names

    assert len(people("faces")) == len(PEOPLE) + 1
    assert {"faces/Ada", "more/Ada"} <= set(people(None))


def test_the_shards_read_with_the_webdataset_package(tmp_path: Path, faces: tuple[Path, Path]) -> None:
    manifest = run(config(*faces, split=(100, 0, 0), shard_size=5), tmp_path / "out")
    urls = [str(tmp_path / "out" / shard.name) for shard in manifest.shards]
    read = list(webdataset.WebDataset(urls, shardshuffle=False).decode("pil").to_tuple("jpg", "json"))
    assert len(read) == sum(PEOPLE.values())
    for image, record in read:
        assert image.size == (128, 128)
        assert set(record) == {"identity", "landmarks", "source", "inside", "outline"}
        assert np.array(record["landmarks"]).shape == (5, 2)


# Splits, order, determinism

UNITS = st.lists(st.text(min_size=1), min_size=1, max_size=40, unique=True)
SHARES = st.tuples(*[st.floats(0, 1)] * 3).filter(lambda s: sum(s) > 0.01).map(lambda s: tuple(x / sum(s) for x in s))


@given(UNITS, SHARES, st.integers(0, 2**31))
def test_a_person_is_in_one_split_that_has_a_share_and_stays_there_whoever_joins(
    people: list[str], shares: tuple[float, float, float], seed: int
) -> None:
    alone = {person: splits.split_of(person, shares, seed) for person in people}
    later = {person: splits.split_of(person, shares, seed) for person in [*people, "somebody new"]}
    assert all(later[person] == split for person, split in alone.items())
    assert all(shares[manifests.SPLITS.index(split)] > 0 for split in alone.values())


def test_shares_are_kept_in_the_large() -> None:
    counts = dict.fromkeys(manifests.SPLITS, 0)
    for person in range(20_000):
        counts[splits.split_of(f"person {person}", (0.8, 0.1, 0.1), 7)] += 1
    assert abs(counts["train"] / 20_000 - 0.8) < 0.01
    assert abs(counts["val"] / 20_000 - 0.1) < 0.01


@given(UNITS, st.integers(0, 1000), st.randoms())
def test_the_order_of_samples_does_not_depend_on_the_order_of_files(
    keys: list[str], seed: int, dice: random.Random
) -> None:
    shuffled = list(keys)
    dice.shuffle(shuffled)
    assert splits.shuffled(keys, seed) == splits.shuffled(shuffled, seed)
    assert sorted(splits.shuffled(keys, seed)) == sorted(keys)


def test_no_identity_is_in_two_splits(tmp_path: Path, faces: tuple[Path, Path]) -> None:
    manifest = run(config(*faces, split=(40, 30, 30)), tmp_path / "out")
    places: dict[int, set[str]] = {}
    for split, record, _ in samples(tmp_path / "out").values():
        places.setdefault(record["identity"], set()).add(split)
    assert all(len(splits_of) == 1 for splits_of in places.values())
    assert len({split for of in places.values() for split in of}) > 1
    assert sum(len(people.names) for people in manifest.identities.values()) == len(places) == len(PEOPLE)


@pytest.mark.slow
def test_the_same_input_and_seed_give_the_same_bytes_however_many_workers(
    tmp_path: Path, faces: tuple[Path, Path]
) -> None:
    settings = config(*faces, shard_size=3)
    run(settings, tmp_path / "one")
    run(settings, tmp_path / "two", workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_another_seed_is_another_division_and_order(tmp_path: Path, faces: tuple[Path, Path]) -> None:
    for seed in (0, 1):
        run(config(*faces, split=(50, 50, 0), seed=seed), tmp_path / str(seed))
    a, b = samples(tmp_path / "0"), samples(tmp_path / "1")
    assert a.keys() == b.keys()
    assert {source: split for source, (split, *_) in a.items()} != {source: split for source, (split, *_) in b.items()}


def test_shards_hold_at_most_the_wanted_samples_and_differ_by_at_most_one(
    tmp_path: Path, faces: tuple[Path, Path]
) -> None:
    manifest = run(config(*faces, split=(100, 0, 0), shard_size=5), tmp_path / "out")
    sizes = [shard.samples for shard in manifest.shards]
    assert sum(sizes) == sum(PEOPLE.values())
    assert max(sizes) <= 5
    assert max(sizes) - min(sizes) <= 1
    assert [shard.name for shard in manifest.shards] == [f"train-{i:06d}.tar" for i in range(len(sizes))]


# What cannot be used


def test_every_file_that_cannot_be_used_is_listed_with_its_reason(tmp_path: Path) -> None:
    folder, lines = collection(tmp_path / "faces", {"Ada": 2})
    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    person = folder / "Ada"
    good = (person / "Ada_0001.jpg").read_bytes()
    fitting = rows[0]["landmarks"]

    def add(name: str, data: bytes, **row: Any) -> None:
        (folder / name).write_bytes(data)
        rows.append({"file": name, "landmarks": fitting, **row})

    add("Ada/notes.txt", b"bought milk")
    add("Ada/text.jpg", b"bought milk")
    add("Ada/half.jpg", jpeg(picture(30))[:4000])
    add("Ada/copy.jpg", good)
    add("Ada/noface.jpg", jpeg(picture(31)), prob=0.4)
    add("Ada/nobody.jpg", jpeg(picture(32)), landmarks=None)
    add("Ada/other-size.jpg", jpeg(picture(33)), size=[1000, 1000])
    add(
        "Ada/profile.jpg",
        jpeg(picture(34)),
        landmarks=[*fitting[:2], *(np.array(fitting[2:]) + np.array([60, 0])).tolist()],
    )
    add("Ada/far.jpg", jpeg(picture(35)), landmarks=(np.array(fitting) * 0.2).tolist())
    add("Ada/tight.jpg", jpeg(picture(36, (205, 100, 248, 145))), landmarks=(ASTRONAUT - [205, 100]).tolist())
    add("stray.jpg", jpeg(picture(37)))
    (person / "unlisted.jpg").write_bytes(jpeg(picture(38)))
    (person / "dangling.jpg").symlink_to(tmp_path / "nowhere")
    rows.append({"file": "Ada/gone.jpg", "landmarks": fitting})
    manifest = run(config(folder, write_lines(lines, rows), min_inside=0.5), tmp_path / "out")
    rejected = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert {row["file"]: row["reason"] for row in rejected} == {
        "Ada/copy.jpg": "duplicate",
        "Ada/dangling.jpg": "not a picture",
        "Ada/far.jpg": "face too small",
        "Ada/gone.jpg": "landmarks without a picture",
        "Ada/half.jpg": "broken picture",
        "Ada/nobody.jpg": "no landmarks",
        "Ada/noface.jpg": "no face",
        "Ada/notes.txt": "not a picture",
        "Ada/other-size.jpg": "landmarks off",
        "Ada/profile.jpg": "landmarks off",
        "Ada/text.jpg": "broken picture",
        "Ada/tight.jpg": "mostly outside the picture",
        "Ada/unlisted.jpg": "no landmarks",
        "stray.jpg": "in no person's folder",
    }
    assert all(row["source"] == "faces" and row["detail"] for row in rejected)
    (source,) = manifest.sources
    assert source.samples == 2
    # Each file is a sample or listed once; only the line without a picture is no file.
    assert source.files == source.samples + sum(source.rejected.values()) - 1
    assert sum(source.rejected.values()) == len(rejected)


def test_a_run_without_a_usable_photo_fails_and_leaves_what_was_there(tmp_path: Path, faces: tuple[Path, Path]) -> None:
    out = tmp_path / "out"
    run(config(*faces), out)
    before = contents(out)
    with pytest.raises(IngestError, match=r"no photo could be used: face too small \(12\)"):
        run(config(*faces, min_eyes=500), out, overwrite=True)
    assert contents(out) == before
    with pytest.raises(FileExistsError):
        run(config(*faces), out)
    assert contents(out) == before


def test_overwriting_leaves_no_shard_of_the_old_run(tmp_path: Path, faces: tuple[Path, Path]) -> None:
    run(config(*faces, shard_size=1), tmp_path / "out")
    manifest = run(config(*faces, shard_size=100), tmp_path / "out", overwrite=True)
    assert {path.name for path in (tmp_path / "out").glob("*.tar")} == {shard.name for shard in manifest.shards}
    verify(tmp_path / "out")


# Verification


@pytest.fixture
def sound(tmp_path: Path, faces: tuple[Path, Path]) -> Path:
    run(config(*faces, split=(50, 50, 0), shard_size=4), tmp_path / "shards")
    verify(tmp_path / "shards")
    return tmp_path / "shards"


def edit(prefix: Path, change: Any) -> None:
    """Change the manifest as parsed json."""
    path = prefix / manifests.MANIFEST
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def test_verify_notices_a_flipped_bit(sound: Path) -> None:
    path = next(iter(sound.glob("*.tar")))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ShardError, match=f"{path.name} has .* bytes and sha256"):
        verify(sound)


def test_verify_notices_a_missing_shard_and_a_missing_manifest(sound: Path) -> None:
    path = next(iter(sound.glob("*.tar")))
    path.unlink()
    with pytest.raises(ShardError, match=f"cannot read .*{path.name}"):
        verify(sound)
    (sound / manifests.MANIFEST).unlink()
    with pytest.raises(ShardError, match="unfinished"):
        verify(sound)


def test_verify_notices_wrong_counts_and_people_of_another_split(sound: Path) -> None:
    whole = (sound / manifests.MANIFEST).read_bytes()
    edit(sound, lambda data: data["samples"].update(train=data["samples"]["train"] + 1))
    with pytest.raises(ShardError, match="other than its manifest says"):
        verify(sound)
    (sound / manifests.MANIFEST).write_bytes(whole)
    edit(sound, lambda data: data["shards"][0].update(samples=data["shards"][0]["samples"] + 1))
    with pytest.raises(ShardError, match="its manifest says"):
        verify(sound)
    (sound / manifests.MANIFEST).write_bytes(whole)
    edit(sound, lambda data: data["identities"]["train"].update(first=1000))
    with pytest.raises(ShardError, match="which is not of train"):
        verify(sound)
    (sound / manifests.MANIFEST).write_bytes(whole)
    edit(sound, lambda data: data["shards"][0].update(name="../../elsewhere.tar"))
    with pytest.raises(ShardError, match="not a shard manifest"):
        verify(sound)


# Sources as a whole


def test_a_source_that_cannot_be_read_as_a_whole_is_an_error(tmp_path: Path, faces: tuple[Path, Path]) -> None:
    def listed(path: Path) -> object:
        return photos(Source(name="s", path=path))

    with pytest.raises(IngestError, match=r"cannot read .*absent"):
        listed(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(IngestError, match="holds no files"):
        listed(tmp_path / "empty")
    shutil.make_archive(str(tmp_path / "faces"), "gztar", faces[0])
    with pytest.raises(IngestError, match="decompress it first"):
        listed(tmp_path / "faces.tar.gz")


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", "line 2"),
        ('{"file": "b.jpg"}', None),
        ('{"landmarks": [[1, 2]]}', "line 2"),
        ('{"file": "b.jpg", "landmarks": [[1, 2]]}', "not five finite points"),
        ('{"file": "b.jpg", "landmarks": [[1, 2], [1, 2], [1, 2], [1, 2], [1, NaN]]}', "not five finite points"),
        ('{"file": "a.jpg", "landmarks": null}', "a.jpg has landmarks twice"),
    ],
)
def test_a_malformed_landmarks_line_is_named_by_its_number(tmp_path: Path, line: str, complaint: str | None) -> None:
    path = tmp_path / "l.jsonl"
    path.write_text('{"file": "a.jpg", "landmarks": [[1, 2], [3, 2], [2, 3], [1, 4], [3, 4]], "size": [9, 8]}\n' + line)
    if complaint is None:
        assert read_landmarks(path)["b.jpg"] is None
        first = read_landmarks(path)["a.jpg"]
        assert isinstance(first, Landmarks)
        assert first.size == (9, 8)
    else:
        with pytest.raises(IngestError, match=complaint):
            read_landmarks(path)


def test_a_tar_member_outside_its_folder_is_read_and_never_written(tmp_path: Path) -> None:
    data = jpeg(picture())
    with tarfile.open(tmp_path / "in.tar", "w") as tar:
        info = tarfile.TarInfo("../../escaped/face.jpg")
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
    row = {"file": "../../escaped/face.jpg", "landmarks": (ASTRONAUT - [96, 0]).tolist()}
    before = set(tmp_path.parent.rglob("*"))
    manifest = run(config(tmp_path / "in.tar", write_lines(tmp_path / "l.jsonl", [row])), tmp_path / "out")
    assert manifest.sources[0].samples == 1
    created = set(tmp_path.parent.rglob("*")) - before
    assert all(path.is_relative_to(tmp_path / "out") or path == tmp_path / "l.jsonl" for path in created)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every folder")
def test_an_unreadable_folder_is_an_error_and_not_an_empty_one(tmp_path: Path) -> None:
    folder, _ = collection(tmp_path / "faces", {"Ada": 1, "Bo": 1})
    (folder / "Bo").chmod(0)
    try:
        with pytest.raises(IngestError, match="cannot read the folder"):
            photos(Source(name="s", path=folder))
    finally:
        (folder / "Bo").chmod(0o755)


# Real faces


@pytest.fixture(scope="module")
def celebrities(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Four people of CelebA, four photos each, outside the repository."""
    folder = tmp_path_factory.mktemp("celebrities")
    rows: list[dict[str, Any]] = []
    with open(shared / "data" / "celeba-labelled.jsonl") as file:
        per_person: dict[str, int] = {}
        for row in map(json.loads, file):
            person = row["file"].split("/")[0]
            if len(per_person) < 4 or person in per_person:
                per_person[person] = per_person.get(person, 0) + 1
                if per_person[person] <= 4:
                    rows.append(row)
    with tarfile.open(shared / "data" / "celeba-labelled.tar") as tar:
        for row in rows:
            tar.extract(row["file"], folder / "photos", filter="data")
    return folder / "photos", write_lines(folder / "l.jsonl", rows)


@pytest.mark.shared
def test_real_faces_become_sound_shards(celebrities: tuple[Path, Path], tmp_path: Path) -> None:
    manifest = run(config(*celebrities, split=(50, 50, 0)), tmp_path / "out")
    assert verify(tmp_path / "out") == manifest
    (source,) = manifest.sources
    assert source.files == 16
    assert source.samples >= 14
    assert sum(len(people.names) for people in manifest.identities.values()) == 4


@pytest.mark.shared
def test_people_of_the_test_set_are_set_aside_whole_and_others_stay(
    celebrities: tuple[Path, Path], shared: Path, tmp_path: Path
) -> None:
    photos_of, lines = celebrities
    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    known = rows[0]["file"].split("/")[0]
    # The test set has one photo of somebody who is in the training photos under another name.
    tested = tmp_path / "tested"
    (tested / "Somebody").mkdir(parents=True)
    shutil.copy(photos_of / rows[0]["file"], tested / "Somebody" / "x.jpg")
    test_lines = write_lines(tmp_path / "t.jsonl", [{**rows[0], "file": "Somebody/x.jpg"}])
    run(config(tested, test_lines, split=(0, 0, 100)), tmp_path / "test")
    settings = config(
        photos_of, write_lines(tmp_path / "l.jsonl", rows[1:]), exclude_like=tmp_path / "test",
        judge_weights=shared / "weights", split=(100, 0, 0),
    )  # fmt: skip
    manifest = run(settings, tmp_path / "train")
    rejected = [json.loads(line) for line in (tmp_path / "train" / "rejected.jsonl").read_text().splitlines()]
    set_aside = {row["file"] for row in rejected if row["reason"] == Reason.LIKE_TEST_SET.value}
    assert {name.split("/")[0] for name in set_aside} == {known}
    assert all("with faces/Somebody/x.jpg" in row["detail"] for row in rejected if row["file"] in set_aside)
    assert len(manifest.identities["train"].names) == 3
    assert f"faces/{known}" not in manifest.identities["train"].names
    assert manifest.settings["excluded_like"] == manifests.digest(tmp_path / "test")


@pytest.mark.shared
def test_comparing_needs_a_sound_test_set(shared: Path, tmp_path: Path) -> None:
    with pytest.raises(ShardError):
        resembling([], [], tmp_path, shared / "weights", 0.5)
