"""The end-to-end suite without a cluster: it says so, its steps run, and each of them can fail."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.e2e import __main__ as command
from tests.e2e import cluster as module
from tests.e2e import steps
from tests.e2e.cluster import ROOT, Cluster, Failed
from tests.e2e.imaginary import Answer, Imaginary, no, ok

Over = Callable[[Imaginary, Sequence[str]], Answer | None]


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time passes in leaps: what never comes is given up at once."""
    clock = iter(range(0, 10_000_000, 30))
    leaping = SimpleNamespace(sleep=lambda _seconds: None, monotonic=lambda: next(clock))
    monkeypatch.setattr(module, "time", leaping)
    monkeypatch.setattr(steps, "time", leaping)


def replicas(cluster: Imaginary, count: int) -> None:
    for (_, kind, _), document in cluster.store.items():
        if kind == "deployment":
            document["spec"]["replicas"] = count


def scaled(good: bool) -> Over:
    """What an HPA would do while the pod ``load`` runs."""

    def over(cluster: Imaginary, words: Sequence[str]) -> Answer | None:
        if words[:4] == ["kubectl", "delete", "pod", "load"]:
            replicas(cluster, 1)
        elif words[1] == "get" and "deployment" in words:
            loaded = any(kind == "pod" for _, kind, _ in cluster.store)
            asked = cluster.notes["asked"] = cluster.notes.get("asked", 0) + 1
            replicas(cluster, 3 if good and loaded and asked == 2 else 1)
        return None

    return over


def talk(outside_too: bool = False, enforced: bool = True) -> dict[str, Callable[[Sequence[str]], dict[str, Any]]]:
    """Who can connect to whom, as the step asks: before and after the wall, then two doors from two sides."""
    answers = iter([True, not enforced, True, outside_too, True, outside_too])
    return {"connect": lambda _: {"open": next(answers)}, "listen": lambda _: {}}


def registry(refuses: bool = True, follows: bool = True) -> dict[str, Any]:
    """Digests as the alias would have them; jobs end as the gates say."""
    made: list[str] = []
    served = iter(["d1", "d2", "d2", "d1"] if follows else ["d1"] * 9)

    def register(arguments: Sequence[str]) -> dict[str, Any]:
        made.append(f"d{arguments[1]}")
        return {"version": arguments[1], "digest": made[-1]}

    def over(_cluster: Imaginary, words: Sequence[str]) -> Answer | None:
        if words[1:4] == ["get", "job", "promote-3"] and refuses:
            return ok('{"status": {"conditions": [{"type": "Failed", "status": "True"}]}}')
        return None

    return {"said": {"registry.py": register, "digests": lambda _: {"digests": [next(served)]}}, "over": over}


LOAD = {"load": lambda _: {"good": 500, "failed": 0, "failures": []}}
GOOD: dict[str, dict[str, Any]] = {
    "install": {},
    "round-trip": {},
    "wrong-password": {"said": {"wrong-password": lambda _: {"recovered": 0.2, "wrong": 9.0}}},
    "bad-values": {},
    "every-example": {},
    "pod-killed": {"said": {"load": lambda _: {"good": 500, "failed": 3, "failures": [{"at": 11.0, "what": "503"}]}}},
    "rolling-upgrade": {"said": LOAD},
    "network-policy": {"said": talk()},
    "pod-security": {},
    "autoscaling": {"said": LOAD, "over": scaled(True)},
    "training": {},
    "promotion": registry(),
    "uninstall": {},
}


def answer(when: Callable[[Sequence[str]], bool], what: Answer) -> Over:
    return lambda _cluster, words: what if when(words) else None


LEFT = ok("configmap/forgotten\n")
BAD: list[tuple[str, str, dict[str, Any], str]] = [
    ("install", "helm waits in vain", {"over": answer(lambda w: w[1] == "upgrade", no("timed out"))}, "timed"),
    ("install", "the server refuses", {"over": answer(lambda w: w[1] == "apply", no("forbidden"))}, "forbidden"),
    ("round-trip", "the test pod fails", {"over": answer(lambda w: w[1] == "test", no("exit code 1"))}, "exit code 1"),
    ("wrong-password", "the program says no", {
        "over": answer(lambda w: w[1:3] == ["get", "pod"], ok('{"status": {"phase": "Failed"}}')),
        "said": {"wrong-password": lambda _: {}}}, "caller"),
    ("bad-values", "everything is taken", {"over": answer(lambda w: w[:2] == ["helm", "upgrade"], ok())}, "not found"),
    ("every-example", "a field is unknown", {
        "over": answer(lambda w: "--dry-run=server" in w, no("Error: unknown field spec.x"))}, "unknown field"),
    ("pod-killed", "it never recovers", {
        "said": {"load": lambda _: {"good": 9, "failed": 1, "failures": [{"at": 44.0, "what": "503"}]}}}, "at the end"),
    ("pod-killed", "many are lost", {
        "said": {"load": lambda _: {"good": 9, "failed": 99, "failures": []}}}, "99 requests were lost"),
    ("rolling-upgrade", "one request fails", {
        "said": {"load": lambda _: {"good": 9, "failed": 1, "failures": [{"at": 3.0, "what": "503"}]}}}, "1 of 9"),
    ("network-policy", "a stranger gets in", {"said": talk(outside_too=True)}, "another namespace reaches 3000"),
    ("network-policy", "the service gets out", {
        "said": talk(), "over": answer(lambda w: w[1] == "exec", ok())}, "can call another pod"),
    ("pod-security", "it is root", {
        "over": answer(lambda w: w[1] == "exec", ok("0\ntouch: Read-only\nwritable\n0\n"))}, "'0'"),
    ("autoscaling", "nothing scales", {"said": LOAD, "over": scaled(False)}, "more than one pod"),
    ("training", "the job fails", {"over": answer(lambda w: w[1:3] == ["get", "pytorchjob"],
        ok('{"status": {"conditions": [{"type": "Failed", "status": "True"}]}}'))}, "failed"),
    ("promotion", "the gates let everything through", registry(refuses=False), "that fails its gates was promoted"),
    ("promotion", "the service does not follow", registry(follows=False), "every pod to serve d2"),
    ("uninstall", "something stays", {"over": lambda c, w: LEFT if "--ignore-not-found" in w and not any(
        "helm" in d for d in c.store.values()) else None}, "everything to be gone"),
]  # fmt: skip


