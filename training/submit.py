"""``python -m training.submit fixed|elastic|deepspeed [--config FILE] [key=value ...]``: train on a cluster, and watch.

Renders ``k8s/training/overlays/OVERLAY/KIND`` as ``kubectl apply -k`` would, puts the config, name, image and size that
were asked for into it, and creates it: what the job needs beside itself by server-side apply, the PyTorchJob with
Kubeflow's training SDK. Then it follows the job: its conditions, and the log of rank 0 over restarts. It runs in a
checkout, not in the cluster. ``--dry-run`` prints the manifest and needs no cluster.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from training import config as configs

if TYPE_CHECKING:
    from kubeflow.training import TrainingClient

ROOT: Final = Path(__file__).resolve().parents[1]
KINDS: Final = ("fixed", "elastic", "deepspeed")
OVERLAYS: Final = ("cpu", "gpu", "spot")
RUNS: Final = "/cache/runs"  # the pod's writable disk
QUEUE_LABEL: Final = "kueue.x-k8s.io/queue-name"
MANAGER: Final = "mien-submit"
REQUEST_TIMEOUT: Final = (10, 30)  # seconds to connect, and to be answered

Object = dict[str, Any]

# What a render holds beside the job: (path below the API server, plural).
_BESIDE: Final = {
    "ConfigMap": ("/api/v1", "configmaps"),
    "ServiceAccount": ("/api/v1", "serviceaccounts"),
    "NetworkPolicy": ("/apis/networking.k8s.io/v1", "networkpolicies"),
    "PodDisruptionBudget": ("/apis/policy/v1", "poddisruptionbudgets"),
}


class SubmitError(Exception):
    """What was asked for cannot be submitted; the message says what to do."""


class ClusterError(SubmitError):
    """There is no cluster, it does not answer, or it refuses."""


class JobFailed(SubmitError):
    """The job ran and failed for good."""


@dataclass(frozen=True)
class Request:
    """What to submit.

    Attributes:
        kind: one of :data:`KINDS`.
        overlay: one of :data:`OVERLAYS`.
        name: of job and run; None keeps the overlay's, and the config's.
        config: file of a run's config; None takes the one that the overlay ships.
        overrides: ``key=value`` for the config.
        image, namespace, nodes, queue: in place of the overlay's. An empty ``queue`` starts without one.
    """

    kind: str
    overlay: str = "gpu"
    name: str | None = None
    config: Path | None = None
    overrides: Sequence[str] = ()
    image: str | None = None
    namespace: str | None = None
    nodes: int | None = None
    queue: str | None = None


# -- the manifest ---------------------------------------------------------------------------------------------------


def manifest(request: Request) -> list[Object]:
    """All objects to create, the job last.

    Raises:
        SubmitError: no kubectl to render with, or a config that the trainer would refuse or lose its work with.
    """
    objects = _render(ROOT / "k8s" / "training" / "overlays" / request.overlay / request.kind)
    (job,) = (obj for obj in objects if obj["kind"] == "PyTorchJob")
    if request.nodes is not None:
        _resize(job, request.nodes)
    if request.queue is not None:
        _queue(job, request.queue)
    (shipped,) = (obj for obj in objects if obj["kind"] == "ConfigMap" and "config.yaml" in obj["data"])
    run = _config(request, shipped["data"]["config.yaml"], processes=_processes(job))
    import yaml

    shipped["data"]["config.yaml"] = yaml.safe_dump(run, sort_keys=False)
    if request.name is not None:
        _rename(objects, job, shipped, request.name)
    for template in _templates(job):
        for container in [*template["spec"].get("initContainers", []), *template["spec"]["containers"]]:
            container["image"] = request.image or container["image"]
    for obj in objects:
        obj["metadata"]["namespace"] = request.namespace or obj["metadata"]["namespace"]
    return [*(obj for obj in objects if obj is not job), job]


def _render(folder: Path) -> list[Object]:
    import yaml

    if not folder.is_dir():
        raise SubmitError(f"there is no {folder}; run this in a checkout of the project")
    # By its own command: k8s/ is no package that training could import, and brings kubectl where there is none.
    try:
        found = subprocess.run(
            [sys.executable, str(ROOT / "k8s" / "tools.py"), "kubectl"],
            capture_output=True, text=True, timeout=400, check=True,
        )  # fmt: skip
        done = subprocess.run(
            [found.stdout.strip(), "kustomize", str(folder)], capture_output=True, text=True, timeout=60, check=True
        )
    except subprocess.CalledProcessError as error:
        raise SubmitError(f"{folder} cannot be rendered: {error.stderr.strip()[-300:]}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SubmitError(f"{folder} cannot be rendered: {error}") from error
    return [obj for obj in yaml.safe_load_all(done.stdout) if obj]


def _config(request: Request, shipped: str, *, processes: int) -> dict[str, Any]:
    """The run's config as it is mounted: ``${MIEN_SHARED}`` is the pod's, so it stays."""
    import yaml

    try:
        if request.config is not None:
            raw = configs.read(request.config, request.overrides)
        else:
            raw = configs.override(yaml.safe_load(shipped), request.overrides)
        raw["runs"] = RUNS
        old = raw.get("name")
        if request.name is not None:
            raw["name"] = request.name
        prefix = str(raw.get("checkpoints") or _beside_shards(raw))
        if request.name is not None and old:  # or two runs would share their checkpoints
            bucket, slash, path = prefix.removeprefix("s3://").partition("/")
            path = "/".join(request.name if part == old else part for part in path.split("/"))
            prefix = f"s3://{bucket}{slash}{path}" if prefix.startswith("s3://") else prefix
        raw["checkpoints"] = prefix
        run = configs.validate(raw)
    except ValueError as error:
        raise SubmitError(str(error)) from error
    if not prefix.startswith("s3://"):
        raise SubmitError(f"checkpoints={prefix} would be lost with the pod; give an s3:// prefix")
    if run.batch < processes * run.accumulate:
        raise SubmitError(
            f"a batch of {run.batch} cannot be divided over {processes} processes and {run.accumulate} micro-batches;"
            " give a larger batch or fewer nodes"
        )
    return raw


def _beside_shards(raw: dict[str, Any]) -> str:
    """Where checkpoints go when the config does not say: into the bucket of the shards."""
    shards = str(raw.get("data", {}).get("shards", ""))
    if not shards.startswith("s3://"):
        raise ValueError(f"data.shards={shards} is no place that pods can read; give an s3:// prefix")
    bucket = shards.removeprefix("s3://").partition("/")[0]
    return f"s3://{bucket}/runs/{raw.get('name')}/checkpoints"


def _templates(job: Object) -> Iterator[Object]:
    for replica in job["spec"]["pytorchReplicaSpecs"].values():
        yield replica["template"]


def _processes(job: Object) -> int:
    """Of the largest world that the job may have."""
    pods = sum(replica["replicas"] for replica in job["spec"]["pytorchReplicaSpecs"].values())
    most = job["spec"].get("elasticPolicy", {}).get("maxReplicas", pods)
    return int(max(pods, most)) * int(job["spec"]["nprocPerNode"])


def _resize(job: Object, nodes: int) -> None:
    if nodes < 1:
        raise SubmitError("--nodes is 1 or more")
    replicas = job["spec"]["pytorchReplicaSpecs"]
    if policy := job["spec"].get("elasticPolicy"):
        policy["minReplicas"] = min(policy["minReplicas"], nodes)
        policy["maxReplicas"] = max(policy["maxReplicas"], nodes)
        replicas["Worker"]["replicas"] = nodes
    elif nodes == 1:
        del replicas["Worker"]
    else:
        replicas["Worker"]["replicas"] = nodes - 1


def _queue(job: Object, queue: str) -> None:
    labels, policy = job["metadata"].setdefault("labels", {}), job["spec"]["runPolicy"]
    if queue:
        labels[QUEUE_LABEL], policy["suspend"] = queue, True
    else:
        labels.pop(QUEUE_LABEL, None)
        policy.pop("suspend", None)


def _rename(objects: list[Object], job: Object, shipped: Object, name: str) -> None:
    """Job, config and budget get the name: two jobs of a namespace share nothing that differs between them."""
    old, of_config = job["metadata"]["name"], shipped["metadata"]["name"]
    job["metadata"]["name"], shipped["metadata"]["name"] = name, f"{name}-config"
    for template in _templates(job):
        for volume in template["spec"]["volumes"]:
            if volume.get("configMap", {}).get("name") == of_config:
                volume["configMap"]["name"] = f"{name}-config"
    if policy := job["spec"].get("elasticPolicy"):
        policy["rdzvId"] = name
    for obj in objects:
        if obj["kind"] == "PodDisruptionBudget":
            obj["metadata"]["name"] = name
            labels = obj["spec"]["selector"]["matchLabels"]
            for key in [key for key, value in labels.items() if value == old]:
                labels[key] = name


# -- the cluster ----------------------------------------------------------------------------------------------------


def connect(context: str | None, namespace: str) -> TrainingClient:
    """The SDK's client, once the cluster has answered; raises :class:`ClusterError`."""
    try:
        from kubeflow.training import TrainingClient
        from kubernetes.client import ApiClient, VersionApi
        from kubernetes.config import ConfigException
    except ImportError as error:
        raise ClusterError(f"submitting needs the SDK: pip install 'mien[k8s]' ({error})") from error
    try:
        client = TrainingClient(context=context, namespace=namespace)
    except ConfigException as error:
        raise ClusterError(f"no cluster: {error}; --dry-run prints what would be created") from error
    api: ApiClient = client.core_api.api_client
    api.configuration.retries = 1  # urllib3's default waits for a host that is away three times as long
    _ask(lambda: VersionApi(api).get_code(_request_timeout=REQUEST_TIMEOUT), f"the cluster at {api.configuration.host}")
    return client


