"""Memory that is free goes back: serving.memory."""

from __future__ import annotations

import ctypes
import gc
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import pytest

from serving.memory import Trimmer, set_aside


def resident() -> int:
    """MiB of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 >> 20


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="the C library is not glibc")
def test_holes_that_a_thread_leaves_go_back_to_the_system() -> None:
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = (
        ctypes.c_void_p,
        [ctypes.c_size_t],
        [ctypes.c_void_p],
    )
    done, end = threading.Event(), threading.Event()

    def work() -> None:
        # 64 MiB in pieces that an arena holds, all but the last freed: only trimming gives back what lies below it.
        pieces = [libc.malloc(64 << 10) for _ in range(1024)]
        for piece in pieces:
            ctypes.memset(piece, 1, 64 << 10)
        for piece in pieces[:-1]:
            libc.free(piece)
        done.set()
        end.wait(30)
        libc.free(pieces[-1])

    worker = threading.Thread(target=work)
    worker.start()
    assert done.wait(30)
    before = resident()
    trimmer = Trimmer(seconds=0.05)
    trimmer.start()
    deadline = time.monotonic() + 20
    while resident() > before - 32 and time.monotonic() < deadline:
        time.sleep(0.05)
    after = resident()
    trimmer.close()
    end.set()
    worker.join()
    assert after <= before - 32
    assert not any(thread.name == "mien-memory" for thread in threading.enumerate())


class Loop:
    """Refers to itself, as an exception does that somebody kept."""

    def __init__(self) -> None:
        self.itself = self


def test_what_refers_to_itself_is_collected_and_what_stays_is_looked_at_no_more() -> None:
    staying = Loop()
    set_aside()
    try:
        assert gc.get_freeze_count() > 1000
        assert not any(thing is staying for thing in gc.get_objects())
        gone = weakref.ref(Loop())
        assert gone() is not None  # nobody has it, and it is there
        trimmer = Trimmer(seconds=0.05)
        trimmer.start()
        deadline = time.monotonic() + 20
        while gone() is not None and time.monotonic() < deadline:
            time.sleep(0.05)
        trimmer.close()
        assert gone() is None
        # A model that has been exchanged is among what was set aside, and goes all the same.
        old, staying = weakref.ref(staying), Loop()
        set_aside()
        assert old() is None
    finally:
        gc.unfreeze()


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc")
def test_large_tensors_of_a_thread_are_not_new_pages_each_time() -> None:
    """In a process of its own: the parameters are the process's."""
    code = """
import resource, threading, torch
from serving.memory import one_arena
one_arena()
def work():
    def faults():
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for n in range(4):
        before = faults()
        held = [torch.ones(4 << 20) for _ in range(4)]  # 16 MiB each
        del held
        last = faults() - before
    print(last)
thread = threading.Thread(target=work)
thread.start()
thread.join()
"""
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1000  # 64 MiB are 16,384 pages
