"""Changing the faces of several frames at once: crops of all of them meet in one batch of the network.

Fail closed: a face whose place is only guessed, that the network cannot transform, or that comes back as it went, is
masked, and said to be.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mien import compositing, geometry
from mien.errors import ModelError
from mien.geometry import Matrix
from mien.model import Operation
from mien.passwords import Code
from mien.video.masking import mask
from mien.video.tracking import State

Transform = Callable[[Tensor, NDArray[np.bool_]], Tensor]
"""Float ``[B, 3, S, S]`` in [-1, 1] and bool ``[B, N]`` to float ``[B, 3, S, S]``; :meth:`Model.transform_float`."""

# As for single pictures: half an 8-bit step.
_UNCHANGED: Final = 1 / 255
# Ellipse over a face whose place is guessed, in crop sides; the crop is about 2.5 faces wide.
_HELD_MARGIN: Final = 1.15
_FAILED_MARGIN: Final = 1.0


@dataclass(frozen=True, eq=False)
class FaceInFrame:
    """A face to change."""

    track: int
    matrix: Matrix
    state: State
    code: Code


@dataclass(eq=False)
class Edited:
    """A frame after its faces were changed."""

    pixels: NDArray[np.uint8]
    transformed: list[int] = field(default_factory=list)
    """Tracks."""
    masked: list[int] = field(default_factory=list)
    """Tracks that could not be transformed."""


def edit(
    frames: Sequence[tuple[NDArray[np.uint8], Sequence[FaceInFrame]]],
    transform: Transform,
    *,
    size: int,
    operation: Operation,
) -> list[Edited]:
    """Change the faces of some frames.

    Args:
        frames: uint8 RGB ``[H, W, 3]`` (not modified) with the faces in it, in the order in which they were, or are
            to be, changed. Faces that lie outside the picture are left out.
        transform: the network; an error of it is an error of the faces it was given.
        size: side of the crops.
        operation: recovering goes through the faces backwards, and leaves alone what was masked.
    """
    out = [Edited(pixels.copy()) for pixels, _ in frames]
    plans: list[tuple[list[FaceInFrame], list[list[int]]]] = []
    for done, (pixels, faces) in zip(out, frames, strict=True):
        height, width = pixels.shape[:2]
        there = [face for face in faces if geometry.meets(face.matrix, size, (height, width))]
        for face in there:
            if face.state is State.held and operation == "anonymize":
                mask(done.pixels, face.matrix, size, margin=_HELD_MARGIN)
                done.masked.append(face.track)
        sure = [face for face in there if face.state is not State.held]
        order = compositing.layers(_stack(sure), size, (height, width))
        plans.append((sure, order if operation == "anonymize" else order[::-1]))
    for level in range(max((len(order) for _, order in plans), default=0)):
        rows = [(i, faces, order[level]) for i, (faces, order) in enumerate(plans) if level < len(order)]
        crops = torch.cat(
            [compositing.extract(out[i].pixels, _stack([faces[j] for j in layer]), size) for i, faces, layer in rows]
        )
        codes = np.stack([faces[j].code for _, faces, layer in rows for j in layer])
        changed, sound = _transform(transform, crops, codes, must_change=operation == "anonymize")
        start = 0
        for i, faces, layer in rows:
            chosen = [faces[j] for j in layer]
            fine = sound[start : start + len(layer)]
            good = [face for face, ok in zip(chosen, fine, strict=True) if ok]
            new = changed[start : start + len(layer)][torch.from_numpy(fine)]
            start += len(layer)
            out[i].pixels = compositing.blend(out[i].pixels, new, _stack(good))
            out[i].transformed += [face.track for face in good]
            for face, ok in zip(chosen, fine, strict=True):
                if not ok:
                    if operation == "anonymize":
                        mask(out[i].pixels, face.matrix, size, margin=_FAILED_MARGIN)
                    out[i].masked.append(face.track)
    return out


def _transform(
    transform: Transform, crops: Tensor, codes: NDArray[np.bool_], *, must_change: bool
) -> tuple[Tensor, NDArray[np.bool_]]:
    """Transformed crops, and which of them can be used."""
    try:
        changed = transform(crops, codes)
    except ModelError:
        if len(crops) == 1:
            return crops, np.zeros(1, dtype=np.bool_)
        # One bad face must not take the others with it.
        parts = [
            _transform(transform, crops[i : i + 1], codes[i : i + 1], must_change=must_change)
            for i in range(len(crops))
        ]
        return torch.cat([part for part, _ in parts]), np.concatenate([ok for _, ok in parts])
    if changed.shape != crops.shape:
        raise ModelError("the network's output has not the shape of its input")
    changed = changed.detach().cpu()
    sound = torch.isfinite(changed.flatten(1)).all(dim=1)
    if must_change:
        sound &= (changed - crops).abs().flatten(1).amax(dim=1) >= _UNCHANGED
    return changed, sound.numpy()


def _stack(faces: Sequence[FaceInFrame]) -> NDArray[np.float64]:
    return np.array([face.matrix for face in faces], dtype=np.float64).reshape(-1, 2, 3)
