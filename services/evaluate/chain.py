"""Every face under its own codes: anonymized, recovered, wrongly recovered; as files, made when they are asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from mien import passwords
from services.evaluate import files
from services.evaluate.distances import Floats, Pixels
from services.evaluate.judges import Judge
from services.evaluate.progress import Progress

Codes = NDArray[np.bool_]

NEAR: Final = (1, 2, 4)
_BATCH: Final = 32

# kind -> (made from, code): T of the one under the other.
_MADE: Final = {
    "A": ("I", "first"),
    "A2": ("I", "second"),
    "R": ("A", "right"),
    "WR": ("A", "wrong"),
    "WR2": ("A", "other wrong"),
    **{f"WR-{n}bit": ("A", f"near {n}") for n in NEAR},
}


@dataclass(frozen=True)
class Subject:
    """What is judged: ``transform(uint8 [B, S, S, 3], bool [B, N]) -> uint8`` and, where it has one, its float twin."""

    transform: Callable[[Pixels, Codes], Pixels]
    bits: int
    digest: str = ""
    transform_float: Callable[[Any, Codes], Any] | None = None
    architecture: str = ""


class Chain:
    """The kinds of picture of some faces, each uint8 ``[M, S, S, 3]``, memoised.

    Kinds: I, A, A2 (another code), R, WR, WR2, WR-1bit, WR-2bit, WR-4bit (wrong by so many bits). ``A@jpeg75`` is A
    through that file, ``R@jpeg75`` what is recovered from it. Without an ``@`` the file is a PNG.

    Args:
        cache: folder for embeddings, so that a run that was cut off need not make them again.
    """

    def __init__(
        self, subject: Subject, images: Pixels, *, seed: int, progress: Progress, cache: Path | None = None
    ) -> None:
        self.subject, self.images, self.progress, self.cache = subject, images, progress, cache
        self.codes = draw_codes(len(images), subject.bits, seed)
        self._made: dict[str, Pixels] = {"I": images}
        self._embedded: dict[tuple[str, str], Floats] = {}

    def __call__(self, kind: str, limit: int | None = None) -> Pixels:
        """The pictures of a kind, of the first ``limit`` faces alone where that is given."""
        count = len(self.images) if limit is None else min(limit, len(self.images))
        if kind in self._made and len(self._made[kind]) >= count:
            return self._made[kind][:count]
        base, _, codec = kind.partition("@")
        if base in ("I", "A", "A2") and codec:
            out = files.save(self(base, count), codec)
        else:
            parent, code = _MADE[base]
            before = self(f"{parent}@{codec}" if codec else parent, count)
            out = np.empty_like(before)
            with self.progress.stage(f"making {kind}", count) as advance:
                for start in range(0, count, _BATCH):
                    part = slice(start, min(start + _BATCH, count))
                    out[part] = files.save(self.subject.transform(before[part], self.codes[code][part]))
                    advance(part.stop - start)
        self._made[kind] = out
        return out

    def embeddings(self, judge: Judge, kind: str, limit: int | None = None) -> Floats:
        """Unit embeddings float ``[M, D]`` of a kind by a judge."""
        count = len(self.images) if limit is None else min(limit, len(self.images))
        known = self._embedded.get((judge.name, kind))
        if known is not None and len(known) >= count:
            return known[:count]
        return self.embed(judge, kind, lambda: self(kind, count), count)

    def embed_pictures(self, judge: Judge, pictures: Pixels, what: str) -> Floats:
        """Unit embeddings of pictures that are there already: kept by what they show, so never those of older ones."""
        content = hashlib.sha256(pictures.tobytes()).hexdigest()[:16]
        return self.embed(judge, f"{what}-{content}".replace(" ", "-"), lambda: pictures, len(pictures))

    def embed(self, judge: Judge, name: str, pictures: Callable[[], Pixels], count: int) -> Floats:
        """Unit embeddings of ``count`` pictures, which are only made where neither memory nor the folder has them."""
        key = (judge.name, name)
        known = self._embedded.get(key)
        if known is not None and len(known) == count:
            return known
        file = self.cache / f"{judge.name}-{name}-{count}.npy" if self.cache else None
        if file is not None and file.exists():
            self._embedded[key] = np.load(file, allow_pickle=False)
            return self._embedded[key]
        pixels = pictures()
        with self.progress.stage(f"{judge.name} looks at {name}", count) as advance:
            self._embedded[key] = judge.embed(pixels, advance)
        if file is not None:
            save_array(file, self._embedded[key])
        return self._embedded[key]


def draw_codes(count: int, bits: int, seed: int) -> dict[str, Codes]:
    """Codes of every face, bool ``[count, bits]`` by name; wrong ones are never right, pairs never equal."""
    rng = np.random.default_rng([seed, 1])
    first, second, wrong, other = (passwords.random_codes(count, bits, rng) for _ in range(4))
    right = ~first
    for code, others in ((second, (first,)), (wrong, (right,)), (other, (right, wrong))):
        for avoid in others:
            same = (code == avoid).all(axis=1)
            code[same, 0] ^= True
    near = {f"near {n}": np.stack([passwords.flip_bits(c, min(n, bits), rng) for c in right]) for n in NEAR}
    return {"first": first, "second": second, "right": right, "wrong": wrong, "other wrong": other, **near}


def save_array(file: Path, array: Floats) -> None:
    """A .npy file that appears whole or not at all."""
    import io

    from mien.store import write_atomically

    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, buffer.getvalue())
