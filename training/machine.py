"""``python -m training.machine``: a plan of training runs on a bare GPU machine that is lent for minutes.

There (nothing but a checkout, the pieces of :mod:`training.pack`, and a Python with torch)::

    python3 -m training.machine run --pieces FOLDER --plan PLAN --out "$OUT" --limit 540

puts the pieces together (shards to ``shards/``, weights to ``../shared`` or ``MIEN_SHARED``, packages on the path),
runs the plan, and leaves in OUT what is worth bringing back, in parts that fit. Here ``python -m training.machine
unpack FOLDER`` puts the runs into ``runs/`` again, where the same command goes on with them, and so does a later
machine that is given ``--resume FOLDER``.

A plan is a text file, a command a line::

    # seconds  command
    90  python -m training --config training/configs/paper.yaml device=cuda bf16=true
    60  python -m training --config training/configs/ablations/full.yaml device=cuda  &
    60  python -m training --config training/configs/ablations/eight-bits.yaml device=cuda

Each has so many seconds, then gets SIGTERM, at which a run saves and stops. A command that ends in ``&`` runs beside
the next one. One that fails is reported, and the next one runs all the same.

Only the standard library is needed to begin: everything else may have to be put together first.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parents[1]
PART: Final = "part"
LISTING: Final = "pieces.json"

# What comes back: files of 16 MiB and eight of them at most, less a margin and room for what others leave there.
BACK_BYTES: Final = 15 * 2**20
BACK_PARTS: Final = 4
_GRACE: Final = 30.0  # seconds between SIGTERM and SIGKILL
_SAMPLES: Final = 2  # grids of a run
_TAIL: Final = 12  # lines of a log


class MachineError(Exception):
    """Pieces that are missing or torn, or a plan that cannot be."""


# -- pieces ----------------------------------------------------------------------------------------------------------


def assemble(pieces: Path, *, root: Path, shared: Path, site: Path) -> None:
    """Check the pieces and lay out what is in them; does nothing where that has been done.

    Args:
        pieces: folder with ``piece-1``, ``piece-2``, ...
        root: of the checkout, for ``shards/``.
        shared: for ``weights/``.
        site: for packages.

    Raises:
        MachineError: a piece is missing, torn, or of another pack; nothing is laid out then.
    """
    parts = checked([(f"piece-{n}", pieces / f"piece-{n}" / PART) for n in _numbers(pieces)], _listing(pieces))
    mark, digest = (
        site / "assembled",
        hashlib.sha256("".join(r["sha256"] for r in _listing(pieces)).encode()).hexdigest(),
    )
    if mark.exists() and mark.read_text() == digest:
        return
    places = {"shards": root / "shards", "shared": shared, "site": site}
    with tarfile.open(fileobj=_Joined(parts), mode="r|gz") as tar:
        for member in tar:
            top, _, rest = member.name.partition("/")
            if top not in places or not rest:
                raise MachineError(f"{member.name} has no place here; pack again with this version")
            places[top].mkdir(parents=True, exist_ok=True)
            tar.extract(member.replace(name=rest), places[top], filter="data")
    mark.write_text(digest)


def _numbers(pieces: Path) -> range:
    return range(1, len(_listing(pieces)) + 1)


def _listing(pieces: Path) -> list[dict[str, Any]]:
    found = sorted(pieces.glob(f"piece-*/{LISTING}"))
    if not found:
        raise MachineError(f"no piece in {pieces}")
    listings = {path.read_text() for path in found}
    if len(listings) > 1:
        raise MachineError(f"the pieces in {pieces} are of different packs; carry those of one")
    return list(json.loads(listings.pop())["pieces"])


def checked(parts: Sequence[tuple[str, Path]], records: Sequence[dict[str, Any]]) -> list[Path]:
    """The files of a set of parts; raises MachineError where one is missing or not what its record says."""
    for (name, path), record in zip(parts, records, strict=True):
        if not path.is_file():
            raise MachineError(f"{name} of {len(records)} is missing ({path})")
        data = path.read_bytes()
        if len(data) != record["bytes"] or hashlib.sha256(data).hexdigest() != record["sha256"]:
            raise MachineError(f"{name} of {len(records)} is torn ({path}, {len(data)} bytes); carry it again")
    return [path for _, path in parts]


class _Joined(io.RawIOBase):
    """Files as one stream."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self._paths = iter(paths)
        self._file: io.BufferedReader | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            if self._file is None:
                path = next(self._paths, None)
                if path is None:
                    return 0
                self._file = open(path, "rb")  # noqa: SIM115
            count = self._file.readinto(buffer)
            if count:
                return count
            self._file.close()
            self._file = None


# -- the plan --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """A line of a plan."""

    seconds: float
    command: str


