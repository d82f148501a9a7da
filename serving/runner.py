"""One pass of a model's network on its device, as fast as that device goes.

Everything that makes a pass faster is a switch of the settings, off by default, and none changes what a caller gets by
more than rounding: bfloat16 autocast, channels_last, ``torch.compile``, captured CUDA graphs. Compiling and capturing
need fixed shapes, so that batches are filled up to the next power of two; the networks have no batch statistics, so
what fills a batch changes nothing.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from mien.errors import ModelError
from mien.model import Model, unchanged
from mien.networks import codes_to_tensor


class Runner:
    """Transforms batches of crops.

    Args:
        model: whose network runs, on its device.
        batch_size: most crops in one call.
        precision: ``float32`` or ``bfloat16`` (autocast).
        channels_last: memory layout of the convolutions.
        compile: ``torch.compile`` for every batch shape.
        cuda_graphs: capture every batch shape.
        backend: of ``torch.compile``.

    Raises:
        ModelError: CUDA graphs without a CUDA device.
    """

    def __init__(
        self,
        model: Model,
        *,
        batch_size: int,
        precision: str = "float32",
        channels_last: bool = False,
        compile: bool = False,  # noqa: A002
        cuda_graphs: bool = False,
        backend: str = "inductor",
    ) -> None:
        if cuda_graphs and model.device.type != "cuda":
            raise ModelError("MIEN_CUDA_GRAPHS needs a CUDA device")
        self._model = model
        self._device = model.device
        self._precision = precision
        self._format = torch.channels_last if channels_last else torch.contiguous_format
        # A network may have chosen for some of its parts already.
        self._network: Any = model.network.to(memory_format=self._format) if channels_last else model.network
        if compile:
            self._network = torch.compile(self._network, backend=backend, dynamic=False)
        self._padded = compile or cuda_graphs
        self._graphs: dict[int, _Graph] = {}
        self._capture = cuda_graphs
        self.batch_size = batch_size

    def __call__(self, crops: Tensor, codes: Tensor) -> Tensor:
        """Transform crops.

        Args:
            crops: float32 ``[B, 3, S, S]`` in [-1, 1], 1 <= B <= batch_size.
            codes: bool ``[B, N]``.

        Returns:
            float32 ``[B, 3, S, S]`` on the CPU; not checked for being finite.
        """
        count = len(crops)
        size = self._bucket(count) if self._padded else count
        if size > count:
            crops = torch.cat([crops, crops.new_zeros(size - count, *crops.shape[1:])])
            codes = torch.cat([codes, codes.new_zeros(size - count, codes.shape[1])])
        with torch.inference_mode():
            images = self._sent(crops).to(torch.float32, memory_format=self._format)
            return self._fetched(self.on_device(images, codes_to_tensor(self._sent(codes)))[:count])

    def on_device(self, images: Tensor, conditions: Tensor) -> Tensor:
        """The pass itself, of what is on the device already and of a shape that may be compiled or captured.

        Args:
            images: float32 ``[B, 3, S, S]`` on the device.
            conditions: float32 ``[B, N]`` in {-0.5, +0.5} on the device.

        Returns:
            float ``[B, 3, S, S]`` on the device; where graphs are captured, valid until the next call.
        """
        if not self._capture:
            return self._pass(images, conditions)
        graph = self._graphs.get(len(images))
        if graph is None:
            graph = self._graphs[len(images)] = _Graph(self._pass, images, conditions)
        return graph(images, conditions)

    def _sent(self, tensor: Tensor) -> Tensor:
        # The driver copies pageable memory in small pieces; torch keeps pinned blocks for the next time.
        if self._device.type != "cuda":
            return tensor.to(self._device)
        return tensor.pin_memory().to(self._device, non_blocking=True)

    def _fetched(self, out: Tensor) -> Tensor:
        if self._device.type != "cuda":
            return out.float().cpu().contiguous()
        host = torch.empty(out.shape, dtype=torch.float32, pin_memory=True)
        host.copy_(out.float().contiguous(), non_blocking=True)
        torch.cuda.current_stream(self._device).synchronize()
        return host

    def warm_up(self) -> None:
        """Run once in every shape that is compiled or captured, else alone; and see that the model does its work.

        Raises:
            ModelError: the output is not finite, of another shape, or the face as it was.
        """
        sizes = sorted({self._bucket(n) for n in range(1, self.batch_size + 1)}) if self._padded else [1]
        size, bits = self._model.crop_size, self._model.bits
        # A ramp, and not noise or a constant: a network may well leave those alone.
        ramp = torch.linspace(-0.8, 0.8, size)
        crop = torch.stack([ramp.expand(size, -1), ramp[:, None].expand(-1, size), ramp.flip(0).expand(size, -1)])
        code = torch.arange(bits) % 2 == 0
        for count in sizes:
            crops = crop.expand(count, -1, -1, -1).contiguous()
            out = self(crops, code.expand(count, -1).contiguous())
            if out.shape != crops.shape or not bool(torch.isfinite(out).all()):
                raise ModelError("the model's output is not a finite picture of its input's shape")
            if unchanged(crops, out):
                raise ModelError("the model leaves faces as they are; is it trained?")

    def _bucket(self, count: int) -> int:
        return min(1 << (count - 1).bit_length(), self.batch_size)

    def _pass(self, images: Tensor, conditions: Tensor) -> Tensor:
        with self._autocast():
            out: Tensor = self._network(images, conditions)
        return out

    def _autocast(self) -> AbstractContextManager[Any]:
        if self._precision == "float32":
            return nullcontext()
        return torch.autocast(self._device.type, dtype=torch.bfloat16)


class _Graph:
    """A captured pass for one batch shape: its inputs are copied into place, and its kernels replayed."""

    def __init__(self, run: Any, images: Tensor, conditions: Tensor) -> None:
        self._images, self._conditions = images.clone(), conditions.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # cuDNN chooses its algorithms, the allocator its blocks
                run(self._images, self._conditions)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        # thread_local: another model may be serving on another thread meanwhile.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._out = run(self._images, self._conditions)

    def __call__(self, images: Tensor, conditions: Tensor) -> Tensor:
        self._images.copy_(images)
        self._conditions.copy_(conditions)
        self._graph.replay()
        out: Tensor = self._out
        return out
