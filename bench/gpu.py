"""The service on a GPU, checked and measured in a minute and a half: ``python -m bench.gpu --out gpu-serving.json``.

For a GPU that is lent for minutes, on a machine that has torch and little else. Each part writes its figures into the
report when it ends, so that whatever stops the run leaves what came before; a part that fails says so and the next one
begins.

- *same*: every way to run the network (arithmetic, memory layout, captured graphs) gives the faces that the CPU gives,
  and faces cross over: what one anonymized, the other recovers,
- *network*: faces a second by way and batch size, on the device alone and from host to host,
- *paper*: the authors' generator at float32 in NCHW beside it, its weights random,
- *swap*: models take turns under load; no request fails and every answer is the work of the model it names,
- *doors*: engine, HTTP and gRPC as :mod:`bench.serving` measures them, the latter two by :mod:`bench.doors` where
  BentoML is missing,
- *compile*: ``torch.compile`` gives the same faces; last, for it may take long.

Exit status: 1 where a check failed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import structlog
import torch

from bench import serving as bench
from bench.models import untrained

# Steps of 8 bits by which a face may differ, on average, from what the CPU makes of it.
_SAME = 0.25
# By how much more, on average, recovery may miss where anonymizing and recovering ran differently.
_CROSSED = 0.5
# The same for bfloat16, which the settings say recovers a little less.
_COARSE = 6.0
PASSWORD = "bench"  # noqa: S105


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=bench.ROOT / "models" / "mien-128")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=0.6, help="of every measurement")
    parser.add_argument("--budget", type=float, default=95.0, help="seconds after which no further part begins")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16, 64, 256])
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--out", type=Path, default=Path("gpu-serving.json"))
    asked = parser.parse_args()
    sys.exit(0 if run(asked) else 1)


def run(asked: argparse.Namespace) -> bool:
    """All parts; whether every check held."""
    began = time.monotonic()
    report: dict[str, Any] = {
        "machine": {"device": asked.device, "name": bench.device_name(asked.device)},
        "versions": {"torch": torch.__version__, "cuda": torch.version.cuda, "numpy": np.__version__},
        "failed": [],
    }
    for name in asked.parts:
        elapsed = time.monotonic() - began
        if elapsed > asked.budget:
            report[name] = {"skipped": f"the time was over after {elapsed:.0f} s"}
            continue
        bench.say(f"{name} ({elapsed:.0f} s)")
        try:
            report[name] = PARTS[name](asked, report)
            if not report[name].get("ok", True):
                report["failed"].append(name)
        except (Exception, SystemExit):
            report[name] = {"error": traceback.format_exc().splitlines()[-12:]}
            report["failed"].append(name)
        report[name]["seconds"] = round(time.monotonic() - began - elapsed, 1)
        asked.out.write_text(json.dumps(report, indent=2) + "\n")
        print(name, json.dumps(report[name])[:600], flush=True)  # noqa: T201
    return not report["failed"]


def ways(asked: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The ways to run the network, as the service's settings name them."""
    found: dict[str, dict[str, Any]] = {
        "float32": {},
        "channels_last": {"channels_last": True},
        "bfloat16": {"precision": "bfloat16"},
    }
    if asked.device.startswith("cuda"):
        found["graphs"] = {"cuda_graphs": True}
        found["bfloat16_graphs"] = {"precision": "bfloat16", "cuda_graphs": True, "channels_last": True}
    return found


# -- the same faces ---------------------------------------------------------------------------------------------------


def same(asked: argparse.Namespace, report: dict[str, Any]) -> dict[str, Any]:
    """Every way against the CPU, each with 13 faces: no power of two, so that filled batches are looked at too."""
    import mien
    from serving.runner import Runner

    truth = Likeness(Runner(mien.load(asked.model, device="cpu"), batch_size=16))
    out: dict[str, Any] = {"cpu": {"recovery_off_by": truth.missed(truth.safe)}, "ok": True}
    for name, how in ways(asked).items():
        runner = Runner(mien.load(asked.model, device=asked.device), batch_size=16, **how)
        runner.warm_up()
        out[name] = judge(runner, truth, coarse=how.get("precision") == "bfloat16")
        out["ok"] &= out[name]["ok"]
    return out


