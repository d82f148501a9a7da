"""Shared fixtures. Anything that needs ``../shared`` says so when it skips."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real faces and recogniser weights that lies beside the project (``MIEN_SHARED``)."""
    folder = Path(os.environ.get("MIEN_SHARED", ROOT.parent / "shared"))
    if not (folder / "weights").is_dir() or not (folder / "data").is_dir():
        pytest.skip(f"no data and weights at {folder} (set MIEN_SHARED)")
    return folder
