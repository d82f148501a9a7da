"""Face recognisers: some to train against, others kept aside to judge.

Every one is a :class:`~mien.recognisers.base.Recogniser`: called with Mien's aligned squares, float ``[B, 3, S, S]`` in
[-1, 1], it takes its own crop by a fixed differentiable warp and gives embeddings ``[B, D]``.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final, Literal, cast

from mien.errors import ModelError
from mien.recognisers.base import Recogniser, cosine, embed_in_batches
from mien.recognisers.dlib_resnet import DlibRecogniser
from mien.recognisers.inception import InceptionResnet
from mien.recognisers.mobilefacenet import MobileFaceNet, load_mobilefacenet, load_weights
from mien.recognisers.sphereface import SphereFace20

__all__ = [
    "NAMES",
    "DlibRecogniser",
    "InceptionResnet",
    "MobileFaceNet",
    "Recogniser",
    "SphereFace20",
    "cosine",
    "embed_in_batches",
    "load",
    "load_mobilefacenet",
    "load_weights",
]

NAMES: Final = ("mobilefacenet-casia", "mobilefacenet-ms1m", "sphereface20", "inception-resnet-v1", "dlib")


def load(name: str, weights: str | os.PathLike[str] | None = None) -> Recogniser:
    """A recogniser by name, in evaluation mode on the CPU.

    Args:
        name: one of :data:`NAMES`.
        weights: a safetensors file, or a folder that holds one named after the recogniser
            (``mobilefacenet_casia.safetensors``). The MobileFaceNets require it; SphereFace-20 starts from random
            weights without it; InceptionResnetV1 and dlib bring their own.

    Raises:
        ModelError: the name is unknown, or the weights are missing or do not fit.
    """
    if name not in NAMES:
        raise ModelError(f"there is no recogniser {name!r}; there are {', '.join(NAMES)}")
    if weights is not None and Path(weights).is_dir():
        weights = Path(weights, name.replace("-", "_") + ".safetensors")
    if name.startswith("mobilefacenet-"):
        if weights is None:
            raise ModelError(f"{name} needs its weights: give a safetensors file, or the folder it lies in")
        return load_mobilefacenet(weights, cast(Literal["casia", "ms1m"], name.removeprefix("mobilefacenet-")))
    if name == "dlib":
        return DlibRecogniser()
    network = SphereFace20() if name == "sphereface20" else InceptionResnet("vggface2" if weights is None else None)
    if weights is not None:
        load_weights(network, weights)
    return network
