"""Copies of stored objects: verified, bounded, shared by processes, and never the reason why a run stops."""

from __future__ import annotations

import hashlib
import logging
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

import storage
from storage.base import Written
from storage.cache import Cache

SIZE = 1000


class Counting(storage.Folder):
    """A folder that knows what was fetched from it."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.fetched: list[str] = []

    def download(self, name: str, path: Path, *, sha256: str | None = None) -> Written:
        self.fetched.append(name)
        return super().download(name, path, sha256=sha256)


@pytest.fixture
def place(tmp_path: Path) -> Counting:
    place = Counting(tmp_path / "place")
    for number in range(6):
        place.write(str(number), bytes([number]) * SIZE)
    return place


def digest(number: int) -> str:
    return hashlib.sha256(bytes([number]) * SIZE).hexdigest()


def use(cache: Cache, place: storage.Prefix, number: int) -> bytes:
    with cache.open(place, str(number), sha256=digest(number), size=SIZE) as copy:
        return copy.read(10, 5)


def test_an_object_is_fetched_once_and_read_in_ranges(place: Counting, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    assert use(cache, place, 1) == use(cache, place, 1) == b"\1" * 5
    assert place.fetched == ["1"]
    assert use(Cache(tmp_path / "cache"), place, 1) == b"\1" * 5  # another process, or run
    assert place.fetched == ["1"]
    with cache.open(place, "1", sha256=digest(1), size=SIZE) as copy:
        assert copy.read(SIZE - 2, 10) == b"\1\1" and copy.size == SIZE


def test_it_stays_within_its_limit_and_evicts_what_was_unused_longest(place: Counting, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", limit=3 * SIZE)
    for number in (0, 1, 2, 0, 3):  # 1 has been unused longest when 3 comes
        use(cache, place, number)
        assert cache.bytes() <= 3 * SIZE
    place.fetched.clear()
    for number in (0, 2, 3):
        use(cache, place, number)
    assert place.fetched == []
    use(cache, place, 1)
    assert place.fetched == ["1"]


def test_what_is_in_use_is_never_evicted_and_what_finds_no_room_is_kept_in_memory(
    place: Counting, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = Cache(tmp_path / "cache", limit=2 * SIZE)
    with cache.open(place, "0", sha256=digest(0), size=SIZE), cache.open(place, "1", sha256=digest(1), size=SIZE):
        with cache.open(place, "2", sha256=digest(2), size=SIZE) as third:
            assert third.in_memory and third.read(0, 3) == b"\2" * 3
        assert "kept in memory" in caplog.text
        place.fetched.clear()
        use(cache, place, 0)
        use(cache, place, 1)
        assert place.fetched == []
    with cache.open(place, "2", sha256=digest(2), size=SIZE) as third:
        assert not third.in_memory


def test_a_broken_copy_is_fetched_again(place: Counting, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    use(Cache(tmp_path / "cache"), place, 1)
    (path,) = (tmp_path / "cache").glob("*.object")
    data = bytearray(path.read_bytes())
    data[500] ^= 1
    path.write_bytes(data)
    assert use(Cache(tmp_path / "cache"), place, 1) == b"\1" * 5
    assert place.fetched == ["1", "1"]
    assert "fetching it again" in caplog.text


def test_an_object_that_is_not_what_it_should_be_is_fetched_once_more_and_then_refused(
    place: Counting, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place.write("1", b"\1" * (SIZE - 1) + b"\2")
    with pytest.raises(storage.ChecksumMismatch, match=f"{place.url}/1 has sha256"):
        use(Cache(tmp_path / "cache"), place, 1)
    assert place.fetched == ["1", "1"]
    assert Cache(tmp_path / "cache").bytes() == 0


def test_threads_that_want_the_same_object_fetch_it_once(place: Counting, tmp_path: Path) -> None:
    cache, results = Cache(tmp_path / "cache"), []
    threads = [threading.Thread(target=lambda: results.append(use(cache, place, 4))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert results == [b"\4" * 5] * 8
    assert place.fetched == ["4"]


def test_processes_share_a_cache_that_is_too_small_for_all(
    place: Counting, tmp_path: Path, background: Callable[..., subprocess.Popen[bytes]]
) -> None:
    code = textwrap.dedent(
        """
        import hashlib, random, sys
        from pathlib import Path
        import storage
        from storage.cache import Cache
        place, cache = storage.open_prefix(sys.argv[1]), Cache(Path(sys.argv[2]), limit=3000)
        dice = random.Random(int(sys.argv[3]))
        for _ in range(300):
            n = dice.randrange(6)
            data = bytes([n]) * 1000
            with cache.open(place, str(n), sha256=hashlib.sha256(data).hexdigest(), size=1000) as copy:
                assert copy.read(0, 1000) == data
            assert cache.bytes() <= 3000
        print("sound")
        """
    )
    processes = [
        background([sys.executable, "-c", code, place.url, tmp_path / "cache", str(n)], log=tmp_path / f"{n}.log")
        for n in range(3)
    ]
    for number, process in enumerate(processes):
        assert process.wait(timeout=60) == 0, (tmp_path / f"{number}.log").read_text()


def test_the_room_of_a_process_that_was_killed_while_fetching_is_taken_back(place: Counting, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", limit=2 * SIZE)
    use(cache, place, 0)
    (tmp_path / "cache" / f"{digest(1)}.{SIZE}.part").write_bytes(b"half")
    (tmp_path / "cache" / f"{digest(1)}.lock").touch()
    os.utime(tmp_path / "cache" / f"{digest(1)}.{SIZE}.part", (0, 0))
    use(cache, place, 2)
    assert not list((tmp_path / "cache").glob("*.part"))
    place.fetched.clear()
    use(cache, place, 0)
    assert place.fetched == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"cannot mount a tmpfs here (not root?): {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_is_worked_around_and_said(
    small_disk: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place, size = Counting(tmp_path / "place"), 300_000
    objects = {str(n): os.urandom(size) for n in range(5)}
    for name, data in objects.items():
        place.write(name, data)
    cache = Cache(small_disk / "cache")
    with caplog.at_level(logging.WARNING):
        for _ in range(2):  # three fit; the others evict them
            for name, data in objects.items():
                with cache.open(place, name, sha256=hashlib.sha256(data).hexdigest(), size=size) as copy:
                    assert copy.read(0, size) == data and not copy.in_memory
    assert caplog.text == ""
    for path in (small_disk / "cache").glob("*.object"):
        path.unlink()
    with suppress(OSError), open(small_disk / "somebody else's", "wb", buffering=0) as file:
        while True:  # until the disk is full
            file.write(b"x" * 4096)
    for name, data in objects.items():
        with cache.open(place, name, sha256=hashlib.sha256(data).hexdigest(), size=size) as copy:
            assert copy.in_memory and copy.read(0, size) == data
    assert caplog.text.count("no room for 0 in the cache") == 1
