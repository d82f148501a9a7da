"""One pass of the network, every way the settings can ask for; with a CUDA device also there (``-m gpu``)."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import mien
from mien import networks
from mien.errors import ModelError
from mien.model import to_bytes, to_float
from serving.runner import Runner

SHIPPED = Path(__file__).resolve().parents[2] / "models" / "mien-128"
GRAPHS = {"cuda_graphs": True}
BFLOAT = {"precision": "bfloat16"}

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture(scope="module")
def faces() -> np.ndarray:
    """uint8 ``[5, 128, 128, 3]``: no power of two, so that batches are filled up where shapes are fixed."""
    from skimage import data

    photo = data.astronaut()
    return np.stack([photo[40 + n : 168 + n, 160:288] for n in range(5)])


@pytest.fixture(scope="module")
def codes() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 2, (5, 128)).astype(bool))


def run(model: mien.Model, faces: np.ndarray, codes: torch.Tensor, **how: Any) -> np.ndarray:
    return to_bytes(Runner(model, batch_size=8, **how)(to_float(faces), codes[:, : model.bits])).astype(int)


@pytest.mark.parametrize("how", [{"channels_last": True}, BFLOAT, {"compile": True, "backend": "eager"}], ids=str)
def test_no_way_to_run_it_changes_what_comes_out(
    tiny_model: Path, faces: np.ndarray, codes: torch.Tensor, how: dict[str, Any]
) -> None:
    model = mien.load(tiny_model, device="cpu")
    usual = model.transform(faces, codes[:, : model.bits].numpy()).astype(int)
    assert np.abs(usual - faces).mean() > 1
    difference = np.abs(run(mien.load(tiny_model, device="cpu"), faces, codes, **how) - usual)
    if how == BFLOAT:
        assert 0 < difference.mean() < 3, "bfloat16 is coarse, and was asked for"
    else:
        assert difference.max() <= 1


def test_fixed_shapes_are_powers_of_two_and_the_batch_size(tiny_model: Path) -> None:
    seen: list[int] = []

    def backend(graph: Any, inputs: list[torch.Tensor]) -> Any:
        seen.append(next(len(x) for x in inputs if x.shape[1:] == (3, 128, 128)))
        return graph.forward

    model = mien.load(tiny_model, device="cpu")
    runner = Runner(model, batch_size=3, compile=True, backend=backend)  # type: ignore[arg-type]
    runner.warm_up()
    warm = sorted(set(seen))
    assert warm == [1, 2, 3]
    seen.clear()
    for count in (1, 2, 3):
        crops, codes = torch.rand(count, 3, 128, 128), torch.zeros(count, model.bits, dtype=torch.bool)
        assert runner(crops, codes).shape == crops.shape
    assert seen == [], "a shape was compiled while requests wait"


class Constant(torch.nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, images: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        return images + self.value


@pytest.mark.parametrize(("value", "said"), [(0.0, "leaves faces as they are"), (torch.nan, "not a finite picture")])
def test_a_model_that_does_not_do_its_work_never_serves(tiny_model: Path, value: float, said: str) -> None:
    config = mien.load(tiny_model, device="cpu").config
    runner = Runner(mien.Model(Constant(value), config, device="cpu"), batch_size=4)
    with pytest.raises(ModelError, match=said):
        runner.warm_up()


def test_graphs_without_a_device_to_capture_them_are_refused(tiny_model: Path) -> None:
    with pytest.raises(ModelError, match="MIEN_CUDA_GRAPHS"):
        Runner(mien.load(tiny_model, device="cpu"), batch_size=4, cuda_graphs=True)


# -- on a GPU: python -m pytest -m gpu tests/serving/test_runner.py ----------------------------------------------------


@pytest.mark.gpu
@cuda
@pytest.mark.parametrize("how", [{}, {"channels_last": True}, GRAPHS, BFLOAT, {**BFLOAT, **GRAPHS}], ids=str)
@pytest.mark.parametrize("which", ["tiny", "shipped"])
def test_on_a_gpu_faces_are_those_of_the_cpu_and_recover_across(
    tiny_model: Path, faces: np.ndarray, codes: torch.Tensor, which: str, how: dict[str, Any]
) -> None:
    folder = SHIPPED if which == "shipped" else tiny_model
    here, there = mien.load(folder, device="cpu"), mien.load(folder, device="cuda")
    code = codes[:, : here.bits]
    usual = here.transform(faces, code.numpy())
    runner = Runner(there, batch_size=8, **how)
    runner.warm_up()
    # Twice: the first may be what was captured.
    made = [to_bytes(runner(to_float(faces), code)) for _ in range(2)]
    assert np.abs(made[0].astype(int) - made[1]).max() <= 1
    coarse = "precision" in how
    assert np.abs(made[0].astype(int) - usual).mean() < (6 if coarse else 0.25)
    missed = np.abs(here.transform(usual, ~code.numpy()).astype(int) - faces).mean()
    crossed = np.abs(here.transform(made[0], ~code.numpy()).astype(int) - faces).mean()
    assert crossed < missed + (6 if coarse else 0.5)


@pytest.mark.gpu
@cuda
def test_a_model_is_captured_while_another_one_serves(tiny_model: Path, other_model: Path) -> None:
    """As when models are exchanged: on a thread of its own, beside passes that go on."""
    one, two = (Runner(mien.load(m, device="cuda"), batch_size=4, **GRAPHS) for m in (tiny_model, other_model))
    one.warm_up()
    crops = torch.rand(4, 3, 128, 128) * 2 - 1
    codes = torch.zeros(4, 16, dtype=torch.bool)
    usual, stop = one(crops, codes), threading.Event()
    worst: list[float] = []

    def serve() -> None:
        while not stop.is_set():
            worst.append(float((one(crops, codes) - usual).abs().max()))

    serving = threading.Thread(target=serve)
    serving.start()
    try:
        two.warm_up()
    finally:
        stop.set()
        serving.join(30)
    assert worst
    assert max(worst) < 1e-3
    plain = networks.codes_to_tensor(codes).cuda()
    with torch.inference_mode():
        expected = mien.load(other_model, device="cuda").network(crops.cuda(), plain).cpu()
    assert (two(crops, codes) - expected).abs().max() < 1e-2


@pytest.mark.gpu
@cuda
def test_the_service_takes_the_gpu_and_finds_and_gives_back_a_face_there(
    run_engine: Callable[..., Any], astronaut: bytes, encode: Callable[..., bytes]
) -> None:
    """A whole picture: detection, crops, blending; what the GPU anonymized the CPU gives back."""

    from pydantic import SecretStr

    from serving.engine import Call
    from serving.options import EditOptions

    options = EditOptions(password=SecretStr("correct horse"))
    on_gpu = run_engine(SHIPPED, device="cuda", cuda_graphs=True, batch_size=4).engine
    assert on_gpu.model.device.type == "cuda"
    assert on_gpu.model.detector.device.startswith("cuda")
    safe = on_gpu.edit(_begun(on_gpu, Call("anonymize", "grpc", "1")), astronaut, options)
    here = mien.load(SHIPPED, device="cpu")
    expected = [face.box for face in here.detect(Image.open(io.BytesIO(astronaut)))]
    assert np.allclose([face.box for face in safe.faces], expected, atol=4)
    back = here.recover(Image.open(io.BytesIO(safe.data)), "correct horse")
    before, after, hidden = (
        np.asarray(picture.convert("RGB")).astype(int)
        for picture in (Image.open(io.BytesIO(astronaut)), back, Image.open(io.BytesIO(safe.data)))
    )
    assert np.abs(after - before).mean() < 0.25 * np.abs(hidden - before).mean()


def _begun(engine: Any, call: Any) -> Any:
    call.served = engine.models.current
    return call
