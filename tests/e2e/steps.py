"""What is done to a cluster, one function a step. Each makes what it needs in a namespace of its own and removes it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from tests.e2e import objects
from tests.e2e.cluster import RELEASE, ROOT, Cluster, Failed, Object, Skipped, wait

Step = Callable[[Cluster], str]
"""Does it; returns what was found, for the table. Raises Failed or Skipped."""

STEPS: Final[dict[str, Step]] = {}
HTTP: Final = f"http://{RELEASE}:3000"
REGISTRY: Final = "http://mien-mlflow:5000"  # of k8s/dev
# What callers may lose of a pod that is killed without warning: each one request on it, and one more until the
# endpoints forget it.
LOST_PER_CALLER: Final = 2


def step(function: Step) -> Step:
    STEPS[function.__name__.replace("_", "-")] = function
    return function


def hold(condition: bool, otherwise: str) -> None:
    if not condition:
        raise Failed(otherwise)


# -- the service -------------------------------------------------------------------------------------------------------


@step
def install(cluster: Cluster) -> str:
    """the chart installs into a namespace of restricted pods, and every pod becomes ready"""
    with cluster.namespace("install") as namespace:
        began = time.monotonic()
        cluster.install(namespace)
        pods = cluster.pods(namespace)
        hold(len(pods) == 2, f"{len(pods)} pods instead of 2")
        for pod in pods:
            (status,) = pod["status"]["containerStatuses"]
            hold(status["ready"] and status["restartCount"] == 0, f"{pod['metadata']['name']}: {status}")
        return f"2 pods ready after {time.monotonic() - began:.0f} s"


@step
def round_trip(cluster: Cluster) -> str:
    """`helm test`: a synthetic picture there and back, over HTTP and gRPC"""
    with cluster.namespace("round-trip") as namespace:
        cluster.install(namespace)
        done = cluster.run("helm", "test", RELEASE, "--namespace", namespace, "--logs", "--timeout", "3m")
        hold(done.returncode == 0, f"helm test: {done.stderr.strip()[-500:]}")
        return next((line for line in done.stdout.splitlines() if line.startswith("OK, model")), "passed")


@step
def wrong_password(cluster: Cluster) -> str:
    """a wrong password gives another picture by an answer that looks the same; bad input gets its 4xx"""
    with cluster.namespace("wrong-password") as namespace:
        cluster.install(namespace)
        found = cluster.python(namespace, "caller", "client.py", "wrong-password", HTTP)
        return f"off by {found['recovered']} with the password, {found['wrong']} with a wrong one (of 255)"


@step
def bad_values(cluster: Cluster) -> str:
    """values that cannot work are refused, and the release stays what it was"""
    bad: list[Object] = [
        {"replica": 3},
        {"image": {"tag": "latest", "digest": ""}},
        {"service": {"type": "LoadBalancer"}},
        {"podSecurity": {"runAsUser": 0}},
        {"settings": {"workers": 65}},
        {"autoscaling": {"hpa": {"enabled": True}, "keda": {"enabled": True, "prometheusAddress": "http://p:9090"}}},
    ]
    with cluster.namespace("bad-values") as namespace:
        cluster.install(namespace)
        before = generation(cluster, namespace)
        for values in bad:
            done = cluster.upgrade(namespace, values)
            hold(done.returncode != 0, f"taken: {values}")
            hold(len(done.stderr.strip()) > 20, f"refused without a reason: {values}")
        hold(generation(cluster, namespace) == before, "the Deployment was changed all the same")
        return f"{len(bad)} of {len(bad)} refused"


def generation(cluster: Cluster, namespace: str) -> int:
    found: int = cluster.get("deployment", RELEASE, "--namespace", namespace)["metadata"]["generation"]
    return found


@step
def every_example(cluster: Cluster) -> str:
    """the API server takes what every ci/*-values.yaml renders to (a dry run; custom kinds where it knows them)"""
    taken, unknown = 0, set[str]()
    with cluster.namespace("examples") as namespace:
        for file in sorted((ROOT / "helm" / "mien" / "ci").glob("*-values.yaml")):
            done = cluster.run(
                "helm", "template", RELEASE, "helm/mien", "--namespace", namespace, "--values", str(file)
            )
            hold(done.returncode == 0, f"{file.name}: {done.stderr.strip()}")
            tried = cluster.run(
                "kubectl", "apply", "--server-side", "--dry-run=server", "--namespace", namespace, "-f", "-",
                text=done.stdout,
            )  # fmt: skip
            missing = [line for line in tried.stderr.splitlines() if "no matches for kind" in line]
            unknown |= {line.partition('for kind "')[2].partition('"')[0] for line in missing}
            wrong = [line for line in tried.stderr.splitlines()
                     if "error" in line.lower() and line not in missing and "ensure CRDs" not in line]  # fmt: skip
            hold(not wrong, f"{file.name}: {' '.join(wrong)[:400]}")
            taken += sum("serverside-applied" in line for line in tried.stdout.splitlines())
    return f"{taken} objects" + (f"; not known here: {', '.join(sorted(unknown))}" if unknown else "")


@step
def pod_killed(cluster: Cluster) -> str:
    """a pod dies without warning under load: callers lose what it was doing, and nothing after that"""
    callers, seconds = 4, 45
    with cluster.namespace("pod-killed") as namespace:
        cluster.install(namespace)
        cluster.start(namespace, "load", "client.py", "load", HTTP, f"--seconds={seconds}", f"--callers={callers}")
        running(cluster, namespace, "load")
        time.sleep(10)
        victim = cluster.pods(namespace)[0]["metadata"]["name"]
        cluster.ask("delete", "pod", victim, "--namespace", namespace, "--grace-period=0", "--force")
        found = cluster.finish(namespace, "load", timeout=seconds + 120)
        hold(found["good"] > 0, f"no answer at all: {found}")
        hold(found["failed"] <= LOST_PER_CALLER * callers, f"{found['failed']} requests were lost: {found['failures']}")
        late = [failure for failure in found["failures"] if failure["at"] > seconds - 10]
        hold(not late, f"still failing at the end: {late}")
        ready(cluster, namespace, 2)
        return f"{found['good']} answered, {found['failed']} lost with the pod"


@step
def rolling_upgrade(cluster: Cluster) -> str:
    """every pod is replaced under load, and no request fails"""
    with cluster.namespace("upgrade") as namespace:
        cluster.install(namespace)
        old = {pod["metadata"]["uid"] for pod in cluster.pods(namespace)}
        cluster.start(namespace, "load", "client.py", "load", HTTP, "--seconds=180", "--callers=3")
        running(cluster, namespace, "load")
        cluster.install(namespace, {"podAnnotations": {"mien-e2e/upgraded": "yes"}})
        hold(not old & {pod["metadata"]["uid"] for pod in cluster.pods(namespace)}, "a pod was not replaced")
        phase = cluster.get("pod", "load", "--namespace", namespace)["status"]["phase"]
        hold(phase == "Running", f"the load was over ({phase}) before the upgrade was")
        found = cluster.finish(namespace, "load", timeout=300)
        hold(found["good"] > 0 and found["failed"] == 0, f"{found['failed']} of {found['good']}: {found['failures']}")
        return f"{found['good']} answered, none failed"


def running(cluster: Cluster, namespace: str, name: str) -> None:
    """Wait until a pod's program has begun."""

    def phase() -> bool | None:
        found = cluster.get("pod", name, "--namespace", namespace)["status"].get("phase")
        return True if found not in (None, "Pending") else None

    wait(phase, 120, f"pod {name} to run")


def ready(cluster: Cluster, namespace: str, count: int) -> None:
    def counted() -> bool | None:
        found = cluster.get("deployment", RELEASE, "--namespace", namespace)["status"].get("readyReplicas", 0)
        return True if found == count else None

    wait(counted, 240, f"{count} ready pods")


# -- walls -------------------------------------------------------------------------------------------------------------


@step
def network_policy(cluster: Cluster) -> str:
    """callers of the namespace get in, others do not, and the service itself calls nobody"""
    with cluster.namespace("policy") as namespace, cluster.namespace("outside") as outside:
        cluster.start(outside, "listener", "client.py", "listen", "8000")
        running(cluster, outside, "listener")
        address = cluster.get("pod", "listener", "--namespace", outside)["status"]["podIP"]
        before = cluster.python(outside, "before", "client.py", "connect", address, "8000")
        hold(before["open"], f"two pods of one namespace cannot talk: {before}")
        cluster.apply(objects.deny_all(outside))
        time.sleep(5)
        if cluster.python(outside, "after", "client.py", "connect", address, "8000")["open"]:
            raise Skipped("this cluster's network plugin does not enforce NetworkPolicy")
        cluster.ask("delete", "networkpolicy", "deny-all", "--namespace", outside)

        cluster.install(namespace)
        host = f"{RELEASE}.{namespace}.svc"
        for port in ("3000", "3001"):
            inside = cluster.python(namespace, f"inside-{port}", "client.py", "connect", host, port)
            hold(inside["open"], f"a neighbour is kept out of {port}: {inside}")
            other = cluster.python(outside, f"outside-{port}", "client.py", "connect", host, port)
            hold(not other["open"], f"a pod of another namespace reaches {port}")
        script = f"import socket; socket.create_connection(({address!r}, 8000), timeout=5)"
        done = cluster.run(
            "kubectl", "exec", f"deployment/{RELEASE}", "--namespace", namespace, "--", "python", "-c", script
        )
        hold(done.returncode != 0, "the service can call another pod")
        hold(re.search(r"TimeoutError|ConnectionRefusedError|OSError", done.stderr) is not None, done.stderr.strip())
        return "2 doors open inside, closed outside; no way out"


@step
def pod_security(cluster: Cluster) -> str:
    """a restricted namespace admits the chart and nothing privileged; a read-only root, nobody is root, no token"""
    with cluster.namespace("security") as namespace:
        made = json.dumps(objects.privileged_pod(namespace, cluster.serve_image))
        refused = cluster.run("kubectl", "apply", "--server-side", "-f", "-", text=made)
        if refused.returncode == 0:
            raise Skipped("this cluster does not enforce PodSecurity")
        hold("violates PodSecurity" in refused.stderr, refused.stderr.strip())
        cluster.install(namespace)
        script = "id -u; touch /x 2>&1; touch /tmp/x && echo writable; grep -c '^CapEff:.*[1-9a-f]' /proc/1/status"
        said = cluster.run(
            "kubectl", "exec", f"deployment/{RELEASE}", "--namespace", namespace, "--", "sh", "-c", script
        ).stdout.splitlines()
        hold(len(said) == 4, f"{said}")
        hold(said[0] != "0" and "Read-only" in said[1] and said[2] == "writable" and said[3] == "0", f"{said}")
        token = cluster.run(
            "kubectl", "exec", f"deployment/{RELEASE}", "--namespace", namespace, "--",
            "ls", "/var/run/secrets/kubernetes.io/serviceaccount",
        )  # fmt: skip
        hold(token.returncode != 0, "the pod has a service account token")
        return f"user {said[0]}, read-only root, no capabilities, no token"


# -- scaling -----------------------------------------------------------------------------------------------------------


@step
def autoscaling(cluster: Cluster) -> str:
    """the HPA adds pods while requests wait, and takes them away afterwards"""
    if not cluster.has("--raw", "/apis/custom.metrics.k8s.io/v1beta1"):
        raise Skipped("no custom.metrics.k8s.io here: prometheus-adapter with the rule of monitoring.adapterRule")
    if not cluster.has("crd", "servicemonitors.monitoring.coreos.com"):
        raise Skipped("no Prometheus operator here to scrape what the HPA asks for")
    values: Object = {
        "autoscaling": {
            "hpa": {"enabled": True}, "minReplicas": 1, "maxReplicas": 3, "targetBusyRequests": 1,
            "scaleDownSeconds": 15,
        },
        "monitoring": {"serviceMonitor": {"enabled": True, "interval": "5s"}, "adapterRule": {"enabled": True}},
        "networkPolicy": {"ingress": {"metricsFrom": [{"namespaceSelector": {}}]}},
    }  # fmt: skip
    with cluster.namespace("autoscaling") as namespace:
        cluster.install(namespace, values)
        metric = f"/apis/custom.metrics.k8s.io/v1beta1/namespaces/{namespace}/pods/*/mien_busy_requests"
        wait(lambda: cluster.has("--raw", metric) or None, 180, "mien_busy_requests in the metrics API", period=5)
        cluster.start(namespace, "load", "client.py", "load", HTTP, "--seconds=240", "--callers=8")

        def replicas() -> int:
            found: int = cluster.get("deployment", RELEASE, "--namespace", namespace)["spec"]["replicas"]
            return found

        most = wait(lambda: n if (n := replicas()) > 1 else None, 220, "more than one pod under load", period=5)
        cluster.ask("delete", "pod", "load", "--namespace", namespace)
        wait(lambda: True if replicas() == 1 else None, 400, "one pod again without load", period=5)
        return f"1 -> {most} -> 1"


