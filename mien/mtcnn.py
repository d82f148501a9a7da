"""MTCNN on a CPU: facenet-pytorch's algorithm, weights and answers, four times as fast.

What a frame costs there is mostly not the networks. Here

- a summed-area table gives every level of the pyramid, and every candidate's crop, at once and exactly: the bins are
  those of ``interpolate(mode="area")``, their sums are integers, and their means the same floats;
- the first network slides over windows that show some of the picture, not over the gray border around it;
- max pooling is two comparisons of slices, which vectorise, and the box of a window is regressed only where there may
  be a face.

The networks see the same numbers as facenet-pytorch's, but sum in another order: what is found agrees to about 1e-4
pixels (tests/mien/test_mtcnn.py).
"""

from __future__ import annotations

import math
from functools import lru_cache, reduce
from typing import Any, Final, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

_GRAY: Final = 127
"""Of the border: as good as the networks' zero, and a whole number."""
_WINDOW: Final = 12
"""Side of what the first network sees at once, in steps of 2."""

Bins = tuple[NDArray[np.int64], NDArray[np.int64]]
"""Start and end of each output pixel's source pixels."""


def accelerate(network: Any) -> None:
    """Exchange the max pooling of a ``facenet_pytorch.MTCNN``, in place, for one that takes a tenth of a CPU's time."""
    for part in (network.pnet, network.rnet, network.onet):
        for name, layer in list(part.named_children()):
            if isinstance(layer, nn.MaxPool2d) and layer.stride == 2 and layer.ceil_mode:
                setattr(part, name, _MaxPool(cast(int, layer.kernel_size)))


