"""What the process forbids itself."""

from __future__ import annotations

import ctypes
import ipaddress
import os
import resource
import signal
import sys
from contextlib import suppress
from typing import Final

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_DUMPABLE: Final = 4

_SUPERVISOR: Final = "MIEN_SUPERVISOR_PID"


def forbid_core_dumps() -> None:
    """No core file of this process, which would hold passwords and faces.

    The limit of 0 stops the kernel from writing one; a handler that ``core_pattern`` pipes to ignores limits, so the
    process is marked as not dumpable too, which also keeps other processes of the same user from reading its memory.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        with suppress(OSError):
            ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


def be_supervisor() -> None:
    """Tell the workers that this process will start whose end is theirs too; see :func:`end_with_supervisor`."""
    os.environ[_SUPERVISOR] = str(os.getpid())


def end_with_supervisor() -> None:
    """Linux: this process is told to end (SIGTERM, so it drains) when its supervisor is gone, by SIGKILL too.

    A worker that outlived its supervisor would keep the port and serve what nobody looks after. To be called on the
    main thread: the wish is the calling thread's and ends with it. A process that no supervisor started is left alone.
    """
    supervisor = os.environ.get(_SUPERVISOR)
    if supervisor is None or sys.platform != "linux":
        return
    with suppress(OSError):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    # It may have ended before the kernel was asked, which then has nothing left to tell.
    if os.getppid() != int(supervisor):
        os.kill(os.getpid(), signal.SIGTERM)


def is_local(host: str) -> bool:
    """Whether only this machine reaches what is bound to an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