def create(client: TrainingClient, objects: list[Object]) -> None:
    """Create the job and apply what it needs; raises :class:`ClusterError`."""
    *beside, job = objects
    for obj in beside:
        base, plural = _BESIDE[obj["kind"]]
        where, name = obj["metadata"]["namespace"], obj["metadata"]["name"]
        _ask(
            lambda url=f"{base}/namespaces/{where}/{plural}/{name}", obj=obj: client.core_api.api_client.call_api(
                url, "PATCH", query_params=[("fieldManager", MANAGER), ("force", "true")], body=obj,
                header_params={"Content-Type": "application/apply-patch+yaml", "Accept": "application/json"},
                auth_settings=["BearerToken"], _preload_content=False, _request_timeout=REQUEST_TIMEOUT,
            ),
            f"{obj['kind']} {where}/{name}",
        )  # fmt: skip
    _ask(lambda: client.create_job(_model(client, job)), f"PyTorchJob {job['metadata']['name']}")


def _model(client: TrainingClient, job: Object) -> Any:
    """A manifest as the SDK's class, which knows less than the cluster may: what it would drop is an error."""
    from kubeflow.training.utils import utils

    model = client.api_client.deserialize(utils.FakeResponse(job), "KubeflowOrgV1PyTorchJob")
    if client.api_client.sanitize_for_serialization(model) != job:
        raise SubmitError("the SDK does not know all of this manifest; --dry-run | kubectl create -f - does")
    return model


