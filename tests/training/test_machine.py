"""Packing for a bare GPU machine, and running a plan there: what is packed is enough, and what comes back goes on."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from mien import store
from tests.training.launch import ROOT
from training import export, machine, pack
from training.checkpoint import latest
from training.config import RunConfig, load
from training.loop import train

# Imports nothing but the standard library, what every machine with torch has, and what is packed.
BARE = """
import os, sys
from importlib.machinery import PathFinder

THERE = set("torch torchgen functorch numpy PIL safetensors yaml requests urllib3 idna certifi charset_normalizer tqdm"
            " torchvision sympy mpmath networkx jinja2 markupsafe filelock fsspec triton nvidia cuda".split())
PACKED = set("pydantic pydantic_core annotated_types typing_inspection typing_extensions facenet_pytorch".split())
OURS = {"mien", "training", "storage"}

class Bare:
    invalidate_caches = staticmethod(PathFinder.invalidate_caches)

    @staticmethod
    def find_spec(name, path=None, target=None):
        top = name.partition(".")[0]
        if path is None and top in PACKED:
            path = [os.environ["SITE"]]
        elif path is None and top in OURS:
            path = [os.environ["CHECKOUT"]]
        elif not (top in THERE | PACKED | OURS or top in sys.stdlib_module_names or top.startswith("_")):
            return None
        return PathFinder.find_spec(name, path, target)

