"""The checks of ``checks.py`` can fail: each breaks one thing of a sound render and is told so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.k8s import checks
from tests.k8s.conftest import Render

Object = dict[str, Any]
Break = Callable[[Object], object]


def _job(objects: list[Object], kind: str) -> Object:
    return next(obj for obj in objects if obj["kind"] == kind)


def _pod(job: Object) -> Object:
    return next(checks.pods(job)).spec


def _main(job: Object) -> Object:
    return _pod(job)["containers"][0]


def _set(where: Callable[[Object], Object], key: str, value: object) -> Break:
    return lambda job: where(job).__setitem__(key, value)


def _drop(where: Callable[[Object], Object], key: str) -> Break:
    return lambda job: where(job).pop(key)


def _replicas(job: Object) -> Object:
    return job["spec"]["pytorchReplicaSpecs"]


BREAKS: dict[str, tuple[str, str, Break, str]] = {
    # overlay's folder, kind of the object, what is broken, part of what is said
    "unknown field": ("gpu/fixed", "PyTorchJob", _set(lambda j: j["spec"], "nprocs", "2"), "nprocs"),
    "unknown field of a pod": ("gpu/fixed", "PyTorchJob", _set(_pod, "tolerate", []), "as a Pod of"),
    "a number for a string": ("gpu/fixed", "PyTorchJob", _set(lambda j: j["spec"], "nprocPerNode", 2), "nprocPerNode"),
    "two masters": ("gpu/fixed", "PyTorchJob", lambda j: _replicas(j)["Master"].update(replicas=2), "not exactly one"),
    "an elastic master": (
        "gpu/elastic", "PyTorchJob", lambda j: _replicas(j).update(Master=_replicas(j)["Worker"] | {"replicas": 1}),
        "Workers alone",
    ),
    "more than elastic allows": (
        "gpu/elastic", "PyTorchJob", lambda j: _replicas(j)["Worker"].update(replicas=99), "between minReplicas",
    ),
    "another container": ("gpu/fixed", "PyTorchJob", _set(_main, "name", "main"), "no container called pytorch"),
    "retries of everything": (
        "gpu/fixed", "PyTorchJob", lambda j: _replicas(j)["Worker"].update(restartPolicy="OnFailure"), "143 from 1",
    ),
    "no launcher": ("gpu/fixed", "PyTorchJob", _set(_main, "args", ["python", "-m", "training"]), "training.launch"),
    "a sidecar": (
        "gpu/fixed", "PyTorchJob",
        lambda j: next(checks.pods(j)).template["metadata"]["annotations"].pop("sidecar.istio.io/inject"), "Istio",
    ),
    "no time to save": (
        "gpu/fixed", "PyTorchJob", _set(_pod, "terminationGracePeriodSeconds", 60), "until after the kubelet",
    ),
    "a queue without suspend": (
        "gpu/fixed", "PyTorchJob", lambda j: j["spec"]["runPolicy"].pop("suspend"), "and not both",
    ),
    "root": ("gpu/fixed", "PyTorchJob", _set(_pod, "securityContext", {"runAsUser": 0}), "runAsNonRoot"),
    "a writable root": (
        "gpu/evaluate", "Job", lambda j: _main(j)["securityContext"].update(readOnlyRootFilesystem=False), "writable",
    ),
    "a literal secret": (
        "gpu/fixed", "PyTorchJob", lambda j: _main(j)["env"].append({"name": "AWS_SECRET_ACCESS_KEY", "value": "x"}),
        "literal",
    ),
    "latest": ("cpu/ingest", "Job", _set(_main, "image", "mien-train:latest"), "is not fixed"),
    "no memory limit": ("gpu/fixed", "PyTorchJob", lambda j: _main(j)["resources"].pop("limits"), "no memory limit"),
    "memory volumes past the limit": (
        "gpu/fixed", "PyTorchJob", lambda j: _main(j)["resources"]["limits"].update(memory="2Gi"), "do not fit",
    ),
    "shared memory on disk": (
        "gpu/fixed", "PyTorchJob",
        lambda j: [v["emptyDir"].pop("medium") for v in _pod(j)["volumes"] if v["name"] == "shm"], "/dev/shm",
    ),
    "a volume of nothing": (
        "gpu/fixed", "PyTorchJob", lambda j: _pod(j)["volumes"][0]["configMap"].update(name="nothing"), "no ConfigMap",
    ),
    "an account that is not there": (
        "gpu/fixed", "PyTorchJob", _set(_pod, "serviceAccountName", "nobody"), "no ServiceAccount nobody",
    ),
    "no network policy": (
        "gpu/fixed", "PyTorchJob",
        lambda j: next(checks.pods(j)).template["metadata"]["labels"].update({"app.kubernetes.io/name": "other"}),
        "no NetworkPolicy both ways",
    ),
    "a runtime of another name": (
        "gpu/trainjob", "TrainJob", lambda j: j["spec"]["runtimeRef"].update(name="other"), "no TrainingRuntime other",
    ),
    "PET_NNODES by hand": (
        "gpu/trainjob", "TrainJob", lambda j: j["spec"]["trainer"].update(env=[{"name": "PET_NNODES", "value": "2"}]),
        "PET_NNODES",
    ),
    "a signal that is final": (
        "gpu/evaluate", "Job",
        lambda j: j["spec"]["podFailurePolicy"]["rules"][0]["onExitCodes"].update(values=[1, 137]), "by signal",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BREAKS)
def test_what_is_broken_is_found(name: str, render: Render, crds: Path) -> None:
    folder, kind, change, said = BREAKS[name]
    objects = render(f"training/overlays/{folder}")
    change(_job(objects, kind))
    assert said in "\n".join(checks.problems(objects, crds))


def test_a_policy_that_lets_pods_reach_the_node_s_credentials_is_found(render: Render, crds: Path) -> None:
    objects = render("training/overlays/gpu/fixed")
    for rule in _job(objects, "NetworkPolicy")["spec"]["egress"]:
        for peer in rule["to"]:
            if "ipBlock" in peer:
                peer["ipBlock"]["except"] = []
    assert any("metadata service" in problem for problem in checks.problems(objects, crds))


def test_a_queue_that_does_not_fit_its_flavors_is_found(render: Render, crds: Path) -> None:
    objects = render("training/queue")
    queue = _job(objects, "ClusterQueue")
    queue["spec"]["resourceGroups"][0]["flavors"][0]["name"] = "elsewhere"
    assert any("no flavor elsewhere" in problem for problem in checks.problems(objects, crds))
