"""The objects that the steps apply beside the chart's, as plain mappings (kubectl takes JSON)."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

Object = dict[str, Any]

PODS: Final = Path(__file__).parent / "pods"
ROUND_TRIP: Final = Path(__file__).resolve().parents[2] / "helm" / "mien" / "files" / "round_trip.py"
RESTRICTED: Final[Object] = {
    "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
}  # fmt: skip


def listed(*made: Object) -> Object:
    return {"apiVersion": "v1", "kind": "List", "items": list(made)}


def merged(base: Object, over: Object) -> Object:
    """Helm's own way to put values over values: mappings are merged, everything else is replaced."""
    result = dict(base)
    for key, value in over.items():
        mapped = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if mapped else value
    return result


def image_values(image: str) -> Object:
    """The chart's ``image`` for a reference: REPOSITORY:TAG or REPOSITORY@DIGEST, a registry's port or none.

    Raises:
        ValueError: there is neither a tag nor a digest.
    """
    repository, _, digest = image.partition("@")
    if digest:
        return {"repository": repository, "digest": digest}
    repository, _, tag = image.rpartition(":")
    if not repository or "/" in tag:
        raise ValueError(f"{image!r} has neither a tag nor a digest")
    return {"repository": repository, "tag": tag}


def values(image: str) -> Object:
    """The chart's values on a small cluster: two pods that fit beside each other and a third while upgrading."""
    return {
        "image": image_values(image),
        "replicas": 2,
        "settings": {"workers": 2, "requestTimeout": 30},
        "resources": {"requests": {"cpu": "100m", "memory": "768Mi"}, "limits": {"cpu": "2", "memory": "2Gi"}},
    }


def namespace(name: str) -> Object:
    labels = {f"pod-security.kubernetes.io/{mode}": "restricted" for mode in ("enforce", "audit", "warn")}
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels | {"mien-e2e": "yes"}}}


def pod_spec(image: str, *, script: str, memory: str = "1Gi", port: int | None = None) -> Object:
    """A restricted pod with its programs in /test and memory in /tmp and /dev/shm, which counts in the limit."""
    container: Object = {
        "name": "program",
        "image": image,
        "imagePullPolicy": "IfNotPresent",
        "command": ["sh", "-c", script],
        "env": [{"name": "HOME", "value": "/tmp"}, {"name": "USER", "value": "mien"}],
        "securityContext": RESTRICTED,
        "resources": {"requests": {"cpu": "100m", "memory": memory}, "limits": {"memory": memory}},
        "volumeMounts": [
            {"name": "test", "mountPath": "/test", "readOnly": True},
            {"name": "tmp", "mountPath": "/tmp"},
            {"name": "shm", "mountPath": "/dev/shm"},
        ],
    }
    if port is not None:
        container["ports"] = [{"containerPort": port}]
    return {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": 2,
        "securityContext": {
            "runAsNonRoot": True, "runAsUser": 65532, "runAsGroup": 65532, "fsGroup": 65532,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [container],
        "volumes": [
            {"name": "test", "configMap": {"name": "e2e-programs"}},
            {"name": "tmp", "emptyDir": {"medium": "Memory", "sizeLimit": "256Mi"}},
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "128Mi"}},
        ],
    }  # fmt: skip


def programs(namespace: str) -> Object:
    """A ConfigMap with everything in tests/e2e/pods, and the program of `helm test`, which they build on."""
    files = {path.name: path.read_text() for path in [*sorted(PODS.glob("*.py")), ROUND_TRIP]}
    meta = {"name": "e2e-programs", "namespace": namespace}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": meta, "data": files}


def program(namespace: str, name: str, image: str, file: str, arguments: Sequence[str]) -> tuple[Object, Object]:
    """The programs and a pod that runs one of them.

    Raises:
        FileNotFoundError: there is no such program.
    """
    if not (PODS / file).is_file():
        raise FileNotFoundError(PODS / file)
    spec = pod_spec(image, script='exec python "$0" "$@"')
    spec["containers"][0]["command"] += [f"/test/{file}", *arguments]
    meta = {"name": name, "namespace": namespace, "labels": {"app.kubernetes.io/part-of": "mien", "mien-e2e": name}}
    return programs(namespace), {"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": spec}