sys.meta_path[:] = [Bare if finder is PathFinder else finder for finder in sys.meta_path]
"""


def _packages(into: Path) -> list[tuple[str, Path]]:
    """What uv would fetch for another Python, taken from this one: tests need no package index."""
    files = []
    for name in pack.PACKAGES:
        for file in importlib.metadata.files(name) or []:
            path = Path(str(file.locate()))
            if path.is_file() and path.suffix != ".pyc":
                files.append((f"site/{file}", path))
    return files


@pytest.fixture(scope="module")
def pieces(shards: Path, untrained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pack")
    weights = folder / "weights"
    weights.mkdir()
    shutil.copy(untrained, weights / "mobilefacenet_casia.safetensors")
    faces = folder / "faces"
    shutil.copytree(shards, faces)
    files = [*_packages(folder), *pack._weights(weights), *pack._shards(faces)]
    assert pack.pack(files, folder / "pieces", piece_bytes=2 << 20) > 2
    return folder / "pieces"


def _assemble(pieces: Path, into: Path) -> None:
    machine.assemble(pieces, root=into / "checkout", shared=into / "shared", site=into / "site")


def test_a_plan_on_a_bare_machine(pieces: Path, shards: Path, tmp_path: Path) -> None:
    checkout, out = tmp_path / "checkout", tmp_path / "out"
    for package in ("mien", "storage", "training"):
        shutil.copytree(ROOT / package, checkout / package, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "sitecustomize.py").write_text(BARE)
    small = (
        "device=cpu threads=1 batch=2 crop_size=64 log_every=2 architecture.width=8 architecture.blocks=1"
        " discriminator.width=8 discriminator.pool_size=4 predictor.width=8"
    )
    (tmp_path / "plan").write_text(
        "# the paper's own configuration, in so far as it fits\n"
        f"240 python -m training --config training/configs/paper.yaml {small} --stop-at 4 &\n"
        "240 python -m training.fit --help &\n"
        "1 trap 'echo saved; exit 0' TERM; while sleep 0.1; do :; done\n"
    )
    ran = subprocess.run(
        [
            *(sys.executable, "-m", "training.machine", "--root", checkout, "run", "--pieces", pieces),
            *("--plan", tmp_path / "plan", "--out", out, "--limit", "270", "--whole", "paper"),
            *("--site", tmp_path / "site"),
        ],
        cwd=checkout,
        env={
            **{k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "MIEN_SHARED")},
            **{"PYTHONPATH": str(tmp_path), "SITE": str(tmp_path / "site"), "CHECKOUT": str(checkout)},
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "--stop-at 4: ended after" in ran.stdout and "--help: ended after" in ran.stdout
    assert re.search(r"done: stopped after [0-9]+ s, code 0", ran.stdout) and "    saved" in ran.stdout
    # What it was given is what was packed, to the byte.
    manifest = (checkout / "shards" / "faces" / "manifest.json").read_bytes()
    assert manifest == (shards / "manifest.json").read_bytes()
    assert {path.name for path in out.iterdir()} >= {"back.json", "back-1"}
    assert all(path.stat().st_size <= 16 << 20 for path in out.iterdir())

    home = tmp_path / "home"
    names = machine.unpack(out, home)
    assert {"runs/machine/01.log", "runs/paper/config.json", "runs/paper/log.jsonl"} <= set(names)
    assert "saved" in (home / "runs/machine/03.log").read_text()
    model = export.of_run(home / "runs" / "paper", home / "model")
    assert (model.images_seen, model.crop_size) == (4, 64)
    assert model.data_digest != "unknown"
    assert store.load(home / "model")[1].digest == model.digest


@pytest.mark.parametrize("whole", [True, False])
def test_a_run_goes_on_from_what_came_back(tiny: RunConfig, tmp_path: Path, whole: bool) -> None:
    root = tmp_path / "there"
    config = tiny.model_copy(update={"runs": str(root / "runs")})
    assert train(config, stop_at=4).nimg == 4
    machine.bring_back(root, tmp_path / "out", whole=["tiny"] if whole else [], keep=[])
    machine.unpack(tmp_path / "out", tmp_path)  # its runs are tmp_path/runs, those of `tiny`
    before, after = _state(root / "runs"), _state(tmp_path / "runs")
    assert after["light"] and "optimizers" not in after["trainer"] and "pools" not in after["trainer"]
    assert after["trainer"]["modules"].keys() == (before["trainer"]["modules"].keys() if whole else {"transformer"})
    for kind in ("transformer",) if not whole else before["trainer"]["modules"]:
        for name, value in before["trainer"]["modules"][kind].items():
            torch.testing.assert_close(after["trainer"]["modules"][kind][name].to(value), value, rtol=5e-4, atol=1e-6)
    stored = (tmp_path / "out" / "back-1").stat().st_size
    assert stored < sum(path.stat().st_size for path in (root / "runs").rglob("state.safetensors")) / 2

    outcome = train(tiny)
    assert outcome.finished and outcome.nimg == 12
    lines = [json.loads(line) for line in (tmp_path / "runs" / "tiny" / "log.jsonl").read_text().splitlines()]
    assert [line["nimg"] for line in lines if "loss" in line] == [2, 4, 6, 8, 10, 12]


def _state(runs: Path) -> dict[str, object]:
    import storage

    found = latest(storage.open_prefix(runs / "tiny" / "checkpoints"))
    assert found is not None and found[0] == 4
    return found[1]


def test_a_piece_that_is_missing_torn_or_of_another_pack_is_named(pieces: Path, tmp_path: Path) -> None:
    mine = tmp_path / "pieces"
    shutil.copytree(pieces, mine)
    part = mine / "piece-2" / machine.PART
    data = part.read_bytes()
    for change, said in (
        (lambda: part.write_bytes(data[:-1]), "piece-2 of [0-9]+ is torn"),
        (lambda: part.write_bytes(data[:-1] + bytes([data[-1] ^ 1])), "piece-2 of [0-9]+ is torn"),
        (part.unlink, "piece-2 of [0-9]+ is missing"),
        (lambda: shutil.rmtree(mine / "piece-2"), "piece-2 of [0-9]+ is missing"),
        (lambda: (mine / "piece-1" / machine.LISTING).write_text('{"pieces": []}'), "different packs"),
        (lambda: shutil.rmtree(mine), "no piece in"),
    ):
        change()
        with pytest.raises(machine.MachineError, match=said):
            _assemble(mine, tmp_path / "machine")
        assert not (tmp_path / "machine").exists()


def test_parts_that_came_back_torn_write_nothing(tmp_path: Path) -> None:
    root = tmp_path / "there"
    (root / "runs" / "machine").mkdir(parents=True)
    (root / "runs" / "machine" / "01.log").write_text("$ true\n")
    kept = root / "models" / "x"
    kept.mkdir(parents=True)
    (kept / "weights").write_bytes(os.urandom(machine.BACK_BYTES + 5))
    machine.bring_back(root, tmp_path / "out", whole=[], keep=[root / "models"])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["back-1", "back-2", "back.json"]
    with pytest.raises(machine.MachineError, match="more than 1 parts"):
        machine.bring_back(root, tmp_path / "other", whole=[], keep=[root / "models"], parts=1)
    assert not (tmp_path / "other").exists()
    assert machine.unpack(tmp_path / "out", tmp_path / "here") == ["runs/machine/01.log", "models/x/weights"]
    assert (tmp_path / "here/models/x/weights").read_bytes() == (kept / "weights").read_bytes()
    (tmp_path / "out" / "back-2").write_bytes(b"")
    with pytest.raises(machine.MachineError, match="back-2 of 2 is torn"):
        machine.unpack(tmp_path / "out", tmp_path / "there-not")
    assert not (tmp_path / "there-not").exists()


def test_a_plan_is_read_as_it_is_written(tmp_path: Path) -> None:
    groups = machine.parse("# one\n\n 90 python -m a && b\n60 c &\n5.5 d\n7 e &\n")
    assert [[(e.seconds, e.command) for e in group] for group in groups] == [
        [(90, "python -m a && b")],
        [(60, "c"), (5.5, "d")],
        [(7, "e")],
    ]
    for wrong in ("python -m a", "90", "0 a", "-1 a", "inf a", "nan a"):
        with pytest.raises(machine.MachineError, match="line 2"):
            machine.parse(f"1 a\n{wrong}\n")
    (tmp_path / "plan").write_text("90 true\n60 true &\n61 true\n")
    arguments = ["run", "--pieces", str(tmp_path), "--plan", str(tmp_path / "plan"), "--out", str(tmp_path / "out")]
    assert machine.main([*arguments, "--limit", "180"]) == 2  # 90 + 61 and 30 for saving
    assert machine.main([*arguments, "--limit", "181"]) == 1  # it fits, and there is no piece


def test_what_does_not_stop_is_killed_and_what_fails_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "_GRACE", 1.0)
    groups = machine.parse("0.3 trap '' TERM; echo deaf; while :; do sleep 0.1; done\n9 exit 3\n9 echo fine\n")
    began = time.monotonic()
    good = machine.run(
        groups,
        tmp_path / "logs",
        root=tmp_path,
        environment=os.environ | {"PYTHON": sys.executable},
        deadline=began + 60,
    )
    said = capsys.readouterr().out
    assert not good and time.monotonic() - began < 20
    assert "code -9" in said and "exit 3: ended after 0 s with 3" in said and "    fine" in said


@pytest.mark.parametrize("plan", sorted((ROOT / "training" / "configs" / "plans").glob("*.plan")), ids=lambda p: p.stem)
def test_plans_that_ship_name_configs_that_are_valid(plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    entries = [entry for group in machine.parse(plan.read_text()) for entry in group]
    assert entries
    for entry in entries:
        words = entry.command.split()
        assert words[:4] == ["python", "-m", "training", "--config"]
        assert load(words[4], words[5:]).device == "cuda"
