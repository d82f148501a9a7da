"""A cluster in memory that answers as a good one would, or in one respect does not: the steps are tried on it.

It knows no Kubernetes. It keeps what is applied, lets the real Helm render what is installed, calls every pod ready at
once, and says of programs in pods what it is told to. That a step passes here says that the step runs; that it fails on
the bad ones says that it can fail. Only a real cluster says anything about the chart.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import helm_python
import yaml

from tests.e2e.cluster import CHART, RELEASE, Cluster

Object = dict[str, Any]
Answer = subprocess.CompletedProcess[str]


def ok(output: str = "") -> Answer:
    return subprocess.CompletedProcess([], 0, output, "")


def no(error: str) -> Answer:
    return subprocess.CompletedProcess([], 1, "", error)


@dataclass(frozen=True)
class Imaginary(Cluster):
    """``said``: what programs in pods print, by their first argument. ``over``: answers that replace the usual ones."""

    said: dict[str, Callable[[Sequence[str]], Object]] = field(default_factory=dict)
    over: Callable[[Imaginary, Sequence[str]], Answer | None] = lambda _cluster, _words: None
    store: dict[tuple[str, str, str], Object] = field(default_factory=dict)
    """By namespace, kind and name."""
    notes: dict[str, Any] = field(default_factory=dict)
    """Whatever the answers want to remember."""
    calls: list[list[str]] = field(default_factory=list)

    @classmethod
    def new(cls, **changes: Any) -> Imaginary:
        made = cls("kubectl", "helm", "registry.example.com:5000/mien-serve:1", "mien-train:1")
        return dataclasses.replace(made, **changes)

    def run(self, program: str, *arguments: str, text: str | None = None, timeout: float = 300) -> Answer:
        del timeout
        words = [program, *arguments]
        self.calls.append(words)
        return self.over(self, words) or getattr(self, f"_{program}_{arguments[0].replace('-', '_')}")(words, text)

    # -- kubectl -------------------------------------------------------------------------------------------------------

    def _kubectl_apply(self, words: list[str], text: str | None) -> Answer:
        if "-k" in words or "--dry-run=server" in words:
            return ok("object/x serverside-applied\n")
        assert text is not None
        made = json.loads(text)
        for document in made["items"] if made["kind"] == "List" else [made]:
            if document["kind"] == "Pod" and "privileged" in json.dumps(document):
                return no('pods "privileged" is forbidden: violates PodSecurity "restricted:latest"')
            self._put(document)
        return ok()

    def _put(self, document: Object) -> None:
        meta = document["metadata"]
        self.store[meta.get("namespace", ""), document["kind"].lower(), meta["name"]] = document

    def _kubectl_get(self, words: list[str], text: str | None) -> Answer:
        del text
        if "--raw" in words or "crd" in words:
            return ok("{}")
        namespace = words[words.index("--namespace") + 1] if "--namespace" in words else ""
        if "--selector" in words:
            selector = words[words.index("--selector") + 1]
            if "--sort-by" in words or "wide" in words:
                return ok("what a person would look at\n")
            if "--ignore-not-found" in words:
                released = [f"{kind}/{name}" for (space, kind, name), document in self.store.items()
                            if space == namespace and "helm" in document]  # fmt: skip
                return ok("\n".join(released if selector.startswith("app.") else []))
            return ok(json.dumps({"items": self._pods(namespace)}))
        kind, name = words[2], words[3]
        document = self.store.get((namespace, kind, name))
        if document is None:
            return no(f'{kind} "{name}" not found')
        status = self._status(namespace, kind)
        if kind == "pod":
            # Twice on its way, then at its end.
            asked = self.notes[name] = self.notes.get(name, 0) + 1
            status["phase"] = "Running" if asked <= 2 else "Succeeded"
        return ok(json.dumps(document | {"status": status}))

    def _status(self, namespace: str, kind: str) -> Object:
        complete = [{"type": name, "status": "True"} for name in ("Complete", "Succeeded")]
        return {
            "pod": {"podIP": "192.0.2.1"},
            "deployment": {"readyReplicas": len(self._pods(namespace))},
        }.get(kind, {"conditions": complete})

    def _pods(self, namespace: str) -> list[Object]:
        deployment = self.store.get((namespace, "deployment", RELEASE))
        if deployment is None:
            return []
        checksum = json.dumps(deployment["spec"]["template"])
        ready = {"containerStatuses": [{"ready": True, "restartCount": 0}]}
        return [
            {"metadata": {"name": f"mien-{n}", "uid": f"{checksum}-{n}"}, "status": ready}
            for n in range(deployment["spec"].get("replicas", 1))
        ]

    def _kubectl_logs(self, words: list[str], text: str | None) -> Answer:
        del text
        pod = self.store.get((words[-1], "pod", words[2]))
        if pod is None:
            return ok("")
        program, *rest = pod["spec"]["containers"][0]["command"][3:]
        if program.endswith("registry.py"):
            assert rest[2].startswith("http://")
        name = rest[0] if program.endswith("client.py") else program.rsplit("/", 1)[-1]
        return ok("chatter\n" + json.dumps(self.said[name](rest)) + "\n")

    def _kubectl_exec(self, words: list[str], text: str | None) -> Answer:
        del text
        if "sh" in words:
            return ok("65532\ntouch: cannot touch '/x': Read-only file system\nwritable\n0\n")
        return no("TimeoutError: timed out" if "python" in words else "ls: cannot access")

    def _kubectl_delete(self, words: list[str], text: str | None) -> Answer:
        del text
        if words[2] == "namespace":
            for key in [key for key in self.store if key[0] == words[3] or key[2] == words[3]]:
                del self.store[key]
        return ok()

    def _kubectl_create(self, words: list[str], text: str | None) -> Answer:
        del text
        name = words[words.index("--namespace") - 1]
        namespace = words[-1]
        self._put({"kind": "Job", "metadata": {"name": name, "namespace": namespace}})
        return ok()

    def _kubectl_rollout(self, words: list[str], text: str | None) -> Answer:
        del words, text
        return ok()

    _kubectl_wait = _kubectl_rollout

    def _kubectl_api_resources(self, words: list[str], text: str | None) -> Answer:
        del words, text
        return ok("pods\nservices\nevents\nnodes.metrics.k8s.io\n")

    # -- Helm ----------------------------------------------------------------------------------------------------------

    def _helm_upgrade(self, words: list[str], text: str | None) -> Answer:
        namespace = words[words.index("--namespace") + 1]
        assert text is not None
        try:
            with helm_python.Chart.load(CHART) as chart:
                files = chart.render(json.loads(text), name=RELEASE, namespace=namespace)
        except helm_python.HelmError as error:
            return no(str(error))
        for path, rendered in files.items():
            if path.endswith(".yaml") and "/tests/" not in path:
                for document in filter(None, yaml.safe_load_all(rendered)):
                    document["metadata"]["generation"] = 1
                    self._put(document | {"helm": True})
        return ok()

    def _helm_template(self, words: list[str], text: str | None) -> Answer:
        del words, text
        return ok("kind: List\n")

    def _helm_test(self, words: list[str], text: str | None) -> Answer:
        del words, text
        return ok("POD LOGS\nOK, model abc\n")

    def _helm_uninstall(self, words: list[str], text: str | None) -> Answer:
        del text
        for key in [key for key, document in self.store.items() if "helm" in document]:
            del self.store[key]
        return ok()
