"""What goes wrong with the data while a run is under way: each does what docs/data.md says, and nothing is skipped."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

import storage
from storage.cache import Cache
from storage.local_s3 import free_ports
from tests.s3 import S3Server, s3_server
from tests.training.test_data_stream import upload, write_many
from training import __main__ as command
from training import loop
from training.config import RunConfig
from training.data import Batches, FaceShards, ShardError, StreamedShards, open_faces

__all__ = ["s3_server"]

COUNTS = (5, 3, 10, 6, 8, 4)  # all different: the cache knows shards by their bytes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_many(tmp_path_factory.mktemp("data") / "faces", COUNTS, size=64)


@pytest.fixture
def place(folder: Path, s3_server: S3Server) -> storage.Prefix:
    return upload(folder, s3_server.prefix())


def little_by_little(place: storage.Prefix, cache: Cache) -> StreamedShards:
    """Two shards at hand at a time, and none asked for before it is due: what fails, fails in the middle."""
    faces = StreamedShards(place, "train", cache, lanes=1, window=6, limit=sum(COUNTS))
    faces._opened.clear()
    faces._kept = 2
    return faces


def epoch(faces: StreamedShards, seen: list[int], size: int = 3) -> None:
    """One epoch, the samples used noted as they come."""
    part = slice(0, size)
    with Batches(faces, seed=0, nimg=0, size=size, part=part, ahead=0, lookahead=0) as batches:
        for _ in range(len(faces) // size):
            seen += next(batches)[0].tolist()


def flip(place: storage.Prefix, name: str) -> None:
    data = bytearray(place.read(name))
    data[1500] ^= 1
    place.write(name, bytes(data))


def emptied(tmp_path: Path, name: str = "cache") -> Cache:
    """A cache in which nothing finds room: what is not at hand comes from the store."""
    return Cache(tmp_path / name, limit=1)


@pytest.mark.parametrize("what", ["gone", "flipped"])
def test_a_shard_that_breaks_under_way_stops_the_run_by_name_and_what_came_before_was_right(
    what: str, place: storage.Prefix, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    faces = little_by_little(place, emptied(tmp_path))
    if what == "gone":
        place.delete("train-000003.tar")
    else:
        flip(place, "train-000003.tar")
    seen: list[int] = []
    with pytest.raises(ShardError, match=r"train-000003\.tar is .*" + ("gone" if what == "gone" else "when fetched")):
        epoch(faces, seen)
    assert not set(seen) & set(range(18, 24)) and len(seen) == len(set(seen))
    if what == "flipped":
        assert "fetching it once more" in caplog.text


def test_the_command_ends_with_1_and_one_line_that_names_the_shard(
    place: storage.Prefix,
    tiny: RunConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flip(place, "train-000001.tar")
    config = tiny.model_copy(
        update={"data": tiny.data.model_copy(update={"shards": place.url}), "cache": str(tmp_path)}
    )
    path = tmp_path / "config.json"
    path.write_text(config.model_dump_json())
    monkeypatch.setattr("sys.argv", ["training", "--config", str(path)])
    assert command.main() == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"training: {place.url}/train-000001.tar is not what its manifest says")


def _waits(place: storage.Prefix, server: S3Server, cache: Cache, away: float) -> None:
    faces, seen = little_by_little(place, cache), list[int]()
    with ThreadPoolExecutor(1) as pool:
        server.stop()
        reading = pool.submit(epoch, faces, seen)
        time.sleep(away)
        assert not reading.done()
        server.start()
        reading.result(timeout=120)
    assert sorted(seen) == list(range(sum(COUNTS)))


def test_a_store_that_is_away_for_seconds_is_waited_for(
    place: storage.Prefix, s3_server: S3Server, tmp_path: Path
) -> None:
    _waits(place, s3_server, emptied(tmp_path), away=2)


@pytest.mark.soak
def test_a_store_that_is_away_for_a_minute_is_waited_for(folder: Path, s3_server: S3Server, tmp_path: Path) -> None:
    upload(folder, url := s3_server.prefix())
    _waits(storage.open_prefix(url, patience=300), s3_server, emptied(tmp_path), away=60)


def test_a_store_that_stays_away_is_given_up_after_the_patience(
    folder: Path, s3_server: S3Server, tmp_path: Path
) -> None:
    upload(folder, url := s3_server.prefix())
    faces, seen = little_by_little(storage.open_prefix(url, patience=2), emptied(tmp_path)), list[int]()
    s3_server.stop()
    try:
        began = time.monotonic()
        with pytest.raises(storage.Unreachable, match=r"nothing answers at http.*AWS_ENDPOINT_URL"):
            epoch(faces, seen)
        assert time.monotonic() - began < 60
    finally:
        s3_server.start()


def test_a_wrong_endpoint_is_said_at_the_start(
    place: storage.Prefix, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_ports(1)[0]}")
    began = time.monotonic()
    with pytest.raises(storage.Unreachable, match="nothing answers at http://127"):
        open_faces(place.url, "train", cache=tmp_path, patience=3)
    assert time.monotonic() - began < 60


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"cannot mount a tmpfs here (not root?): {done.stderr.strip()}")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_on_a_full_disk_training_goes_on_from_memory_says_so_and_ends_with_the_same_weights(
    folder: Path,
    place: storage.Prefix,
    tiny: RunConfig,
    small_disk: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with suppress(OSError), open(small_disk / "somebody else's", "wb", buffering=0) as file:
        while True:
            file.write(b"x" * 4096)
    weights = []
    for name, cache in (("full", small_disk / "cache"), ("room", tmp_path / "room")):
        data = tiny.data.model_copy(update={"shards": place.url})
        changes = {"name": name, "data": data, "cache": str(cache), "total_images": 4, "sample_every": 100}
        loop.train(tiny.model_copy(update=changes))
        weights.append((Path(tiny.runs) / name / "model" / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]
    assert caplog.text.count("kept in memory") >= 1
    assert not list(small_disk.rglob("*.object"))


def test_more_processes_than_shards_share_them(folder: Path, tmp_path: Path) -> None:
    """No error, on purpose: nobody runs dry and nobody waits, see training/order.py."""
    place, seen = storage.open_prefix(folder), []
    memory = FaceShards(folder, "train")
    for rank in range(9):
        faces = StreamedShards(place, "train", Cache(tmp_path / str(rank)), lanes=9)
        with Batches(faces, seed=0, nimg=0, size=18, part=slice(2 * rank, 2 * rank + 2)) as batches:
            for _ in range(2):
                indices, batch = next(batches)
                assert np.array_equal(batch.images, memory.decode(indices).images)
                seen += indices.tolist()
        faces.close()
    assert sorted(seen) == list(range(sum(COUNTS)))


def test_fewer_samples_in_a_batch_than_processes_is_refused_at_the_start(tiny: RunConfig) -> None:
    with pytest.raises(ValueError, match="cannot be divided over 1 processes and 4"):
        loop.train(tiny.model_copy(update={"accumulate": 4}))


def test_a_cache_folder_that_cannot_be_written_is_an_error_that_names_it(place: storage.Prefix, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(storage.StorageError, match=f"the cache {os.fspath(tmp_path)}/file/cache cannot"):
        open_faces(place.url, "train", cache=tmp_path / "file" / "cache", limit=6).decode(np.arange(3))
