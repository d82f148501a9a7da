"""The chart as Helm renders it, and schemas for what comes out. Real Helm, through helm-python-sdk: always there."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any, Final

import helm_python
import jsonschema
import kubernetes_validate
import yaml

ROOT: Final = Path(__file__).resolve().parents[2]
CHART: Final = ROOT / "helm" / "mien"
CASES: Final = sorted((CHART / "ci").glob("*-values.yaml"))
CRDS: Final = Path(os.environ.get("MIEN_SHARED", ROOT.parent / "shared")) / "crds"
KUBERNETES: Final = ("1.28", "1.29", "1.30", "1.31", "1.32", "1.33", "1.34", "1.35")

Object = dict[str, Any]


def values_of(case: Path) -> Object:
    values: Object = yaml.safe_load(case.read_text())
    return values


def raw(values: Object | None = None, *, name: str = "demo", namespace: str = "prod") -> dict[str, str]:
    """Template -> text, NOTES.txt among them.

    Raises:
        helm_python.HelmError: Helm refuses the values, by the schema or by `fail`.
    """
    with helm_python.Chart.load(CHART) as chart:
        return {
            path.split("/templates/")[-1]: text
            for path, text in chart.render(values, name=name, namespace=namespace).items()
        }


def render(values: Object | None = None, *, name: str = "demo", namespace: str = "prod") -> list[Object]:
    """All objects.

    Raises:
        helm_python.HelmError: as :func:`raw`.
    """
    return [
        document
        for path, text in raw(values, name=name, namespace=namespace).items()
        if path.endswith(".yaml")
        for document in yaml.load_all(text, Loader=_Strict)
        if document
    ]


def of_kind(objects: list[Object], kind: str, suffix: str = "") -> Object:
    """The one object of a kind whose name ends like this, after the release's full name."""
    found = [o for o in objects if o["kind"] == kind and o["metadata"]["name"] == f"demo-mien{suffix}"]
    assert len(found) == 1, f"{len(found)} of {kind} demo-mien{suffix}"
    return found[0]


def container(objects: list[Object], suffix: str = "") -> Object:
    (only,) = of_kind(objects, "Deployment", suffix)["spec"]["template"]["spec"]["containers"]
    return dict(only)


def environment(objects: list[Object], suffix: str = "") -> dict[str, Any]:
    return {entry["name"]: entry.get("value", entry.get("valueFrom")) for entry in container(objects, suffix)["env"]}


@functools.cache
def _custom(kind: str, group: str, version: str) -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(json.loads((CRDS / f"{kind}_{group}_{version}.json").read_text()))


def complaint(document: Object, version: str) -> str | None:
    """What is wrong with an object, by the schema of its kind that refuses unknown fields; None where it is right."""
    group, _, kind_version = document["apiVersion"].rpartition("/")
    if group == "gateway.networking.k8s.io":
        errors = list(GATEWAY[document["kind"]].iter_errors(document))
        return str(errors[0].message) if errors else None
    if "." in group and not group.endswith("k8s.io"):
        errors = list(_custom(document["kind"], group, kind_version).iter_errors(document))
        return f"{list(errors[0].path)}: {errors[0].message}" if errors else None
    try:
        kubernetes_validate.validate(document, version, strict=True)
    except kubernetes_validate.ValidationError as error:
        return f"{list(error.path)}: {error.message}"
    return None


class _Strict(yaml.SafeLoader):
    """A key twice in one mapping is an error, as the API server says and PyYAML does not."""


def _mapping(loader: _Strict, node: yaml.MappingNode) -> Object:
    keys = [loader.construct_object(key, deep=True) for key, _ in node.value]
    if len(keys) != len(set(keys)):
        raise yaml.YAMLError(f"twice in one mapping, {node.start_mark}: {sorted(k for k in keys if keys.count(k) > 1)}")
    return loader.construct_mapping(node, deep=True)


_Strict.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


# -- Gateway API v1: no schema of it is at hand, so the part that the chart uses, from the specification --------------


def _closed(required: list[str], **properties: Any) -> Object:
    return {"type": "object", "additionalProperties": False, "required": required, "properties": properties}


_TEXT: Final = {"type": "string", "minLength": 1}
_PORT: Final = {"type": "integer", "minimum": 1, "maximum": 65535}
_DURATION: Final = {"type": "string", "pattern": "^([0-9]{1,5}(h|m|s|ms)){1,4}$"}
_PARENT: Final = _closed(["name"], group=_TEXT, kind=_TEXT, name=_TEXT, namespace=_TEXT, sectionName=_TEXT, port=_PORT)
_BACKEND: Final = _closed(
    ["name", "port"],
    name=_TEXT,
    namespace=_TEXT,
    port=_PORT,
    weight={"type": "integer", "minimum": 0, "maximum": 1_000_000},
)
_PATH: Final = _closed(["type", "value"], type={"enum": ["Exact", "PathPrefix", "RegularExpression"]}, value=_TEXT)
_METHOD: Final = _closed([], type={"enum": ["Exact", "RegularExpression"]}, service=_TEXT, method=_TEXT)


def _route(kind: str, match: Object, **rule: Any) -> jsonschema.Draft202012Validator:
    rules = _closed(
        [],
        name=_TEXT,
        matches={"type": "array", "items": match, "maxItems": 64},
        backendRefs={"type": "array", "items": _BACKEND, "maxItems": 16},
        **rule,
    )
    spec = _closed(
        [],
        parentRefs={"type": "array", "items": _PARENT, "maxItems": 32},
        hostnames={"type": "array", "items": _TEXT, "maxItems": 16},
        rules={"type": "array", "items": rules, "minItems": 1, "maxItems": 16},
    )
    return jsonschema.Draft202012Validator(
        _closed(
            ["apiVersion", "kind", "metadata", "spec"],
            apiVersion={"const": "gateway.networking.k8s.io/v1"},
            kind={"const": kind},
            metadata={"type": "object"},
            spec=spec,
        )
    )


GATEWAY: Final = {
    "HTTPRoute": _route(
        "HTTPRoute", _closed([], path=_PATH), timeouts=_closed([], request=_DURATION, backendRequest=_DURATION)
    ),
    "GRPCRoute": _route("GRPCRoute", _closed([], method=_METHOD)),
}