def _ask(question: Callable[[], Any], about: str) -> Any:
    from kubernetes.client import ApiException
    from urllib3.exceptions import HTTPError

    try:
        return question()
    except (ApiException, HTTPError, OSError, RuntimeError, TimeoutError) as raised:
        # The SDK packs the API server's answer into a RuntimeError of its own.
        beneath = raised.__cause__ or raised.__context__
        error = beneath if isinstance(beneath, ApiException) else raised
        if not isinstance(error, ApiException):
            raise ClusterError(f"{about}: {str(error).strip().splitlines()[0][:300]}") from raised
        advice = {
            401: "the credentials of the kubeconfig are not accepted",
            403: "you may not do that there; ask for the role in docs/kubernetes.md",
            404: "there is no such thing: is the training operator installed, and the namespace there?",
            409: "it exists: follow it with --attach, or delete it first",
        }.get(error.status, error.reason)
        raise ClusterError(f"{about}: {error.status}, {advice}") from raised


# -- following ------------------------------------------------------------------------------------------------------


@dataclass
class _Log:
    """How far the log of rank 0 was read: over cut connections and over pods, which keep their name in a restart."""

    pod: str = ""
    last: str = ""
    ended: set[tuple[str, int]] = field(default_factory=set)


def follow(client: TrainingClient, name: str, *, say: Callable[[str], None], poll: float = 3.0) -> None:
    """Until the job has ended: its conditions through ``say``, rank 0's log to standard output.

    Raises:
        JobFailed: it failed; the message is the operator's.
        ClusterError: the cluster went away for more than a minute; the job goes on without us.
    """
    told: set[tuple[str, str, str]] = set()
    log, away = _Log(), 0.0
    while True:
        try:
            job = _ask(lambda: client.get_job(name), f"PyTorchJob {name}")
            away = 0.0
        except ClusterError:
            away += poll
            if away > 60:
                raise
            time.sleep(poll)
            continue
        conditions = (job.status.conditions if job.status else None) or []
        for c in conditions:
            mark = (c.type, c.status, str(c.last_transition_time))
            if c.status == "True" and mark not in told:
                told.add(mark)
                say(f"{c.type}: {c.message or c.reason}")
        ended = next((c for c in conditions if c.type in ("Succeeded", "Failed") and c.status == "True"), None)
        _stream(client, name, log)
        if ended is not None:
            if ended.type == "Failed":
                raise JobFailed(f"{name} failed: {ended.message or ended.reason}")
            return
        time.sleep(poll)


