"""Manifests as `kubectl apply -k` would send them."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from k8s import tools

ROOT = Path(__file__).resolve().parents[2]
K8S = ROOT / "k8s"

Render = Callable[[str], list[dict[str, Any]]]


@cache
def _render(kubectl: Path, folder: str) -> str:
    done = subprocess.run([kubectl, "kustomize", K8S / folder], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="session")
def render() -> Render:
    """``render("training/overlays/cpu/fixed")``: the objects of that kustomization, each time as fresh copies."""
    try:
        kubectl = tools.find("kubectl")
    except tools.ToolMissing as error:
        pytest.skip(f"no kubectl to render kustomizations with: {error}")
    return lambda folder: [obj for obj in yaml.safe_load_all(_render(kubectl, folder)) if obj]


@pytest.fixture(scope="session")
def crds() -> Path:
    """Schemas of custom resources (``MIEN_SHARED/crds``)."""
    folder = Path(os.environ.get("MIEN_SHARED", ROOT.parent / "shared")) / "crds"
    if not folder.is_dir():
        pytest.skip(f"no schemas of custom resources at {folder} (set MIEN_SHARED)")
    return folder
