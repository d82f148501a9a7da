"""What a cluster would say of a manifest, and what this house asks of one besides, without a cluster.

Every check takes objects and gives the list of what is wrong with them, in words; an empty list is a pass. So the tests
can also show that a broken manifest is found (``test_mutations.py``).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import referencing
from kubernetes_validate import utils as built_in

Object = dict[str, Any]
VERSIONS = tuple(f"1.{minor}" for minor in range(28, 36))
GROUPS_BUILT_IN = {"", "apps", "batch", "policy", "autoscaling", "networking.k8s.io", "rbac.authorization.k8s.io"}


# -- schemas ----------------------------------------------------------------------------------------------------------


def schema_problems(obj: Object, crds: Path, versions: tuple[str, ...] = VERSIONS) -> list[str]:
    """Against the built-in schemas of each Kubernetes version, or the custom resource's; unknown fields are refused."""
    problems: list[str] = []
    group = obj.get("apiVersion", "").rpartition("/")[0]
    # `metadata` is any object in a custom resource's schema; a ConfigMap's is the real one.
    shell = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": obj.get("metadata", {})}
    if group in GROUPS_BUILT_IN:
        for version in versions:
            problems += [f"{version}: {p}" for p in _built_in(_text(obj), version)]
        return problems
    problems += _custom(_text(obj), crds)
    problems += [f"metadata: {p}" for p in _built_in(_text(shell), versions[-1])]
    for pod in pods(obj):
        as_pod = {"apiVersion": "v1", "kind": "Pod", "metadata": pod.template.get("metadata", {}), "spec": pod.spec}
        for version in versions:
            problems += [f"{pod.where} as a Pod of {version}: {p}" for p in _built_in(_text(as_pod), version)]
    return problems


def _text(obj: Object) -> str:
    return json.dumps(obj, sort_keys=True)


@cache  # most objects are the same in many overlays
def _built_in(text: str, version: str) -> list[str]:
    obj = json.loads(text)
    try:
        validator = _built_in_validator(obj["apiVersion"], obj["kind"], version)
    except FileNotFoundError:
        return [f"Kubernetes {version} knows no {obj['kind']} of {obj['apiVersion']}"]
    return [_short(error) for error in validator.iter_errors(obj)]


@cache
def _built_in_validator(api_version: str, kind: str, version: str) -> jsonschema.Draft202012Validator:
    folder = f"kubernetes-json-schema/v{version}.0-local-strict"
    name = re.sub(r"^([^./]*)(?:\.[^/]*)?/", r"\1-", api_version)
    schema = built_in.schema_contents(f"{folder}/{kind.lower()}-{name}.json", version)
    return jsonschema.Draft202012Validator(schema, registry=_definitions(folder, version))


@cache
def _definitions(folder: str, version: str) -> Any:
    contents = built_in.schema_contents(f"{folder}/_definitions.json", version)
    return referencing.Resource.from_contents(contents) @ referencing.Registry()  # it has an $id


@cache
def _custom(text: str, crds: Path) -> list[str]:
    obj = json.loads(text)
    path = crds / f"{obj['kind']}_{obj['apiVersion'].replace('/', '_')}.json"
    if not path.exists():
        return [f"there is no schema for {obj['kind']} of {obj['apiVersion']}"]
    validator = jsonschema.Draft202012Validator(json.loads(path.read_text()))
    return [_short(error) for error in validator.iter_errors(obj)]


def _short(error: jsonschema.ValidationError) -> str:
    return f"{'.'.join(map(str, error.absolute_path)) or 'object'}: {error.message[:200]}"


# -- pods -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pod:
    """A pod template, wherever it lies in an object."""

    where: str
    template: Object

    @property
    def spec(self) -> Object:
        return self.template["spec"]

    @property
    def containers(self) -> list[Object]:
        return [*self.spec.get("initContainers", []), *self.spec["containers"]]


def pods(obj: Object) -> Iterator[Pod]:
    """The pod templates of an object of any kind."""
    kind = obj["kind"]
    if kind == "PyTorchJob":
        for role, replica in obj["spec"]["pytorchReplicaSpecs"].items():
            yield Pod(role, replica["template"])
    elif kind in ("TrainingRuntime", "ClusterTrainingRuntime"):
        for job in obj["spec"]["template"]["spec"]["replicatedJobs"]:
            yield Pod(job["name"], job["template"]["spec"]["template"])
    elif kind == "CronJob":
        yield Pod("job", obj["spec"]["jobTemplate"]["spec"]["template"])
    elif kind in ("Job", "Deployment", "StatefulSet", "DaemonSet"):
        yield Pod("pod", obj["spec"]["template"])


