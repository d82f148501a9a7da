"""Values that cannot work are refused before anything reaches a cluster, with a message that says what to do."""

from __future__ import annotations

import importlib.util
import json
import sys
from typing import Any

import helm_python
import jsonschema
import pytest
import yaml

from serving.settings import Settings
from tests.helm import chart


def nested(path: str, value: Any) -> dict[str, Any]:
    for key in reversed(path.split(".")):
        value = {key: value}
    return dict(value)


BAD_BY_SCHEMA = [
    ("replica", 3, "replica"),
    ("replicas", "two", "integer"),
    ("replicas", -1, "minimum"),
    ("image.tag", "latest", "tag"),
    ("image.repository", "", "minLength"),
    ("image.digest", "sha256:abc", "pattern"),
    ("image.pullPolicy", "Sometimes", "Always"),
    ("image.pullSecret", "x", "pullSecret"),
    ("model.source", "s3", "image"),
    ("model.path", "models/mien", "pattern"),
    ("model.realm", "", "minLength"),
    ("model.mlflow.uri", "mien@champion", "pattern"),
    ("model.mlflow.trackingUri", "mlflow:5000", "pattern"),
    ("model.mlflow.cacheSize", "1G", "pattern"),
    ("settings.workers", 65, "maximum"),
    ("settings.requestTimeout", None, "requestTimeout"),
    ("settings.requestTimeout", 3600, "maximum"),
    ("settings.queue", 4, "queue"),
    ("settings.precision", "float16", "bfloat16"),
    ("resources.limits.memory", "3G", "pattern"),
    ("resources.limits.memory", 3_000_000_000, "string"),
    ("memoryVolumes.tmp", "64M", "pattern"),
    ("gpu.count", 0, "minimum"),
    ("podSecurity.runAsUser", 0, "minimum"),
    ("service.type", "ExternalName", "ClusterIP"),
    ("service.httpPort", 70000, "maximum"),
    ("podDisruptionBudget.maxUnavailable", 0, "minimum"),
    ("autoscaling.targetBusyRequests", 0, "minimum"),
    ("canary.weight", 101, "maximum"),
    ("canary.uri", "models:/mien", "pattern"),
    ("monitoring.serviceMonitor.interval", "15", "pattern"),
    ("monitoring.rules.errorRatio", 5, "maximum"),
    ("topologySpread.whenUnsatisfiable", "Maybe", "ScheduleAnyway"),
    ("extraEnv", [{"value": "x"}], "name"),
    ("gateway.parentRefs", [{"namespace": "x"}], "name"),
    ("apiKeys.keys", ["plain"], "keys"),
]

BAD_TOGETHER = [
    ({"autoscaling": {"hpa": {"enabled": True}, "keda": {"enabled": True, "prometheusAddress": "http://p:9090"}}},
     "exclude each other"),
    ({"autoscaling": {"keda": {"enabled": True}}}, "autoscaling.keda.prometheusAddress"),
    ({"autoscaling": {"minReplicas": 5, "maxReplicas": 2}}, "larger than"),
    ({"autoscaling": {"gpuUtilization": {"enabled": True}}}, "gpu.enabled"),
    ({"model": {"source": "pvc"}}, "model.pvc.existingClaim"),
    ({"model": {"source": "mlflow"}}, "model.mlflow.trackingUri"),
    ({"canary": {"enabled": True}}, "model.source=mlflow"),
    ({"model": {"source": "mlflow", "mlflow": {"trackingUri": "http://m:5000"}},
      "canary": {"enabled": True, "uri": "models:/mien@champion"}}, "the same model"),
    ({"model": {"source": "mlflow", "mlflow": {"trackingUri": "http://m:5000"}},
      "canary": {"enabled": True, "weight": 5}}, "gateway.enabled or ingress.enabled"),
    ({"ingress": {"enabled": True}}, "ingress.host"),
    ({"ingress": {"grpc": {"enabled": True}}}, "ingress.grpc.host"),
    ({"ingress": {"enabled": True, "host": "h.example.com"}}, "apiKeys.existingSecret"),
    ({"gateway": {"enabled": True}}, "gateway.parentRefs"),
    ({"gateway": {"enabled": True, "parentRefs": [{"name": "g"}]}}, "apiKeys.existingSecret"),
    ({"gateway": {"enabled": True, "parentRefs": [{"name": "g"}], "grpc": {"enabled": True}}},
     "gateway.grpc.hostnames"),
    ({"gateway": {"enabled": True, "parentRefs": [{"name": "g"}], "hostnames": ["a.example.com"],
                  "grpc": {"enabled": True, "hostnames": ["a.example.com"]}}}, "only one of the two routes"),
    ({"service": {"type": "LoadBalancer"}}, "apiKeys.existingSecret"),
    ({"grpcTls": {"clientCertificates": True}}, "grpcTls.existingSecret"),
    ({"serviceAccount": {"create": False}}, "serviceAccount.name"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "value", "named"), BAD_BY_SCHEMA, ids=[f"{p}={v}" for p, v, _ in BAD_BY_SCHEMA])
