"""Passwords, and the codes that condition the network.

A *password* is what a person types: any Unicode string. A *code* is the N bits the network is conditioned on
(bool ``[N]``; paper, section 3.1: p in {0,1}^N, N = 16). The code is derived with Argon2id (RFC 9106) from the password
and a public *realm*, so that one password gives one code everywhere in a deployment and nothing needs to be stored.

What a memory-hard KDF does not help with: a code has only N bits, so who holds the model can try all 2^N codes
without guessing a single password.
"""

from __future__ import annotations

import hashlib
import mmap
import threading
import unicodedata
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from mien.errors import InvalidPassword

Code = NDArray[np.bool_]

DEFAULT_REALM: Final = "mien"
MAX_PASSWORD_CHARACTERS: Final = 1024

# RFC 9106, section 4, second recommended option: 3 passes over 64 MiB in 4 lanes.
_TIME_COST: Final = 3
_MEMORY_KIB: Final = 64 * 1024
_PARALLELISM: Final = 4
# ARGON2_FLAG_CLEAR_PASSWORD: its copy of the password is wiped, too.
_CLEAR_PASSWORD: Final = 1


class Workspace:
    """The 64 MiB that a derivation fills, kept for the next one; for who derives all day.

    Fresh memory is a quarter of what a derivation takes of the processor: the system clears 16,384 pages, each when it
    is first touched, and takes them back. Argon2 wipes what it filled before it returns, so nothing of a password
    stays; and the pages are left out of core dumps. One derivation at a time: others wait.
    """

    def __init__(self) -> None:
        from argon2.low_level import ffi

        self._lock = threading.Lock()
        self._memory = mmap.mmap(-1, _MEMORY_KIB * 1024)
        for advice in ("MADV_HUGEPAGE", "MADV_DONTDUMP"):
            with suppress(AttributeError, OSError):  # where the system has no such thing
                self._memory.madvise(getattr(mmap, advice))
        # Held, because Argon2 calls them by address.
        block = ffi.from_buffer("uint8_t[]", self._memory)

        def allocate(place: Any, count: int) -> int:
            if count > len(block):
                return 1
            place[0] = block
            return 0

        self._allocate: Any = ffi.callback("int(uint8_t **, size_t)", allocate, error=1)
        self._free: Any = ffi.callback("void(uint8_t *, size_t)", lambda place, count: None)

    def derive(self, secret: bytes, salt: bytes, length: int, threads: int) -> bytes:
        """What ``hash_secret_raw`` of argon2-cffi gives with the parameters of :func:`derive_code`.

        Raises:
            HashingError: no thread could be started.
        """
        from argon2.exceptions import HashingError
        from argon2.low_level import ARGON2_VERSION, Type, core, error_to_str, ffi

        out = ffi.new("uint8_t[]", length)
        held = ffi.new("uint8_t[]", secret), ffi.new("uint8_t[]", salt)
        context = ffi.new("argon2_context *")
        context.version = ARGON2_VERSION
        context.out, context.outlen = out, length
        context.pwd, context.pwdlen = held[0], len(secret)
        context.salt, context.saltlen = held[1], len(salt)
        context.t_cost, context.m_cost = _TIME_COST, _MEMORY_KIB
        context.lanes, context.threads = _PARALLELISM, min(threads, _PARALLELISM)
        context.allocate_cbk, context.free_cbk = self._allocate, self._free
        context.flags = _CLEAR_PASSWORD
        with self._lock:
            status = core(context, Type.ID.value)
        if status:
            raise HashingError(error_to_str(status))
        return bytes(ffi.buffer(out))