def pod_problems(pod: Pod) -> list[str]:
    """Pod Security "restricted", read-only root, bounded memory volumes, no token, no literal secret, fixed image."""
    spec, problems = pod.spec, []

    def need(holds: bool, text: str) -> None:
        if not holds:
            problems.append(f"{pod.where}: {text}")

    security = spec.get("securityContext", {})
    need(security.get("runAsNonRoot") is True, "runAsNonRoot is not true")
    need(security.get("runAsUser", 0) > 0, "runAsUser is root's or missing")
    need(security.get("seccompProfile", {}).get("type") == "RuntimeDefault", "seccompProfile is not RuntimeDefault")
    need(spec.get("automountServiceAccountToken") is False, "the service account's token is mounted")
    for key in ("hostNetwork", "hostPID", "hostIPC", "shareProcessNamespace"):
        need(not spec.get(key), f"{key} is set")
    volumes = {volume["name"]: volume for volume in spec.get("volumes", [])}
    for name, volume in volumes.items():
        kind = next(iter(volume.keys() - {"name"}))
        need(kind in {"emptyDir", "configMap", "secret", "persistentVolumeClaim", "projected"}, f"{name} is a {kind}")
        if kind == "emptyDir":
            need("sizeLimit" in (volume["emptyDir"] or {}), f"emptyDir {name} has no sizeLimit")
    for container in pod.containers:
        problems += [f"{pod.where}/{container['name']}: {p}" for p in _container_problems(container, volumes)]
    return problems


def _container_problems(container: Object, volumes: Mapping[str, Object]) -> list[str]:
    problems = []

    def need(holds: bool, text: str) -> None:
        if not holds:
            problems.append(text)

    security = container.get("securityContext", {})
    need(security.get("allowPrivilegeEscalation") is False, "may escalate its privileges")
    need(security.get("readOnlyRootFilesystem") is True, "its root file system is writable")
    need(security.get("capabilities", {}).get("drop") == ["ALL"], "does not drop all capabilities")
    need(not security.get("capabilities", {}).get("add"), "adds capabilities")
    need(not security.get("privileged"), "is privileged")
    image = container.get("image", "")
    need(bool(re.search(r"(:(?!latest$)[\w][\w.-]*|@sha256:[0-9a-f]{64})$", image)), f"image {image!r} is not fixed")
    for variable in container.get("env", []):
        if re.search(r"KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL", variable["name"]):
            need("value" not in variable, f"{variable['name']} is literal; refer to a Secret")
    mounts = {mount["mountPath"]: mount["name"] for mount in container.get("volumeMounts", [])}
    need("/tmp" in mounts, "has no /tmp, and its root is read-only")
    limits = container.get("resources", {}).get("limits", {})
    requests = container.get("resources", {}).get("requests", {})
    need("memory" in limits, "has no memory limit")
    need({"cpu", "memory"} <= requests.keys(), "requests no cpu or memory")
    memory = disk = 0
    for path, name in mounts.items():
        empty = volumes.get(name, {}).get("emptyDir")
        if empty is None:
            continue
        if empty.get("medium") == "Memory":
            memory += quantity(empty.get("sizeLimit", "0"))
        else:
            need(path not in ("/tmp", "/dev/shm"), f"{path} is on disk")
            disk += quantity(empty.get("sizeLimit", "0"))
    need(memory < quantity(limits.get("memory", "0")), "its memory volumes do not fit into its memory limit")
    if disk and "ephemeral-storage" in limits:
        need(disk <= quantity(limits["ephemeral-storage"]), "its disk volumes do not fit into its ephemeral-storage")
    return problems


