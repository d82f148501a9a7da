"""Faces in moving pictures: no face slips for a frame.

A clip is read twice, in constant memory but for some hundred bytes a face and frame. The first pass finds and follows
faces (:mod:`mien.video.tracking`) and keeps geometry alone, so that gaps of the detector can be bridged forwards *and*
backwards (:mod:`mien.video.trajectories`). The second changes the faces in batches over frames and encodes
(:mod:`mien.video.clips`). The geometry travels in the file (:mod:`mien.video.geometry_track`), and recovery cuts out
the very same crops. Live frames (:mod:`mien.video.live`) go through the same tracker, with a bounded look back.

Needs the extra ``video`` (PyAV, trackers, OpenCV); nothing of it is imported before it is used.
"""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from mien.video.errors import InvalidVideo, VideoExtraMissing

if TYPE_CHECKING:
    from mien.video.clips import Report, anonymize, find_tracks, recover
    from mien.video.live import LiveFrames, LiveResult

__all__ = [
    "InvalidVideo",
    "LiveFrames",
    "LiveResult",
    "Report",
    "VideoExtraMissing",
    "anonymize",
    "find_tracks",
    "recover",
    "require_extra",
]

_LAZY = {
    "Report": "mien.video.clips",
    "anonymize": "mien.video.clips",
    "find_tracks": "mien.video.clips",
    "recover": "mien.video.clips",
    "LiveFrames": "mien.video.live",
    "LiveResult": "mien.video.live",
}


def require_extra() -> None:
    """Raise :class:`VideoExtraMissing` where a package of the extra ``video`` is not installed; imports none."""
    missing = [name for name in ("av", "trackers", "cv2", "scipy") if find_spec(name) is None]
    if missing:
        raise VideoExtraMissing(
            f'Video needs packages that are not installed ({", ".join(missing)}). Run: pip install "mien[video]"'
        )


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        require_extra()
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'mien.video' has no attribute {name!r}")