# -- training and promotion --------------------------------------------------------------------------------------------


@step
def training(cluster: Cluster) -> str:
    """two pods train together to the end (a PyTorchJob where the operator is; E2E_TRAINING=job: plain Jobs)"""
    operator = cluster.has("crd", "pytorchjobs.kubeflow.org") and os.environ.get("E2E_TRAINING") != "job"
    with cluster.namespace("training") as namespace:
        made = objects.pytorchjob if operator else objects.training_job
        cluster.apply(*made(namespace, cluster.train_image))
        kind, good = ("pytorchjob", "Succeeded") if operator else ("job", "Complete")

        def state() -> str | None:
            status = cluster.get(kind, "train", "--namespace", namespace).get("status", {})
            held = {c["type"] for c in status.get("conditions", []) if c["status"] == "True"}
            return next((name for name in (good, "Failed") if name in held), None)

        ended = wait(state, 900, f"the {kind} to end", period=5)
        log = cluster.ask(
            "logs", "--namespace", namespace, "--selector", "mien-e2e=train", "--tail", "5", "--prefix"
        ).strip()
        hold(ended == good, f"the {kind} failed: {log}")
        return f"a {kind} of 2 pods"


@step
def promotion(cluster: Cluster) -> str:
    """candidate -> gates -> champion -> the service follows; a bad one is refused; a roll back is followed too"""
    with cluster.namespace("promotion") as namespace, tempfile.TemporaryDirectory() as scratch:
        cluster.apply(objects.secret(namespace, "mien-s3", AWS_ACCESS_KEY_ID="e2e", AWS_SECRET_ACCESS_KEY="e2e-only"))
        for name in ("dev", "promote"):
            folder = objects.overlay(Path(scratch) / name, ROOT / "k8s" / name, namespace, cluster.train_image)
            cluster.ask("apply", "--server-side", "-k", str(folder))
        for name in ("mien-s3", "mien-mlflow"):
            cluster.ask("rollout", "status", f"statefulset/{name}", "--namespace", namespace, "--timeout=300s",
                        timeout=330)  # fmt: skip
        cluster.ask("wait", "--for=condition=complete", "job/mien-s3-bucket", "--namespace", namespace,
                    "--timeout=300s", timeout=330)  # fmt: skip

        def candidate(kind: str, seed: int) -> Object:
            return cluster.python(namespace, f"register-{seed}", "registry.py", kind, str(seed), REGISTRY,
                                  image=cluster.train_image)  # fmt: skip

        def run_job(cronjob: str, name: str) -> bool:
            cluster.ask("create", "job", f"--from=cronjob/{cronjob}", name, "--namespace", namespace)

            def ended() -> str | None:
                status = cluster.get("job", name, "--namespace", namespace)["status"]
                held = {c["type"] for c in status.get("conditions", []) if c["status"] == "True"}
                return next((kind for kind in ("Complete", "Failed") if kind in held), None)

            return wait(ended, 240, f"job {name} to end") == "Complete"

        def followed(digest: str, name: str) -> None:
            tries = iter(range(100))

            def served() -> bool | None:
                found = cluster.python(namespace, f"{name}-{next(tries)}", "client.py", "digests", HTTP)["digests"]
                return True if found == [digest] else None

            wait(served, 120, f"every pod to serve {digest[:12]}")

        first = candidate("good", 1)
        hold(run_job("mien-promote", "promote-1"), "the first candidate was refused")
        cluster.install(
            namespace,
            {"model": {"source": "mlflow", "mlflow": {"trackingUri": REGISTRY, "pollSeconds": 2}}},
        )
        followed(first["digest"], "first")
        second = candidate("good", 2)
        hold(run_job("mien-promote", "promote-2"), "the second candidate was refused")
        followed(second["digest"], "second")
        candidate("bad", 3)
        hold(not run_job("mien-promote", "promote-3"), "a candidate that fails its gates was promoted")
        followed(second["digest"], "still-second")
        hold(run_job("mien-rollback", "rollback"), "the roll back failed")
        followed(first["digest"], "back-to-first")
        return "2 promotions and a roll back followed, 1 refused"


