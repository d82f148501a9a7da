"""API keys and rate limits: who may ask, and how often.

A key file has a line ``NAME SHA256`` for every key: the name that logs say, and the hash of the key in hexadecimal.
Keys are made by ``python -m serving.keys NAME``; they have 256 random bits, so a plain hash protects them, and nothing
slower is needed. The file is read again when it changes (a Kubernetes secret, for one, is exchanged under its name).
"""

from __future__ import annotations

import hashlib
import re
import secrets
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

import structlog

from mien.errors import MienError
from serving import logs
from serving.problems import RateLimited, Unauthenticated
from serving.settings import Settings

_LINE: Final = re.compile(r"(?P<name>[A-Za-z0-9._-]{1,64})\s+(?P<digest>[0-9a-f]{64})")
_LOOK_EVERY: Final = 1.0
_MOST_CALLERS: Final = 10_000
# Of a minute's allowance, what may be used at once.
_BURST: Final = 1 / 4


class InvalidKeyFile(MienError):
    """The file of API keys cannot be read or has a line that is none."""


class KeyRing:
    """The keys of a file, by their hashes.

    Raises:
        InvalidKeyFile: when it is made; a file that becomes unusable later leaves the keys as they were.
    """

    def __init__(self, path: Path, log: structlog.typing.FilteringBoundLogger) -> None:
        self._path = path
        self._log = log
        self._lock = threading.Lock()
        self._looked = time.monotonic()
        self._stamp = _stamp(path)
        self._names = read(path)

    def owner(self, key: str) -> str | None:
        """The name of a key, None where there is no such key."""
        with self._lock:
            self._look()
            # Looked up by its hash, so that the time it takes says nothing about how much of a guess was right.
            return self._names.get(hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest())

    def _look(self) -> None:
        now = time.monotonic()
        if now - self._looked < _LOOK_EVERY:
            return
        self._looked = now
        try:
            stamp = _stamp(self._path)
            if stamp == self._stamp:
                return
            self._names, self._stamp = read(self._path), stamp
            self._log.info("api_keys_read", keys=len(self._names))
        except (InvalidKeyFile, OSError) as error:
            self._log.error("api_keys_unusable", **logs.describe(error))


def read(path: Path) -> Mapping[str, str]:
    """Names by hash.

    Raises:
        InvalidKeyFile: naming the line, and quoting nothing of it.
    """
    names: dict[str, str] = {}
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidKeyFile(f"cannot read the API keys in {path}: {type(error).__name__}") from None
    for number, line in enumerate(lines, 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            raise InvalidKeyFile(f"{path}, line {number}: expected NAME SHA256 (python -m serving.keys NAME makes one)")
        names[match["digest"]] = match["name"]
    if not names:
        raise InvalidKeyFile(f"{path} has no API key (python -m serving.keys NAME makes one)")
    return names


def _stamp(path: Path) -> tuple[int, int, int]:
    try:
        status = path.stat()
    except OSError as error:
        raise InvalidKeyFile(f"cannot read the API keys in {path}: {error.strerror}") from None
    return status.st_ino, status.st_mtime_ns, status.st_size


class Allowance:
    """A token bucket for each caller: ``per_minute`` on average, a quarter of it at once.

    Args:
        per_minute: 0 for any number.
        what: of what, for the message.
        clock: seconds.
    """

    def __init__(self, per_minute: int, what: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate = per_minute / 60
        self._most = max(1.0, per_minute * _BURST)
        self._what = what
        self._clock = clock
        self._lock = threading.Lock()
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, caller: str, count: int = 1) -> None:
        """Use some.

        Raises:
            RateLimited: there is not enough; nothing was used.
        """
        if not self._rate:
            return
        now = self._clock()
        with self._lock:
            left, then = self._left.pop(caller, (self._most, now))
            left = min(self._most, left + (now - then) * self._rate)
            # More at once than the bucket ever holds would wait for ever: it takes a full one.
            needed = min(float(count), self._most)
            enough = left >= needed
            self._left[caller] = (left - needed if enough else left, now)
            if len(self._left) > _MOST_CALLERS:
                self._left.popitem(last=False)
        if not enough:
            per_minute = round(self._rate * 60)
            raise RateLimited(
                f"At most {per_minute} {self._what} a minute are allowed.", retry_after=(needed - left) / self._rate
            )


class Gate:
    """What a request passes before anything else is done for it."""

    def __init__(self, settings: Settings, log: structlog.typing.FilteringBoundLogger) -> None:
        self._keys = KeyRing(settings.api_keys, log) if settings.api_keys is not None else None
        self._requests = Allowance(settings.requests_per_minute, "requests")
        self._recoveries = Allowance(settings.recoveries_per_minute, "passwords to recover with")

    def identify(self, authorization: str | None, peer: str) -> str:
        """The caller's name: of the key, or the address where keys are off.

        Args:
            authorization: ``Bearer KEY``.
            peer: the caller's address.

        Raises:
            Unauthenticated: keys are on and this is none.
        """
        if self._keys is None:
            return peer
        scheme, _, key = (authorization or "").partition(" ")
        name = self._keys.owner(key.strip()) if scheme.lower() == "bearer" and key else None
        if name is None:
            raise Unauthenticated("Send an API key: 'Authorization: Bearer KEY'.")
        return name

    @property
    def named(self) -> bool:
        """Whether callers are names of keys, rather than addresses."""
        return self._keys is not None

    def admit(self, caller: str) -> None:
        """Count a request.

        Raises:
            RateLimited: too many of this caller's.
        """
        self._requests.take(caller)

    def try_passwords(self, caller: str, count: int) -> None:
        """Count passwords that recover will try: guessing is what the stricter limit is against.

        Raises:
            RateLimited: too many of this caller's.
        """
        self._recoveries.take(caller, count)


def main() -> None:
    """Make a key: it goes to its owner, and its line into the file."""
    if len(sys.argv) != 2 or not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", sys.argv[1]):
        sys.exit("usage: python -m serving.keys NAME   (letters, digits, dot, dash and underscore)")
    key = f"mien_{secrets.token_urlsafe(32)}"
    sys.stderr.write(f"The key, shown this once: {key}\nThe line for the file of MIEN_API_KEYS:\n")
    sys.stdout.write(f"{sys.argv[1]} {hashlib.sha256(key.encode()).hexdigest()}\n")


if __name__ == "__main__":
    main()
