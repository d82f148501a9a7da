"""What can be wrong with a clip or with the installation."""

from __future__ import annotations

from mien.errors import MienError


class InvalidVideo(MienError):
    """The file is not a video Mien can read, is broken or truncated, or cannot be written as asked."""


class VideoExtraMissing(MienError):
    """A package of the extra ``video`` is not installed."""
