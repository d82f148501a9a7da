"""Mien: other faces under a password, the real ones back only to who knows it.

    import mien

    model = mien.load("models/mien-128")
    safe = model.anonymize(photo, "correct horse")  # PIL.Image -> PIL.Image
    same = model.recover(safe, "correct horse")
    mien.Client("http://localhost:3000").anonymize(photo, "correct horse")  # the same against a service

Names below are imported when they are first used: ``import mien`` alone loads neither torch nor Pillow.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from mien import errors
from mien.errors import (
    AccessDenied,
    ImageTooLarge,
    InvalidImage,
    InvalidPassword,
    MienError,
    ModelError,
    ModelIntegrityError,
    NoFaceFound,
    NoSuchFace,
    ServiceError,
    ServiceTimeout,
    ServiceUnavailable,
    TooManyFaces,
    WrongModel,
)

if TYPE_CHECKING:
    from mien.clients import Answer, AsyncClient, Client, Frame
    from mien.detection import Detector, Face, MTCNNDetector
    from mien.model import Model, Result, load
    from mien.passwords import derive_code, hamming_distance, inverse

__version__ = "0.1.0"

__all__ = [
    "AccessDenied",
    "Answer",
    "AsyncClient",
    "Client",
    "Detector",
    "Face",
    "Frame",
    "ImageTooLarge",
    "InvalidImage",
    "InvalidPassword",
    "MTCNNDetector",
    "MienError",
    "Model",
    "ModelError",
    "ModelIntegrityError",
    "NoFaceFound",
    "NoSuchFace",
    "Result",
    "ServiceError",
    "ServiceTimeout",
    "ServiceUnavailable",
    "TooManyFaces",
    "WrongModel",
    "__version__",
    "derive_code",
    "errors",
    "hamming_distance",
    "inverse",
    "load",
]

_LAZY = {
    "Answer": "mien.clients",
    "AsyncClient": "mien.clients",
    "Client": "mien.clients",
    "Frame": "mien.clients",
    "Detector": "mien.detection",
    "Face": "mien.detection",
    "MTCNNDetector": "mien.detection",
    "Model": "mien.model",
    "Result": "mien.model",
    "load": "mien.model",
    "derive_code": "mien.passwords",
    "hamming_distance": "mien.passwords",
    "inverse": "mien.passwords",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'mien' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
