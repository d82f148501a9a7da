"""Shards to batches, in one canonical order that any number of processes can take their part of.

Which sample comes when is arithmetic (:mod:`training.order`): a function of the seed and of ``nimg``, the images seen.
So resuming needs no state but ``nimg``, and a run that goes on with another world size still uses every sample of an
epoch exactly once. Two readers offer the same:

- :class:`FaceShards` reads a folder whole when it is opened and keeps the JPEG bytes (half a million crops are about
  3 GB): for folders on the machine's own disk.
- :class:`StreamedShards` reads ``s3://`` (or a folder too large for memory) through a cache of verified copies, a
  window of shards at a time.

What is wrong with the data is said when they are opened: no credentials, wrong endpoint, a manifest that is missing or
malformed, a shard that is missing or has another size than its manifest says. A store that stops answering later is
waited for (:mod:`storage`); a shard with other bytes than its manifest says is fetched once more and then refused by
name. Nothing is ever skipped.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import re
import tarfile
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

import storage
from mien.errors import MienError
from storage.cache import Cache, Copy
from training.order import LANES, WINDOW, Canonical, Indices, Order

__all__ = ["Batch", "Batches", "FaceShards", "Faces", "Order", "Reduced", "ShardError", "StreamedShards", "open_faces"]

logger = logging.getLogger(__name__)

# Fits the volume of k8s/training beside the weights.
CACHE_LIMIT: Final = 16 << 30
_FETCHES: Final = 4  # shards on their way at the same time
_AHEAD: Final = 3  # batches that are decoded before they are due
_BLOCK: Final = 512  # of a tar
_IDENTITY: Final = re.compile(rb'\{"identity": (null|[0-9]+)[,}]')


class ShardError(MienError):
    """The manifest and the shards disagree, or one cannot be read."""


@dataclass(frozen=True)
class Sample:
    """One crop as it lies in a shard."""

    key: str
    jpeg: bytes
    identity: int  # -1: unlabelled


@dataclass(frozen=True)
class Batch:
    """Decoded crops.

    Attributes:
        images: uint8 ``[B, S, S, 3]``.
        identities: int64 ``[B]``, -1 where unlabelled.
    """

    images: NDArray[np.uint8]
    identities: NDArray[np.int64]


Part = Callable[[int], slice]
"""The places of ``n`` that this process works on; :meth:`training.distributed.World.part`."""


class Faces(Protocol):
    """What training needs of the samples of a split, however they are read."""

    digest: str  # sha256 of the manifest
    crop_size: int
    identities: int  # classes

    def __len__(self) -> int: ...

    def indices(self, seed: int, nimg: int, batch: int, part: slice) -> Indices:
        """Which samples a process takes of the batch that follows ``nimg`` images, int64 ``[n]``."""
        ...

    def decode(self, indices: Indices, pool: ThreadPoolExecutor | None = None) -> Batch:
        """The samples at ``indices``, in that order."""
        ...

    def labelled(self, part: Part) -> Iterator[Batch]:
        """The samples with an identity, this process's part of them, in batches of 64 at most."""
        ...

    def prefetch(self, indices: Indices) -> None:
        """Have what these samples need at hand soon; returns at once."""
        ...


def open_faces(
    url: str | os.PathLike[str],
    split: str,
    *,
    limit: int | None = None,
    cache: Path | None = None,
    cache_limit: int = CACHE_LIMIT,
    lanes: int = LANES,
    patience: float = 600.0,
) -> Faces:
    """The samples of a split: a folder in memory, ``s3://`` or whatever has a ``cache`` streamed through it.

    Args:
        url: what :func:`storage.open_prefix` takes.
        split: ``train``, ``val`` or ``test``.
        limit: only the first so many samples.
        cache: folder for copies of shards, on a local disk; for S3 ``$XDG_CACHE_HOME/mien/shards`` where None.
        cache_limit: bytes that it may hold.
        lanes: parts of an epoch that are read side by side, see :mod:`training.order`.
        patience: seconds for which a store that does not answer is asked again.

    Raises:
        ShardError, storage.StorageError: see the module.
    """
    if not storage.is_s3(url) and cache is None:
        return FaceShards(url, split, limit=limit)
    if cache is None:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        cache = Path(home) / "mien" / "shards"
    place = storage.open_prefix(url, patience=patience)
    return StreamedShards(place, split, Cache(cache, cache_limit), limit=limit, lanes=lanes)


