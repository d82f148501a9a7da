"""``python -m services.ingest`` as its user sees it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import yaml
from PIL import Image

from services.ingest import config as configs
from services.ingest import verify
from services.ingest.config import IngestError

ROOT = Path(__file__).resolve().parents[2]
ASTRONAUT = np.array([[205.13, 102.63], [247.75, 104.64], [226.19, 128.68], [202.76, 140.69], [245.75, 142.3]])


def command(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "services.ingest", *map(str, arguments)],
        cwd=ROOT, capture_output=True, text=True, timeout=200, env={**os.environ, **environment},
    )  # fmt: skip


@pytest.fixture
def photos(tmp_path: Path) -> tuple[Path, Path]:
    rows = []
    for person in ("Ada", "Bo"):
        (tmp_path / "faces" / person).mkdir(parents=True)
        Image.fromarray(np.roll(skimage.data.astronaut(), len(rows), axis=1)).save(
            tmp_path / "faces" / person / "a.png"
        )
        rows.append({"file": f"{person}/a.png", "landmarks": (ASTRONAUT + np.array([len(rows), 0])).tolist()})
    (tmp_path / "faces" / "Ada" / "notes.txt").write_text("bought milk")
    (tmp_path / "l.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "faces", tmp_path / "l.jsonl"


def test_a_run_says_what_became_of_every_file_and_ends_with_where_the_result_is(
    tmp_path: Path, photos: tuple[Path, Path]
) -> None:
    out = tmp_path / "out"
    arguments = ("--source", photos[0], "--landmarks", photos[1], "--out", out, "--test-only", "--licence", "CC0")
    done = command(*arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"2 crops in 1 shards: {out / 'manifest.json'}"
    assert "not a picture 1" in done.stderr
    manifest = verify(out)
    assert manifest.samples == {"train": 0, "val": 0, "test": 2}
    assert manifest.sources[0].licence == "CC0"
    checked = command("--out", out, "--verify")
    assert (checked.returncode, checked.stdout.splitlines()[-1]) == (0, f"sound: {out / 'manifest.json'}")
    again = command(*arguments)
    assert again.returncode == 2
    assert again.stderr == f"ingest: {out} holds shards already; give another --out, or --overwrite\n"


def test_a_dry_run_says_what_would_happen_and_writes_nothing(tmp_path: Path, photos: tuple[Path, Path]) -> None:
    config = tmp_path / "c.yaml"
    source = {"name": "faces", "path": "${PHOTOS}", "landmarks": str(photos[1]), "split": [1, 1, 0]}
    config.write_text(yaml.safe_dump({"sources": [source], "seed": 3}))
    done = command("--config", config, "--out", tmp_path / "out", "--dry-run", "--seed", "4", PHOTOS=str(photos[0]))
    assert done.returncode == 0, done.stderr
    assert "faces: 3 files, 2 people, landmarks given, train/val/test 50/50/0" in done.stdout
    assert "seed 4; nothing done" in done.stdout
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--out", "x"], "give either --config or --source"),
        (["--out", "x", "--source", "absent"], "cannot read absent: No such file or directory"),
        (["--out", "x", "--source", "a", "--source", "b", "--landmarks", "l"], "2 times --source needs as many"),
        (["--out", "x", "--source", "a", "--split", "80/20"], "--split '80/20' is not three shares like 80/10/10"),
        (["--out", "x", "--source", "a", "--layout", "heap"], "sources.0.layout"),
        (["--out", "gs://bucket/faces", "--source", "a"], "expected s3://bucket/prefix"),
        (["--out", "x", "--source", "a.rec"], "cannot read a.rec: No such file"),
        (["--out", "x", "--source", "a", "--aligned", "somehow"], "sources.0.aligned"),
        (["--out", "x", "--source", "a", "--landmarks", "l", "--aligned", "insightface"], "either aligned or"),
        (["--out", "absent", "--verify"], "no manifest.json in absent"),
    ],
)
def test_a_mistake_is_one_clear_line_and_no_traceback(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    complaint: str,
) -> None:
    from services.ingest import cli

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["ingest", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert error.startswith("ingest: ")
    assert complaint in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_config_with_an_unknown_key_or_an_unset_variable_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("sources: [{name: a, path: b}]\ncrop_sice: 128\n")
    with pytest.raises(IngestError, match="crop_sice"):
        configs.load(path)
    path.write_text("sources: [{name: a, path: '${NOWHERE_SET}/b'}]\n")
    with pytest.raises(IngestError, match="NOWHERE_SET, which is not set"):
        configs.load(path, {})
    path.write_text("sources: [{name: a, path: b}, {name: a, path: c}]\n")
    with pytest.raises(IngestError, match="a name of its own"):
        configs.load(path)


def test_people_are_divided_80_10_10_where_nothing_else_is_said(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("sources: [{name: a, path: b}]\n")
    assert configs.load(path).split == pytest.approx((0.8, 0.1, 0.1))
    path.write_text("sources: [{name: a, path: b}]\nsplit: [80, 10, 10]\n")
    assert configs.load(path).split == pytest.approx((0.8, 0.1, 0.1))


def test_the_configs_that_ship_keep_lfw_for_testing_and_celeba_people_for_validation() -> None:
    folder = ROOT / "services" / "ingest" / "configs"
    faces, lfw = configs.load(folder / "shared.yaml", {}), configs.load(folder / "lfw.yaml", {})
    assert lfw.split == (0, 0, 1)
    assert not any("lfw" in str(source.path) for source in faces.sources)
    assert faces.sources[0].labelled
    assert faces.split == (0.9, 0.1, 0.0)
    assert all(source.split == (1, 0, 0) for source in faces.sources if not source.labelled)
    assert str(faces.sources[0].path) == "../shared/data/celeba-labelled.tar"