def quantity(text: str | int) -> float:
    """A Kubernetes quantity as a number."""
    found = re.fullmatch(r"([0-9.]+)(m|[kMGTP]i?)?", str(text))
    assert found, text
    factors = {"m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
    factors |= {f"{unit}i": 1024.0**power for power, unit in enumerate("KMGTP", start=1)} | {"ki": 1024.0}
    return float(found[1]) * factors.get(found[2] or "", 1.0)


# -- jobs -------------------------------------------------------------------------------------------------------------


def pytorchjob_problems(obj: Object) -> list[str]:
    """The rules of the Training Operator's webhook and controller that its schema does not hold."""
    problems: list[str] = []
    spec, replicas = obj["spec"], obj["spec"]["pytorchReplicaSpecs"]
    name = obj["metadata"]["name"]
    # Pods are NAME-master-0 and so on, and Services of that name: DNS-1035, 63 characters.
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name) or len(name) > 63 - len("-worker-999"):
        problems.append(f"the name {name!r} does not make Service names")
    if not isinstance(spec.get("nprocPerNode", "1"), str):
        problems.append("nprocPerNode is not a string")
    elif not re.fullmatch(r"auto|cpu|gpu|[1-9][0-9]*", spec.get("nprocPerNode", "1")):
        problems.append(f"nprocPerNode {spec['nprocPerNode']!r} is no number, auto, cpu or gpu")
    if not replicas or replicas.keys() - {"Master", "Worker"}:
        problems.append(f"replicas are {sorted(replicas)}; only Master and Worker are known")
    if "Master" in replicas and replicas["Master"].get("replicas") != 1:
        problems.append("there is a Master and not exactly one")
    for role, replica in replicas.items():
        if replica.get("replicas", 1) < 1:
            problems.append(f"{role} has no replica")
        if replica.get("restartPolicy") != "ExitCode":
            problems.append(f"{role} restarts by {replica.get('restartPolicy')}, which does not tell 143 from 1")
        containers = replica["template"]["spec"].get("containers", [])
        if "pytorch" not in [container["name"] for container in containers]:
            problems.append(f"{role} has no container called pytorch")
        if any(not container.get("image") for container in containers):
            problems.append(f"{role} has a container without an image")
        if "restartPolicy" in replica["template"]["spec"]:
            problems.append(f"{role}'s pod sets restartPolicy, which the operator overwrites")
    policy = spec.get("runPolicy", {})
    if policy.get("cleanPodPolicy") not in ("None", "Running", "All"):
        problems.append("cleanPodPolicy is not None, Running or All")
    if "backoffLimit" not in policy:
        problems.append("no backoffLimit bounds the retries")
    if policy.get("managedBy", "kubeflow.org/training-operator") not in (
        "kubeflow.org/training-operator",
        "kueue.x-k8s.io/multikueue",
    ):
        problems.append("managedBy names no controller that exists")
    if (elastic := spec.get("elasticPolicy")) is not None:
        if replicas.keys() != {"Worker"}:
            problems.append("an elastic job has Workers alone")
        elif not elastic["minReplicas"] <= replicas["Worker"]["replicas"] <= elastic["maxReplicas"]:
            problems.append("replicas are not between minReplicas and maxReplicas")
        if "nProcPerNode" in elastic:
            problems.append("elasticPolicy.nProcPerNode is deprecated and forbidden beside nprocPerNode")
        if elastic.get("rdzvBackend") != "c10d":
            problems.append("the rendezvous is not c10d")
    return problems


def trainjob_problems(obj: Object, render: list[Object]) -> list[str]:
    """The rules of Kubeflow Trainer's webhooks."""
    problems: list[str] = []
    reference, trainer = obj["spec"]["runtimeRef"], obj["spec"].get("trainer", {})
    if not any(o["kind"] == reference.get("kind") and o["metadata"]["name"] == reference["name"] for o in render):
        problems.append(f"there is no {reference.get('kind')} {reference['name']}")
    # Trainer sets these itself and refuses a job that does.
    reserved = {"PET_NNODES", "PET_NPROC_PER_NODE", "PET_NODE_RANK", "PET_MASTER_ADDR", "PET_MASTER_PORT"}
    if taken := reserved & {variable["name"] for variable in trainer.get("env", [])}:
        problems.append(f"the trainer's env sets {', '.join(sorted(taken))}")
    return problems


def runtime_problems(obj: Object) -> list[str]:
    """A runtime that Trainer finds its way into: the job and the container called node, the label of the step."""
    problems = []
    for job in obj["spec"]["template"]["spec"]["replicatedJobs"]:
        labels = job["template"].get("metadata", {}).get("labels", {})
        if labels.get("trainer.kubeflow.org/trainjob-ancestor-step") == "trainer":
            if job["name"] != "node":
                problems.append(f"the trainer's job is called {job['name']}, not node")
            pod = job["template"]["spec"]["template"]["spec"]
            if "node" not in [container["name"] for container in pod["containers"]]:
                problems.append("no container is called node")
            break
    else:
        problems.append("no job has the label of the trainer step")
    if "torch" not in obj["spec"].get("mlPolicy", {}):
        problems.append("mlPolicy is not torch's: nothing injects PET_*")
    if "maxRestarts" not in obj["spec"]["template"]["spec"].get("failurePolicy", {}):
        problems.append("nothing restarts a job that was preempted")
    return problems