class Reduced:
    """Faces whose crops are made a whole number of times smaller, each pixel the mean of those it takes the place of.

    Args:
        faces: the samples as they are stored.
        crop_size: what is asked for, pixels a side.

    Raises:
        ValueError: the stored crops are not a multiple of it.
    """

    def __init__(self, faces: Faces, crop_size: int) -> None:
        if faces.crop_size % crop_size:
            raise ValueError(
                f"crop_size {crop_size} does not divide the {faces.crop_size} pixels of the crops in the shards; give a"
                " size that does, or shards of that size (python -m services.ingest --crop-size)"
            )
        self._faces, self._times = faces, faces.crop_size // crop_size
        self.crop_size, self.digest, self.identities = crop_size, faces.digest, faces.identities

    def __len__(self) -> int:
        return len(self._faces)

    def indices(self, seed: int, nimg: int, batch: int, part: slice) -> Indices:
        """See :meth:`Faces.indices`."""
        return self._faces.indices(seed, nimg, batch, part)

    def decode(self, indices: Indices, pool: ThreadPoolExecutor | None = None) -> Batch:
        """See :meth:`Faces.decode`."""
        return self._smaller(self._faces.decode(indices, pool))

    def labelled(self, part: Part) -> Iterator[Batch]:
        """See :meth:`Faces.labelled`."""
        return map(self._smaller, self._faces.labelled(part))

    def prefetch(self, indices: Indices) -> None:
        """See :meth:`Faces.prefetch`."""
        self._faces.prefetch(indices)

    def _smaller(self, batch: Batch) -> Batch:
        times, size = self._times, self.crop_size
        cells = batch.images.reshape(len(batch.images), size, times, size, times, 3)
        return Batch(np.rint(cells.mean(axis=(2, 4))).astype(np.uint8), batch.identities)


class FaceShards:
    """All samples of one split, checked against the manifest when opened.

    Args:
        folder: holds ``manifest.json`` and the shards it lists.
        split: ``train``, ``val`` or ``test``.
        limit: only the first so many samples.

    Raises:
        ShardError: no manifest, a shard missing or with another sha256, no sample in the split.
    """

    def __init__(self, folder: str | os.PathLike[str], split: str, *, limit: int | None = None) -> None:
        folder = Path(folder)
        manifest, self.digest = _manifest(storage.open_prefix(folder))
        self.crop_size = int(manifest["crop_size"])
        samples: list[Sample] = []
        for shard in manifest["shards"]:
            if shard["split"] == split:
                samples += _read_shard(folder / shard["name"], shard["sha256"], shard["samples"])
                if limit is not None and len(samples) >= limit:
                    break
        self.samples = samples[:limit]
        if not self.samples:
            raise ShardError(f"{folder} has no sample in split {split!r}")
        self.identities = max((s.identity for s in self.samples), default=-1) + 1
        self._order: Order | None = None

    def __len__(self) -> int:
        return len(self.samples)

    def decode(self, indices: NDArray[np.int64], pool: ThreadPoolExecutor | None = None) -> Batch:
        """The samples at ``indices``, in that order."""
        chosen = [self.samples[i] for i in indices]
        return _decoded([s.jpeg for s in chosen], [s.identity for s in chosen], pool)

    def indices(self, seed: int, nimg: int, batch: int, part: slice) -> Indices:
        """See :meth:`Faces.indices`."""
        if self._order is None or self._order.seed != seed:
            self._order = Order(len(self), seed)
        return self._order.take(nimg + part.start, nimg + part.stop)

    def labelled(self, part: Part) -> Iterator[Batch]:
        """See :meth:`Faces.labelled`."""
        labelled = np.array([i for i, s in enumerate(self.samples) if s.identity >= 0], dtype=np.int64)
        mine = labelled[part(len(labelled))]
        for start in range(0, len(mine), 64):
            yield self.decode(mine[start : start + 64])

    def prefetch(self, indices: Indices) -> None:
        """Everything is at hand."""


