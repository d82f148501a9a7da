"""Every manifest of every overlay, as a cluster and its operators would judge it."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer.main
import yaml

from tests.k8s import checks
from tests.k8s.conftest import K8S, ROOT, Render
from training import config, fit, submit

KINDS = ("fixed", "elastic", "deepspeed", "trainjob", "ingest", "fit", "evaluate")
OVERLAYS = [f"training/overlays/{overlay}/{kind}" for overlay in ("cpu", "gpu", "spot") for kind in KINDS]
FOLDERS = ["namespace", "dev", "promote", "monitoring", "training/queue", *OVERLAYS]


def test_every_kustomization_that_is_to_be_applied_is_checked_here() -> None:
    files = {p.parent.relative_to(K8S).as_posix() for p in K8S.rglob("kustomization.yaml")}
    parts = {f for f in files if f.startswith(("training/base/", "training/components/"))}
    assert files - parts == set(FOLDERS)


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_cluster_and_its_operators_would_take_it(folder: str, render: Render, crds: Path) -> None:
    objects = render(folder)
    assert objects
    assert checks.problems(objects, crds) == []


@pytest.mark.parametrize("folder", OVERLAYS)
def test_what_trains_is_accepted_by_the_trainer_that_is_in_the_image(folder: str, render: Render) -> None:
    objects = render(folder)
    files = {obj["metadata"]["name"]: obj["data"] for obj in objects if obj["kind"] == "ConfigMap"}
    commands = [
        pod.spec["containers"][0]["args"] for obj in objects if obj["kind"] != "StatefulSet" for pod in checks.pods(obj)
    ]
    commands += [obj["spec"]["trainer"]["args"] for obj in objects if obj["kind"] == "TrainJob"]
    assert commands
    for command in commands:
        module, arguments = command[2], command[3:]
        if module == "training.launch":
            assert arguments[:4] == ["-m", "training", "--config", "/etc/mien/config.yaml"]
            _accepted_by_training(files["mien-train-config"]["config.yaml"], arguments[4:])
        elif module == "training.fit":
            _accepted_by_fit(arguments)
        else:
            _accepted_by_command(module, arguments)


def _accepted_by_training(text: str, overrides: list[str]) -> None:
    path = ROOT / "training" / "configs" / "mien.yaml"
    assert {**yaml.safe_load(text)}.keys() - yaml.safe_load(path.read_text()).keys() == {"runs", "checkpoints"}
    raw = yaml.safe_load(text)
    for override in overrides:
        key, _, value = override.partition("=")
        config._assign(raw, key.split("."), config._parse(value))
    loaded = config.RunConfig.model_validate(config.expand(raw))
    assert loaded.checkpoints is not None and loaded.checkpoints.startswith("s3://")  # a pod's disk goes with the pod


def _accepted_by_fit(arguments: list[str]) -> None:
    """The config is the repository's own, from the place in the image that the Dockerfile copies it to."""
    assert "COPY training/configs /opt/mien/configs" in (ROOT / "training" / "Dockerfile").read_text()
    flag, path, *overrides = arguments
    assert flag == "--config" and path.startswith("/opt/mien/configs/")
    shipped = ROOT / "training" / "configs" / path.removeprefix("/opt/mien/configs/")
    here, there = fit.load(shipped), fit.load(shipped, overrides)
    assert there.data.shards.startswith("s3://") and there.mlflow == "$(MLFLOW_TRACKING_URI)"
    # Only places are named: the fit itself is the one of this machine.
    assert fit.key_of(here, "digest") == fit.key_of(there, "digest")


def _accepted_by_command(module: str, arguments: list[str]) -> None:
    """Typer knows every option and argument; nothing is run."""
    import importlib

    app = importlib.import_module(f"{module}.cli").app
    typer.main.get_command(app).make_context(module, list(arguments))


