"""Folders and S3 keep the same promises."""

from __future__ import annotations

import hashlib
import os
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import storage
from storage import s3
from storage.base import Prefix
from storage.local_s3 import free_ports
from tests.s3 import BUCKET, S3Server, s3_server

__all__ = ["s3_server"]


@pytest.fixture(params=["folder", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Prefix:
    if request.param == "folder":
        return storage.open_prefix(tmp_path / "place")
    server: S3Server = request.getfixturevalue("s3_server")
    return storage.open_prefix(f"{server.prefix()}/some/place", patience=20)


def test_what_is_written_is_read_whole_in_ranges_and_to_a_file(place: Prefix, tmp_path: Path) -> None:
    data = os.urandom(100_000)
    place.check()
    written = place.write("a/b.bin", data)
    assert written == storage.Written(len(data), hashlib.sha256(data).hexdigest())
    assert place.read("a/b.bin") == place.read("a/b.bin", sha256=written.sha256) == data
    assert place.read("a/b.bin", start=512, length=1000) == data[512:1512]
    assert place.read("a/b.bin", start=99_000) == data[99_000:]
    assert place.read("a/b.bin", start=99_999, length=50) == data[-1:]
    assert place.read("a/b.bin", start=100_000, length=1) == b""
    assert place.size("a/b.bin") == len(data)
    assert place.download("a/b.bin", tmp_path / "copy", sha256=written.sha256) == written
    assert (tmp_path / "copy").read_bytes() == data
    assert place.write("a/b.bin", tmp_path / "copy") == written
    place.write("empty", b"")
    assert place.read("empty") == b""


def test_names_are_listed_in_order_and_deleted(place: Prefix) -> None:
    assert list(place.list()) == []
    for name in ("b", "a/2", "a/1", "c.json"):
        place.write(name, name.encode())
    assert [entry.name for entry in place.list()] == ["a/1", "a/2", "b", "c.json"]
    assert [(entry.name, entry.size) for entry in place.list("a/")] == [("a/1", 3), ("a/2", 3)]
    assert place.exists("b") and not place.exists("a") and not place.exists("z")
    place.delete("b")
    place.delete("b")
    assert not place.exists("b")
    for call in (place.read, place.size):
        with pytest.raises(storage.NotFound, match=r"place/b\b"):
            call("b")


def test_other_bytes_than_expected_are_refused(place: Prefix, tmp_path: Path) -> None:
    place.write("x", b"one thing")
    other = hashlib.sha256(b"another").hexdigest()
    with pytest.raises(storage.ChecksumMismatch, match=r"place/x has sha256"):
        place.read("x", sha256=other)
    with pytest.raises(storage.ChecksumMismatch, match=r"place/x has sha256"):
        place.download("x", tmp_path / "x", sha256=other)


@pytest.mark.parametrize("name", ["", "/etc/passwd", "../x", "a/../../x", "a//b", "./a", "a/"])
def test_a_name_cannot_leave_its_prefix(place: Prefix, name: str) -> None:
    for call in (place.read, place.exists, place.delete, lambda name: place.write(name, b"")):
        with pytest.raises(storage.StorageError, match="not a relative name"):
            call(name)


def test_a_place_goes_to_another_process(place: Prefix) -> None:
    place.write("x", b"x")
    assert pickle.loads(pickle.dumps(place)).read("x") == b"x"


def test_a_place_serves_several_threads(place: Prefix) -> None:
    def work(number: int) -> None:
        place.write(f"n/{number}", str(number).encode() * 1000)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert {entry.name: place.read(entry.name) for entry in place.list("n/")} == {
        f"n/{n}": str(n).encode() * 1000 for n in range(8)
    }


def test_only_known_schemes_are_opened(tmp_path: Path) -> None:
    with pytest.raises(storage.StorageError, match="not gs://"):
        storage.open_prefix("gs://bucket/x")
    with pytest.raises(storage.StorageError, match="expected s3://bucket"):
        storage.open_prefix("s3:///x")
    assert storage.open_prefix(f"file://{tmp_path}/x").url == f"{tmp_path}/x"


# Folders


def test_a_folder_shows_nothing_of_a_write_that_failed(tmp_path: Path) -> None:
    place = storage.open_prefix(tmp_path)
    place.write("x", b"old")
    with pytest.raises(storage.NotFound):
        place.write("x", tmp_path / "absent")
    assert place.read("x") == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_an_unfinished_write_of_a_killed_process_is_not_listed(tmp_path: Path) -> None:
    (tmp_path / ".x.99-1.tmp").write_bytes(b"half")
    assert list(storage.open_prefix(tmp_path).list()) == []


def test_a_folder_that_cannot_be_one_is_said_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(storage.StorageError, match="is a file"):
        storage.open_prefix(tmp_path / "file" / "x").check()
    storage.open_prefix(tmp_path / "not" / "yet").check()


# S3


def test_large_objects_travel_in_parts_and_ranges(
    s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "_PART", 5 << 20)  # the least S3 allows
    monkeypatch.setattr(s3, "_RANGE", 1 << 20)
    place = storage.open_prefix(s3_server.prefix(), patience=20)
    data = os.urandom(12_345_678)
    (tmp_path / "source").write_bytes(data)
    written = place.write("big", tmp_path / "source")
    assert place.write("same", data) == written
    assert place.read("big") == data
    place.download("same", tmp_path / "copy", sha256=written.sha256)
    assert (tmp_path / "copy").read_bytes() == data
    assert place.read("big", start=(1 << 20) - 5, length=10) == data[(1 << 20) - 5 : (1 << 20) + 5]


def test_an_object_changed_behind_its_metadata_is_refused(s3_server: S3Server, tmp_path: Path) -> None:
    client: Any = s3_server.client()
    url = s3_server.prefix()
    key = url.removeprefix(f"s3://{BUCKET}/")
    place = storage.open_prefix(url, patience=5)
    written = place.write("a", b"true bytes")
    client.put_object(Bucket=BUCKET, Key=f"{key}/a", Body=b"True bytes", Metadata={"sha256": written.sha256})
    with pytest.raises(storage.ChecksumMismatch):
        place.read("a")
    with pytest.raises(storage.ChecksumMismatch):
        place.download("a", tmp_path / "a")


def test_a_server_that_is_away_for_a_while_is_waited_for(s3_server: S3Server) -> None:
    place = storage.open_prefix(s3_server.prefix(), patience=60)
    place.write("a", b"a")
    s3_server.stop()
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(place.read, "a")
        time.sleep(2)
        assert not reading.done()
        s3_server.start()
        assert reading.result(timeout=60) == b"a"
    place.write("b", b"b")
    assert place.read("b") == b"b"


def test_missing_buckets_credentials_and_endpoints_are_told_apart(
    s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = s3_server.prefix()
    with pytest.raises(storage.NotFound, match="no bucket 'absent' at http"):
        storage.open_prefix("s3://absent/x").check()
    with monkeypatch.context() as patch:
        patch.setenv("AWS_SECRET_ACCESS_KEY", "guessed")
        with pytest.raises(storage.AccessDenied, match="refuses these credentials"):
            storage.open_prefix(url).check()
    with monkeypatch.context() as patch:
        patch.delenv("AWS_ACCESS_KEY_ID")
        patch.delenv("AWS_SECRET_ACCESS_KEY")
        with pytest.raises(storage.NoCredentials, match="set AWS_ACCESS_KEY_ID"):
            storage.open_prefix(url).check()
    with monkeypatch.context() as patch:
        (port,) = free_ports(1)
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        began = time.monotonic()
        with pytest.raises(storage.Unreachable, match=f"nothing answers at http://127.0.0.1:{port}"):
            storage.open_prefix(url, patience=2).check()
        assert time.monotonic() - began < 15
        patch.setenv("AWS_ENDPOINT_URL", "not a url")
        with pytest.raises(storage.Unreachable, match="see AWS_ENDPOINT_URL"):
            storage.open_prefix(url).check()