def _stream(client: TrainingClient, name: str, log: _Log) -> None:
    """Copy rank 0's log until its container ends or the connection does; nothing where there is no pod yet."""
    try:
        pods = _ask(lambda: client.get_job_pods(name, timeout=30), f"pods of {name}")
    except ClusterError:
        return
    first = [p for p in pods if p.metadata.labels.get("training.kubeflow.org/replica-type") == "master"]
    first = first or [p for p in pods if p.metadata.labels.get("training.kubeflow.org/replica-index") == "0"]
    for pod in first:
        states = {s.name: s for s in (pod.status.container_statuses or [])} if pod.status else {}
        state = states.get("pytorch")
        if state is None or not (state.state.running or state.state.terminated):
            continue
        this = (pod.metadata.uid, state.restart_count)
        if this in log.ended:
            continue
        if log.pod != pod.metadata.uid:
            log.pod, log.last = pod.metadata.uid, ""
        # Within what `follow` gives us before a proxy cuts it; we go on behind the last line that came.
        if _copy(client, pod.metadata.name, pod.metadata.namespace, log) and state.state.terminated:
            log.ended.add(this)


def _copy(client: TrainingClient, pod: str, namespace: str, log: _Log) -> bool:
    """Whether the log was read to the end that it has now."""
    from kubernetes.client import ApiException
    from urllib3.exceptions import HTTPError

    since = {}
    if log.last:
        then = datetime.fromisoformat(log.last[:19]).replace(tzinfo=UTC)
        since = {"since_seconds": max(1, int((datetime.now(UTC) - then).total_seconds()) + 2)}
    try:
        answer = client.core_api.read_namespaced_pod_log(
            pod, namespace, container="pytorch", follow=True, timestamps=True, _preload_content=False,
            _request_timeout=(10, 120), **since,
        )  # fmt: skip
        for line in _lines(answer):
            moment, _, text = line.partition(" ")
            if log.last and moment <= log.last:
                continue
            log.last = moment
            sys.stdout.write(f"{text}\n")
            sys.stdout.flush()
    except (ApiException, HTTPError, OSError):
        return False  # asked again at the next look
    return True


def _lines(answer: Any) -> Iterator[str]:
    rest = b""
    for chunk in answer.stream(4096, decode_content=False):
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield line.decode(errors="replace")
    if rest:
        yield rest.decode(errors="replace")


# -- the command ----------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit codes: 0 created, or followed until it succeeded; 1 the job failed; 2 wrong usage or config; 3 no cluster,
    or it refuses; 130 stopped watching (the job goes on)."""
    parser = argparse.ArgumentParser(
        prog="training.submit", description="Train on the cluster of the current kubeconfig, and follow the job."
    )
    parser.add_argument("kind", choices=KINDS, help="k8s/training/overlays/OVERLAY/KIND")
    parser.add_argument("--overlay", choices=OVERLAYS, default="gpu", help="[gpu]")
    parser.add_argument("--config", type=Path, help="of the run, YAML or JSON [the one in k8s/training/base/common]")
    parser.add_argument("--name", help="of job and run [the overlay's and the config's]")
    parser.add_argument("--image", help="[mien-train of the overlay]")
    parser.add_argument("--nodes", type=int, help="pods [2]")
    parser.add_argument("--queue", help="Kueue's LocalQueue; '' starts without one [the overlay's]")
    parser.add_argument("--namespace", help="[mien]")
    parser.add_argument("--context", help="of the kubeconfig [the current one]")
    parser.add_argument("--attach", action="store_true", help="create nothing, follow the job that is there")
    parser.add_argument("--no-follow", action="store_true", help="create and return")
    parser.add_argument("--dry-run", action="store_true", help="print the manifest and stop; needs no cluster")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the config, for example batch=256")
    chosen = parser.parse_intermixed_args(arguments)

    def say(text: str) -> None:
        sys.stderr.write(f"== {text}\n")
        sys.stderr.flush()

    try:
        objects = manifest(
            Request(
                kind=chosen.kind, overlay=chosen.overlay, name=chosen.name, config=chosen.config,
                overrides=chosen.overrides, image=chosen.image, namespace=chosen.namespace, nodes=chosen.nodes,
                queue=chosen.queue,
            )
        )  # fmt: skip
        if chosen.dry_run:
            import yaml

            sys.stdout.write(yaml.safe_dump_all(objects, sort_keys=False))
            return 0
        name, namespace = objects[-1]["metadata"]["name"], objects[-1]["metadata"]["namespace"]
        client = connect(chosen.context, namespace)
        if not chosen.attach:
            create(client, objects)
            say(f"PyTorchJob {namespace}/{name} created")
        if chosen.no_follow:
            sys.stdout.write(f"kubectl -n {namespace} get pytorchjob {name}\n")
            return 0
        follow(client, name, say=say)
    except JobFailed as error:
        sys.stderr.write(f"submit: {error}\n")
        return 1
    except ClusterError as error:
        sys.stderr.write(f"submit: {error}\n")
        return 3
    except SubmitError as error:
        sys.stderr.write(f"submit: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("submit: the job goes on; the same command with --attach follows it\n")
        return 130
    sys.stdout.write(f"{namespace}/{name} succeeded\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