def find(
    network: Any, pixels: NDArray[np.uint8], border: int
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Faces in a picture with a gray border around it.

    Args:
        network: ``facenet_pytorch.MTCNN`` on the CPU.
        pixels: uint8 RGB ``[H, W, 3]``, without the border.
        border: its width.

    Returns:
        Boxes ``[F, 4]``, confidences ``[F]`` and landmarks ``[F, 5, 2]`` in coordinates of the picture without its
        border, each as facenet-pytorch's ``detect`` has them; the largest first.
    """
    from facenet_pytorch.models.utils import detect_face as facenet

    height, width = pixels.shape[0] + 2 * border, pixels.shape[1] + 2 * border
    first, second, third = network.thresholds
    with torch.inference_mode():
        table = _Table(pixels, border)
        boxes = _propose(network, table, (height, width), first)
        boxes, crops = _crops(table, facenet.rerec(boxes), (height, width), 24)
        if len(boxes):
            regression, chances = network.rnet(crops)
            boxes = torch.cat([boxes[:, :4], chances[:, 1:]], dim=1)
            sure = chances[:, 1] > second
            boxes, regression = boxes[sure], regression[sure]
            picked = _nms(boxes, 0.7)
            boxes = facenet.rerec(facenet.bbreg(boxes[picked], regression[picked]))
            boxes, crops = _crops(table, boxes, (height, width), 48)
        if not len(boxes):
            return np.zeros((0, 4)), np.zeros(0), np.zeros((0, 5, 2))
        regression, points, chances = network.onet(crops)
        boxes = torch.cat([boxes[:, :4], chances[:, 1:]], dim=1)
        sure = chances[:, 1] > third
        boxes, regression, points = boxes[sure], regression[sure], points[sure]
        side_x, side_y = boxes[:, 2:3] - boxes[:, 0:1] + 1, boxes[:, 3:4] - boxes[:, 1:2] + 1
        points = torch.stack(
            [side_x * points[:, :5] + boxes[:, 0:1] - 1, side_y * points[:, 5:] + boxes[:, 1:2] - 1], dim=2
        )
        boxes = facenet.bbreg(boxes, regression)
        one = torch.zeros(len(boxes), dtype=torch.int64)
        picked = facenet.batched_nms_numpy(boxes[:, :4], boxes[:, 4], one, 0.7, "Min")
        found, places = boxes[picked].numpy(), points[picked].numpy()
    order = np.argsort((found[:, 2] - found[:, 0]) * (found[:, 3] - found[:, 1]))[::-1]
    found, places = found[order].astype(np.float64), places[order].astype(np.float64)
    return found[:, :4] - border, found[:, 4], places - border


class _Table:
    """The picture's summed-area table: means over any rectangles of the bordered picture, exactly."""

    def __init__(self, pixels: NDArray[np.uint8], border: int) -> None:
        self.border = border
        self.height, self.width = pixels.shape[:2]
        kind = torch.int32 if pixels.size // 3 * 255 < 2**31 else torch.int64
        # Of the difference from the border, which therefore counts nothing and need not be in the table.
        planes = torch.from_numpy(pixels.copy()).permute(2, 0, 1).to(kind) - _GRAY
        sums = planes.cumsum(2, dtype=kind).cumsum(1, dtype=kind)
        self.sums: NDArray[Any] = F.pad(sums, (1, 0, 1, 0)).numpy()

    def level(self, rows: Bins, columns: Bins) -> Tensor:
        """Means as the networks want them, float32 ``[1, 3, rows, columns]``."""
        (top, bottom), (left, right) = self._inside(rows, self.height), self._inside(columns, self.width)
        strips = np.take(self.sums, bottom, axis=1) - np.take(self.sums, top, axis=1)
        sums = np.take(strips, right, axis=2) - np.take(strips, left, axis=2)
        return torch.from_numpy(self._mean(sums, _count(rows)[:, None], _count(columns)))[None]

    def crops(self, rows: Bins, columns: Bins) -> Tensor:
        """The same for many rectangles: bins ``[K, S]`` each way to float32 ``[K, 3, S, S]``."""
        (top, bottom), (left, right) = self._inside(rows, self.height), self._inside(columns, self.width)
        stride = self.width + 1
        flat = self.sums.reshape(3, -1)
        top, bottom = top[:, :, None] * stride, bottom[:, :, None] * stride
        left, right = left[:, None], right[:, None]
        sums = (
            np.take(flat, bottom + right, axis=1)
            - np.take(flat, bottom + left, axis=1)
            - np.take(flat, top + right, axis=1)
            + np.take(flat, top + left, axis=1)
        ).transpose(1, 0, 2, 3)
        return torch.from_numpy(self._mean(sums, _count(rows)[:, None, :, None], _count(columns)[:, None, None]))

    def _inside(self, bins: Bins, side: int) -> Bins:
        return np.clip(bins[0] - self.border, 0, side), np.clip(bins[1] - self.border, 0, side)

    @staticmethod
    def _mean(sums: NDArray[Any], rows: NDArray[Any], columns: NDArray[Any]) -> NDArray[np.float32]:
        # In the order of adaptive_avg_pool2d: one rounding more or less would be another number.
        total = sums + _GRAY * (rows * columns).astype(sums.dtype)
        mean: NDArray[np.float32] = total.astype(np.float32)
        mean /= rows.astype(np.float32)
        mean /= columns.astype(np.float32)
        mean -= np.float32(127.5)
        mean *= np.float32(0.0078125)
        return mean


def _propose(network: Any, table: _Table, size: tuple[int, int], threshold: float) -> Tensor:
    """The first network over all levels: boxes ``[K, 5]`` with chances, not yet square."""
    height, width = size
    found: list[Tensor] = []
    levels: list[Tensor] = []
    scale = 12.0 / network.min_face_size
    shorter = min(height, width) * scale
    while shorter >= 12:
        rows, y = _windows(height, int(height * scale + 1), table.border, table.height)
        columns, x = _windows(width, int(width * scale + 1), table.border, table.width)
        corners, chances, regression = _slide(network.pnet, table.level(rows, columns), threshold)
        corners += torch.tensor([x, y])
        low, high = ((2 * corners + 1) / scale).floor(), ((2 * corners + _WINDOW) / scale).floor()
        found.append(torch.cat([low, high, chances[:, None], regression], dim=1))
        levels.append(torch.full((len(low),), len(levels)))
        scale, shorter = scale * network.factor, shorter * network.factor
    boxes, level = torch.cat(found), torch.cat(levels)
    boxes = boxes[_nms(boxes, 0.5, level)]
    boxes = boxes[_nms(boxes, 0.7)]
    sides = (boxes[:, 2:4] - boxes[:, :2]).repeat(1, 2)
    return torch.cat([boxes[:, :4] + boxes[:, 5:] * sides, boxes[:, 4:5]], dim=1)


@lru_cache(maxsize=256)
def _windows(side: int, level: int, border: int, inner: int) -> tuple[Bins, int]:
    """The bins of one axis of a level that windows showing the picture see, and the number of the first window.

    The same for all frames of a clip; not to be written to.
    """
    start, end = _bins(np.array([0]), np.array([side]), level)
    shown = np.flatnonzero((end[0] > border) & (start[0] < border + inner))
    first = max(0, math.ceil((int(shown[0]) - _WINDOW + 1) / 2))
    # Where the last window ends beyond the level, all of the level is taken: pooling then rounds up as it did.
    until = min(level, int(shown[-1]) // 2 * 2 + _WINDOW)
    return (start[0, 2 * first : until], end[0, 2 * first : until]), first


def _slide(network: Any, level: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """PNet: ``[1, 3, h, w]`` to windows float ``[K, 2]`` (x, y), chances ``[K]`` and box regression ``[K, 4]``."""
    features = network.pool1(network.prelu1(network.conv1(level)))
    features = network.prelu3(network.conv3(network.prelu2(network.conv2(features))))
    # Two outputs, of which softmax sees the difference alone.
    weight = network.conv4_1.weight
    bias = network.conv4_1.bias
    lead = F.conv2d(features, weight[1:] - weight[:1], bias[1:] - bias[:1])[0, 0]
    y, x = torch.nonzero(lead >= math.log(threshold / (1 - threshold)) - 1e-3, as_tuple=True)
    there = features[0, :, y, x].T
    chances = F.linear(there, weight[:, :, 0, 0], bias).softmax(dim=1)[:, 1]
    sure = chances >= threshold
    regression = F.linear(there[sure], network.conv4_2.weight[:, :, 0, 0], network.conv4_2.bias)
    return torch.stack([x[sure], y[sure]], dim=1).float(), chances[sure], regression


class _MaxPool(nn.Module):
    """``MaxPool2d(side, 2, ceil_mode=True)``: the same numbers, by comparing slices."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def forward(self, x: Tensor) -> Tensor:
        down, right = (max(0, -(-(n - self.side) // 2)) * 2 + self.side - n for n in x.shape[2:])
        if down > 0 or right > 0:
            x = F.pad(x, (0, right, 0, down), value=-math.inf)
        height, width = x.shape[2] - self.side + 1, x.shape[3] - self.side + 1
        x = reduce(torch.maximum, [x[:, :, i : i + height : 2] for i in range(self.side)])
        return reduce(torch.maximum, [x[..., i : i + width : 2] for i in range(self.side)])


def _crops(table: _Table, boxes: Tensor, size: tuple[int, int], side: int) -> tuple[Tensor, Tensor]:
    """Boxes that have a pixel in the bordered picture, and what they show, ``[K, 3, side, side]``."""
    from facenet_pytorch.models.utils import detect_face as facenet

    if not len(boxes):
        return boxes, torch.zeros(0, 3, side, side)
    y, y_end, x, x_end = (edge.astype(np.int64) for edge in facenet.pad(boxes, size[1], size[0]))
    some = (y_end >= y) & (x_end >= x)
    # facenet-pytorch counts from one here.
    rows = _bins(y[some] - 1, y_end[some], side)
    columns = _bins(x[some] - 1, x_end[some], side)
    return boxes[torch.from_numpy(some)], table.crops(rows, columns)


def _bins(start: NDArray[np.int64], end: NDArray[np.int64], count: int) -> Bins:
    """Bins of adaptive pooling of ``start:end`` to ``count`` pixels, each ``[K, count]``."""
    length, number = (end - start)[:, None], np.arange(count)
    return start[:, None] + number * length // count, start[:, None] - (-(number + 1) * length // count)


def _count(bins: Bins) -> NDArray[np.int64]:
    return bins[1] - bins[0]


def _nms(boxes: Tensor, threshold: float, groups: Tensor | None = None) -> Tensor:
    from torchvision.ops import batched_nms, nms

    if groups is None:
        return nms(boxes[:, :4], boxes[:, 4], threshold)  # type: ignore[no-any-return]
    return batched_nms(boxes[:, :4], boxes[:, 4], groups, threshold)  # type: ignore[no-any-return]
