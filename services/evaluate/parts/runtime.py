"""How fast: the paper's batch of 12, and the best rate, beside the paper's architecture on the same machine."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable

import numpy as np
import torch

from mien import networks, passwords
from services.evaluate.context import Context
from services.evaluate.figures import Result

_BATCHES = (1, 4, 12, 32)


def run(context: Context) -> Result:
    """Median seconds a batch of 12 uint8 faces, and images/s at the best of a few batch sizes."""
    result = Result()
    faces = np.resize(context.sample.faces.images, (max(_BATCHES), *context.sample.faces.images.shape[1:]))
    codes = passwords.random_codes(len(faces), context.subject.bits, np.random.default_rng(0))
    rates = {}
    for batch in _BATCHES:
        rates[batch] = batch / _median(lambda b=batch: context.subject.transform(faces[:b], codes[:b]), 5)  # type: ignore[misc]
    result.number("runtime.batch12.seconds", 12 / rates[12], 5)
    result.number("runtime.best.images-per-second", max(rates.values()), 5)
    result.number("runtime.best.batch", max(rates, key=rates.__getitem__))
    paper = networks.build(networks.ResNetConfig(), bits=context.subject.bits, size=faces.shape[1]).eval()
    images = torch.from_numpy(faces[:12].copy()).permute(0, 3, 1, 2).float() / 127.5 - 1
    conditions = networks.codes_to_tensor(torch.from_numpy(codes[:12]))
    with torch.inference_mode():
        seconds = _median(lambda: paper(images, conditions), 2)
    result.number("runtime.paper-architecture.batch12.seconds", seconds, 2)
    result.number("runtime.threads", torch.get_num_threads())
    threads = torch.get_num_threads()
    result.series["machine"] = (
        f"{platform.machine()}, {threads} thread{'s' if threads > 1 else ''}, torch {torch.__version__}"
    )
    return result


def _median(call: Callable[[], object], times: int) -> float:
    call()
    took = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        took.append(time.perf_counter() - start)
    return float(np.median(took))