class Likeness:
    """Faces, their codes, and what one way to run the network makes of them."""

    def __init__(self, run: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        from mien.model import to_bytes, to_float

        self._run, self._to_bytes, self._to_float = run, to_bytes, to_float
        self.faces = bench.faces(13, 128)
        draw = np.random.default_rng(0)
        bits = run._model.bits  # type: ignore[attr-defined]
        self.codes = torch.from_numpy(draw.integers(0, 2, (len(self.faces), bits)).astype(bool))
        self.safe = self.anonymize()

    def anonymize(self) -> np.ndarray:
        """uint8 ``[B, S, S, 3]``."""
        return self._to_bytes(self._run(self._to_float(self.faces), self.codes))

    def missed(self, safe: np.ndarray) -> float:
        """By how many steps recovery of anonymized faces is off, on average."""
        back = self._to_bytes(self._run(self._to_float(safe), ~self.codes))
        return off(back, self.faces)


def off(a: np.ndarray, b: np.ndarray) -> float:
    """The mean difference in steps of 8 bits."""
    return float(np.abs(a.astype(int) - b.astype(int)).mean())


def judge(run: Any, truth: Likeness, *, coarse: bool) -> dict[str, Any]:
    """One way to run the network against the CPU's."""
    own = Likeness(run)
    usual = truth.missed(truth.safe)
    found = {
        "changed_by": off(own.safe, own.faces),
        "off_by": off(own.safe, truth.safe),
        "off_by_at_most": int(np.abs(own.safe.astype(int) - truth.safe.astype(int)).max()),
        "recovery_off_by": own.missed(own.safe),
        "recovery_of_the_cpus_off_by": own.missed(truth.safe),
        "recovery_by_the_cpu_off_by": truth.missed(own.safe),
    }
    recoveries = max(value for name, value in found.items() if name.startswith("recovery"))
    within = (_COARSE, _COARSE) if coarse else (_SAME, _CROSSED)
    ok = found["off_by"] <= within[0] and recoveries <= usual + within[1] and found["changed_by"] > 2
    return {**found, "ok": bool(ok)}


# -- speed ------------------------------------------------------------------------------------------------------------


def network(asked: argparse.Namespace, report: dict[str, Any]) -> dict[str, Any]:
    """Faces a second by way and batch size."""
    import mien
    from serving.runner import Runner

    out: dict[str, Any] = {}
    best = ("", 0, 0.0)
    for name, how in ways(asked).items():
        model = mien.load(asked.model, device=asked.device)
        out[name] = {}
        for size in asked.batches:
            on_device = bench.bare(model, size, asked.seconds / 2, **how)
            runner = Runner(model, batch_size=size, **how)
            crops, codes = torch.rand(size, 3, 128, 128) * 2 - 1, torch.zeros(size, model.bits, dtype=torch.bool)
            host = size / bench.seconds_of(lambda run=runner, a=crops, b=codes: run(a, b), asked.seconds / 2)
            out[name][size] = {"on_device": on_device, "host_to_host": host}
            if "bfloat16" not in name and on_device > best[2]:
                best = (name, size, on_device)
    return {"faces_per_second": out, "best": {"way": best[0], "batch": best[1], "faces_per_second": best[2]}}


def paper(asked: argparse.Namespace, report: dict[str, Any]) -> dict[str, Any]:
    """The authors' generator: arithmetic alone."""
    from mien import networks

    built = networks.build(networks.ResNetConfig(), bits=16, size=128).eval().to(asked.device)
    out = {}
    for size in [size for size in asked.batches if 1 < size <= 64] or [1]:
        images = torch.rand(size, 3, 128, 128, device=asked.device) * 2 - 1
        codes = torch.zeros(size, 16, device=asked.device) - 0.5
        out[size] = size / bench.seconds_of(lambda a=images, b=codes: bench.forward(built, a, b), asked.seconds)
    ours = report.get("network", {}).get("best", {}).get("faces_per_second")
    return {"faces_per_second": out, "ours_over_paper": ours / max(out.values()) if ours else None}


# -- the service ------------------------------------------------------------------------------------------------------


def swap(asked: argparse.Namespace, report: dict[str, Any]) -> dict[str, Any]:
    """Two models take turns every second while four callers ask without a pause, over the engine, PNG to PNG."""
    import mien
    from serving.engine import Engine
    from serving.metrics import Metrics
    from serving.settings import Settings

    graphs = asked.device.startswith("cuda")
    with tempfile.TemporaryDirectory() as scratch:
        other, place = Path(scratch) / "other", Path(scratch) / "place"
        untrained(other, seed=7)
        exchange(asked.model, place)
        settings = Settings(
            model=str(place), device=asked.device, batch_size=16, model_poll=0.2, cuda_graphs=graphs, workers=4
        )
        log = structlog.wrap_logger(None, wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
        engine = Engine(settings, Metrics(), log)
        engine.start()
        try:
            while engine.status == "loading":
                time.sleep(0.05)
            faces = bench.faces(4, 128)
            answers = asyncio.run(under_load(engine, bench.png(np.concatenate(list(faces))), place, asked, other))
        finally:
            engine.close()
        truth = {}
        for folder in (asked.model, other):
            model = mien.load(folder, device=asked.device)
            code = model.code_for("anonymize", PASSWORD)
            truth[model.digest] = np.concatenate(list(model.transform(faces, np.tile(code, (len(faces), 1)))))
    worst = max(off(picture, truth[digest]) for digest, picture in answers["made"])
    digests = [digest for digest, _ in answers["made"]]
    turns = sum(a != b for a, b in pairwise(digests))
    ok = not answers["errors"] and worst <= _SAME and set(digests) == set(truth) and answers["exchanged"] >= 4
    return {
        "ok": bool(ok),
        "exchanged": answers["exchanged"],
        "answers": len(digests),
        "turns_seen": turns,
        "worst_off_by": worst,
        "errors": answers["errors"][:3],
        "captured": graphs,
    }


async def under_load(
    engine: Any, picture: bytes, place: Path, asked: argparse.Namespace, other: Path
) -> dict[str, Any]:
    """Exchange the model six times while callers ask."""
    from pydantic import SecretStr

    from mien import pictures
    from serving.options import EditOptions

    options = EditOptions(password=SecretStr(PASSWORD), aligned=True)
    made: list[tuple[str, np.ndarray]] = []
    errors: list[str] = []
    stop = asyncio.Event()

    async def caller() -> None:
        while not stop.is_set():
            try:
                with engine.request("anonymize", "http", "bench") as call:
                    edited = await engine.run(call, lambda call=call: engine.edit(call, picture, options))
                made.append((edited.digest, pictures.decode(edited.data).pixels))
            except Exception as error:
                errors.append(repr(error))

    callers = [asyncio.ensure_future(caller()) for _ in range(4)]
    exchanged = 0
    for new in (other, asked.model) * 3:
        exchange(new, place)
        wanted = json.loads((new / "config.json").read_text())["digest"]
        ends = time.monotonic() + asked.budget / 2
        while engine.digest != wanted and time.monotonic() < ends:
            await asyncio.sleep(0.05)
        if engine.digest != wanted:
            errors.append(f"model {wanted[:12]} never came: {engine.models.failure}")
            break
        exchanged += 1
        await asyncio.sleep(asked.seconds / 2)
    stop.set()
    await asyncio.gather(*callers)
    return {"made": made, "errors": errors, "exchanged": exchanged}


def exchange(new: Path, place: Path) -> None:
    """Put a model in the place of another as a deployment would: config last."""
    place.mkdir(exist_ok=True)
    for name in ("model.safetensors", "config.json"):
        shutil.copyfile(new / name, place / f".{name}")
        (place / f".{name}").replace(place / name)


def doors(asked: argparse.Namespace, report: dict[str, Any]) -> dict[str, Any]:
    """:mod:`bench.serving`, short, the way and at the batch size that came out best."""
    best = report.get("network", {}).get("best", {"way": "float32", "batch": 16})
    how = ways(asked)[best["way"]]
    # Eight workers hold 32 faces each: what is larger than a part of that leaves the device waiting.
    batch = min(best["batch"], 64)
    measured = bench.measure(
        argparse.Namespace(
            model=asked.model,
            device=asked.device,
            seconds=2 * asked.seconds,
            faces=32,
            callers=16 if asked.device.startswith("cuda") else 4,
            rounds=3,
            batches=[batch],
            precision=how.get("precision", "float32"),
            channels_last=how.get("channels_last", False),
            cuda_graphs=how.get("cuda_graphs", False),
        )
    )
    print(bench.table(measured), flush=True)  # noqa: T201
    return measured


def compiled(asked: argparse.Namespace, report: dict[str, Any]) -> dict[str, Any]:
    """``torch.compile`` of one batch size."""
    import mien
    from serving.runner import Runner

    truth = Likeness(Runner(mien.load(asked.model, device="cpu"), batch_size=16))
    model = mien.load(asked.model, device=asked.device)
    began = time.monotonic()
    # 13 faces fill a batch of 16, so that one shape is compiled.
    runner = Runner(model, batch_size=16, compile=True, backend=asked.backend)
    out = judge(runner, truth, coarse=False)
    out["compiling_seconds"] = round(time.monotonic() - began, 1)
    images = torch.rand(16, 3, 128, 128, device=model.device) * 2 - 1
    codes = torch.zeros(16, model.bits, device=model.device) - 0.5
    seconds = bench.seconds_of(lambda: bench.forward(runner.on_device, images, codes), asked.seconds)
    return {**out, "faces_per_second_at_16": 16 / seconds}


PARTS: dict[str, Callable[[argparse.Namespace, dict[str, Any]], dict[str, Any]]] = {
    "same": same,
    "network": network,
    "paper": paper,
    "swap": swap,
    "doors": doors,
    "compile": compiled,
}


if __name__ == "__main__":
    main()