def parse(text: str) -> list[list[Entry]]:
    """A plan as groups that run one after another, the entries of a group side by side; raises MachineError."""
    groups: list[list[Entry]] = [[]]
    for number, raw in enumerate(text.splitlines(), 1):
        line = raw.strip()
        if not line or line.startswith("#"):
            continue
        seconds, _, command = line.partition(" ")
        beside = command.endswith("&") and not command.endswith("&&")
        command = command.removesuffix("&").strip() if beside else command.strip()
        try:
            entry = Entry(float(seconds), command)
        except ValueError:
            raise MachineError(f"line {number} of the plan is not SECONDS COMMAND: {line}") from None
        if not command or not 0 < entry.seconds < float("inf"):
            raise MachineError(f"line {number} of the plan is not SECONDS COMMAND: {line}")
        groups[-1].append(entry)
        if not beside:
            groups.append([])
    return [group for group in groups if group]


def run(
    groups: Sequence[Sequence[Entry]], logs: Path, *, root: Path, environment: dict[str, str], deadline: float
) -> bool:
    """Run a plan; every command's output goes to a file of its own, and how it ended is said at once.

    Args:
        groups: see :func:`parse`.
        logs: folder.
        root: where the commands run.
        environment: of the commands.
        deadline: of :func:`time.monotonic`, past which nothing begins or goes on.

    Returns:
        Whether every command did what was asked: ended with 0, or with 143 or as it liked after SIGTERM.
    """
    logs.mkdir(parents=True, exist_ok=True)
    good, number = True, len(list(logs.glob("*.log")))
    for group in groups:
        running = []
        for entry in group:
            number += 1
            log = logs / f"{number:02d}.log"
            log.write_text(f"$ {entry.command}\n")
            running.append((entry, log, time.monotonic(), _begin(entry.command, log, root, environment)))
        for entry, log, began, process in running:
            code, stopped = _end(process, min(began + entry.seconds, deadline), deadline + _GRACE)
            good = good and (code == 0 or (stopped and code in (143, -signal.SIGTERM)))
            took = time.monotonic() - began
            how = f"stopped after {took:.0f} s, code {code}" if stopped else f"ended after {took:.0f} s with {code}"
            tail = log.read_text(errors="replace").splitlines()[1:][-_TAIL:]
            _say(f"[{log.stem}] {entry.command}: {how}", *(f"    {line[:400]}" for line in tail))
    return good


def _begin(command: str, log: Path, root: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    # `python` is this one, whatever it is called here. With a trap the shell outlives the SIGTERM that its group gets,
    # until the command has saved.
    script = f'python() {{ "$PYTHON" "$@"; }}; trap : TERM; {command}'
    with open(log, "ab") as output:
        return subprocess.Popen(
            ["/bin/bash", "-c", script],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=root,
            start_new_session=True,
        )


def _end(process: subprocess.Popen[bytes], due: float, last: float) -> tuple[int, bool]:
    """Exit code, and whether it had to be stopped."""
    try:
        return process.wait(timeout=max(0.0, due - time.monotonic())), False
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGTERM)
    try:
        return process.wait(timeout=max(1.0, min(_GRACE, last - time.monotonic()))), True
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return process.wait(), True


# -- what comes back -------------------------------------------------------------------------------------------------


def bring_back(root: Path, out: Path, *, whole: Sequence[str], keep: Sequence[Path], parts: int = BACK_PARTS) -> None:
    """Write ``back-1`` ... and their listing into ``out``: of each run its config, log, newest grids and a light
    checkpoint, and the files kept.

    Args:
        root: of the checkout, with all runs in ``runs``, at any depth.
        out: where the parts go.
        whole: names of the runs whose checkpoints have all networks, to go on with; of the others T alone comes back.
            Where that is too much, T alone of all.
        keep: files and folders beside them, as they are.
        parts: so many at most.

    Raises:
        MachineError: too much also without the other networks.
    """
    for names in (list(whole), []):
        files = [*_run_files(root, names), *_kept(root, keep)]
        data = _archive(files)
        if len(data) <= parts * BACK_BYTES:
            break
        _say(f"{len(data) / 2**20:.0f} MiB are more than {parts} parts: T alone of every run comes back")
    else:
        raise MachineError(
            f"{len(data) / 2**20:.0f} MiB are more than {parts} parts of {BACK_BYTES >> 20} MiB; keep less"
        )
    out.mkdir(parents=True, exist_ok=True)
    records = []
    for number, start in enumerate(range(0, len(data), BACK_BYTES), 1):
        part = data[start : start + BACK_BYTES]
        (out / f"back-{number}").write_bytes(part)
        records.append({"sha256": hashlib.sha256(part).hexdigest(), "bytes": len(part)})
    (out / "back.json").write_text(json.dumps({"format": 1, "parts": records}, indent=1) + "\n")
    _say(f"{len(files)} files, {len(data) / 2**20:.1f} MiB, in {len(records)} parts in {out}")


