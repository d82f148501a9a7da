"""``python -m training.local``: the whole chain on this machine, small, with real servers and nothing of a cluster.

S3 server (SeaweedFS) and MLflow server -> pictures -> ingest -> shards in S3 -> two training processes that read them
from there, with checkpoints in S3 -> a registered model, ``mien@candidate`` -> evaluate -> promote. Every part is the
command that a cluster's manifests run, in a process of its own; the parts meet in the two servers alone.

With ``MIEN_SHARED`` it takes a few people of its CelebA tar and its recogniser; without, pictures made of the one
portrait that scikit-image carries, and a recogniser of random weights: the same road to a model of no use.
A run that was interrupted goes on when the command is given again; ``--fresh`` begins anew.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import storage
from mien.manifest import MANIFEST
from storage.local_s3 import Server, free_ports

BUCKET = "mien"
SPLIT = "60/40/0"  # with a dozen people 80/10/10 may leave nobody to validate with, or to judge
A_PERSON = 4  # pictures taken of each, so that there are many people
ROOT = Path(__file__).resolve().parents[1]
REFUSED = 3  # services.promote's exit code for a gate that does not hold
# No part of the chain takes longer on two cores than a fraction of this; a part that hangs must not hang the chain.
PART_TIMEOUT = 1800.0


class ChainError(Exception):
    """A part of the chain failed; the message says which, and where its output is."""


@dataclass(frozen=True)
class Options:
    """One run of the chain. ``photos`` and ``images`` bound its length: pictures taken, images trained on."""

    folder: Path
    shared: Path
    photos: int = 160
    images: int = 160
    faces: int = 24  # that evaluate looks at; its threshold needs 200 pairs of different people
    timeout: float = PART_TIMEOUT


def run(options: Options) -> Path:
    """The whole chain; leaves the folder of the run, and both servers stopped.

    Returns:
        The report of the evaluation.

    Raises:
        ChainError: a part failed.
        storage.StorageError: the S3 server did not start, or does not take the shards.
    """
    folder = options.folder
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    with _s3(folder) as s3, _mlflow(folder) as tracking:
        environment = os.environ | s3.environment | {
            "MLFLOW_TRACKING_URI": tracking, "MIEN_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "GIT_PYTHON_REFRESH": "quiet",
        }  # fmt: skip
        os.environ.update(s3.environment)
        s3.create_bucket(BUCKET)
        _say(f"S3 at {s3.endpoint}, MLflow at {tracking}")
        chain = _Chain(options, environment)
        prefix = f"s3://{BUCKET}/shards"
        place = storage.open_prefix(prefix, patience=60)
        if not list(place.list(MANIFEST)):  # written last
            chain.part("ingest", "-m", "services.ingest", *_pictures(options), "--split", SPLIT, "--out", prefix)
        _say(f"{sum(entry.name.endswith('.tar') for entry in place.list())} shards in {prefix}")
        config = _config(options, tracking, prefix)
        chain.part(
            "training",
            *("-m", "training.launch", "--nproc-per-node", "2", "--master-addr", "127.0.0.1"),
            *("--master-port", str(free_ports(1)[0]), "-m", "training", "--config", str(config)),
        )
        checkpoints = [e.name for e in storage.open_prefix(f"s3://{BUCKET}/checkpoints").list()]
        if not checkpoints:
            raise ChainError(f"training left no checkpoint in s3://{BUCKET}/checkpoints")
        run_id, version = _registered(tracking)
        _say(f"{len(checkpoints)} files of checkpoints in s3://{BUCKET}/checkpoints; models:/mien/{version} registered")
        report = folder / "report"
        weights = options.shared / "weights"
        chain.part(
            "evaluate",
            *("-m", "services.evaluate", "--model", f"models:/mien/{version}", "--data", prefix, "--split", "val"),
            *("--judges", "dlib,mobilefacenet-ms1m" if weights.is_dir() else "dlib", "--limit", str(options.faces)),
            *("--parts", "verification,recovery", "--quick", "--out", str(report), "--mlflow", tracking),
            *(("--weights", str(weights)) if weights.is_dir() else ()),
        )
        # Gates refuse a model that saw a few hundred images, and should: 3 is an answer here, not a failure.
        code = chain.part("promote", "-m", "services.promote", accept=(0, REFUSED))
        _say("promote: the gates refuse it, as they should so small a run" if code else "promote: it is the champion")
    uri = f"sqlite:///{folder}/mlflow/mlflow.db"
    _say(f"report: {report / 'report.html'}")
    _say(f"the run in MLflow: {shlex.join(_mlflow_command(folder, 5000))}")
    _say(f"  then http://127.0.0.1:5000/#/experiments/{_experiment(uri, run_id)}/runs/{run_id}")
    return report / "report.html"


class _Chain:
    """Runs the parts, one after another, each with its output on the terminal and in a file."""

    def __init__(self, options: Options, environment: dict[str, str]) -> None:
        self._options, self._environment, self._number = options, environment, 0

    def part(self, name: str, *arguments: str, accept: tuple[int, ...] = (0,)) -> int:
        """Run ``python ARGUMENTS``; its exit code, which is one of ``accept``."""
        self._number += 1
        log = self._options.folder / "logs" / f"{self._number}-{name}.log"
        _say(f"{name}: python {shlex.join(arguments)}")
        began = time.monotonic()
        with open(log, "wb") as output:
            process = _start([sys.executable, *arguments], output, self._environment)
            try:
                code = _follow(process, log, began + self._options.timeout)
            finally:
                _end(process)
        if code not in accept:
            raise ChainError(f"{name} ended with {code}; its output is in {log}")
        _say(f"{name}: {time.monotonic() - began:.0f} s")
        return code


def _follow(process: subprocess.Popen[bytes], log: Path, deadline: float) -> int:
    """Copy what a process writes to the terminal until it ends.

    Raises:
        ChainError: it did not by the deadline.
    """
    with open(log, "rb") as written:
        while True:
            code = process.poll()
            sys.stderr.write(written.read().decode(errors="replace"))
            sys.stderr.flush()
            if code is not None:
                return code
            if time.monotonic() > deadline:
                raise ChainError(f"a part took too long; its output is in {log}")
            time.sleep(0.2)


def _start(command: Sequence[str], output: IO[bytes], environment: dict[str, str]) -> subprocess.Popen[bytes]:
    # Its own group, so that what it started ends with it.
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=environment,
        start_new_session=True, cwd=ROOT,
    )  # fmt: skip


def _end(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM to a process and all it started, SIGKILL after ten seconds."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=10)
            return


@contextmanager
def _s3(folder: Path) -> Iterator[Server]:
    server = Server(folder / "s3", free_ports(1)[0])
    with open(folder / "logs" / "s3.log", "wb") as log:
        process = _start(server.command(), log, dict(os.environ))
        try:
            server.ready(process)
            yield server
        finally:
            _end(process)


@contextmanager
def _mlflow(folder: Path) -> Iterator[str]:
    port = free_ports(1)[0]
    (folder / "mlflow").mkdir(exist_ok=True)
    path = folder / "logs" / "mlflow.log"
    with open(path, "wb") as log:
        environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        process = _start(_mlflow_command(folder, port), log, environment)
        try:
            deadline = time.monotonic() + 300
            while True:
                with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2):
                    break
                if process.poll() is not None or time.monotonic() > deadline:
                    raise ChainError(f"the MLflow server did not start; its output is in {path}")
                time.sleep(0.2)
            yield f"http://127.0.0.1:{port}"
        finally:
            _end(process)


def _mlflow_command(folder: Path, port: int) -> list[str]:
    return [
        *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"),
        *("--backend-store-uri", f"sqlite:///{folder}/mlflow/mlflow.db"),
        *("--artifacts-destination", str(folder / "mlflow" / "artifacts")),
    ]


def _pictures(options: Options) -> list[str]:
    """Options of ingest that name the pictures, which lie in the folder ``photos`` afterwards."""
    photos = options.folder / "photos"
    shutil.rmtree(photos, ignore_errors=True)
    photos.mkdir()
    tar, known = (options.shared / "data" / f"celeba-labelled.{end}" for end in ("tar", "jsonl"))
    if not (tar.exists() and known.exists()):
        _make_pictures(photos, options.photos)
        return ["--source", str(photos), "--licence", "scikit-image's portrait of Eileen Collins, NASA, public domain"]
    taken: set[str] = set()
    people: Counter[str] = Counter()
    with tarfile.open(tar) as archive:
        for member in archive:
            if len(taken) >= options.photos:
                break
            person = member.name.partition("/")[0]
            if member.isfile() and people[person] < A_PERSON:
                people[person] += 1
                archive.extract(member, photos, filter="data")
                taken.add(member.name)
    landmarks = options.folder / "landmarks.jsonl"
    with open(known) as lines, open(landmarks, "w") as out:
        out.writelines(line for line in lines if json.loads(line)["file"] in taken)
    licence = "CelebA, non-commercial research only; pictures are not to be published"
    return ["--source", str(photos), "--landmarks", str(landmarks), "--licence", licence]


def _make_pictures(photos: Path, count: int) -> None:
    """One portrait, mirrored, tinted and scaled: ``A_PERSON`` pictures to each made-up person."""
    import numpy as np
    from PIL import Image
    from skimage.data import astronaut

    portrait = Image.fromarray(astronaut()[:300, 60:360])
    rng = np.random.default_rng(0)
    for number in range(count):
        side = int(rng.integers(240, 340))
        picture = np.asarray(portrait.resize((side, side), Image.Resampling.LANCZOS))
        picture = picture[:, ::-1] if rng.random() < 0.5 else picture
        person = photos / f"person-{number // A_PERSON:03d}"
        person.mkdir(exist_ok=True)
        tinted = (picture * rng.uniform(0.7, 1.0, size=3)).astype(np.uint8)
        Image.fromarray(tinted).save(person / f"{number % A_PERSON}.jpg", quality=95)


def _config(options: Options, tracking: str, shards: str) -> Path:
    """The run's config: every term of the paper, a network small enough for a minute or two on two cores."""
    folder = options.folder
    weights = options.shared / "weights" / "mobilefacenet_casia.safetensors"
    if not weights.exists():
        weights = folder / "recogniser.safetensors"
        _random_recogniser(weights)
    values: dict[str, Any] = {
        "name": "local",
        "runs": str(folder / "runs"),
        "architecture": {"name": "coupling", "steps": 2, "widths": [16, 32], "detail_gain": [0.3, 0.06]},
        "data": {"shards": shards},
        # Empty at first, as on a node that has never seen the shards; each is checked against the manifest.
        "cache": str(folder / "cache" / "shards"),
        "recogniser": {"name": "mobilefacenet-casia", "weights": str(weights)},
        "discriminator": {"width": 8, "pool_size": 16},
        "predictor": {"width": 16},
        "objective": {"save": True, "near_miss": 0.3},
        "optimizer": {"lr": 6e-4, "warmup": 32},
        "total_images": options.images,
        "batch": 8,
        "ema": 50,
        "device": "cpu",
        "threads": 1,
        "log_every": 16,
        "sample_every": max(8, options.images // 2),
        "checkpoint_every": max(8, options.images // 4),
        "checkpoints": f"s3://{BUCKET}/checkpoints",
        "mlflow": tracking,
    }
    path = folder / "config.json"
    path.write_text(json.dumps(values, indent=1) + "\n")
    return path


def _random_recogniser(path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    from mien.recognisers import MobileFaceNet

    torch.manual_seed(0)
    save_file(MobileFaceNet("casia").state_dict(), path)


def _registered(tracking: str) -> tuple[str, str]:
    """Run and version of ``mien@candidate``."""
    query = f"{tracking}/api/2.0/mlflow/registered-models/alias?name=mien&alias=candidate"
    try:
        with urllib.request.urlopen(query, timeout=30) as answer:  # noqa: S310 - our own server
            version = json.load(answer)["model_version"]
    except urllib.error.HTTPError as error:
        raise ChainError(f"training registered no model: {error}") from error
    return version["run_id"], version["version"]


def _experiment(uri: str, run_id: str) -> str:
    from mlflow import MlflowClient

    return str(MlflowClient(uri, uri).get_run(run_id).info.experiment_id)


def _say(text: str) -> None:
    sys.stderr.write(f"== {text}\n")
    sys.stderr.flush()


def main() -> int:
    """Exit codes: 0 the chain went through, 1 a part failed."""
    parser = argparse.ArgumentParser(prog="training.local", description="The whole chain on this machine, small.")
    parser.add_argument("--folder", type=Path, default=Path("runs/local"), help="of everything it leaves [runs/local]")
    parser.add_argument("--photos", type=int, default=160, help="pictures taken [160]")
    parser.add_argument("--images", type=int, default=160, help="images trained on [160]")
    parser.add_argument("--faces", type=int, default=24, help="faces that evaluate looks at [24]")
    parser.add_argument("--fresh", action="store_true", help="begin anew: remove what an earlier run left there")
    chosen = parser.parse_args()
    shared = Path(os.environ.get("MIEN_SHARED", "../shared")).resolve()
    folder = chosen.folder.resolve()
    if chosen.fresh and (folder / "logs").is_dir():
        shutil.rmtree(folder)
    try:
        report = run(Options(folder, shared, photos=chosen.photos, images=chosen.images, faces=chosen.faces))
    except (ChainError, storage.StorageError) as error:
        sys.stderr.write(f"local: {error}\n")
        return 1
    sys.stdout.write(f"{report}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
