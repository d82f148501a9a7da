"""Shards of one tinted face with a whole manifest, at any size: for what learns, and need not learn much."""

from __future__ import annotations

import json
from pathlib import Path

from mien.manifest import Manifest
from tests.training.conftest import write_shards


def small_shards(folder: Path, counts: dict[str, int], size: int) -> Path:
    """``counts`` samples a split; four people, some samples of nobody."""
    write_shards(folder, counts, size=size)
    file = folder / "manifest.json"
    whole = json.loads(file.read_text()) | {
        "seed": 0, "settings": {}, "versions": {}, "sources": [], "samples": counts, "unlabelled": counts,
        "identities": {split: {"first": 0, "names": ["a", "b", "c", "d"]} for split in counts},
    }  # fmt: skip
    file.write_text(Manifest.model_validate(whole).model_dump_json())
    return folder
