"""The runbook's commands, as far as they go without a cluster.

Each line of each ``sh`` block of docs/operations.md goes to the real program: flags must be known, charts must render
to valid objects, objects that are named must be among those that the runbook installs. A line of a program that no rule
here knows fails.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
import yaml

from k8s import tools
from serving import keys as api_keys
from tests.helm import chart

RUNBOOK: Final = chart.ROOT / "docs" / "operations.md"
LINES: Final = [
    line
    for block in re.findall(r"^```sh\n(.*?)^```", RUNBOOK.read_text(), re.DOTALL | re.MULTILINE)
    for line in block.splitlines()
]
# A port where nothing listens: what kubectl and helm say then is what they say after they understood the command.
NOWHERE: Final = {
    "apiVersion": "v1",
    "kind": "Config",
    "current-context": "nowhere",
    "clusters": [{"name": "nowhere", "cluster": {"server": "http://127.0.0.1:9"}}],
    "contexts": [{"name": "nowhere", "context": {"cluster": "nowhere", "user": "nobody"}}],
    "users": [{"name": "nobody", "user": {}}],
}
UNREACHABLE: Final = re.compile(r"unreachable|connection refused|The connection to the server \S+ was refused")
# Flags of an upgrade that `helm template` has no use for.
OF_A_CLUSTER: Final = {"--install", "--reuse-values", "--wait"}


def of(program: str, *words: str) -> list[str]:
    """Lines that start like this, environment and pipes aside."""
    return [line for line in LINES if without_variables(line)[: 1 + len(words)] == [program, *words]]


def without_variables(line: str) -> list[str]:
    words = shlex.split(line)
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words.pop(0)
    return words


@pytest.fixture(scope="module")
def programs() -> dict[str, str]:
    try:
        return {"kubectl": str(tools.find("kubectl")), "helm": str(tools.find("helm"))}
    except tools.ToolMissing as error:
        pytest.skip(f"no kubectl and helm to ask: {error}")


@pytest.fixture
def nowhere(tmp_path: Path) -> dict[str, str]:
    file = tmp_path / "kubeconfig"
    file.write_text(yaml.safe_dump(NOWHERE))
    (tmp_path / "keys.txt").write_text(f"alice {'0' * 64}\n")
    return os.environ | {"KUBECONFIG": str(file), "HOME": str(tmp_path)}


def run(words: list[str], env: dict[str, str], cwd: Path = chart.ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, env=env, cwd=cwd, capture_output=True, text=True, timeout=60, check=False)


def test_every_line_is_of_a_kind_that_is_checked_here() -> None:
    assert len(LINES) > 40
    kinds = {(words[0], words[1] if words[0] in {"python", "helm"} else "") for words in map(without_variables, LINES)}
    assert {program for program, _ in kinds} == {"make", "kubectl", "helm", "python", "serving/build.sh"}
    assert {verb for program, verb in kinds if program == "helm"} == {
        "install", "upgrade", "test", "history", "rollback", "uninstall",
    }  # fmt: skip


def test_the_bare_cluster_takes_five_commands() -> None:
    block = re.search(r"## Install on a bare cluster\n.*?```sh\n(.*?)```", RUNBOOK.read_text(), re.DOTALL)
    assert block is not None
    assert len(block[1].splitlines()) == 5


@pytest.mark.parametrize("line", [*of("helm", "install"), *of("helm", "upgrade")])
def test_what_helm_is_to_install_renders_to_what_a_cluster_takes(
    line: str, programs: dict[str, str], nowhere: dict[str, str]
) -> None:
    words = without_variables(line)
    # --reuse-values: on top of what was installed before. What the chart refuses without it stands beside it.
    earlier = ["--set", "model.source=mlflow", "--set", "model.mlflow.trackingUri=http://mien-mlflow:5000"]
    words = [programs["helm"], "template", *words[2:], *(earlier if "canary" in line else [])]
    done = run([word for word in words if word not in OF_A_CLUSTER], nowhere)
    assert done.returncode == 0, done.stderr
    objects = [document for document in yaml.safe_load_all(done.stdout) if document]
    assert {"Deployment", "Service", "NetworkPolicy"} <= {document["kind"] for document in objects}
    for document in objects:
        if chart.CRDS.is_dir() or not re.search("coreos|keda", document["apiVersion"]):
            assert chart.complaint(document, "1.31") is None
        assert document["metadata"]["namespace"] == "mien"


@pytest.mark.parametrize("line", of("helm"))
def test_helm_understands_the_line_and_then_looks_for_a_cluster(
    line: str, programs: dict[str, str], nowhere: dict[str, str]
) -> None:
    done = run([programs["helm"], *without_variables(line)[1:]], nowhere)
    assert done.returncode != 0
    assert UNREACHABLE.search(done.stderr), done.stderr


@pytest.mark.parametrize("folder", sorted({w[w.index("-k") + 1] for w in map(shlex.split, LINES) if "-k" in w}))
def test_what_is_applied_can_be_built(folder: str, programs: dict[str, str], nowhere: dict[str, str]) -> None:
    done = run([programs["kubectl"], "kustomize", folder], nowhere)
    assert done.returncode == 0, done.stderr
    for document in yaml.safe_load_all(done.stdout):
        assert chart.complaint(document, "1.31") is None


@pytest.mark.parametrize("line", of("kubectl"))
def test_kubectl_understands_the_line_and_then_looks_for_a_cluster(
    line: str, programs: dict[str, str], nowhere: dict[str, str], tmp_path: Path
) -> None:
    first, *rest = (shlex.split(part) for part in line.split(" | "))
    first = [word.replace("keys=keys.txt", f"keys={tmp_path / 'keys.txt'}") for word in first]
    done = run([programs["kubectl"], *first[1:]], nowhere)
    if "--dry-run=client" in first:
        assert done.returncode == 0, done.stderr
        made = yaml.safe_load(done.stdout)
        assert chart.complaint(made, "1.31") is None
        (after,) = rest
        done = subprocess.run(
            [programs["kubectl"], *after[1:]], env=nowhere, input=done.stdout, capture_output=True, text=True,
            timeout=60, check=False,
        )  # fmt: skip
    assert done.returncode != 0
    assert UNREACHABLE.search(done.stderr), done.stderr


def named_in_the_runbook() -> Iterator[tuple[str, str]]:
    for words in map(shlex.split, of("kubectl")):
        for word in words:
            if match := re.fullmatch(r"(?:--from=)?(deployment|service|cronjob|job|pod)/([a-z0-9-]+)", word):
                yield match[1], match[2]
        for kind in ("configmap", "poddisruptionbudget"):
            if kind in words:
                yield kind, words[words.index(kind) + 1]


def test_objects_that_are_named_are_objects_that_were_made(programs: dict[str, str], nowhere: dict[str, str]) -> None:
    named = set(named_in_the_runbook())
    assert {"deployment", "service", "cronjob", "job", "configmap", "poddisruptionbudget"} == {k for k, _ in named}
    made = {
        (document["kind"].lower(), document["metadata"]["name"])
        for case in ("canary", "monitoring")
        for document in chart.render(
            chart.values_of(chart.CHART / "ci" / f"{case}-values.yaml"), name="mien", namespace="mien"
        )
    }
    for folder in ("k8s/promote", "k8s/dev"):
        built = run([programs["kubectl"], "kustomize", folder], nowhere).stdout
        made |= {(document["kind"].lower(), document["metadata"]["name"]) for document in yaml.safe_load_all(built)}
    # Jobs that the runbook itself makes of a CronJob.
    made |= {("job", words[-1]) for words in map(shlex.split, of("kubectl")) if "job" in words and "create" in words}
    assert named <= made


def test_secrets_that_values_name_are_made_or_explained() -> None:
    text = RUNBOOK.read_text()
    named = {value for file in ("keys-ingress", "monitoring", "hpa")
             for value in re.findall(r"(?:existingSecret|testSecret): (\S+)",
                                     (chart.CHART / "ci" / f"{file}-values.yaml").read_text())}  # fmt: skip
    assert named == {"mien-keys", "mien-test-key", "mien-tls"}
    assert all(f"`{name}`" in text for name in named)


@pytest.mark.parametrize("line", of("make"))
def test_make_knows_the_target(line: str) -> None:
    done = run(["make", "--dry-run", *without_variables(line)[1:]], dict(os.environ))
    assert done.returncode == 0, done.stderr
    assert re.search(r"build\.sh|-m tests\.e2e", done.stdout)


@pytest.mark.parametrize("line", of("python", "-m", "tests.e2e"))
def test_end_to_end_steps_are_there_and_wait_for_a_cluster(
    line: str, programs: dict[str, str], nowhere: dict[str, str]
) -> None:
    del programs  # both are there
    done = run([sys.executable, *shlex.split(line)[1:]], nowhere)
    assert done.returncode == (0 if "--list" in line else 69), done.stderr


def test_the_image_script_takes_the_flags(tmp_path: Path) -> None:
    builder = tmp_path / "recorder"
    builder.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    builder.chmod(0o755)
    (line,) = of("serving/build.sh")
    done = run([str(chart.ROOT / line.split()[0]), *line.split()[1:]], os.environ | {"BUILDER": str(builder)})
    assert done.returncode == 0, done.stderr
    assert line.split()[1:] == done.stdout.splitlines()[-6:-2]
    stages = re.findall(r"^FROM \S+ AS (\S+)", (chart.ROOT / "serving" / "Dockerfile").read_text(), re.MULTILINE)
    assert line.split()[2] in stages


def test_a_key_is_made_as_the_runbook_makes_it_and_opens_the_door(tmp_path: Path) -> None:
    (line,) = of("python", "-m", "serving.keys")
    done = subprocess.run(
        ["bash", "-ec", line.replace("python", shlex.quote(sys.executable), 1).replace("keys.txt", f"{tmp_path}/keys")],
        cwd=chart.ROOT, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    (name,) = api_keys.read(tmp_path / "keys").values()
    assert name == "alice"
    assert "mien_" in done.stderr


@pytest.mark.parametrize("line", of("python", "-m", "services.promote"))
def test_promote_takes_the_options(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import typer.main

    from services.promote.cli import app

    context = typer.main.get_command(app).make_context("promote", shlex.split(line)[3:])
    assert context.params["mlflow"] == "http://localhost:5000"


def test_the_table_of_examples_names_files_and_values_that_are_there() -> None:
    rows = re.findall(r"^\| .*? \| (`.*?`) \| (`.*?`) \|$", RUNBOOK.read_text(), re.MULTILINE)
    assert len(rows) >= 8
    for values, examples in rows:
        for example in re.findall(r"`([\w-]+)`", examples):
            assert (chart.CHART / "ci" / f"{example}-values.yaml").is_file(), example
        for path in re.findall(r"`([\w.]+?)(?:\.\*)?`", values):
            assert exists(path), path


@pytest.mark.parametrize("path", sorted(set(re.findall(
    r"`((?:settings|networkPolicy|autoscaling|monitoring|resources|model|lifecycle|image|podSecurity|apiKeys|canary)"
    r"(?:\.\w+)+)(?:=\S+)?`", RUNBOOK.read_text()))))  # fmt: skip
def test_a_value_that_the_text_names_is_one(path: str) -> None:
    assert exists(path)


def exists(path: str) -> bool:
    """Whether values.yaml has this value, null or not."""
    values = chart.values_of(chart.CHART / "values.yaml")
    *folders, last = path.split(".")
    for part in folders:
        values = values.get(part, {})
    return last in values


def test_outcomes_metrics_and_log_events_that_the_text_names_are_real() -> None:
    text = RUNBOOK.read_text()
    source = "".join(path.read_text() for path in (chart.ROOT / "serving").glob("*.py"))
    for name in re.findall(r"`(mien_\w+)`", text):
        known = source + (chart.CHART / "files" / "prometheus-adapter.yaml").read_text()
        assert name in known, name
    for event in ("model_failed", "api_keys_unusable", "wrong-model", "internal-error", "not-ready", "failure"):
        assert event in text
        assert f'"{event}"' in source