def training_pod_problems(pod: Pod, grace_default: int = 30) -> list[str]:
    """What every pod that trains needs: the launcher, shared memory, no sidecar, time to save."""
    problems = []
    main = pod.spec["containers"][0]
    started = [*main.get("command", []), *main.get("args", [])]
    if started[:3] != ["python", "-m", "training.launch"] or main.get("command"):
        problems.append(
            f"starts {' '.join(started[:3])}, not `python -m training.launch` under the image's entry point"
        )
    mounts = {mount["mountPath"]: mount["name"] for mount in main.get("volumeMounts", [])}
    volumes = {volume["name"]: volume for volume in pod.spec.get("volumes", [])}
    if volumes.get(mounts.get("/dev/shm", ""), {}).get("emptyDir", {}).get("medium") != "Memory":
        problems.append("/dev/shm is not a memory volume: the default of 64 MiB kills NCCL and worker processes")
    metadata = pod.template.get("metadata", {})
    for where in ("labels", "annotations"):
        if metadata.get(where, {}).get("sidecar.istio.io/inject") != "false":
            problems.append(f"{where} let Istio inject a sidecar, which breaks the rendezvous")
    environment = {variable["name"]: variable for variable in main.get("env", [])}
    patience = int(environment.get("PET_SHUTDOWN_TIMEOUT", {}).get("value", 30))
    if patience >= pod.spec.get("terminationGracePeriodSeconds", grace_default):
        problems.append("torchrun waits for its workers until after the kubelet has killed it")
    if forbidden := {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"} & environment.keys():
        problems.append(f"sets {', '.join(sorted(forbidden))}, which are torchrun's")
    return [f"{pod.where}: {p}" for p in problems]


def job_problems(obj: Object) -> list[str]:
    """Jobs: what retrying cannot mend ends them, an eviction does not count."""
    spec = obj["spec"]["jobTemplate"]["spec"] if obj["kind"] == "CronJob" else obj["spec"]
    template, problems = spec["template"], []
    if spec.get("podFailurePolicy") is None:
        return ["no podFailurePolicy"] if template["spec"].get("restartPolicy") == "Never" else []
    if template["spec"].get("restartPolicy") != "Never":
        problems.append("a podFailurePolicy needs restartPolicy Never")
    names = [container["name"] for container in template["spec"]["containers"]]
    for rule in spec["podFailurePolicy"]["rules"]:
        codes = rule.get("onExitCodes", {})
        if codes and codes.get("containerName", names[0]) not in names:
            problems.append(f"a rule names the container {codes['containerName']}, which there is none of")
        if any(code == 0 or code >= 128 for code in codes.get("values", [])) and rule["action"] == "FailJob":
            problems.append("an exit by signal ends the job for good")
    return problems


# -- a whole render ---------------------------------------------------------------------------------------------------


def reference_problems(render: list[Object]) -> list[str]:
    """ConfigMaps, volumes and service accounts that are named are there; Secrets are by reference and so elsewhere."""
    problems = []
    there = {(obj["kind"], obj["metadata"]["name"]) for obj in render}
    for obj in render:
        for pod in pods(obj):
            where = f"{obj['kind']} {obj['metadata']['name']} {pod.where}"
            account = pod.spec.get("serviceAccountName")
            if account and ("ServiceAccount", account) not in there:
                problems.append(f"{where}: there is no ServiceAccount {account}")
            volumes = {volume["name"]: volume for volume in pod.spec.get("volumes", [])}
            claims = {t["metadata"]["name"] for t in obj["spec"].get("volumeClaimTemplates", [])}
            for name, volume in volumes.items():
                if "configMap" in volume and ("ConfigMap", volume["configMap"]["name"]) not in there:
                    problems.append(f"{where}: volume {name} is of no ConfigMap here")
            for container in pod.containers:
                for mount in container.get("volumeMounts", []):
                    if mount["name"] not in volumes.keys() | claims:
                        problems.append(f"{where}/{container['name']}: mounts {mount['name']}, which is no volume")
                for source in container.get("envFrom", []):
                    if "configMapRef" in source and ("ConfigMap", source["configMapRef"]["name"]) not in there:
                        problems.append(f"{where}: env from no ConfigMap here")
    return problems


def policy_problems(render: list[Object]) -> list[str]:
    """Every pod is under a NetworkPolicy in both directions, and no policy lets it reach the node's metadata."""
    problems = []
    policies = [obj for obj in render if obj["kind"] == "NetworkPolicy"]
    for policy in policies:
        for rule in policy["spec"].get("egress", []):
            for peer in rule.get("to", []):
                block = peer.get("ipBlock")
                if block and block["cidr"] == "0.0.0.0/0" and "169.254.0.0/16" not in block.get("except", []):
                    problems.append(f"{policy['metadata']['name']} lets pods reach the metadata service")
    for obj in render:
        for pod in pods(obj):
            labels = pod.template["metadata"].get("labels", {})
            covered = {
                direction
                for policy in policies
                if policy["spec"]["podSelector"].get("matchLabels", {}).items() <= labels.items()
                for direction in policy["spec"]["policyTypes"]
            }
            if covered != {"Ingress", "Egress"}:
                problems.append(f"{obj['kind']} {obj['metadata']['name']}: no NetworkPolicy both ways")
    return problems


def queue_problems(obj: Object) -> list[str]:
    """A queue's label and being created suspended go together: one without the other starts too early or never."""
    labelled = "kueue.x-k8s.io/queue-name" in obj["metadata"].get("labels", {})
    policy = obj["spec"]["runPolicy"] if obj["kind"] == "PyTorchJob" else obj["spec"]
    return [] if labelled == bool(policy.get("suspend")) else ["has a queue's label or suspend, and not both"]


def cluster_queue_problems(render: list[Object]) -> list[str]:
    """The rules of Kueue's webhook: flavors exist, and list the covered resources in their order."""
    problems = []
    flavors = {obj["metadata"]["name"] for obj in render if obj["kind"] == "ResourceFlavor"}
    queues = {obj["metadata"]["name"]: obj for obj in render if obj["kind"] == "ClusterQueue"}
    for name, queue in queues.items():
        for group in queue["spec"]["resourceGroups"]:
            for flavor in group["flavors"]:
                if flavor["name"] not in flavors:
                    problems.append(f"{name}: there is no flavor {flavor['name']}")
                if [resource["name"] for resource in flavor["resources"]] != group["coveredResources"]:
                    problems.append(f"{name}/{flavor['name']}: resources are not the covered ones in their order")
    problems += [
        f"LocalQueue {obj['metadata']['name']}: there is no ClusterQueue {obj['spec']['clusterQueue']}"
        for obj in render
        if obj["kind"] == "LocalQueue" and obj["spec"]["clusterQueue"] not in queues
    ]
    return problems


def requested(obj: Object) -> set[str]:
    """The resources that an object's pods ask for."""
    asked: set[str] = set()
    for pod in pods(obj):
        for container in pod.containers:
            resources = container.get("resources", {})
            asked |= resources.get("requests", {}).keys() | resources.get("limits", {}).keys()
    trainer = obj["spec"].get("trainer", {}).get("resourcesPerNode", {}) if obj["kind"] == "TrainJob" else {}
    return asked | trainer.get("requests", {}).keys() | trainer.get("limits", {}).keys()


def problems(render: list[Object], crds: Path) -> list[str]:
    """Everything that is wrong with a render."""
    found: list[str] = []
    for obj in render:
        mine = schema_problems(obj, crds)
        if not mine:  # the other checks read fields that a sound schema gives
            by_kind: dict[str, list[Callable[[Object], list[str]]]] = {
                "PyTorchJob": [pytorchjob_problems, queue_problems],
                "TrainJob": [lambda o: trainjob_problems(o, render), queue_problems],
                "TrainingRuntime": [runtime_problems],
                "Job": [job_problems, queue_problems],
                "CronJob": [job_problems],
            }
            for check in by_kind.get(obj["kind"], []):
                mine += check(obj)
            for pod in pods(obj):
                mine += pod_problems(pod)
                if obj["kind"] in ("PyTorchJob", "TrainingRuntime"):
                    mine += training_pod_problems(pod)
        found += [f"{obj['kind']} {obj['metadata']['name']}: {p}" for p in mine]
    if not found:
        found += reference_problems(render) + policy_problems(render) + cluster_queue_problems(render)
    return found