def test_every_step_is_tried_on_a_good_and_on_a_bad_cluster() -> None:
    assert GOOD.keys() == steps.STEPS.keys() == {name for name, *_ in BAD}


@pytest.mark.parametrize("name", steps.STEPS)
def test_a_good_cluster_passes_and_is_left_as_it_was(name: str) -> None:
    cluster = Imaginary.new(**GOOD[name])
    result = command.attempt(name, cluster)
    assert (result.outcome, result.step) == ("ok", name), result.found
    assert result.found
    assert cluster.store == {}


@pytest.mark.parametrize(("name", "what", "changes", "said"), BAD, ids=[f"{n}: {w}" for n, w, *_ in BAD])
def test_a_bad_cluster_fails_with_the_reason_and_is_cleaned_up(
    name: str, what: str, changes: dict[str, Any], said: str
) -> None:
    cluster = Imaginary.new(**changes)
    result = command.attempt(name, cluster)
    assert result.outcome == "FAILED", what
    assert said in result.found
    assert cluster.store == {}


def test_namespaces_of_failed_steps_are_kept_on_request() -> None:
    cluster = Imaginary.new(keep=True, over=answer(lambda w: w[:2] == ["helm", "upgrade"], no("timed out")))
    assert command.attempt("install", cluster).outcome == "FAILED"
    assert [kind for _, kind, _ in cluster.store] == ["namespace"]


@pytest.mark.parametrize(
    ("name", "changes", "lacks"),
    [
        ("network-policy", {"said": talk(enforced=False)}, "does not enforce NetworkPolicy"),
        ("autoscaling", {"over": answer(lambda w: "--raw" in w, no("not found"))}, "prometheus-adapter"),
        ("pod-security", {"over": answer(lambda w: w[1] == "apply", ok())}, "does not enforce PodSecurity"),
    ],
)
def test_what_the_cluster_lacks_is_skipped_with_its_name(name: str, changes: dict[str, Any], lacks: str) -> None:
    result = command.attempt(name, Imaginary.new(**changes))
    assert result.outcome == "skipped"
    assert lacks in result.found


def test_an_unforeseen_answer_is_a_row_and_not_the_end() -> None:
    garbled = Imaginary.new(over=answer(lambda w: w[1] == "get", ok("<html>")))
    result = command.attempt("install", garbled)
    assert result.outcome == "FAILED"
    assert "JSONDecodeError" in result.found


def test_without_the_operator_training_runs_as_a_plain_job(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "pytorchjob" in command.attempt("training", Imaginary.new()).found
    monkeypatch.setenv("E2E_TRAINING", "job")
    assert "a job of 2 pods" in command.attempt("training", Imaginary.new()).found
    monkeypatch.delenv("E2E_TRAINING")
    bare = Imaginary.new(over=answer(lambda w: "crd" in w, no("not found")))
    assert "a job of 2 pods" in command.attempt("training", bare).found


# -- the command -------------------------------------------------------------------------------------------------------


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.e2e", *arguments], cwd=ROOT, env=os.environ | environment,
        capture_output=True, text=True, timeout=330, check=False,  # a fresh machine fetches helm first
    )  # fmt: skip


def test_without_a_cluster_it_says_so_and_exits_with_its_own_code(tmp_path: Path) -> None:
    done = run(KUBECONFIG=str(tmp_path / "none"), HOME=str(tmp_path))
    assert done.returncode == 69
    assert done.stderr.startswith("e2e: no cluster: ")
    assert done.stdout == ""


def test_steps_are_listed_and_wrong_names_refused_without_a_cluster() -> None:
    done = run("--list", KUBECONFIG="/nonexistent")
    assert done.returncode == 0
    assert [line.split()[0] for line in done.stdout.splitlines()] == list(steps.STEPS)
    assert run("--step", "everything").returncode == 2


def test_one_step_alone_and_the_exit_code_of_a_failed_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Cluster, "connect", classmethod(lambda _cls, keep=False: Imaginary.new(keep=keep)))
    assert command.main(["--step", "install", "--step", "round-trip"]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert [row.split()[:2] for row in rows[1:3]] == [["install", "ok"], ["round-trip", "ok"]]
    assert rows[-1] == "2 ok, 0 FAILED, 0 skipped"
    bad = Imaginary.new(over=answer(lambda w: w[1] == "apply", no("forbidden")))
    monkeypatch.setattr(Cluster, "connect", classmethod(lambda _cls, keep=False: bad))
    assert command.main(["--step", "install"]) == 1
    assert "forbidden" in capsys.readouterr().out


def test_it_needs_nothing_but_python_kubectl_and_helm() -> None:
    """-I -S: the standard library and no package of the environment."""
    script = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import tests.e2e.__main__ as m; sys.exit(m.main(['--list']))"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr


def test_waiting_ends() -> None:
    with pytest.raises(Failed, match="waited 60 s for the moon"):
        module.wait(lambda: None, 60, "the moon")
