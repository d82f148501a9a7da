"""Ingest at size: RecordIO pairs, object storage, runs that are cut off and go on, several processes."""

from __future__ import annotations

import io
import json
import os
import signal
import struct
import subprocess
import sys
import tarfile
import textwrap
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import storage
from mien import geometry
from mien.compositing import extract
from services.ingest import IngestConfig, IngestError, Source, crops, pipeline, recordio, run, verify
from services.ingest.sources import photos, read_landmarks
from tests.s3 import S3Server, s3_server
from tests.services.test_ingest import ASTRONAUT, collection, config, contents, jpeg, picture, samples

__all__ = ["s3_server"]

Pair = tuple[Path, Path]


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return collection(tmp_path_factory.mktemp("photos") / "faces", {"Ada": 4, "Bo": 2, "Cyd": 3, "Dag": 3})


@pytest.fixture(scope="module")
def expected(faces: Pair, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What an undisturbed run of one process writes into a folder."""
    out = tmp_path_factory.mktemp("expected") / "out"
    run(settings(*faces), out)
    return contents(out)


def settings(path: Path | str, landmarks: Path | str | None) -> IngestConfig:
    return config(path, landmarks, shard_size=3, seed=5)  # type: ignore[arg-type]


def stored(url: str) -> dict[str, bytes]:
    place = storage.open_prefix(url)
    return {entry.name: place.read(entry.name) for entry in place.list()}


# Crops


@pytest.mark.parametrize("scale", [0.3, 0.9, 1.7])
@pytest.mark.parametrize("box", [(96, 0, 356, 256), (180, 60, 290, 170)])
def test_a_crop_is_the_one_the_library_cuts_out(scale: float, box: tuple[int, int, int, int]) -> None:
    pixels = np.asarray(Image.fromarray(picture(box=box)).resize([round(scale * (box[2] - box[0]))] * 2))
    landmarks = geometry.scale_points(ASTRONAUT - box[:2], pixels.shape[0] / (box[3] - box[1]))
    matrix = geometry.crop_transform(landmarks)
    expected = (extract(pixels, matrix[None], 128)[0].permute(1, 2, 0).numpy() + 1) * 127.5
    covered = crops._covered(matrix, 128, *pixels.shape[1::-1])
    cut = crops.cut(pixels, matrix, 128, "mirror", covered)
    assert np.abs(cut - expected).max() <= 0.51  # rounding, and no more


# RecordIO. The writer is the test's own, after MXNet's description of the format.


def pack(labels: float | tuple[float, ...], data: bytes, number: int = 0) -> bytes:
    if isinstance(labels, float):
        return struct.pack("<IfQQ", 0, labels, number, 0) + data
    return struct.pack("<IfQQ", len(labels), 0.0, number, 0) + struct.pack(f"<{len(labels)}f", *labels) + data


def frame(data: bytes) -> bytes:
    """MXNet's writer: data is cut where it holds the magic at a multiple of four bytes."""
    magic = struct.pack("<I", recordio.MAGIC)
    cuts = [i for i in range(0, len(data) // 4 * 4, 4) if data[i : i + 4] == magic]
    pieces, begin = [], 0
    for cut in cuts:
        pieces.append(data[begin:cut])
        begin = cut + 4
    pieces.append(data[begin:])
    flags = [0] if len(pieces) == 1 else [1, *[2] * (len(pieces) - 2), 3]
    return b"".join(
        magic + struct.pack("<I", flag << 29 | len(piece)) + piece + b"\0" * (-len(piece) % 4)
        for flag, piece in zip(flags, pieces, strict=True)
    )


def write_pair(path: Path, records: list[bytes]) -> Path:
    offsets, data = [], b""
    for record in records:
        offsets.append(len(data))
        data += frame(record)
    path.with_suffix(".idx").write_text("".join(f"{i}\t{offset}\n" for i, offset in enumerate(offsets)))
    path.write_bytes(data)
    return path


def aligned_crops(count: int) -> list[bytes]:
    """112 px crops at InsightFace's template."""
    to_112 = geometry.fit_similarity(ASTRONAUT - [96, 0], geometry.RECOGNISER_112)
    made = []
    for number in range(count):
        square = extract(picture(number), to_112[None], 112)[0].permute(1, 2, 0).numpy()
        made.append(jpeg(((square + 1) * 127.5).round().astype(np.uint8)))
    return made


def insightface(path: Path, people: tuple[int, ...] = (3, 2, 4)) -> tuple[Path, list[bytes]]:
    """As InsightFace packs a data set: record 0, pictures, and a record a person with the range of his pictures."""
    pictures = aligned_crops(sum(people))
    first = len(pictures) + 1
    records, ranges, number = [pack((float(first), float(first + len(people))), b"")], [], 1
    for person, count in enumerate(people):
        ranges.append(pack((float(number), float(number + count)), b"", person))
        for _ in range(count):
            # Some of its data sets give a picture several labels, the person first.
            label = (float(person), 0.5) if number % 2 else float(person)
            records.append(pack(label, pictures[number - 1], number))
            number += 1
    return write_pair(path, records + ranges), pictures


def test_an_insightface_pair_becomes_shards_whose_landmarks_are_its_template(tmp_path: Path) -> None:
    path, _ = insightface(tmp_path / "train.rec")
    source = Source(name="casia", path=path, aligned="insightface", fill="smooth", licence="research")  # type: ignore[arg-type]
    manifest = run(IngestConfig(sources=(source,), split=(100, 0, 0)), tmp_path / "out")
    assert verify(tmp_path / "out") == manifest
    assert manifest.identities["train"].names == ("casia/000000", "casia/000001", "casia/000002")
    found = samples(tmp_path / "out")
    people = {source: record["identity"] for source, (_, record, _) in found.items()}
    numbers = [f"casia/{person:06d}/{n:08d}" for n, person in enumerate([0, 0, 0, 1, 1, 2, 2, 2, 2], start=1)]
    assert people == dict(zip(numbers, [0, 0, 0, 1, 1, 2, 2, 2, 2], strict=True))
    for _, record, image in found.values():
        assert np.abs(np.array(record["landmarks"]) - geometry.template()).max() < 0.6
        assert record["inside"] == pytest.approx((112 * 32 / 35.24 / 128) ** 2, abs=0.02)
        assert np.asarray(Image.open(io.BytesIO(image))).std() > 20


def test_a_pair_without_identity_records_is_read_by_the_labels_of_its_pictures(tmp_path: Path) -> None:
    pictures = aligned_crops(4)
    path = write_pair(tmp_path / "x.rec", [pack(float(n // 2), data, n) for n, data in enumerate(pictures)])
    found = photos(Source(name="x", path=path))  # type: ignore[arg-type]
    assert [photo.name for photo in found] == [f"{n // 2:06d}/{n:08d}" for n in range(4)]
    assert [photo.identity for photo in found] == ["x/000000", "x/000000", "x/000001", "x/000001"]


@given(st.lists(st.sampled_from([b"\x0a\x23\xd7\xce", b"abcd", b"x", b""]), max_size=12).map(b"".join))
def test_data_that_contain_the_magic_survive(data: bytes) -> None:
    assert recordio.payload(frame(data)) == data
    assert recordio.split(pack(1.0, data)) == ((1.0,), data)
    assert recordio.picture(frame(pack((1.0, 2.0), data))) == data


@given(st.binary(max_size=80), st.integers(0, 200))
def test_bytes_that_are_no_record_are_an_error_of_one_kind(noise: bytes, cut: int) -> None:
    for data in (noise, frame(pack((1.0, 2.0), b"a picture" * 5))[:cut]):
        try:
            recordio.picture(data)
        except recordio.RecordError:
            continue


@pytest.mark.parametrize("what", ["no idx", "text", "beyond", "shifted", "range", "twice"])
def test_a_pair_that_does_not_belong_together_is_refused(tmp_path: Path, what: str) -> None:
    path, _ = insightface(tmp_path / "a.rec")
    index = path.with_suffix(".idx")
    lines = index.read_text().splitlines()
    if what == "no idx":
        index.unlink()
    elif what == "text":
        index.write_text("0 0\n")
    elif what == "beyond":
        index.write_text("\n".join([*lines, f"99\t{path.stat().st_size}"]))
    elif what == "shifted":
        index.write_text("\n".join([f"0\t{4}", *lines[1:]]))
    elif what == "range":
        index.write_text("\n".join(line for line in lines if not line.startswith("10\t")))
    elif what == "twice":
        index.write_text("\n".join([*lines, lines[3].replace("3\t", "77\t")]))
    match = {
        "no idx": "cannot read .*a.idx",
        "text": "line 1 of the .idx",
        "beyond": "offsets that a .rec",
        "shifted": "no record begins where",
        "range": "the .idx has no 10",
        "twice": "or one twice",
    }[what]
    with pytest.raises(IngestError, match=match):
        photos(Source(name="a", path=path))  # type: ignore[arg-type]


def test_a_broken_record_is_set_aside_by_name(tmp_path: Path) -> None:
    path, _ = insightface(tmp_path / "a.rec")
    data = bytearray(path.read_bytes())
    offset = int(path.with_suffix(".idx").read_text().splitlines()[2].split("\t")[1])
    data[offset] ^= 1
    path.write_bytes(data)
    source = Source(name="a", path=path, aligned="insightface")  # type: ignore[arg-type]
    manifest = run(IngestConfig(sources=(source,)), tmp_path / "out")
    assert manifest.sources[0].rejected == {"broken picture": 1}
    (said,) = map(json.loads, (tmp_path / "out" / "rejected.jsonl").read_text().splitlines())
    assert said["file"] == "000000/00000002" and said["detail"] == "no record begins here"


# Object storage


def test_every_kind_of_source_in_s3_gives_the_shards_of_the_same_on_disk(
    faces: Pair, expected: dict[str, bytes], tmp_path: Path, s3_server: S3Server
) -> None:
    place = storage.open_prefix(s3_server.prefix())
    for photo in faces[0].rglob("*.jpg"):
        place.write(f"faces/{photo.relative_to(faces[0]).as_posix()}", photo)
    place.write("l.jsonl", faces[1])
    with tarfile.open(tmp_path / "faces.tar", "w") as tar:
        for photo in sorted(faces[0].rglob("*.jpg"), reverse=True):
            tar.add(photo, photo.relative_to(faces[0]).as_posix())
    place.write("faces.tar", tmp_path / "faces.tar")
    for name in ("faces/", "faces.tar"):
        out = f"{place.url}/out-{name.strip('/')}"
        manifest = run(settings(f"{place.url}/{name}", f"{place.url}/l.jsonl"), out)
        assert stored(out) == expected, name
        assert verify(out) == manifest
    path, _ = insightface(tmp_path / "a.rec")
    for end in ("rec", "idx"):
        place.write(f"a.{end}", tmp_path / f"a.{end}")
    for url in (str(path), f"{place.url}/a.rec"):
        source = Source(name="a", path=url, aligned="insightface")
        run(IngestConfig(sources=(source,)), tmp_path / ("s3" if storage.is_s3(url) else "disk"))
    assert contents(tmp_path / "s3") == contents(tmp_path / "disk")
    with pytest.raises(FileExistsError):
        run(settings(*faces), f"{place.url}/out-faces.tar")
    again = run(config(*faces, shard_size=100), f"{place.url}/out-faces.tar", overwrite=True)
    assert {name for name in stored(f"{place.url}/out-faces.tar") if name.endswith(".tar")} == {
        shard.name for shard in again.shards
    }


def test_verify_notices_in_s3_what_it_notices_on_disk(faces: Pair, s3_server: S3Server) -> None:
    out = s3_server.prefix()
    manifest = run(settings(*faces), out)
    place = storage.open_prefix(out)
    name = manifest.shards[0].name
    whole = place.read(name)
    place.write(name, whole[:1000] + bytes([whole[1000] ^ 1]) + whole[1001:])
    with pytest.raises(pipeline.manifests.ShardError, match=f"{name} has .* bytes and sha256"):
        verify(out)
    place.delete(name)
    with pytest.raises(pipeline.manifests.ShardError, match="no such object"):
        verify(out)


def test_a_source_in_s3_that_goes_away_stops_the_run_and_leaves_out_nothing(
    faces: Pair, expected: dict[str, bytes], tmp_path: Path, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = storage.open_prefix(f"{s3_server.prefix()}/faces")
    for photo in faces[0].rglob("*.jpg"):
        place.write(photo.relative_to(faces[0]).as_posix(), photo)
    chosen = settings(place.url, faces[1])
    monkeypatch.setattr(pipeline, "PART", 4)
    monkeypatch.setattr(pipeline.reading, "_place", lambda url: storage.open_prefix(url, patience=1))
    work = pipeline.plan(chosen)

    def advance(stage: str, done: int, total: int) -> None:
        if (stage, done) == ("crop", 4):
            s3_server.stop()

    try:
        with pytest.raises(storage.Unreachable, match="nothing answers"):
            run(chosen, tmp_path / "out", work=work, advance=advance)
    finally:
        s3_server.start()
    assert not (tmp_path / "out" / "manifest.json").exists()
    before: list[int] = []
    run(chosen, tmp_path / "out", advance=lambda stage, done, total: before.append(done))
    assert before[0] == 4  # the part that was done
    assert contents(tmp_path / "out") == expected


# Runs that are cut off

DRIVER = textwrap.dedent(
    """
    import os, signal, sys
    import torch
    import storage
    from services.ingest import IngestConfig, pipeline
    from storage import folder
    torch.set_num_threads(1)
    pipeline.PART = 4
    settings, out = IngestConfig.model_validate_json(sys.argv[1]), sys.argv[2]
    kinds = [folder.Folder]
    if storage.is_s3(out):
        from storage.s3 import S3
        kinds = [S3]

    def child(fatal):
        count = 0
        for kind in kinds:
            for name in ("write", "delete"):
                original = getattr(kind, name)
                def counted(self, *arguments, original=original):
                    nonlocal count
                    count += 1
                    if count == fatal:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return original(self, *arguments)
                setattr(kind, name, counted)
        pipeline.run(settings, out)
        os._exit(0)

    deaths = 0
    while True:
        # Each life may do one step more than the one before, so that every kind of step is the last of some life.
        pid = os.fork()
        if not pid:
            child(1 + deaths)
        _, status = os.waitpid(pid, 0)
        if os.WIFEXITED(status):
            print("deaths", deaths, "exit", os.WEXITSTATUS(status))
            break
        deaths += 1
        assert deaths < 40
    """
)


@pytest.mark.parametrize("where", ["folder", "s3"])
def test_killed_at_every_few_writes_it_ends_with_the_same_bytes(
    where: str, faces: Pair, expected: dict[str, bytes], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Lives that end by SIGKILL at their first, second, third, ... write or deletion, until one comes to the end."""
    out = str(tmp_path / "out") if where == "folder" else request.getfixturevalue("s3_server").prefix()
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, settings(*faces).model_dump_json(), out],
        capture_output=True, text=True, timeout=240, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    deaths = int(done.stdout.split()[1])
    assert done.stdout.split()[3] == "0" and deaths >= 5, done.stdout + done.stderr
    assert (contents(Path(out)) if where == "folder" else stored(out)) == expected


PROCESSES = textwrap.dedent(
    """
    import multiprocessing, os, signal, sys
    from services.ingest import IngestConfig, pipeline
    from services.ingest.site import Site
    if __name__ == "__main__":
        # Twelve photos, of which nine at most are under way when the first part is written: there is work left to fail.
        pipeline.PART, pipeline._CHUNK = 4, 1
        original = Site.write_part
        def write_part(self, number, *rest):
            original(self, number, *rest)
            if number == 0:
                children = [child.pid for child in multiprocessing.active_children()]
                print(*children, flush=True)
                # All of them: what one leaves, another may have done before anybody notices.
                for victim in [os.getpid()] if sys.argv[3] == "main" else children:
                    os.kill(victim, signal.SIGKILL)
        Site.write_part = write_part
        pipeline.run(IngestConfig.model_validate_json(sys.argv[1]), sys.argv[2], workers=2)
    """
)


@pytest.mark.parametrize("victim", ["main", "worker"])
def test_processes_end_with_the_one_that_started_them_and_what_they_did_is_kept(
    victim: str,
    faces: Pair,
    expected: dict[str, bytes],
    tmp_path: Path,
    background: Callable[..., subprocess.Popen[bytes]],
) -> None:
    script = tmp_path / "script.py"
    script.write_text(PROCESSES)
    chosen, out, log = settings(*faces), tmp_path / "out", tmp_path / "log"
    root = Path(__file__).parents[2]
    command = [sys.executable, str(script), chosen.model_dump_json(), str(out), victim]
    process = background(command, log=log, env={**os.environ, "PYTHONPATH": str(root)})
    process.wait(timeout=200)
    text = log.read_text()
    assert process.returncode == (-signal.SIGKILL if victim == "main" else 1), text
    if victim == "worker":
        assert "WorkerDied: a process that decodes pictures was killed" in text
    children = [int(word) for word in text.splitlines()[0].split()]
    assert len(children) == 2
    deadline = time.monotonic() + 60
    while any(_alive(child) for child in children):
        assert time.monotonic() < deadline, "workers outlived who gave them work"
        time.sleep(0.1)
    first: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "PART", 4)
        run(chosen, out, advance=lambda stage, done, total: first.append(done))
    assert first[0] >= 4
    assert contents(out) == expected


def _alive(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def test_what_changed_meanwhile_is_not_taken_from_an_earlier_run(
    faces: Pair, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "PART", 4)

    class Stopped(Exception):
        pass

    def stop(stage: str, done: int, total: int) -> None:
        if done >= 9:
            raise Stopped

    with pytest.raises(Stopped):
        run(settings(*faces).model_copy(update={"min_inside": 0.31}), tmp_path / "out", advance=stop)
    assert (tmp_path / "out" / ".ingest").is_dir()
    begun: list[int] = []
    run(settings(*faces), tmp_path / "out", advance=lambda stage, done, total: begun.append(done))
    assert begun[0] == 0  # another threshold: nothing was taken over
    assert contents(tmp_path / "out") == expected  # and nothing was left behind


def test_two_runs_do_not_write_into_one_folder(faces: Pair, tmp_path: Path) -> None:
    def another(stage: str, done: int, total: int) -> None:
        with pytest.raises(IngestError, match="another ingest is at work"):
            run(settings(*faces), tmp_path / "out")

    run(settings(*faces), tmp_path / "out", advance=another)


def test_a_name_that_a_tar_holds_twice_is_what_unpacking_would_leave(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for data in (b"old", b"new!"):
            info = tarfile.TarInfo("x/a.jpg")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    (photo,) = photos(Source(name="a", path=tmp_path / "a.tar"))  # type: ignore[arg-type]
    assert pipeline.reading.read([photo]) == [b"new!"]


# Detection


@pytest.mark.slow
def test_pictures_searched_together_are_searched_like_each_alone(faces: Pair) -> None:
    """Batched detection finds what single detection finds, in a hundredth of a pixel, also where there is nothing."""
    find = crops.DetectedFace()
    pictures: list[Any] = [picture(n) for n in range(3)] + [picture(0, (100, 10, 350, 240))]
    pictures.insert(1, np.full((256, 260, 3), 90, dtype=np.uint8))
    together = find(pictures)
    for pixels, landmarks in zip(pictures, together, strict=True):
        (alone,) = find([pixels])
        assert (alone is None) == (landmarks is None)
        if alone is not None and landmarks is not None:
            assert np.abs(alone.points - landmarks.points).max() < 0.01
    assert together[1] is None
    known = read_landmarks(faces[1])["Ada/Ada_0001.jpg"]
    assert known is not None and together[0] is not None
    assert np.abs(together[0].points - known.points).max() < 4  # found in the whole photo
