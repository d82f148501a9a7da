"""How much of the bare network's speed is left behind each door: ``python -m bench.serving``.

One run, one machine, one model, so that the ratios mean something where the figures themselves do not travel:

- *bare*: the network alone at the batch size that suits the device best,
- *engine*: admission, queue, workers and batching around it, crops already decoded,
- *HTTP*, *gRPC*: the real service in a process of its own, aligned crops in and out as PNG, callers on this machine,
- *stream*: the same crops as frames of a ``TransformStream``, whose password is derived once and not for each,
- *codec*: decoding and encoding of such a request on one thread, which a door cannot do without,
- *lone*: one request of one crop to an idle service, in turns with the same work done here without a service; what a
  door adds is the median of the differences,
- *password*: what Argon2id takes of the processor, by design, of every request; on a CPU the network lacks it,
- *caller*: what a face takes of the processor on the callers' side, of which the service is innocent,
- *of what is possible*: a door against the machine that does the network, the codec, Argon2id and what the callers do,
  and nothing else: on a CPU these take turns, beside a GPU they do not. What is missing there the door itself costs,
- *paper*: the authors' generator at float32 in NCHW, its weights random: arithmetic alone.

Bare, engine and doors take turns and are compared within a turn: a machine is seldom as fast now as a minute ago.
Callers and service share the processor, so that what callers cost is in the figures of the doors.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import importlib.util
import io
import json
import logging
import os
import platform
import queue
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import structlog
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
PASSWORD = "bench"  # noqa: S105
DOORS = ("http", "grpc", "stream")
# Of an operation that is repeated: calls not counted.
_WARM_UP = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "mien-128")
    parser.add_argument("--seconds", type=float, default=8.0, help="of every measurement")
    parser.add_argument("--faces", type=int, default=32, help="aligned crops in one request")
    parser.add_argument("--callers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5, help="in which bare, engine and doors take turns")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--cuda-graphs", action="store_true")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "serving.json")
    asked = parser.parse_args()
    report = measure(asked)
    asked.out.write_text(json.dumps(report, indent=2) + "\n")
    print(table(report))  # noqa: T201
    print(asked.out)  # noqa: T201


def measure(asked: argparse.Namespace) -> dict[str, Any]:
    """All figures of one run."""
    import mien
    from mien import passwords

    model = mien.load(asked.model, device=asked.device)
    crops = faces(asked.faces, model.crop_size)
    workspace = passwords.Workspace()

    def derive() -> passwords.Code:
        # As the engine does it.
        return passwords.derive_code(PASSWORD, realm=model.realm, bits=model.bits, workspace=workspace)

    say("bare network")
    by_batch = {size: bare(model, size, asked.seconds / 2, **tuning(asked)) for size in asked.batches}
    best = max(by_batch, key=lambda size: by_batch[size])
    strip = png(np.concatenate(list(crops)))
    one = png(crops[0])
    codec = seconds_of(lambda: recode(strip), asked.seconds / 4)
    callers: dict[str, list[float]] = {name: [] for name in DOORS}
    with engine_of(asked, crops, best) as through_engine, service(asked, best) as (http, grpc):
        ways = {
            "bare": lambda seconds: bare(model, best, seconds, **tuning(asked)),
            "engine": through_engine,
            "http": lambda seconds: by_many(lambda: http_caller(http, strip), asked, seconds, callers["http"]),
            "grpc": lambda seconds: by_many(lambda: grpc_caller(grpc, strip), asked, seconds, callers["grpc"]),
            "stream": lambda seconds: by_many(lambda: stream_caller(grpc, strip), asked, seconds, callers["stream"]),
        }
        say("engine and doors")
        rounds = [{name: way(asked.seconds / 2) for name, way in ways.items()} for _ in range(asked.rounds)]
        say("a lone request")
        with http_caller(http, one) as by_http, grpc_caller(grpc, one) as by_grpc:
            alone = lone(model, one, derive, {"http": by_http, "grpc": by_grpc}, 2 * asked.seconds)
    password = cpu_seconds(derive)
    say("the paper's architecture")
    paper = paper_network(asked, best, model.bits, model.crop_size)
    caller = {name: statistics.median(taken) for name, taken in callers.items()}
    once = {"http": codec + password, "grpc": codec + password, "stream": codec}
    besides = {name: once[name] / asked.faces + taken for name, taken in caller.items()}
    rate = statistics.median(a["bare"] for a in rounds)
    return {
        "machine": {"device": asked.device, "name": device_name(asked.device), "cpus": os.cpu_count()},
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "model": {"digest": model.digest, "architecture": model.config.architecture.name},
        "faces_per_request": asked.faces,
        "callers": asked.callers,
        "bare": {"batch": best, "faces_per_second": rate, "by_batch": by_batch},
        "engine": shares(rounds, "engine", 0.0, asked.device),
        **{name: shares(rounds, name, besides[name], asked.device) for name in DOORS},
        "rounds": rounds,
        "codec": {"seconds_per_face": codec / asked.faces, "share_of_a_bare_face": codec / asked.faces * rate},
        "password": {
            "cpu_seconds": password,
            # Of the processor time in which the bare network does the faces of one request.
            "share_of_a_request": password * rate / asked.faces / (os.cpu_count() or 1),
        },
        "caller": {f"{name}_cpu_seconds_per_face": taken for name, taken in caller.items()},
        "lone": alone,
        "paper": {"faces_per_second": paper, "ours_over_paper": rate / paper},
    }


def shares(rounds: list[dict[str, float]], name: str, besides: float, device: str) -> dict[str, float]:
    """Medians over the rounds, each compared with what the bare network did in the same round."""
    return {
        "faces_per_second": statistics.median(a[name] for a in rounds),
        "of_bare": statistics.median(a[name] / a["bare"] for a in rounds),
        "of_possible": statistics.median(a[name] / most_possible(a["bare"], besides, device) for a in rounds),
    }


def most_possible(bare: float, besides: float, device: str) -> float:
    """Faces a second of a machine that does nothing but what a request cannot do without.

    Args:
        bare: faces a second of the network, which takes all processors of a CPU, or the GPU.
        besides: processor seconds a face of everything else.
        device: where the network runs.
    """
    cpus = os.cpu_count() or 1
    if device.startswith("cuda"):
        return min(bare, cpus / besides) if besides else bare
    return 1 / (1 / bare + besides / cpus)


def table(report: dict[str, Any]) -> str:
    """The report for people."""
    rows = [("bare network", report["bare"]["faces_per_second"], 1.0)]
    rows += [(n, report[n]["faces_per_second"], report[n]["of_bare"]) for n in ("engine", *DOORS)]
    lines = [f"{name:14} {rate:9.1f} faces/s {100 * ratio:6.1f} %" for name, rate, ratio in rows]
    for n, name in enumerate(DOORS, start=2):
        taken = "codec and callers leave" if name == "stream" else "codec, Argon2id and callers leave"
        lines[n] += f" of bare, {100 * report[name]['of_possible']:.0f} % of what {taken}"
    lone, paper, password = report["lone"], report["paper"], report["password"]
    lines.append(
        f"lone request   {1000 * lone['direct_seconds']:.1f} ms without a service ("
        + ", ".join(f"{name} {1000 * lone[name + '_seconds']:.1f}" for name in STAGES)
        + f"); http adds {lone['http_added_ms']:.1f} ms, grpc {lone['grpc_added_ms']:.1f} ms"
    )
    lines.append(
        f"Argon2id       {1000 * password['cpu_seconds']:.0f} ms of processor time a request, "
        f"{100 * password['share_of_a_request']:.0f} % of what its {report['faces_per_request']} faces take"
    )
    lines.append(
        "callers        "
        + ", ".join(f"{name} {1e6 * report['caller'][name + '_cpu_seconds_per_face']:.0f} us" for name in DOORS)
        + f" of processor time a face, against {1e6 / report['bare']['faces_per_second']:.0f} us that the network takes"
    )
    lines.append(
        f"paper (fp32)   {paper['faces_per_second']:9.1f} faces/s; ours does {paper['ours_over_paper']:.1f} x as many"
    )
    lines.append(
        f"PNG in and out costs {100 * report['codec']['share_of_a_bare_face']:.0f} % of a core while "
        f"the network does a face; batch {report['bare']['batch']}, {report['machine']['name']}"
    )
    return "\n".join(lines)


STAGES = ("decode", "password", "network", "encode")


def lone(
    model: Any, picture: bytes, derive: Callable[[], Any], doors: dict[str, Callable[[], None]], seconds: float
) -> dict[str, float]:
    """One request at a time, through each door and without any, in turns.

    Returns:
        Median seconds of each and of the :data:`STAGES` of the work, and the milliseconds that each door adds.
    """
    from mien import pictures

    taken: dict[str, list[float]] = {name: [] for name in (*STAGES, "direct", *doors)}
    ends = time.monotonic() + seconds
    rounds = 0
    while time.monotonic() < ends or rounds < _WARM_UP + 5:
        marks = [time.perf_counter()]
        decoded = pictures.decode(picture)
        marks.append(time.perf_counter())
        code = derive()
        marks.append(time.perf_counter())
        changed = model.transform(decoded.pixels[None], code[None])
        marks.append(time.perf_counter())
        pictures.encode(decoded.with_pixels(changed[0], None), "PNG")
        marks.append(time.perf_counter())
        for name, began, ended in zip(STAGES, marks, marks[1:], strict=False):
            taken[name].append(ended - began)
        taken["direct"].append(marks[-1] - marks[0])
        for name, ask in doors.items():
            began = time.perf_counter()
            ask()
            taken[name].append(time.perf_counter() - began)
        rounds += 1
    kept = {name: values[_WARM_UP:] for name, values in taken.items()}
    report = {f"{name}_seconds": statistics.median(values) for name, values in kept.items()}
    for name in doors:
        differences = [through - bare for through, bare in zip(kept[name], kept["direct"], strict=True)]
        report[f"{name}_added_ms"] = 1000 * statistics.median(differences)
    return report


# -- inside ---------------------------------------------------------------------------------------------------------


def tuning(asked: argparse.Namespace) -> dict[str, Any]:
    """How the network runs: settings of the service, and arguments of its runner."""
    names = ("precision", "channels_last", "cuda_graphs")
    return {name: getattr(asked, name) for name in names}


def bare(model: Any, size: int, seconds: float, **how: Any) -> float:
    """Faces a second of the network at one batch size, crops on the device before and after."""
    from serving.runner import Runner

    runner = Runner(model, batch_size=size, **how)
    codes = torch.zeros(size, model.bits, device=model.device) - 0.5
    images = torch.rand(size, 3, model.crop_size, model.crop_size, device=model.device) * 2 - 1
    if how.get("channels_last"):
        images = images.to(memory_format=torch.channels_last)
    return size / seconds_of(lambda: forward(runner.on_device, images, codes), seconds)


def forward(network: Any, images: torch.Tensor, codes: torch.Tensor) -> None:
    with torch.inference_mode():
        network(images, codes)
        if images.is_cuda:
            torch.cuda.synchronize()


def paper_network(asked: argparse.Namespace, size: int, bits: int, side: int) -> float:
    from mien import networks

    network = networks.build(networks.ResNetConfig(), bits=bits, size=side).eval().to(asked.device)
    codes = torch.zeros(size, bits, device=asked.device) - 0.5
    images = torch.rand(size, 3, side, side, device=asked.device) * 2 - 1
    return size / seconds_of(lambda: forward(network, images, codes), asked.seconds)


@contextmanager
def engine_of(asked: argparse.Namespace, crops: np.ndarray, batch: int) -> Iterator[Callable[[float], float]]:
    """Measures faces a second of requests that are admitted, wait, are worked on and batched, without pictures."""
    from serving.engine import Engine
    from serving.metrics import Metrics
    from serving.settings import Settings

    log = structlog.wrap_logger(None, wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    settings = Settings(model=str(asked.model), device=asked.device, batch_size=batch, model_poll=0, **tuning(asked))
    engine = Engine(settings, Metrics(), log)
    engine.start()
    while engine.status == "loading":
        time.sleep(0.05)
    if engine.model is None:
        raise SystemExit(f"no model in {asked.model}")
    images = torch.from_numpy(crops).permute(0, 3, 1, 2).float() / 127.5 - 1
    codes = torch.zeros(len(crops), engine.model.bits, dtype=torch.bool)

    async def caller(ends: float, finished: list[float]) -> None:
        while time.monotonic() < ends:
            with engine.request("anonymize", "http", "bench") as call:
                await engine.run(call, lambda: engine._batcher.transform(call.served.run, images, codes))
            finished.append(time.monotonic())

    async def callers(seconds: float) -> list[float]:
        finished: list[float] = []
        ends = time.monotonic() + seconds
        await asyncio.gather(*(caller(ends, finished) for _ in range(asked.callers)))
        return finished

    try:
        yield lambda seconds: asked.faces * rate_of(asyncio.run(callers(seconds + 1)))
    finally:
        engine.close()


# -- doors ----------------------------------------------------------------------------------------------------------


@contextmanager
def service(asked: argparse.Namespace, batch: int) -> Iterator[tuple[str, str]]:
    """``bentoml serve``, or :mod:`bench.doors` where there is none; gives the address of HTTP and that of gRPC."""
    import httpx

    port, grpc_port = free_ports(2)
    command = ["bench.doors", "--port", str(port), "--grpc-port", str(grpc_port)]
    if importlib.util.find_spec("bentoml"):
        command = ["bentoml", "serve", "serving.service:MienService", "--working-dir", str(ROOT)]
        command += ["--host", "127.0.0.1", "--port", str(port)]
    with tempfile.TemporaryDirectory() as home, open(Path(home) / "log", "wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", *command],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_die_with_parent,
            env={
                **os.environ,
                "MIEN_MODEL": str(asked.model.resolve()),
                "MIEN_DEVICE": asked.device,
                "MIEN_BATCH_SIZE": str(batch),
                "MIEN_GRPC_PORT": str(grpc_port),
                "MIEN_MAX_STREAMS": str(max(8, asked.callers)),
                "MIEN_MODEL_POLL": "0",
                **{f"MIEN_{name.upper()}": str(value) for name, value in tuning(asked).items()},
                "BENTOML_HOME": home,
            },
        )
        try:
            ends = time.monotonic() + 120
            while True:
                if process.poll() is not None or time.monotonic() > ends:
                    raise SystemExit((Path(home) / "log").read_text())
                try:
                    if httpx.get(f"http://127.0.0.1:{port}/readyz", timeout=2, trust_env=False).status_code == 200:
                        break
                except httpx.HTTPError:
                    pass
                time.sleep(0.2)
            yield f"http://127.0.0.1:{port}", f"127.0.0.1:{grpc_port}"
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait(30)


Asks = Callable[[], None]


@contextmanager
def http_caller(url: str, picture: bytes) -> Iterator[Asks]:
    import httpx

    with httpx.Client(base_url=url, timeout=120, trust_env=False) as client:
        fields = {"password": PASSWORD, "aligned": "true"}
        yield lambda: client.post("/v1/anonymize", files={"image": picture}, data=fields).raise_for_status() and None


@contextmanager
def grpc_caller(address: str, picture: bytes) -> Iterator[Asks]:
    import grpc

    from mien.v1 import face_identity_pb2 as pb
    from mien.v1.face_identity_pb2_grpc import FaceIdentityStub

    with grpc.insecure_channel(address, [("grpc.max_receive_message_length", -1)]) as channel:
        stub = FaceIdentityStub(channel)
        message = pb.EditRequest(image=picture, options=pb.EditOptions(password=PASSWORD, aligned=True))
        yield lambda: stub.Anonymize(message, timeout=120) and None


@contextmanager
def stream_caller(address: str, picture: bytes) -> Iterator[Asks]:
    """One frame at a time, like the other callers."""
    import grpc

    from mien.v1 import face_identity_pb2 as pb
    from mien.v1.face_identity_pb2_grpc import FaceIdentityStub

    edit = pb.EditOptions(password=PASSWORD, aligned=True)
    options = pb.StreamOptions(operation=pb.OPERATION_ANONYMIZE, edit=edit, fail_without_face=True)
    frame = pb.TransformStreamRequest(frame=pb.Frame(encoded=picture))
    sent: queue.SimpleQueue[Any] = queue.SimpleQueue()
    sent.put(pb.TransformStreamRequest(options=options))
    with grpc.insecure_channel(address, [("grpc.max_receive_message_length", -1)]) as channel:
        answers = FaceIdentityStub(channel).TransformStream(iter(sent.get, None))

        def ask() -> None:
            sent.put(frame)
            next(answers)

        try:
            yield ask
        finally:
            sent.put(None)
        for _ in answers:  # until the stream's place is free again
            pass


def by_many(
    make: Callable[[], AbstractContextManager[Asks]], asked: argparse.Namespace, seconds: float, costs: list[float]
) -> float:
    """Faces a second of callers that ask without a pause; what a face takes of the processor here goes to ``costs``."""
    finished: list[float] = []

    def run(ask: Asks) -> None:
        while time.monotonic() < ends:
            ask()
            finished.append(time.monotonic())

    with ExitStack() as callers:
        asks = [callers.enter_context(make()) for _ in range(asked.callers)]
        threads = [threading.Thread(target=run, args=(ask,)) for ask in asks]
        ends = time.monotonic() + seconds + 1
        began = time.process_time()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    costs.append((time.process_time() - began) / len(finished) / asked.faces)
    return asked.faces * rate_of(finished)


def rate_of(finished: list[float]) -> float:
    """Answers a second, from the first to the last: before the first, and at the end, the load is not full."""
    finished = sorted(finished)
    return (len(finished) - 1) / (finished[-1] - finished[0])


# -- small things ---------------------------------------------------------------------------------------------------


def seconds_of(call: Callable[[], object], seconds: float) -> float:
    """The median time of one call."""
    for _ in range(_WARM_UP):
        call()
    taken: list[float] = []
    ends = time.monotonic() + seconds
    while time.monotonic() < ends or len(taken) < 3:
        began = time.perf_counter()
        call()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def cpu_seconds(call: Callable[[], object]) -> float:
    """The median processor time of one call, of all threads."""
    taken = []
    for _ in range(7):
        began = time.process_time()
        call()
        taken.append(time.process_time() - began)
    return statistics.median(taken)


def faces(count: int, side: int) -> np.ndarray:
    """uint8 ``[count, side, side, 3]``: one real face, moved, so that PNG has something real to compress."""
    from skimage import data

    photo = np.asarray(Image.fromarray(data.astronaut()[20:200, 140:320]).resize((side, side)))
    return np.stack([np.roll(photo, 3 * n, axis=1) for n in range(count)])


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def recode(data: bytes) -> None:
    from mien import pictures

    pictures.encode(pictures.decode(data), "PNG")


def _die_with_parent() -> None:
    """Linux: the kernel ends the service when the benchmark is killed; its worker follows by itself."""
    PR_SET_PDEATHSIG = 1
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for probe in sockets:
        probe.bind(("127.0.0.1", 0))
    ports = [int(probe.getsockname()[1]) for probe in sockets]
    for probe in sockets:
        probe.close()
    return ports


def device_name(device: str) -> str:
    if device.startswith("cuda"):
        return str(torch.cuda.get_device_name())
    names = [line.split(":")[1] for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    return names[0].strip() if names else platform.processor()


def say(what: str) -> None:
    print(f"... {what}", file=sys.stderr, flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
