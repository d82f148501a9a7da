"""docs/training.md: its commands are read by the programs that they name, and its table names what there is."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Final

import pytest

from training import fit
from training.config import RunConfig, load

ROOT: Final = Path(__file__).resolve().parents[2]
TEXT: Final = (ROOT / "docs" / "training.md").read_text()
LINES: Final = [
    shlex.split(line, comments=True)
    for block in re.findall(r"^```sh\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)
    for line in block.replace("\\\n", " ").splitlines()
    if line
]


def test_every_command_is_one_that_its_program_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed.run import get_args_parser

    monkeypatch.chdir(ROOT)
    seen = []
    for line in LINES:
        if line[:2] == ["make", "train-local"]:
            assert re.search(r"^train-local:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        elif line[:4] == ["python", "-m", "training", "--config"]:
            load(line[4], line[5:])
        elif line[:4] == ["python", "-m", "training.fit", "--config"]:
            fit.load(line[4], line[5:])
        else:
            assert line[:3] == ["python", "-m", "training.launch"], line
            given = get_args_parser().parse_args(line[3:])
            assert given.module and given.training_script == "training"
            assert given.training_script_args == ["--config", "CONFIG"]
        seen.append(line[:3])
    assert len(seen) >= 6


def test_keys_that_the_guide_names_are_keys_of_a_config() -> None:
    named = set(re.findall(r"`([a-z_]+)=[^`]*`", TEXT)) | {"timeout", "patience", "max_skipped", "cache_limit"}
    assert {"start", "strategy", "accumulate", "mlflow", "checkpoints"} <= named
    assert named - {"key"} <= RunConfig.model_fields.keys()
    defaults = {name: RunConfig.model_fields[name].default for name in ("timeout", "patience", "max_skipped")}
    for name, default in defaults.items():
        assert f"`{name}` ({default:g}" in TEXT
