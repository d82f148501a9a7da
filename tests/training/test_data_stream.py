"""Shards read through the cache: the samples that memory gives, whatever the world, and clear errors."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import storage
from storage.cache import Cache
from tests.s3 import S3Server, s3_server
from tests.training.conftest import write_shards
from training import loop
from training.config import RunConfig
from training.data import Batches, FaceShards, ShardError, StreamedShards, open_faces

__all__ = ["s3_server"]

COUNTS = (7, 9, 8, 6, 10)


def write_many(folder: Path, counts: tuple[int, ...] = COUNTS, *, size: int = 32) -> Path:
    """Several shards of one split, and one of another; pictures tell their number."""
    folder.mkdir(parents=True)
    shards = []
    for number, count in enumerate(counts):
        write_shards(folder / str(number), {"train": count}, size=size)
        (record,) = json.loads((folder / str(number) / "manifest.json").read_text())["shards"]
        record["name"] = f"train-{number:06d}.tar"
        (folder / str(number) / "train-000000.tar").rename(folder / record["name"])
        (folder / str(number) / "manifest.json").unlink()
        (folder / str(number)).rmdir()
        shards.append(record)
    write_shards(folder / "val", {"val": 4}, size=size)
    (record,) = json.loads((folder / "val" / "manifest.json").read_text())["shards"]
    (folder / "val" / "val-000000.tar").rename(folder / "val-000000.tar")
    (folder / "val" / "manifest.json").unlink()
    (folder / "val").rmdir()
    (folder / "manifest.json").write_text(json.dumps({"crop_size": size, "shards": [*shards, record]}))
    return folder


def upload(folder: Path, url: str) -> storage.Prefix:
    place = storage.open_prefix(url, patience=60)
    for path in sorted(folder.glob("*.tar")):
        place.write(path.name, path)
    place.write("manifest.json", folder / "manifest.json")
    return place


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_many(tmp_path / "faces")


def stream(folder: Path, tmp_path: Path, **options: int) -> StreamedShards:
    place = storage.open_prefix(folder)
    return StreamedShards(place, "train", Cache(tmp_path / "cache"), **options)


def test_a_streamed_sample_is_the_one_in_memory(folder: Path, tmp_path: Path) -> None:
    memory, streamed = FaceShards(folder, "train"), stream(folder, tmp_path)
    assert len(memory) == len(streamed) == sum(COUNTS) and streamed.shards == len(COUNTS)
    assert (memory.identities, memory.digest, memory.crop_size) == (
        streamed.identities, streamed.digest, streamed.crop_size,
    )  # fmt: skip
    indices = np.random.default_rng(0).permutation(len(memory))
    with ThreadPoolExecutor(3) as pool:
        one, other = memory.decode(indices), streamed.decode(indices, pool)
    assert np.array_equal(one.images, other.images) and np.array_equal(one.identities, other.identities)
    few = stream(folder, tmp_path, limit=10)
    assert len(few) == 10 and np.array_equal(few.decode(np.arange(10)).images, memory.decode(np.arange(10)).images)


def test_the_labelled_samples_are_divided_and_complete(folder: Path, tmp_path: Path) -> None:
    def all_of(faces: FaceShards | StreamedShards, world: int) -> list[bytes]:
        found = []
        for rank in range(world):
            for batch in faces.labelled(lambda n, r=rank: slice(n * r // world, n * (r + 1) // world)):
                assert (batch.identities >= 0).all()
                found += [image.tobytes() for image in batch.images]
        return found

    expected = all_of(FaceShards(folder, "train"), 1)
    assert all_of(stream(folder, tmp_path), 1) == all_of(stream(folder, tmp_path), 3) == expected


def test_worlds_of_two_one_and_three_use_every_sample_of_every_epoch_once(folder: Path, tmp_path: Path) -> None:
    """Each rank is a reader of its own that begins where the others stopped; batches are those of one process."""
    batch, alone = 10, []
    with Batches(
        stream(folder, tmp_path, lanes=2, window=6), seed=5, nimg=0, size=batch, part=slice(0, batch)
    ) as whole:
        for _ in range(12):
            alone.append(next(whole)[0].tolist())
    nimg, used = 0, []
    for world, steps in ((2, 3), (1, 4), (3, 5)):
        ranks = [
            Batches(
                stream(folder, tmp_path, lanes=2, window=6), seed=5, nimg=nimg, size=batch,
                part=slice(batch * r // world, batch * (r + 1) // world),
            )
            for r in range(world)
        ]  # fmt: skip
        for _ in range(steps):
            used.append([i for rank in ranks for i in next(rank)[0].tolist()])
            nimg += batch
        for rank in ranks:
            rank.__exit__()
    assert used == alone
    flat = [i for indices in used for i in indices]
    for epoch in range(3):
        assert sorted(flat[40 * epoch : 40 * (epoch + 1)]) == list(range(40))
    assert flat[:40] != flat[40:80]


def test_a_batch_is_what_its_indices_say(folder: Path, tmp_path: Path) -> None:
    memory = FaceShards(folder, "train")
    with Batches(stream(folder, tmp_path), seed=1, nimg=100, size=6, part=slice(2, 5)) as batches:
        for _ in range(20):
            indices, batch = next(batches)
            assert np.array_equal(batch.images, memory.decode(indices).images)


def test_few_shards_are_held_and_the_files_of_others_are_closed(tmp_path: Path) -> None:
    folder = write_many(tmp_path / "faces", (4,) * 30, size=16)
    faces = stream(folder, tmp_path, lanes=1, window=4)
    descriptors = Path("/proc/self/fd")
    before = len(list(descriptors.iterdir()))
    with Batches(faces, seed=0, nimg=0, size=4, part=slice(0, 4), lookahead=8) as batches:
        for _ in range(60):
            next(batches)
    faces.close()
    assert len(faces._opened) == 0
    assert len(list(descriptors.iterdir())) <= before


@pytest.mark.parametrize("what", ["missing", "shorter", "no manifest", "not a manifest", "no sample"])
def test_what_is_wrong_at_the_start_is_said_at_the_start(folder: Path, tmp_path: Path, what: str) -> None:
    path, match = folder / "train-000002.tar", {
        "missing": "lists train-000002.tar, which is not in", "shorter": "train-000002.tar has .* bytes; its manifest",
        "no manifest": "no manifest.json in", "not a manifest": "is not a shard manifest", "no sample": "no sample",
    }[what]  # fmt: skip
    if what == "missing":
        path.unlink()
    elif what == "shorter":
        path.write_bytes(path.read_bytes()[:-512])
    elif what == "no manifest":
        (folder / "manifest.json").unlink()
    elif what == "not a manifest":
        (folder / "manifest.json").write_text('{"shards": 1}')
    with pytest.raises(ShardError, match=match):
        open_faces(folder, "test" if what == "no sample" else "train", cache=tmp_path / "cache", limit=40)


def test_a_flipped_byte_is_fetched_once_more_and_then_refused_by_name(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = folder / "train-000003.tar"
    data = bytearray(path.read_bytes())
    data[1500] ^= 1
    # With the identities in the manifest nothing is read before it is due.
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["identities"] = {"train": {"first": 0, "names": ["a", "b", "c", "d"]}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    path.write_bytes(data)
    faces = stream(folder, tmp_path)
    assert faces.identities == 4
    faces.decode(np.arange(20))
    with pytest.raises(ShardError, match=r"faces/train-000003\.tar is not what its manifest says, also when fetched"):
        faces.decode(np.arange(24, 30))
    assert caplog.text.count("fetching it once more") == 1
    with (
        Batches(faces, seed=0, nimg=0, size=40, part=slice(0, 40)) as batches,
        pytest.raises(ShardError, match="000003"),
    ):
        next(batches)


def test_a_shard_with_other_samples_than_its_manifest_says_is_refused(folder: Path, tmp_path: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["shards"][0]["samples"] = 8
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ShardError, match=r"train-000000\.tar holds 7 pictures and 7 labels; its manifest says 8"):
        stream(folder, tmp_path)


def test_a_folder_is_read_without_boto3(folder: Path, tmp_path: Path) -> None:
    code = textwrap.dedent(
        """
        import sys
        for name in ("boto3", "botocore", "yaml", "tenacity", "mlflow"):
            sys.modules[name] = None
        from pathlib import Path
        from training.data import open_faces
        import numpy as np
        for cache in (None, Path(sys.argv[2])):
            assert open_faces(sys.argv[1], "train", cache=cache).decode(np.arange(3)).images.shape == (3, 32, 32, 3)
        """
    )
    subprocess.run([sys.executable, "-c", code, str(folder), str(tmp_path / "cache")], check=True, timeout=60)


# S3


def test_a_server_that_stops_in_the_middle_is_waited_for_and_nothing_is_left_out(
    folder: Path, tmp_path: Path, s3_server: S3Server, caplog: pytest.LogCaptureFixture
) -> None:
    place = upload(folder, s3_server.prefix())
    faces = StreamedShards(place, "train", Cache(tmp_path / "cache"), lanes=1, window=4, limit=40)
    # A cache without room: every shard comes from the server when it is due.
    faces._cache = Cache(tmp_path / "none", limit=1)
    faces._opened.clear()
    faces._kept = 1
    memory, seen = FaceShards(folder, "train"), []
    batches = Batches(faces, seed=0, nimg=0, size=4, part=slice(0, 4), ahead=0, lookahead=0)
    with batches, ThreadPoolExecutor(1) as pool:
        seen.append(next(batches))
        s3_server.stop()
        waiting = pool.submit(lambda: [next(batches) for _ in range(9)])
        time.sleep(3)
        assert not waiting.done()
        s3_server.start()
        seen += waiting.result(timeout=60)
    assert sorted(i for indices, _ in seen for i in indices.tolist()) == list(range(40))
    for indices, batch in seen:
        assert np.array_equal(batch.images, memory.decode(indices).images)
    assert "trying again" in caplog.text


def test_training_reads_from_s3_what_it_reads_from_a_folder_through_a_cache(
    shards: Path, tiny: RunConfig, tmp_path: Path, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    place = upload(shards, s3_server.prefix())
    used: dict[str, list[list[int]]] = {"s3": [], "folder": []}
    for name, url, cache in (("s3", place.url, None), ("folder", str(shards), str(tmp_path / "own"))):
        data = tiny.data.model_copy(update={"shards": url})
        changes = {"name": name, "data": data, "cache": cache, "lanes": 2, "total_images": 6, "sample_every": 100}
        config = tiny.model_copy(update=changes)
        for stop in (4, None) if name == "s3" else (None,):  # interrupted, and not
            loop.train(config, stop_at=stop, on_batch=lambda _, indices, n=name: used[n].append(indices.tolist()))
    assert used["s3"] == used["folder"]
    assert len({i for indices in used["s3"] for i in indices}) == 6
    assert list((tmp_path / "home" / "mien" / "shards").glob("*.object"))
    weights = [(Path(tiny.runs) / name / "model" / "model.safetensors").read_bytes() for name in ("s3", "folder")]
    assert weights[0] == weights[1]


def test_credentials_bucket_and_endpoint_are_asked_for_at_the_start(
    s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    with pytest.raises(storage.NotFound, match="no bucket 'absent'"):
        open_faces("s3://absent/faces", "train", cache=cache)
    with pytest.raises(ShardError, match=r"no manifest\.json in s3://"):
        open_faces(s3_server.prefix(), "train", cache=cache)
    with monkeypatch.context() as patch:
        patch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
        with pytest.raises(storage.AccessDenied, match="refuses these credentials"):
            open_faces(s3_server.prefix(), "train", cache=cache)
    with monkeypatch.context() as patch:
        patch.delenv("AWS_ACCESS_KEY_ID")
        patch.delenv("AWS_SECRET_ACCESS_KEY")
        with pytest.raises(storage.NoCredentials):
            open_faces(s3_server.prefix(), "train", cache=cache)


def test_threads_share_a_reader(folder: Path, tmp_path: Path) -> None:
    faces, memory = stream(folder, tmp_path), FaceShards(folder, "train")
    faces._kept = 1  # every shard is opened again and again
    wrong: list[int] = []

    def work(seed: int) -> None:
        for _ in range(10):
            indices = np.random.default_rng(seed).integers(0, 40, 8)
            if not np.array_equal(faces.decode(indices).images, memory.decode(indices).images):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert wrong == []
