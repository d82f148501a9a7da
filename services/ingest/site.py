"""Where a run keeps what it has done so far, so that it goes on there when it is started again.

Photos are worked on in *parts* of :data:`PART`, in the order of their names. A finished part is two objects under
``OUT/.ingest/FINGERPRINT/``: ``part-000012.bin``, the crops with their records, sorted by where they come in the final
order, and ``part-000012.json``, what lies where and what was set aside and why. The second is written last, and a part
without it is done again. As every part is sorted, the shards, which are written in the final order, read each part once
from front to back: a merge, which needs neither memory nor a local disk for half a million crops.

The fingerprint covers whatever decides about a crop: files and their times or ETags, thresholds, landmarks, seed and
versions of the libraries. With another fingerprint nothing is reused.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import storage
from mien.manifest import Shard
from services.ingest.config import IngestError
from services.ingest.crops import Reason, Rejection

FOLDER: Final = ".ingest"
PART: Final = 4096
# Of all parts together, while they are merged.
_MEMORY: Final = 256 << 20
_MOST: Final = 1 << 20
_FINISHED: Final = "finished.json"


@dataclass(frozen=True, slots=True)
class Sample:
    """A crop on its way into a shard; record and picture lie in a part."""

    key: str
    source: str
    file: str
    unit: str  # what decides its split: the identity, or the photo itself
    identity: str | None
    digest: str  # sha256 of the photo
    part: int
    offset: int
    record: int  # bytes of the record, which the picture follows
    picture: int  # bytes of the picture


class Site:
    """See the module.

    Args:
        out: folder or ``s3://`` prefix of the shards.
        fingerprint: of the run.
    """

    def __init__(self, out: str, fingerprint: str) -> None:
        self.out = out
        self.root = storage.open_prefix(_below(out, FOLDER))
        self.place = storage.open_prefix(_below(out, f"{FOLDER}/{fingerprint[:32]}"))
        # Shards are put together in files: beside the result, where that is a folder, or in the system's place.
        self.scratch: Path | None = None if storage.is_s3(out) else Path(self.place.url)
        self._windows: dict[int, tuple[int, bytes]] = {}
        self._window = _MOST

    def begin(self) -> int:
        """Parts that are finished already: 0 .. n - 1."""
        if self.scratch is not None:
            self.scratch.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.scratch.parent / "lock", "wb")  # noqa: SIM115 - held as long as we are at work
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise IngestError(f"another ingest is at work in {self.out}") from error
        there = {entry.name for entry in self.place.list("part-")}
        count = 0
        while f"part-{count:06d}.json" in there:
            count += 1
        return count

    def merge(self, parts: int) -> None:
        """Say that so many parts will be read side by side."""
        self._window = max(64 << 10, min(_MOST, _MEMORY // max(1, parts)))

    def write_part(
        self,
        number: int,
        samples: Sequence[tuple[Sample, bytes, bytes]],
        rejected: Iterable[Rejection],
        order: Sequence[int],
    ) -> None:
        """Keep a part.

        Args:
            number: which; parts are written in order.
            samples: in the order of the photos, with record and picture; places are filled in here.
            rejected: what was set aside.
            order: places in ``samples``, sorted by where they come in the final order.
        """
        offsets, position, pieces = {}, 0, []
        for i in order:
            _, record, picture = samples[i]
            offsets[i] = position
            pieces += [record, picture]
            position += len(record) + len(picture)
        self.place.write(f"part-{number:06d}.bin", b"".join(pieces))
        rows = [
            [s.key, s.source, s.file, s.unit, s.identity, s.digest, offsets[i], len(record), len(picture)]
            for i, (s, record, picture) in enumerate(samples)
        ]
        said = [[r.source, r.file, r.reason.value, r.detail] for r in rejected]
        text = json.dumps({"samples": rows, "rejected": said}, ensure_ascii=False)
        self.place.write(f"part-{number:06d}.json", text.encode())

    def part(self, number: int) -> tuple[list[Sample], list[Rejection]]:
        """What a finished part says."""
        data = json.loads(self.place.read(f"part-{number:06d}.json"))
        samples = [
            Sample(key, source, file, unit, identity, digest, number, offset, record, picture)
            for key, source, file, unit, identity, digest, offset, record, picture in data["samples"]
        ]
        return samples, [Rejection(source, file, Reason(why), detail) for source, file, why, detail in data["rejected"]]

    def read(self, sample: Sample) -> tuple[bytes, bytes]:
        """A sample's record and picture."""
        length = sample.record + sample.picture
        start, window = self._windows.get(sample.part, (0, b""))
        at = sample.offset - start
        if at < 0 or at + length > len(window):
            window = self.place.read(
                f"part-{sample.part:06d}.bin", start=sample.offset, length=max(length, self._window)
            )
            self._windows[sample.part] = (sample.offset, window)
            at = 0
        data = window[at : at + length]
        if len(data) != length:
            raise storage.StorageError(f"part {sample.part} in {self.place.url} is cut off; remove {self.root.url}")
        return data[: sample.record], data[sample.record :]

    def note_shard(self, shard: Shard) -> None:
        """Remember that a shard is written."""
        self.place.write(f"shard-{shard.name}.json", shard.model_dump_json().encode())

    def shards(self, target: storage.Prefix) -> dict[str, Shard]:
        """Shards that were written and are still there."""
        notes = [entry.name for entry in self.place.list("shard-")]
        if not notes:
            return {}
        sizes = {entry.name: entry.size for entry in target.list("")}
        known = (Shard.model_validate_json(self.place.read(name)) for name in notes)
        return {shard.name: shard for shard in known if sizes.get(shard.name) == shard.bytes}

    def finish(self, manifest: bytes) -> None:
        """Remember that all that is left is the manifest, and cleaning up."""
        self.place.write(_FINISHED, json.dumps({"manifest": hashlib.sha256(manifest).hexdigest()}).encode())

    def finished(self, manifest: bytes) -> bool:
        """Whether this manifest is this run's, which was cut off while it cleaned up."""
        if not self.place.exists(_FINISHED):
            return False
        return bool(json.loads(self.place.read(_FINISHED))["manifest"] == hashlib.sha256(manifest).hexdigest())

    def remove(self) -> None:
        """Remove what this and earlier runs kept."""
        self._windows.clear()
        # Backwards: the note that the run is finished goes last.
        for entry in reversed(list(self.root.list(""))):
            self.root.delete(entry.name)
        if isinstance(self.root, storage.Folder):
            import shutil

            shutil.rmtree(self.root.path, ignore_errors=True)


def fingerprint(facts: Any) -> str:
    """A name for everything that decides about a run's crops: hex."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=asdict).encode()).hexdigest()


def _below(out: str, name: str) -> str:
    return f"{out.rstrip('/')}/{name}" if storage.is_s3(out) else str(Path(out, name))