def unpack(folder: Path, root: Path) -> list[str]:
    """Put what came back where it was, under ``root``; the names of the files.

    Raises:
        MachineError: a part is missing or torn; nothing is written then.
    """
    try:
        records = json.loads((folder / "back.json").read_text())["parts"]
    except (OSError, ValueError, KeyError) as error:
        raise MachineError(f"{folder}/back.json cannot be read: {error}") from error
    parts = checked([(f"back-{n}", folder / f"back-{n}") for n in range(1, len(records) + 1)], records)
    with tarfile.open(fileobj=_Joined(parts), mode="r|") as tar:
        names = []
        for member in tar:
            tar.extract(member, root, filter="data")
            names.append(member.name)
    return names


def _run_files(root: Path, whole: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    import storage
    from training.checkpoint import light

    runs = root / "runs"
    for log in sorted(runs.rglob("machine/*.log")):
        yield str(log.relative_to(root)), log.read_bytes()
    for config in sorted(runs.rglob("config.json")):
        folder = config.parent
        if not (folder / "checkpoints").is_dir():
            continue
        samples = sorted((folder / "samples").glob("*.png"))[-_SAMPLES:]
        for path in (config, folder / "log.jsonl", *samples):
            if path.exists():
                yield str(path.relative_to(root)), path.read_bytes()
        for name, data in light(storage.open_prefix(folder / "checkpoints"), whole=folder.name in whole):
            yield str((folder / "checkpoints" / name).relative_to(root)), data


def _kept(root: Path, paths: Sequence[Path]) -> Iterator[tuple[str, bytes]]:
    for path in paths:
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                yield str(file.resolve().relative_to(root)), file.read_bytes()


def _archive(files: Iterable[tuple[str, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), int(time.time())
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


# -- command ---------------------------------------------------------------------------------------------------------


def _say(*lines: str) -> None:
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    sys.stdout.flush()


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit codes: 0 all well; 1 a command failed, or pieces or parts are not whole; 2 the plan does not fit."""
    parser = argparse.ArgumentParser(prog="training.machine", description="Training on a machine lent for minutes.")
    parser.add_argument("--root", type=Path, default=ROOT, help="of the checkout; default: this one")
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", help="put the pieces together, run a plan, leave what comes back")
    running.add_argument("--pieces", required=True, type=Path, help="folder with piece-1, piece-2, ...")
    running.add_argument("--plan", required=True, type=Path, help="SECONDS COMMAND, a line each")
    running.add_argument("--out", required=True, type=Path, help="folder for what comes back")
    running.add_argument("--limit", required=True, type=float, help="seconds for all of it")
    running.add_argument("--resume", type=Path, help="what came back from an earlier machine, to go on with")
    running.add_argument(
        "--whole", action="append", default=[], metavar="RUN", help="bring back all networks of this run"
    )
    running.add_argument("--keep", action="append", default=[], type=Path, help="file or folder to bring back too")
    running.add_argument("--site", type=Path, default=Path("/tmp/mien-site"), help="folder for packages")  # noqa: S108
    unpacking = commands.add_parser("unpack", help="put what came back into runs/")
    unpacking.add_argument("folder", type=Path)
    chosen = parser.parse_args(arguments)
    try:
        if chosen.command == "unpack":
            _say(*unpack(chosen.folder, chosen.root))
            return 0
        return _run(chosen)
    except MachineError as error:
        sys.stderr.write(f"training.machine: {error}\n")
        return 1


def _run(chosen: argparse.Namespace) -> int:
    began = time.monotonic()
    groups = parse(chosen.plan.read_text())
    planned = sum(max(entry.seconds for entry in group) for group in groups)
    # Putting together and bringing back take some seconds each.
    if planned + _GRACE > chosen.limit:
        _say(
            f"the plan takes {planned:.0f} s, with {_GRACE:.0f} s for saving and bringing back more than the limit,"
            f" {chosen.limit:.0f} s"
        )
        return 2
    root = chosen.root.resolve()
    shared = Path(os.environ.get("MIEN_SHARED", root.parent / "shared"))
    assemble(chosen.pieces, root=root, shared=shared, site=chosen.site)
    _say(f"pieces put together after {time.monotonic() - began:.1f} s")
    runs = root / "runs"
    if chosen.resume:
        _say(f"{len(unpack(chosen.resume, root))} files of an earlier machine")
        shutil.rmtree(runs / "machine", ignore_errors=True)
    path = os.pathsep.join(filter(None, (str(chosen.site), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHON": sys.executable, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    good = run(groups, runs / "machine", root=root, environment=environment, deadline=began + chosen.limit - _GRACE)
    sys.path.insert(0, str(chosen.site))
    bring_back(root, chosen.out, whole=chosen.whole, keep=chosen.keep)
    _say(f"{time.monotonic() - began:.0f} s in all")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
