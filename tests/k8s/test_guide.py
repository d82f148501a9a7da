"""docs/kubernetes.md: each line of its ``sh`` blocks goes to the real program, as far as goes without a cluster, and
what it names is there."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Final

import pytest
import yaml

from k8s import tools
from tests.k8s import checks
from tests.k8s.conftest import K8S, ROOT, Render
from training import exporter, submit

GUIDE: Final = ROOT / "docs" / "kubernetes.md"
TEXT: Final = GUIDE.read_text()
LINES: Final = [
    line
    for block in re.findall(r"^```sh\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)
    for line in block.splitlines()
    if line
]  # fmt: skip
# A port where nothing listens: what kubectl says then is what it says after it understood the command.
NOWHERE: Final = {
    "apiVersion": "v1", "kind": "Config", "current-context": "nowhere",
    "clusters": [{"name": "nowhere", "cluster": {"server": "http://127.0.0.1:9"}}],
    "contexts": [{"name": "nowhere", "context": {"cluster": "nowhere", "user": "nobody"}}],
    "users": [{"name": "nobody", "user": {}}],
}  # fmt: skip
KINDS: Final = {"job": "Job", "statefulset": "StatefulSet", "service": "Service", "pytorchjob": "PyTorchJob",
                "trainjob": "TrainJob"}  # fmt: skip


def of(*words: str) -> list[str]:
    return [line for line in LINES if shlex.split(line)[: len(words)] == list(words)]


@pytest.fixture(scope="module")
def everything(render: Render) -> set[tuple[str, str]]:
    """Kind and name of all that the folders of k8s/ make."""
    folders = sorted({w[w.index("-k") + 1].removeprefix("k8s/") for w in map(shlex.split, LINES) if "-k" in w})
    folders += ["training/overlays/gpu/fixed", "promote"]
    return {(obj["kind"], obj["metadata"]["name"]) for folder in folders for obj in render(folder)}


def test_every_line_is_of_a_kind_that_is_checked_here() -> None:
    known = {*of("kubectl"), *of("make"), *of("python", "-m", "training.submit")}
    assert len(LINES) > 30 and set(LINES) == known
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {shlex.split(line)[1] for line in of("make")} <= targets


@pytest.mark.parametrize("folder", sorted({w[w.index("-k") + 1] for w in map(shlex.split, LINES) if "-k" in w}))
def test_what_is_applied_is_what_a_cluster_takes(folder: str, render: Render, crds: Path) -> None:
    assert checks.problems(render(folder.removeprefix("k8s/")), crds) == []


@pytest.mark.parametrize("line", of("kubectl"))
def test_kubectl_understands_the_line_and_then_looks_for_a_cluster(
    line: str, tmp_path: Path, everything: set[tuple[str, str]]
) -> None:
    kubeconfig = tmp_path / "kubeconfig"
    kubeconfig.write_text(yaml.safe_dump(NOWHERE))
    env = os.environ | {"KUBECONFIG": str(kubeconfig), "HOME": str(tmp_path)}
    words = shlex.split(line)
    done = subprocess.run(
        [tools.find("kubectl"), *words[1:]], env=env, cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode != 0 and re.search("connection refused|was refused", done.stderr), done.stderr
    assert "unknown" not in done.stderr
    named = [match.groups() for word in words if (match := re.fullmatch(r"([a-z]+)/([a-z0-9-]+)", word))]
    named += [(kind, words[i + 1]) for i, kind in enumerate(words[:-1]) if kind in ("pytorchjob", "trainjob")]
    for kind, name in named:
        if kind in KINDS:
            assert (KINDS[kind], name) in everything, f"the guide names {kind}/{name}"


@pytest.mark.parametrize("line", of("python", "-m", "training.submit"))
def test_what_is_submitted_is_what_a_cluster_takes(
    line: str, render: Render, crds: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert submit.main([*shlex.split(line)[3:], "--dry-run"]) == 0
    assert checks.problems(list(yaml.safe_load_all(capsys.readouterr().out)), crds) == []


def test_the_tables_are_the_folders_and_the_figures_the_exporters(tmp_path: Path) -> None:
    rows = re.findall(r"^\| `([a-z0-9/]+)` \|", TEXT, re.MULTILINE)
    overlays = {path.name for path in (K8S / "training" / "overlays").iterdir()}
    kinds = {path.name for path in (K8S / "training" / "overlays" / "gpu").iterdir()}
    folders = {f"k8s/{p.parent.relative_to(K8S).as_posix()}" for p in K8S.rglob("kustomization.yaml")}
    folders = {f for f in folders if not re.search("/(base|components|overlays)/", f)}
    assert set(rows) == overlays | kinds | folders
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.jsonl").write_text(
        '{"nimg": 1, "time": 1, "images_per_second": 1, "data_wait": 0, "loss": 1}\n'
    )
    exposed = exporter.expose(tmp_path)
    named = set(re.findall(r"mien_training_[a-z_]+", TEXT))
    assert len(named) >= 4 and all(re.search(rf"^{name}\b", exposed, re.MULTILINE) for name in named)


def test_what_the_guide_says_of_a_job_is_in_its_manifest(render: Render) -> None:
    def job(folder: str) -> dict[str, object]:
        return next(obj for obj in render(f"training/overlays/{folder}") if obj["kind"] == "PyTorchJob")

    gpu, spot, elastic = job("gpu/fixed"), job("spot/fixed"), job("gpu/elastic")
    assert gpu["spec"]["runPolicy"]["backoffLimit"] == 20 and spot["spec"]["runPolicy"]["backoffLimit"] == 1000
    policy = elastic["spec"]["elasticPolicy"]
    assert (policy["minReplicas"], policy["maxReplicas"]) == (1, 4)
    (pod, *_) = checks.pods(spot)
    assert pod.spec["terminationGracePeriodSeconds"] == 25
    assert "checkpoint_every=10000" in pod.spec["containers"][0]["args"]
    (pod, *_) = checks.pods(gpu)
    assert pod.spec["containers"][0]["resources"]["requests"]["nvidia.com/gpu"] == "1"
    fetched = [c["args"] for c in pod.spec["initContainers"]]
    assert fetched == [["python", "-m", "training.fetch", "s3://mien/weights", "/cache/shared/weights"]]
    config = (ROOT / "training" / "configs" / "mien.yaml").read_text()
    weights = set(re.findall(r"weights/([\w.]+\.safetensors)", config))
    assert weights == set(re.findall(r"`(\w+\.safetensors)`", TEXT))