def deny_all(namespace: str) -> Object:
    spec = {"podSelector": {}, "policyTypes": ["Ingress"]}
    meta = {"name": "deny-all", "namespace": namespace}
    return {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": meta, "spec": spec}


def privileged_pod(namespace: str, image: str) -> Object:
    """What a restricted namespace must refuse."""
    meta = {"name": "privileged", "namespace": namespace}
    container = {"name": "x", "image": image, "securityContext": {"privileged": True}}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": {"containers": [container]}}


def secret(namespace: str, name: str, **data: str) -> Object:
    meta = {"name": name, "namespace": namespace}
    return {"apiVersion": "v1", "kind": "Secret", "metadata": meta, "stringData": data}


# -- training ----------------------------------------------------------------------------------------------------------

_PREPARE: Final = "python /test/tiny_run.py /tmp/run && exec python -m training.launch "
_TRAIN: Final = " -m training --config /tmp/run/config.json"


def training_job(namespace: str, image: str) -> tuple[Object, ...]:
    """Two pods of plain Kubernetes that train together: an Indexed Job and a headless Service for their names."""
    script = (
        _PREPARE + "--nnodes 2 --nproc-per-node 1 --node-rank $JOB_COMPLETION_INDEX "
        "--master-addr train-0.train --master-port 29500" + _TRAIN
    )
    spec = pod_spec(image, script=script, memory="2Gi", port=29500) | {"subdomain": "train"}
    labels = {"mien-e2e": "train"}
    meta = {"name": "train", "namespace": namespace}
    job = {
        "completions": 2, "parallelism": 2, "completionMode": "Indexed", "backoffLimit": 2,
        "activeDeadlineSeconds": 900, "template": {"metadata": {"labels": labels}, "spec": spec},
    }  # fmt: skip
    # A worker asks for its master's name before that pod is ready.
    service = {"clusterIP": "None", "publishNotReadyAddresses": True, "selector": labels, "ports": [{"port": 29500}]}
    return (
        programs(namespace),
        {"apiVersion": "v1", "kind": "Service", "metadata": meta, "spec": service},
        {"apiVersion": "batch/v1", "kind": "Job", "metadata": meta, "spec": job},
    )


def pytorchjob(namespace: str, image: str) -> tuple[Object, Object]:
    """The same for the Training Operator, which names the pods and sets PET_* itself.

    Workers alone: beside a Master the operator gives them an init container that a restricted namespace refuses.
    """
    template = {
        "metadata": {"labels": {"mien-e2e": "train", "sidecar.istio.io/inject": "false"}},
        "spec": pod_spec(image, script=_PREPARE + _TRAIN.strip(), memory="2Gi"),
    }
    template["spec"]["containers"][0]["name"] = "pytorch"
    del template["spec"]["restartPolicy"]
    spec = {
        "nprocPerNode": "1",
        "elasticPolicy": {"rdzvBackend": "c10d", "minReplicas": 2, "maxReplicas": 2, "maxRestarts": 2},
        "runPolicy": {"cleanPodPolicy": "None", "activeDeadlineSeconds": 900, "backoffLimit": 4},
        "pytorchReplicaSpecs": {"Worker": {"replicas": 2, "restartPolicy": "ExitCode", "template": template}},
    }
    meta = {"name": "train", "namespace": namespace}
    return programs(namespace), {"apiVersion": "kubeflow.org/v1", "kind": "PyTorchJob", "metadata": meta, "spec": spec}


# -- registry ----------------------------------------------------------------------------------------------------------


def overlay(folder: Path, base: Path, namespace: str, train_image: str) -> Path:
    """A kustomization of ``base`` in another namespace and with another image, as a file in ``folder``; the folder."""
    repository, _, digest = train_image.partition("@")
    name, _, tag = (repository, "", "") if digest else repository.rpartition(":")
    image = {"name": "mien-train", "newName": name, **({"digest": digest} if digest else {"newTag": tag})}
    kustomization = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "namespace": namespace,
        "resources": [os.path.relpath(base.resolve(), folder.resolve())],
        "images": [image],
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "kustomization.yaml").write_text(json.dumps(kustomization, indent=1) + "\n")  # JSON is YAML
    return folder