# -- the end -----------------------------------------------------------------------------------------------------------


@step
def uninstall(cluster: Cluster) -> str:
    """nothing of the release is left in its namespace"""
    with cluster.namespace("uninstall") as namespace:
        cluster.install(namespace, {"podDisruptionBudget": {"enabled": True}})
        before = remains(cluster, namespace)
        hold(len(before) >= 5, f"only {before} to begin with")
        done = cluster.run("helm", "uninstall", RELEASE, "--namespace", namespace, "--wait", "--timeout", "3m")
        hold(done.returncode == 0, f"helm uninstall: {done.stderr.strip()}")
        wait(lambda: True if not remains(cluster, namespace) else None, 120, "everything to be gone")
        return f"{len(before)} objects before, none after"


def remains(cluster: Cluster, namespace: str) -> list[str]:
    """Objects of any kind that are the release's, by its label or by Helm's own record."""
    kinds = cluster.ask("api-resources", "--verbs=list", "--namespaced", "--output=name").split()
    # Events remain by design, and metrics are no objects.
    kinds = [kind for kind in kinds if not kind.startswith("events") and "metrics.k8s.io" not in kind]
    found = list[str]()
    for selector in (f"app.kubernetes.io/instance={RELEASE}", f"owner=helm,name={RELEASE}"):
        done: subprocess.CompletedProcess[str] = cluster.run(
            "kubectl", "get", ",".join(kinds), "--namespace", namespace, "--selector", selector, "--output", "name",
            "--ignore-not-found",
        )  # fmt: skip
        found += done.stdout.split()
    return sorted(found)
