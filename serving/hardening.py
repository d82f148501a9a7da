"""What the process forbids itself."""

from __future__ import annotations

import ctypes
import ipaddress
import resource
import sys
from contextlib import suppress

_PR_SET_DUMPABLE = 4


def forbid_core_dumps() -> None:
    """No core file of this process, which would hold passwords and faces.

    The limit of 0 stops the kernel from writing one; a handler that ``core_pattern`` pipes to ignores limits, so the
    process is marked as not dumpable too, which also keeps other processes of the same user from reading its memory.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        with suppress(OSError):
            ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


def is_local(host: str) -> bool:
    """Whether only this machine reaches what is bound to an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