def derive_code(
    password: str,
    *,
    realm: str = DEFAULT_REALM,
    bits: int = 16,
    workspace: Workspace | None = None,
    threads: int = _PARALLELISM,
) -> Code:
    """Derive the code of a password.

    The password is normalised (NFKC) first, so that the same characters typed on different keyboards agree. ``bits``
    is part of the derivation: codes of different lengths from one password are unrelated.

    Args:
        password: 1 to 1024 characters, any Unicode.
        realm: public name of the deployment; the salt is derived from it.
        bits: N, a positive multiple of 4 (the password predictor reads 4 bits a head; paper, eq. 18).
        workspace: memory to derive in; fresh one otherwise. The code is the same.
        threads: that compute the four lanes in a workspace, 1 to 4. They make the time, and not the code.

    Returns:
        bool ``[bits]``.

    Raises:
        InvalidPassword: the password is empty, too long or not encodable.
        ValueError: ``bits`` is not a positive multiple of 4.
    """
    from argon2.low_level import Type, hash_secret_raw

    check_bits(bits)
    secret = _normalise(password)
    salt = hashlib.sha256(f"mien/code/v1\0{realm}\0{bits}".encode()).digest()[:16]
    length = max(4, (bits + 7) // 8)
    raw = (
        workspace.derive(secret, salt, length, threads)
        if workspace is not None
        else hash_secret_raw(secret, salt, _TIME_COST, _MEMORY_KIB, _PARALLELISM, length, Type.ID)
    )
    return np.unpackbits(np.frombuffer(raw, dtype=np.uint8))[:bits].astype(np.bool_)


def check_password(password: str) -> None:
    """Raise :class:`~mien.errors.InvalidPassword` where :func:`derive_code` would, without the cost of deriving."""
    _normalise(password)


def _normalise(password: str) -> bytes:
    if not isinstance(password, str) or not password:
        raise InvalidPassword("The password is empty. Give at least one character.")
    if len(password) > MAX_PASSWORD_CHARACTERS:
        raise InvalidPassword(f"The password is longer than {MAX_PASSWORD_CHARACTERS} characters.")
    try:
        return unicodedata.normalize("NFKC", password).encode("utf-8")
    except UnicodeEncodeError:
        # `from None`: the chained error's message would quote part of the password.
        raise InvalidPassword("The password is not valid Unicode text.") from None


def check_bits(bits: int) -> None:
    """Raise ``ValueError`` unless ``bits`` is a positive multiple of 4."""
    if bits <= 0 or bits % 4:
        raise ValueError(f"a code has a positive multiple of 4 bits, not {bits}")


def inverse(code: Code) -> Code:
    """The code that recovers: every bit flipped (paper, eq. 2: -p for p in {-1/2, 1/2}^N)."""
    return np.logical_not(code)


def hamming_distance(a: Code, b: Code) -> int:
    """Number of differing bits; raises ``ValueError`` where the lengths differ."""
    if a.shape != b.shape:
        raise ValueError(f"codes of different lengths: {a.shape} and {b.shape}")
    return int(np.count_nonzero(a != b))


def parse_code(text: str, *, bits: int | None = None) -> Code:
    """Read a raw code, for research: ``"0110..."``, most significant bit first, N characters.

    Raises:
        InvalidPassword: other characters than 0 and 1, or another length than ``bits``.
    """
    text = text.strip()
    if not text or set(text) - {"0", "1"}:
        raise InvalidPassword("A raw code is written with the characters 0 and 1 only.")
    if bits is not None and len(text) != bits:
        raise InvalidPassword(f"This model takes codes of {bits} bits; the one given has {len(text)}.")
    return np.array([c == "1" for c in text], dtype=np.bool_)


def format_code(code: Iterable[bool]) -> str:
    """The inverse of :func:`parse_code`."""
    return "".join("1" if bit else "0" for bit in code)


def random_codes(count: int, bits: int, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Uniform codes, bool ``[count, bits]``."""
    return rng.integers(0, 2, size=(count, bits)).astype(np.bool_)


def flip_bits(code: Code, count: int, rng: np.random.Generator) -> Code:
    """A code at Hamming distance exactly ``count``: a near-miss password.

    Raises:
        ValueError: ``count`` is negative or larger than the code.
    """
    if not 0 <= count <= code.size:
        raise ValueError(f"cannot flip {count} of {code.size} bits")
    out = code.copy()
    out[rng.choice(code.size, size=count, replace=False)] ^= True
    return out
