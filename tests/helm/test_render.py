"""Whatever the values, what Helm renders is what an API server takes, unknown fields refused."""

from __future__ import annotations

import re
from pathlib import Path

import helm_python
import pytest

from tests.helm import chart

EVERY = [None, *chart.CASES]
ids = ["defaults", *(case.name.removesuffix("-values.yaml") for case in chart.CASES)]


@pytest.fixture(scope="module")
def every() -> dict[str, list[chart.Object]]:
    """All objects of the defaults and of every file in ci/."""
    return {name: chart.render(chart.values_of(case) if case else None) for name, case in zip(ids, EVERY, strict=True)}


def distinct(every: dict[str, list[chart.Object]]) -> list[chart.Object]:
    return list({repr(document): document for objects in every.values() for document in objects}.values())


@pytest.mark.parametrize("version", chart.KUBERNETES)
def test_built_in_kinds_pass_the_strict_schemas_of_each_supported_kubernetes(
    every: dict[str, list[chart.Object]], version: str
) -> None:
    builtin = [
        document
        for document in distinct(every)
        if re.fullmatch(r"v1|[a-z]+/v\d|[a-z.]+\.k8s\.io/v\d", document["apiVersion"])
        and "gateway" not in document["apiVersion"]
    ]
    assert {"Deployment", "Service", "NetworkPolicy", "Ingress", "HorizontalPodAutoscaler", "Pod"} <= {
        document["kind"] for document in builtin
    }
    complaints = {
        f"{document['kind']} {document['metadata']['name']}": wrong
        for document in builtin
        if (wrong := chart.complaint(document, version))
    }
    assert not complaints


def test_custom_kinds_pass_their_schemas(every: dict[str, list[chart.Object]]) -> None:
    if not chart.CRDS.is_dir():
        pytest.skip(f"no schemas of custom resources at {chart.CRDS} (set MIEN_SHARED)")
    custom = [document for document in distinct(every) if re.search(r"coreos|keda|gateway", document["apiVersion"])]
    assert {document["kind"] for document in custom} == {
        "ServiceMonitor", "PrometheusRule", "ScaledObject", "HTTPRoute", "GRPCRoute",
    }  # fmt: skip
    assert not {document["kind"]: wrong for document in custom if (wrong := chart.complaint(document, "1.31"))}


@pytest.mark.parametrize("kind", ["Deployment", "ServiceMonitor", "HTTPRoute"])
def test_the_schemas_would_notice_an_unknown_field(every: dict[str, list[chart.Object]], kind: str) -> None:
    if kind == "ServiceMonitor" and not chart.CRDS.is_dir():
        pytest.skip(f"no schemas of custom resources at {chart.CRDS} (set MIEN_SHARED)")
    document = next(document for document in distinct(every) if document["kind"] == kind)
    assert chart.complaint(document, "1.31") is None
    assert chart.complaint({**document, "spec": {**document["spec"], "replicaz": 1}}, "1.31")


def test_lint_is_silent_even_when_strict() -> None:
    for case in EVERY:
        report = helm_python.lint(chart.CHART, chart.values_of(case) if case else None, strict=True, namespace="prod")
        assert report["messages"] == []
        assert report["errors"] == []


@pytest.mark.parametrize("case", EVERY, ids=ids)
def test_objects_do_not_clash_and_stay_in_the_namespace(case: Path | None) -> None:
    objects = chart.render(chart.values_of(case) if case else None)
    names = [(document["apiVersion"], document["kind"], document["metadata"]["name"]) for document in objects]
    assert len(names) == len(set(names))
    assert {document["metadata"]["namespace"] for document in objects} == {"prod"}
    assert all(len(name) <= 63 for *_, name in names)


def test_long_names_are_cut_to_what_kubernetes_takes() -> None:
    values = chart.values_of(chart.CHART / "ci" / "canary-ingress-values.yaml")
    objects = chart.render(values, name="r" * 53)
    assert max(len(document["metadata"]["name"]) for document in objects) <= 63


def test_two_releases_in_one_namespace_share_nothing() -> None:
    one, other = (chart.render(name=name) for name in ("one", "other"))
    assert not {(o["kind"], o["metadata"]["name"]) for o in one} & {(o["kind"], o["metadata"]["name"]) for o in other}
    selectors = [chart_objects[0]["spec"]["selector"]["matchLabels"] for chart_objects in (
        [o for o in one if o["kind"] == "Deployment"], [o for o in other if o["kind"] == "Deployment"],
    )]  # fmt: skip
    assert selectors[0] != selectors[1]


def test_notes_say_the_next_command() -> None:
    notes = chart.raw()["NOTES.txt"]
    assert "kubectl --namespace prod rollout status deployment/demo-mien" in notes
    assert "helm test demo --namespace prod" in notes
    assert "no API keys" in notes
    with_keys = chart.raw(chart.values_of(chart.CHART / "ci" / "keys-ingress-values.yaml"))["NOTES.txt"]
    assert "https://mien.example.com/" in with_keys
    assert "no API keys" not in with_keys


def test_notes_warn_where_the_network_policy_keeps_a_way_in_closed() -> None:
    values = chart.values_of(chart.CHART / "ci" / "keys-ingress-values.yaml")
    assert "networkPolicy.ingress.from" not in chart.raw(values)["NOTES.txt"]
    del values["networkPolicy"]
    assert "networkPolicy.ingress.from lets the pods of prod in" in chart.raw(values)["NOTES.txt"]
    assert "networkPolicy.ingress.from" not in chart.raw()["NOTES.txt"]


@pytest.mark.parametrize("case", chart.CASES, ids=[case.name.removesuffix("-values.yaml") for case in chart.CASES])
def test_no_example_opens_a_way_in_that_its_own_network_policy_closes(case: Path) -> None:
    assert "networkPolicy.ingress.from" not in chart.raw(chart.values_of(case))["NOTES.txt"]