@pytest.mark.parametrize("overlay", ["gpu", "spot"])
def test_the_queue_covers_what_its_jobs_ask_for(overlay: str, render: Render) -> None:
    """Kueue never admits a job with a resource that its queue does not cover, and says so only in an event."""
    (queue,) = [obj for obj in render("training/queue") if obj["kind"] == "ClusterQueue"]
    covered = {name for group in queue["spec"]["resourceGroups"] for name in group["coveredResources"]}
    local = {obj["metadata"]["name"] for obj in render("training/queue") if obj["kind"] == "LocalQueue"}
    for kind in KINDS:
        for obj in render(f"training/overlays/{overlay}/{kind}"):
            if obj["kind"] in ("PyTorchJob", "TrainJob", "Job"):
                assert obj["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] in local
            assert checks.requested(obj) <= covered, obj["metadata"]["name"]


def test_the_queue_is_valid_in_both_served_versions(render: Render, crds: Path) -> None:
    for obj in render("training/queue"):
        newer = {**obj, "apiVersion": "kueue.x-k8s.io/v1beta2"}
        assert checks.schema_problems(newer, crds) == []


def test_the_pods_of_all_training_jobs_are_one_pod(render: Render) -> None:
    """They are written out where they are used; what is not about the kind of job is the same in each."""

    def essence(pod: checks.Pod) -> dict[str, object]:
        spec = {
            k: v for k, v in pod.spec.items() if k not in ("containers", "topologySpreadConstraints", "restartPolicy")
        }
        main = {k: v for k, v in pod.spec["containers"][0].items() if k not in ("name", "args", "ports")}
        return {"metadata": pod.template["metadata"], "spec": spec, "main": main}

    found = {
        f"{folder} {pod.where}": essence(pod)
        for folder in ("fixed", "elastic", "deepspeed", "trainjob")
        for obj in render(f"training/overlays/gpu/{folder}")
        for pod in checks.pods(obj)
    }
    assert len(found) == 6
    first = next(iter(found.values()))
    assert all(pod == first for pod in found.values())


def test_what_belongs_to_the_gpu_is_only_where_there_is_one(render: Render) -> None:
    for folder in OVERLAYS:
        overlay, kind = folder.split("/")[2:]
        asked = set().union(*(checks.requested(obj) for obj in render(folder)))
        assert ("nvidia.com/gpu" in asked) == (overlay != "cpu" and kind != "ingest"), folder


def test_a_spot_job_saves_before_its_node_is_gone(render: Render) -> None:
    for kind in ("fixed", "elastic", "deepspeed", "trainjob"):
        for obj in render(f"training/overlays/spot/{kind}"):
            for pod in checks.pods(obj):
                assert pod.spec["terminationGracePeriodSeconds"] <= 30
                assert not any("evict" in key or "disrupt" in key for key in pod.template["metadata"]["annotations"])


def test_promotion_has_no_rights_and_who_is_on_duty_has_few(render: Render) -> None:
    objects = render("promote")
    (binding,) = [obj for obj in objects if obj["kind"].endswith("RoleBinding")]
    assert [subject["kind"] for subject in binding["subjects"]] == ["Group"]
    (role,) = [obj for obj in objects if obj["kind"].endswith("Role")]
    verbs = {verb for rule in role["rules"] for verb in rule["verbs"]}
    resources = {resource for rule in role["rules"] for resource in rule["resources"]}
    assert verbs == {"get", "list", "watch", "create"}
    assert resources == {"cronjobs", "jobs", "pods", "pods/log"}
    assert not any("secrets" in rule["resources"] or "*" in rule["resources"] for rule in role["rules"])


def test_who_trains_may_do_what_submitting_needs_and_reads_no_secret(render: Render) -> None:
    (role,) = [obj for obj in render("namespace") if obj["kind"] == "Role"]
    (binding,) = [obj for obj in render("namespace") if obj["kind"] == "RoleBinding"]
    assert [subject["kind"] for subject in binding["subjects"]] == ["Group"]
    allowed = {(r, verb) for rule in role["rules"] for r in rule["resources"] for verb in rule["verbs"]}
    resources = {resource for resource, _ in allowed}
    assert not resources & {"*", "secrets", "pods/exec", "roles", "rolebindings"} and ("pods", "create") not in allowed
    plurals = {plural for _, plural in submit._BESIDE.values()}
    assert {
        (plural, "patch") for plural in plurals
    } <= allowed  # server-side apply is a PATCH, and makes what is not there
    assert {(plural, "create") for plural in plurals} <= allowed
    assert {("pytorchjobs", "create"), ("pytorchjobs", "get"), ("pods", "list"), ("pods/log", "get")} <= allowed


def test_rolling_back_is_never_on_a_schedule(render: Render) -> None:
    cron = {obj["metadata"]["name"]: obj["spec"] for obj in render("promote") if obj["kind"] == "CronJob"}
    assert cron["mien-rollback"]["suspend"] is True
    assert cron["mien-promote"]["suspend"] is False
    assert cron["mien-promote"]["concurrencyPolicy"] == "Forbid"