def test_the_schema_refuses_and_names_the_value(path: str, value: Any, named: str) -> None:
    with pytest.raises(helm_python.HelmError) as refused:
        chart.render(nested(path, value))
    message = str(refused.value)
    where = path.split(".") if named != path.split(".")[-1] else path.split(".")[:-1]
    assert "/".join(where) in message or named in message
    assert len(message) < 1000


@pytest.mark.parametrize(("values", "named"), BAD_TOGETHER, ids=[named for _, named in BAD_TOGETHER])
def test_values_that_do_not_go_together_are_refused_with_advice(values: dict[str, Any], named: str) -> None:
    with pytest.raises(helm_python.HelmError, match=named.replace(".", r"\.")):
        chart.render(values)


def test_what_helm_itself_puts_at_the_root_is_let_through() -> None:
    assert chart.render({"global": {"anything": {"goes": 1}}, "enabled": True}) == chart.render()


def generator() -> Any:
    spec = importlib.util.spec_from_file_location("helm_generate", chart.CHART.parent / "generate.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look names up
    spec.loader.exec_module(module)
    return module


def test_schema_and_readme_are_what_the_comments_of_values_yaml_give() -> None:
    stale = [path.name for path, text in generator().generate().items() if path.read_text() != text]
    assert not stale, "run `python helm/generate.py`"


def test_the_schema_is_one_and_takes_the_defaults() -> None:
    schema = json.loads((chart.CHART / "values.schema.json").read_text())
    jsonschema.Draft7Validator.check_schema(schema)
    jsonschema.Draft7Validator(schema).validate(yaml.safe_load((chart.CHART / "values.yaml").read_text()))


def test_each_value_is_described_or_says_itself_what_it_is() -> None:
    """Names that speak for themselves, and no others, go without a comment."""
    plain = {"enabled", "key", "className", "annotations", "podAnnotations", "podLabels", "nodeSelector", "tolerations",
             "affinity", "priorityClassName", "labels", "type", "httpPort", "grpcPort", "host", "maxUnavailable",
             "minReplicas", "maxReplicas", "replicas", "pullPolicy", "create", "resource", "hostnames",
             "timeoutSeconds", "registryPorts", "prometheusAddress", "runAsUser", "runAsGroup", "fsGroup"}  # fmt: skip
    module = generator()
    source = (chart.CHART / "values.yaml").read_text()
    notes = module.comments(source)

    def leaves(values: dict[str, Any], path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
        found = []
        for key, value in values.items():
            here = (*path, key)
            opened = "additionalProperties" in notes.get(here, module.Comment()).schema
            if isinstance(value, dict) and value and not opened:
                found += leaves(value, here)
            else:
                found.append(here)
        return found

    bare = [path for path in leaves(yaml.safe_load(source)) if not notes.get(path, module.Comment()).text]
    assert {path[-1] for path in bare} <= plain


def test_settings_are_settings_of_the_service_with_their_bounds() -> None:
    """Every environment variable that the chart sets is one that serving reads, and takes the chart's extremes."""
    schema = json.loads((chart.CHART / "values.schema.json").read_text())["properties"]["settings"]["properties"]
    for bound in ("minimum", "maximum"):
        chosen = {name: spec[bound] for name, spec in schema.items() if bound in spec}
        values = {"settings": chosen | {"precision": "bfloat16", "channelsLast": True, "cudaGraphs": True}}
        variables = chart.environment(chart.render(values))
        fields = {
            name.removeprefix("MIEN_").lower(): value
            for name, value in variables.items()
            if name.startswith("MIEN_") and isinstance(value, str)
        }
        assert set(fields) <= set(Settings.model_fields)
        assert len(fields) > len(chosen)
        Settings.model_validate(fields)


def test_large_numbers_reach_the_service_as_whole_ones() -> None:
    variables = chart.environment(chart.render({"settings": {"maxBodyBytes": 26_214_400, "batchWaitMs": 2.5}}))
    assert variables["MIEN_MAX_BODY_BYTES"] == "26214400"
    assert variables["MIEN_BATCH_WAIT_MS"] == "2.5"
