"""``python -m training.submit`` against an HTTP server that takes, judges and answers as an API server with
the training operator: what is created has to pass the schemas, the job's status moves on, and its log is streamed."""

from __future__ import annotations

import json
import re
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.k8s import checks
from tests.k8s.conftest import ROOT, Render
from training import submit

pytest.importorskip("kubeflow.training", reason="submitting needs the extra k8s")

JOBS = "/apis/kubeflow.org/v1/namespaces/mien/pytorchjobs"
BEGAN = datetime.now(UTC) - timedelta(minutes=1)


@dataclass
class Cluster:
    """What the server was given, and what it says. ``story`` is the job's conditions and the pods, a step a look."""

    crds: Path
    applied: list[dict[str, Any]] = field(default_factory=list)
    jobs: dict[str, dict[str, Any]] = field(default_factory=dict)
    story: list[tuple[list[dict[str, str]], list[dict[str, Any]]]] = field(default_factory=list)
    logs: dict[str, list[str]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    refuse: tuple[str, int] = ("nothing", 0)

    def answer(self, method: str, path: str, query: str, body: bytes) -> tuple[int, Any]:
        self.asked.append(f"{method} {path}")
        if self.refuse[0] in path:
            return self.refuse[1], {"kind": "Status", "code": self.refuse[1], "message": "because"}
        if path == "/version/":
            return 200, {"major": "1", "minor": "33", "gitVersion": "v1.33.0", "gitCommit": "", "gitTreeState": "",
                         "buildDate": "", "goVersion": "", "compiler": "", "platform": ""}  # fmt: skip
        if method == "PATCH":
            obj = json.loads(body)
            assert "fieldManager=mien-submit" in query and path.endswith(f"/{obj['metadata']['name']}")
            assert f"/namespaces/{obj['metadata']['namespace']}/" in path
            if problems := checks.schema_problems(obj, self.crds, ("1.33",)):
                return 422, {"kind": "Status", "code": 422, "message": str(problems)}
            self.applied.append(obj)
            return 200, obj
        if method == "POST" and path == JOBS:
            job = json.loads(body)
            if job["metadata"]["name"] in self.jobs:
                return 409, {"kind": "Status", "code": 409, "message": "exists"}
            if problems := checks.problems([*self.applied, job], self.crds):
                return 422, {"kind": "Status", "code": 422, "message": str(problems)}
            self.jobs[job["metadata"]["name"]] = job
            return 201, job
        if method == "GET" and path.startswith(JOBS):
            job = self.jobs.get(path.rpartition("/")[2])
            if job is None:
                return 404, {"kind": "Status", "code": 404, "message": "not found"}
            if len(self.story) > 1:
                self.story.pop(0)
            return 200, job | {"status": {"conditions": self.story[0][0]}}
        if method == "GET" and path.endswith("/pods"):
            return 200, {"kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": self.story[0][1]}
        if method == "GET" and path.endswith("/log"):
            return 200, "".join(f"{line}\n" for line in self.logs[path.split("/")[-2]])
        return 404, {"kind": "Status", "code": 404, "message": f"{method} {path}"}


@pytest.fixture
def cluster(crds: Path, render: Render, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A server, and a kubeconfig for it."""
    state = Cluster(crds)

    class Handler(BaseHTTPRequestHandler):
        def handle_one(self) -> None:
            path, _, query = self.path.partition("?")
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            code, given = state.answer(self.command, path, query, body)
            data = given.encode() if isinstance(given, str) else json.dumps(given).encode()
            self.send_response(code)
            self.send_header("Content-Type", "text/plain" if isinstance(given, str) else "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PATCH = handle_one  # noqa: N815 - http.server's names

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    kubeconfig = tmp_path / "kubeconfig"
    kubeconfig.write_text(_kubeconfig(server.server_address[1]))
    monkeypatch.setenv("KUBECONFIG", str(kubeconfig))
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(kubeconfig))
    monkeypatch.setattr(submit.time, "sleep", lambda _: None)
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()


def _kubeconfig(port: int) -> str:
    return json.dumps(
        {
            "apiVersion": "v1", "kind": "Config", "current-context": "here",
            "clusters": [{"name": "c", "cluster": {"server": f"http://127.0.0.1:{port}"}}],
            "users": [{"name": "u", "user": {"token": "t"}}],
            "contexts": [{"name": "here", "context": {"cluster": "c", "user": "u"}}],
        }
    )  # fmt: skip


def _condition(kind: str, message: str, second: int) -> dict[str, str]:
    moment = (BEGAN + timedelta(seconds=second)).strftime("%Y-%m-%dT%H:%M:%SZ")
    return {"type": kind, "status": "True", "reason": kind, "message": message, "lastTransitionTime": moment,
            "lastUpdateTime": moment}  # fmt: skip


def _pod(uid: str, state: str, kind: str = "master", index: str = "0") -> dict[str, Any]:
    moment = BEGAN.strftime("%Y-%m-%dT%H:%M:%SZ")
    is_now = {"running": {"startedAt": moment}, "terminated": {"exitCode": 0}, "waiting": {"reason": "Creating"}}[state]
    labels = {"training.kubeflow.org/replica-type": kind, "training.kubeflow.org/replica-index": index}
    status = {
        "name": "pytorch",
        "ready": True,
        "restartCount": 0,
        "image": "i",
        "imageID": "i",
        "state": {state: is_now},
    }
    return {
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": f"job-{kind}-{index}", "namespace": "mien", "uid": uid,
                                                        "labels": labels},
        "spec": {"containers": [{"name": "pytorch"}]}, "status": {"phase": "Running", "containerStatuses": [status]},
    }  # fmt: skip


def _line(second: int, text: str) -> str:
    return f"{(BEGAN + timedelta(seconds=second)).strftime('%Y-%m-%dT%H:%M:%S.000000000Z')} {text}"


# -- the manifest ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlay", submit.OVERLAYS)
@pytest.mark.parametrize("kind", submit.KINDS)
def test_what_is_printed_is_what_the_overlay_has_but_for_what_was_asked_for(
    kind: str, overlay: str, render: Render, crds: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submit.main([kind, "--overlay", overlay, "--dry-run"]) == 0
    printed = list(yaml.safe_load_all(capsys.readouterr().out))
    assert checks.problems(printed, crds) == []

    def by_name(objects: list[dict[str, Any]]) -> dict[tuple[str, str], Any]:
        return {(o["kind"], o["metadata"]["name"]): o for o in objects}

    rendered = by_name(render(f"training/overlays/{overlay}/{kind}"))
    for found in (rendered, by_name(printed)):
        for obj in found.values():
            if "config.yaml" in obj.get("data", {}):
                obj["data"]["config.yaml"] = yaml.safe_load(obj["data"]["config.yaml"])
    assert by_name(printed) == rendered and printed[-1]["kind"] == "PyTorchJob"


def test_two_jobs_of_one_namespace_share_nothing_that_differs(render: Render, crds: Path, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("name: faces\ntotal_images: 1000\nbatch: 64\ndata: {shards: 's3://faces/shards/big'}\n")
    one, two = (
        submit.manifest(
            submit.Request(
                "elastic", name=name, config=config, overrides=["optimizer.lr=2e-4"], nodes=6, queue="", image="r/i:2",
                namespace="other",
            )
        )
        for name in ("one", "two")
    )  # fmt: skip
    assert checks.problems(one, crds) == []
    text = yaml.safe_dump_all(one)
    assert text.count("mien-train-elastic") == 0 and "image: r/i:2" in text and "image: mien-train" not in text
    assert {obj["metadata"]["namespace"] for obj in one} == {"other"}
    job = one[-1]
    assert job["spec"]["pytorchReplicaSpecs"]["Worker"]["replicas"] == 6 == job["spec"]["elasticPolicy"]["maxReplicas"]
    assert "suspend" not in job["spec"]["runPolicy"] and submit.QUEUE_LABEL not in job["metadata"]["labels"]
    runs = []
    for objects, name in ((one, "one"), (two, "two")):
        (shipped,) = (o for o in objects if "config.yaml" in o.get("data", {}))
        assert shipped["metadata"]["name"] == f"{name}-config"
        run = yaml.safe_load(shipped["data"]["config.yaml"])
        assert run["checkpoints"] == f"s3://faces/runs/{name}/checkpoints" and run["runs"] == submit.RUNS
        assert run["optimizer"] == {"lr": 2e-4} and run["name"] == name
        runs.append(run)
    names = [{(o["kind"], o["metadata"]["name"]) for o in objects} for objects in (one, two)]
    assert {kind for kind, _ in names[0] & names[1]} == {"ServiceAccount", "NetworkPolicy", "ConfigMap"}
    assert ("ConfigMap", "mien-storage") in names[0] & names[1] and len(names[0] & names[1]) == 3
    # The overlay's own config, renamed: its checkpoints move with the name, its bucket of the same name does not.
    renamed = submit.manifest(submit.Request("fixed", name="next"))
    (shipped,) = (o for o in renamed if "config.yaml" in o.get("data", {}))
    assert yaml.safe_load(shipped["data"]["config.yaml"])["checkpoints"] == "s3://mien/runs/next/checkpoints"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nodes", "100"], "a batch of 64 cannot be divided over 100 processes"),
        (["--nodes", "0"], "--nodes is 1 or more"),
        (["checkpoints=/data"], "would be lost with the pod"),
        (["data.shards=/data", "checkpoints=null"], "no place that pods can read"),
        (["batchsize=3"], "batchsize"),
        (["batch"], "key=value"),
        (["--config", "nowhere.yaml"], "cannot read config nowhere.yaml"),
    ],
)
def test_what_the_trainer_would_refuse_or_lose_is_refused_before_it_is_submitted(
    arguments: list[str], message: str, render: Render, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submit.main(["fixed", *arguments, "--dry-run"]) == 2
    assert message in capsys.readouterr().err


# -- the cluster ----------------------------------------------------------------------------------------------------


def test_a_job_is_created_followed_over_a_restart_and_streamed_to_its_end(
    cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    created = _condition("Created", "PyTorchJob mien-train is created.", 0)
    running = _condition("Running", "PyTorchJob mien-train is running.", 2)
    restarting = _condition("Restarting", "Master replica(s) failed with exit code 143.", 10)
    done = _condition("Succeeded", "PyTorchJob mien-train successfully completed.", 40)
    worker = _pod("w", "running", "worker")
    cluster.story = [
        ([], []),
        ([created], []),
        ([created], [_pod("a", "waiting"), worker]),
        ([created, running], [_pod("a", "running"), worker]),
        ([created, running], [_pod("a", "terminated"), worker]),
        ([created, restarting], []),
        ([created, restarting], [_pod("b", "running"), worker]),
        ([created, done], [_pod("b", "terminated"), worker]),
    ]
    # The pod that comes again has the name of the one before; what was shown is not shown again.
    cluster.logs = {"job-master-0": [_line(3, "5000/2000000"), _line(9, "saved, 143"), _line(20, "10000/2000000")]}
    assert submit.main(["fixed", "--overlay", "gpu"]) == 0
    said = capsys.readouterr()
    assert said.out.splitlines()[:3] == ["5000/2000000", "saved, 143", "10000/2000000"]
    assert said.out.count("saved, 143") <= 2  # once a pod
    assert said.out.splitlines()[-1] == "mien/mien-train succeeded"
    for told in ("created", "Running: PyTorchJob mien-train is running.", "failed with exit code 143", "successfully"):
        assert said.err.count(told) >= 1
    assert {o["kind"] for o in cluster.applied} == {"ConfigMap", "ServiceAccount", "NetworkPolicy"}
    job = cluster.jobs["mien-train"]
    assert job["metadata"]["labels"][submit.QUEUE_LABEL] == "mien" and job["spec"]["runPolicy"]["suspend"] is True

    # It is there: creating it again says so and touches nothing; --attach follows it.
    assert submit.main(["fixed"]) == 3
    assert "409, it exists: follow it with --attach" in capsys.readouterr().err
    posts = [asked for asked in cluster.asked if asked.startswith("POST")]
    assert submit.main(["fixed", "--attach"]) == 0
    assert [asked for asked in cluster.asked if asked.startswith("POST")] == posts


def test_a_job_that_fails_is_a_failure_with_the_operator_s_words(
    cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    failed = _condition("Failed", "PyTorchJob mien-train-elastic is failed because 1 Worker replica(s) failed.", 5)
    cluster.story = [([], []), ([failed], [_pod("a", "terminated", "worker")])]
    cluster.logs = {"job-worker-0": [_line(4, "training: a shard is missing")]}
    assert submit.main(["elastic", "--overlay", "cpu"]) == 1
    said = capsys.readouterr()
    assert "training: a shard is missing" in said.out  # the reason is seen also when the job was over at the first look
    assert "because 1 Worker replica(s) failed" in said.err
    assert {o["kind"] for o in cluster.applied} >= {"PodDisruptionBudget"}


@pytest.mark.parametrize(
    ("path", "code", "message"),
    [
        ("/version", 401, "the credentials of the kubeconfig are not accepted"),
        ("configmaps", 403, "you may not do that there"),
        ("pytorchjobs", 404, "is the training operator installed"),
    ],
)
def test_a_cluster_that_refuses_is_a_sentence(
    path: str, code: int, message: str, cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster.refuse = (path, code)
    assert submit.main(["fixed", "--no-follow"]) == 3
    assert re.search(rf"{code}, .*{message}", capsys.readouterr().err)
    assert cluster.jobs == {}


def test_without_a_cluster_it_says_so_and_what_can_be_done(
    render: Render, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kubeconfig = tmp_path / "kubeconfig"
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(kubeconfig))
    assert submit.main(["fixed"]) == 3
    assert "--dry-run prints what would be created" in capsys.readouterr().err
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        kubeconfig.write_text(_kubeconfig(closed.getsockname()[1]))
        assert submit.main(["fixed"]) == 3
    assert "the cluster at http://127.0.0.1" in capsys.readouterr().err


def test_a_field_that_the_sdk_would_drop_is_not_dropped_in_silence(cluster: Cluster) -> None:
    objects = submit.manifest(submit.Request("fixed"))
    client = submit.connect(None, "mien")
    objects[-1]["spec"]["runPolicy"]["somethingNew"] = 1
    with pytest.raises(submit.SubmitError, match="does not know all of this manifest"):
        submit.create(client, objects)
    assert cluster.jobs == {}


def test_the_folder_it_renders_is_the_one_that_is_checked() -> None:
    assert submit.ROOT == ROOT
