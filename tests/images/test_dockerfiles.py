"""What the two Dockerfiles promise, read from their text; tests/images/test_pod.py runs what comes out."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("serving", "training")


def lines(folder: str) -> list[str]:
    """The instructions, comments left out and continued lines joined."""
    text = (ROOT / folder / "Dockerfile").read_text()
    bare = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    return [" ".join(line.split()) for line in bare.replace("\\\n", " ").splitlines() if line.strip()]


def last_stage(folder: str) -> list[str]:
    instructions = lines(folder)
    return instructions[max(i for i, line in enumerate(instructions) if line.startswith("FROM ")) :]


def test_both_have_the_same_text_up_to_torch_and_so_share_its_layer() -> None:
    heads = []
    for folder in FOLDERS:
        text = (ROOT / folder / "Dockerfile").read_text()
        start, end = text.index("# Any image with Python"), text.index("# -- the same in serving/Dockerfile")
        heads.append(text[start:end])
    assert heads[0] == heads[1]
    assert "torch" in heads[0]


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_base_is_an_argument_with_a_pinned_official_default(folder: str) -> None:
    bases = [line for line in lines(folder) if line.startswith("ARG BASE_IMAGE=")]
    assert len(bases) == 1
    assert re.fullmatch(r"ARG BASE_IMAGE=docker\.io/library/python:3\.\d+\.\d+-slim-[a-z]+", bases[0])
    froms = [line.split()[1] for line in lines(folder) if line.startswith("FROM ")]
    names = {line.split()[3] for line in lines(folder) if line.startswith("FROM ") and " AS " in line}
    assert set(froms) <= names | {"${BASE_IMAGE}", "${TOOLS_IMAGE}", "scratch"}


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_image_runs_as_nobody_under_an_init_and_ends_by_sigterm(folder: str) -> None:
    stage = last_stage(folder)
    user = next(line for line in stage if line.startswith("USER "))
    assert re.fullmatch(r"USER [1-9]\d+:[1-9]\d+", user)  # numbers: runAsNonRoot cannot judge a name
    assert 'ENTRYPOINT ["/usr/bin/tini", "--"]' in stage
    assert "STOPSIGNAL SIGTERM" in stage
    assert any(line.startswith("HEALTHCHECK") for line in stage)
    assert not any(line.startswith("RUN") for line in stage)  # nothing is installed on top, no cache can stay
    labels = " ".join(line for line in stage if line.startswith("LABEL"))
    for label in ("title", "description", "licenses", "version", "revision"):
        assert f"org.opencontainers.image.{label}=" in labels


@pytest.mark.parametrize("folder", FOLDERS)
def test_authorities_are_a_secret_and_packages_have_hashes(folder: str) -> None:
    runs = [line for line in lines(folder) if line.startswith("RUN")]
    assert all("id=ca," in run for run in runs if ("uv " in run or "pip install" in run) and "--offline" not in run)
    installs = [run for run in runs if "--requirements" in run]
    assert installs and all("--require-hashes" in run for run in installs)
    assert not any(line.startswith("COPY") and re.search(r"\.(pem|crt|conf)\b", line) for line in lines(folder))
    assert "FROM packages AS sbom-build" in lines(folder)


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_projects_own_code_is_copied_so_that_no_cache_keeps_an_older_one(folder: str) -> None:
    """buildah's cache key of a RUN has the text of its mounts, not their content: only uv, which never changes.

    And buildah up to 1.28 mounts from a cached stage only where a stage of the same target copies from it.
    """
    mounted = {source for line in lines(folder) if line.startswith("RUN") for source in re.findall(r"from=(\w+)", line)}
    assert mounted == {"tools"}
    assert sum(line.startswith("COPY --from=wheel ") for line in lines(folder)) == 1
    text = lines(folder)
    first = text.index("FROM core AS packages")
    packages = text[first : text.index("FROM packages AS sbom-build")]
    assert any(line.startswith("COPY --from=tools ") for line in packages)


def test_nothing_enters_the_build_that_was_not_named() -> None:
    rules = [
        line for line in (ROOT / ".dockerignore").read_text().splitlines() if line.strip() and not line.startswith("#")
    ]
    assert rules[0] == "*"
    allowed = {rule[1:] for rule in rules if rule.startswith("!")}
    assert allowed == {
        "LICENSE", "README.md", "mien", "models", "pyproject.toml", "requirements.lock", "services", "serving",
        "storage", "training",
    }  # fmt: skip
    for folder in FOLDERS:
        copied = {
            part.split("/")[0].strip("./")
            for line in lines(folder)
            if line.startswith("COPY ") and "--from" not in line
            for part in line.split()[1:-1]
        }
        assert copied - {"${MODEL}"} <= allowed


def test_chart_and_package_have_one_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    chart = yaml.safe_load((ROOT / "helm" / "mien" / "Chart.yaml").read_text())
    assert chart["appVersion"] == project
    for folder in FOLDERS:
        assert f"ARG VERSION={project}" in lines(folder)


@pytest.mark.parametrize(("folder", "name"), [("serving", "mien-serve"), ("training", "mien-train")])
def test_the_build_scripts_say_what_they_build_and_pass_on_what_they_are_given(
    folder: str, name: str, tmp_path: Path
) -> None:
    builder = tmp_path / "recorder"  # prints what a builder would have been asked for
    builder.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    builder.chmod(0o755)
    environment = {"PATH": "/usr/bin:/bin", "BUILDER": str(builder), "BASE_IMAGE": "localhost/base:1"}
    environment |= {"CA_BUNDLE": "/etc/authorities.pem"}
    done = subprocess.run(
        [ROOT / folder / "build.sh", "--network", "host"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    said = done.stdout.splitlines()
    assert said[:3] == ["build", "-f", f"{folder}/Dockerfile"]
    assert said[4].startswith(f"{name}:")
    assert {"BASE_IMAGE=localhost/base:1", "id=ca,src=/etc/authorities.pem", "host"} <= set(said)
    assert said[-1] == f"built {said[4]}"


def test_a_part_of_an_image_does_not_take_the_name_of_the_whole(tmp_path: Path) -> None:
    builder = tmp_path / "recorder"
    builder.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    builder.chmod(0o755)
    done = subprocess.run(
        [ROOT / "serving" / "build.sh", "--target", "sbom", "--output", "sbom"],
        env={"PATH": "/usr/bin:/bin", "BUILDER": str(builder)},
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    said = done.stdout.splitlines()
    assert "-t" not in said
    assert {"--target", "sbom", "--output"} <= set(said)
    assert said[-1].startswith("built a part of mien-serve:")


def test_without_a_builder_the_script_says_so(tmp_path: Path) -> None:
    for program in ("bash", "dirname", "sed", "git"):
        if found := shutil.which(program):
            (tmp_path / program).symlink_to(found)
    done = subprocess.run(
        [ROOT / "serving" / "build.sh"],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 69
    assert "buildah, podman or docker" in done.stderr