def _decoded(jpegs: list[bytes], identities: list[int], pool: ThreadPoolExecutor | None) -> Batch:
    # A task a thread, not one a picture: handing a picture over costs a tenth of decoding it.
    count = max(1, min(len(jpegs), getattr(pool, "_max_workers", 1)))
    parts = [jpegs[i * len(jpegs) // count : (i + 1) * len(jpegs) // count] for i in range(count)]
    decoded = map(_decode, parts) if pool is None else pool.map(_decode, parts)
    return Batch(np.stack([pixels for part in decoded for pixels in part]), np.array(identities, dtype=np.int64))


def _decode(jpegs: list[bytes]) -> list[NDArray[np.uint8]]:
    pixels = []
    for jpeg in jpegs:
        with Image.open(io.BytesIO(jpeg)) as image:
            pixels.append(np.asarray(image.convert("RGB")))
    return pixels


def _read_shard(path: Path, sha256: str, expected: int) -> list[Sample]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ShardError(f"the manifest lists {path.name}, which cannot be read ({error.strerror})") from error
    if hashlib.sha256(data).hexdigest() != sha256:
        raise ShardError(f"{path} does not have the sha256 its manifest gives; write the shards again")
    images: dict[str, bytes] = {}
    labels: dict[str, int] = {}
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        for member in tar:
            file = tar.extractfile(member)
            if file is None:
                continue
            key, _, extension = member.name.partition(".")
            if extension == "json":
                identity = json.load(file)["identity"]
                labels[key] = -1 if identity is None else int(identity)
            else:
                images[key] = file.read()
    if images.keys() != labels.keys() or len(images) != expected:
        raise ShardError(f"{path} holds {len(images)} pictures and {len(labels)} labels; its manifest says {expected}")
    return [Sample(key, jpeg, labels[key]) for key, jpeg in images.items()]


@dataclass(frozen=True)
class _Open:
    """A shard at hand: where each picture lies, and whom it shows."""

    copy: Copy
    offsets: NDArray[np.int64]  # [samples]
    lengths: NDArray[np.int64]
    identities: NDArray[np.int64]  # -1: unlabelled


class StreamedShards:
    """The samples of one split, read through a cache as they are due; usable from several threads.

    Samples are numbered shard by shard in the order of the manifest. In memory are the places and labels of the shards
    of one window of the order, and their bytes only where the cache has no room.

    Args:
        place: holds ``manifest.json`` and the shards it lists.
        split: ``train``, ``val`` or ``test``.
        cache: of verified copies; shared by all processes of a machine.
        limit: only the first so many samples.
        lanes, window: of :class:`training.order.Canonical`; part of the order.

    Raises:
        ShardError: no manifest, a shard missing or of another size, no sample in the split.
        storage.StorageError: the place cannot be read: credentials, endpoint, bucket.
    """

    def __init__(
        self,
        place: storage.Prefix,
        split: str,
        cache: Cache,
        *,
        limit: int | None = None,
        lanes: int = LANES,
        window: int = WINDOW,
    ) -> None:
        self.place, self._cache, self._lanes, self._window = place, cache, lanes, window
        place.check()
        manifest, self.digest = _manifest(place)
        self.crop_size = int(manifest["crop_size"])
        self._shards = [shard for shard in manifest["shards"] if shard["split"] == split]
        counts = [int(shard["samples"]) for shard in self._shards]
        if limit is not None:
            enough = int(np.searchsorted(np.cumsum(counts), limit)) + 1
            self._shards, counts = self._shards[:enough], counts[:enough]
            if sum(counts) > limit:
                counts[-1] -= sum(counts) - limit
        if not sum(counts):
            raise ShardError(f"{place.url} has no sample in split {split!r}")
        self._counts = counts
        self._starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self._same_as_stored(split)
        self._order: Canonical | None = None
        # A lane's window lies in so many shards, and the next one's are fetched meanwhile.
        self._kept = min(len(counts), 2 * lanes * (window // max(1, sum(counts) // len(counts)) + 2))
        self._opened: OrderedDict[int, _Open] = OrderedDict()
        self._opening: dict[int, Future[_Open]] = {}
        self._lock = threading.Lock()
        self._fetches = ThreadPoolExecutor(_FETCHES, thread_name_prefix="shards")
        people = manifest.get("identities")
        if people is not None and limit is None:  # numbered from 0 in train, and from where the others end after it
            self.identities = int(people[split]["first"]) + len(people[split]["names"])
        else:
            known = [self._shard(i).identities[: counts[i]].max(initial=-1) for i in range(len(counts))]
            self.identities = int(max(known)) + 1

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def shards(self) -> int:
        """How many there are."""
        return len(self._counts)

    def indices(self, seed: int, nimg: int, batch: int, part: slice) -> Indices:
        """See :meth:`Faces.indices`; a process's part is of few lanes, see :mod:`training.order`."""
        if self._order is None or self._order.seed != seed:
            self._order = Canonical(self._counts, seed=seed, lanes=self._lanes, window=self._window)
        shards, insides = self._order.at(self._order.sorted(nimg, batch)[part])
        return self._starts[shards] + insides

    def prefetch(self, indices: Indices) -> None:
        """Begin to fetch the shards of these samples; what goes wrong is raised by who decodes them."""
        for shard in dict.fromkeys(self._places(indices)[0].tolist()):
            self._begin(shard)

    def decode(self, indices: Indices, pool: ThreadPoolExecutor | None = None) -> Batch:
        """The samples at ``indices``, in that order; waits for shards that are not there yet.

        Raises:
            ShardError: a shard is missing, or not what its manifest says, also when it was fetched again.
            storage.StorageError: the store did not answer within its patience.
        """
        shards, insides = self._places(indices)
        self.prefetch(indices)
        jpegs: list[bytes] = [b""] * len(indices)
        identities = [-1] * len(indices)
        for shard in dict.fromkeys(shards.tolist()):
            opened = self._shard(shard)
            for i in np.flatnonzero(shards == shard).tolist():
                inside = int(insides[i])
                jpegs[i] = opened.copy.read(int(opened.offsets[inside]), int(opened.lengths[inside]))
                identities[i] = int(opened.identities[inside])
        return _decoded(jpegs, identities, pool)

    def labelled(self, part: Part) -> Iterator[Batch]:
        """See :meth:`Faces.labelled`; a process reads the shards of its part alone."""
        mine = part(len(self))
        for shard in range(len(self._counts)):
            first, last = max(mine.start, int(self._starts[shard])), min(mine.stop, int(self._starts[shard + 1]))
            if first < last:
                places = np.arange(first, last, dtype=np.int64)
                places = places[self._shard(shard).identities[places - self._starts[shard]] >= 0]
                for start in range(0, len(places), 64):
                    yield self.decode(places[start : start + 64])

    def close(self) -> None:
        """Give the copies back to the cache."""
        self._fetches.shutdown(wait=True, cancel_futures=True)
        with self._lock:
            self._opened.clear()

    def _places(self, indices: Indices) -> tuple[Indices, Indices]:
        shards = np.searchsorted(self._starts, indices, side="right") - 1
        return shards, indices - self._starts[shards]

    def _same_as_stored(self, split: str) -> None:
        sizes = {entry.name: entry.size for entry in self.place.list(f"{split}-")}
        for shard in self._shards:
            found = sizes.get(shard["name"])
            if found is None:
                raise ShardError(f"the manifest lists {shard['name']}, which is not in {self.place.url}")
            if found != shard["bytes"]:
                raise ShardError(
                    f"{self.place.url}/{shard['name']} has {found} bytes; its manifest says {shard['bytes']}."
                    " Copy or ingest it again."
                )

    def _begin(self, shard: int) -> Future[_Open] | None:
        with self._lock:
            if shard in self._opened:
                return None
            if shard not in self._opening:
                self._opening[shard] = self._fetches.submit(self._fetch, shard)
            return self._opening[shard]

    def _shard(self, shard: int) -> _Open:
        while True:
            with self._lock:
                if shard in self._opened:
                    self._opened.move_to_end(shard)
                    return self._opened[shard]
            fetching = self._begin(shard)
            if fetching is not None:
                try:
                    return fetching.result()
                finally:
                    with self._lock:  # a failure is raised once and tried again when asked again
                        if self._opening.get(shard) is fetching:
                            del self._opening[shard]

    def _fetch(self, shard: int) -> _Open:
        record = self._shards[shard]
        where = f"{self.place.url}/{record['name']}"
        try:
            copy = self._cache.open(self.place, record["name"], sha256=record["sha256"], size=record["bytes"])
        except storage.ChecksumMismatch as error:
            raise ShardError(f"{where} is not what its manifest says, also when fetched again: {error}") from error
        except storage.NotFound as error:
            raise ShardError(f"{where} is in the manifest and was there at the start, and is gone: {error}") from error
        try:
            opened = _index(copy, where, int(record["samples"]))
        except BaseException:
            copy.close()
            raise
        with self._lock:
            self._opened[shard] = opened
            self._opening.pop(shard, None)
            while len(self._opened) > self._kept:
                # Not closed: another thread may be reading it. The last one to let go closes it.
                self._opened.popitem(last=False)
        return opened


def _index(copy: Copy, where: str, expected: int) -> _Open:
    """Where the samples of a tar lie. Its headers are read here, since tarfile takes a third of decoding's time."""
    data = copy.read(0, copy.size)
    pictures: dict[bytes, tuple[int, int]] = {}
    labels: dict[bytes, int] = {}
    position = 0
    try:
        while position + _BLOCK <= len(data) and data[position]:
            header = data[position : position + _BLOCK]
            name, kind = header[:100].rstrip(b"\0"), header[156:157]
            size = int(header[124:136].rstrip(b"\0 ") or b"0", 8)
            position += _BLOCK
            if kind not in (b"0", b"\0") or position + size > len(data):
                raise ValueError("only plain files are expected")
            key, _, extension = name.partition(b".")
            if extension == b"json":
                text = data[position : position + size]
                found = _IDENTITY.match(text)  # as ingest writes it; parsing all of it takes as long as the rest here
                identity = json.loads(text)["identity"] if found is None else None if found[1] == b"null" else found[1]
                labels[key] = -1 if identity is None else int(identity)
            else:
                pictures[key] = (position, size)
            position += -(-size // _BLOCK) * _BLOCK
    except (ValueError, KeyError, TypeError) as error:
        raise ShardError(f"{where} is not a shard as ingest writes them ({error})") from error
    if pictures.keys() != labels.keys() or len(pictures) != expected:
        raise ShardError(
            f"{where} holds {len(pictures)} pictures and {len(labels)} labels; its manifest says {expected}"
        )
    places = np.array(list(pictures.values()), dtype=np.int64)
    return _Open(copy, places[:, 0], places[:, 1], np.array([labels[key] for key in pictures], dtype=np.int64))


def _manifest(place: storage.Prefix) -> tuple[dict[str, Any], str]:
    try:
        data = place.read("manifest.json")
    except storage.NotFound as error:
        raise ShardError(f"no manifest.json in {place.url}; services.ingest writes it last ({error})") from error
    try:
        manifest = json.loads(data)
        int(manifest["crop_size"])
        for shard in manifest["shards"]:
            shard["name"], shard["split"], shard["sha256"], int(shard["samples"]), int(shard["bytes"])
    except (ValueError, KeyError, TypeError) as error:
        raise ShardError(f"{place.url}/manifest.json is not a shard manifest ({error!r})") from error
    return manifest, hashlib.sha256(data).hexdigest()


class Batches:
    """A process's batches of a run, decoded in other threads before they are due: a context manager and iterator.

    Gives ``(indices, batch)`` for ``nimg``, ``nimg + size``, ... without end. What goes wrong is raised by ``next``
    when the batch is due, not before.

    Args:
        faces: where the samples come from.
        seed, nimg: place in the order.
        size: of the whole batch, over all processes.
        part: this process's part of it.
        threads: that decode.
        ahead: batches that are decoded before they are due.
        lookahead: samples of all processes before which shards are asked for.
    """

    def __init__(
        self,
        faces: Faces,
        *,
        seed: int,
        nimg: int,
        size: int,
        part: slice,
        threads: int = 2,
        ahead: int = _AHEAD,
        lookahead: int = 2048,
    ) -> None:
        self._faces, self._seed, self._size, self._part = faces, seed, size, part
        self._next, self._asked, self._lookahead, self._ahead = nimg, nimg, lookahead, ahead
        self._due: deque[tuple[Indices, Future[Batch]]] = deque()
        self._planned: deque[Indices] = deque()  # asked for and not yet due: a batch's place is worked out once
        self._decoders = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        # One at a time: batches are finished in the order in which they are due.
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="read")

    def __enter__(self) -> Batches:
        return self

    def __exit__(self, *_: object) -> None:
        for _, future in self._due:
            future.cancel()
        self._reader.shutdown(wait=False, cancel_futures=True)
        self._decoders.shutdown(wait=False, cancel_futures=True)

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> tuple[Indices, Batch]:
        while self._asked < self._next + max(self._lookahead, self._size * (self._ahead + 1 - len(self._due))):
            indices = self._faces.indices(self._seed, self._asked, self._size, self._part)
            self._faces.prefetch(indices)
            self._planned.append(indices)
            self._asked += self._size
        while len(self._due) <= self._ahead:
            indices = self._planned.popleft()
            self._due.append((indices, self._reader.submit(self._faces.decode, indices, self._decoders)))
            self._next += self._size
        indices, future = self._due.popleft()
        return indices, future.result()
