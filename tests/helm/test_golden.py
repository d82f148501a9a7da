"""What must not change by accident, in what Helm renders."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from tests.helm import chart

CASES = {case.name.removesuffix("-values.yaml"): case for case in chart.CASES}


@pytest.fixture(scope="module")
def default() -> list[chart.Object]:
    return chart.render()


@pytest.fixture(scope="module")
def every() -> list[chart.Object]:
    return [o for case in [None, *chart.CASES] for o in chart.render(chart.values_of(case) if case else None)]


def case(name: str) -> list[chart.Object]:
    return chart.render(chart.values_of(CASES[name]))


def pod_specs(objects: list[chart.Object]) -> list[chart.Object]:
    deployments = [o["spec"]["template"]["spec"] for o in objects if o["kind"] == "Deployment"]
    return deployments + [o["spec"] for o in objects if o["kind"] == "Pod"]


def mebibytes(quantity: str) -> int:
    number, unit = re.fullmatch(r"(\d+)(Mi|Gi)", quantity).groups()  # type: ignore[union-attr]
    return int(number) * {"Mi": 1, "Gi": 1024}[unit]


# -- security ----------------------------------------------------------------------------------------------------------


def test_every_pod_meets_the_restricted_profile(every: list[chart.Object]) -> None:
    """The rules of https://kubernetes.io/docs/concepts/security/pod-security-standards/, one by one."""
    allowed = {
        "configMap",
        "emptyDir",
        "persistentVolumeClaim",
        "secret",
        "projected",
        "downwardAPI",
        "csi",
        "ephemeral",
    }
    for spec in pod_specs(every):
        assert not {"hostNetwork", "hostPID", "hostIPC", "hostUsers"} & spec.keys()
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for volume in spec["volumes"]:
            assert volume.keys() - {"name"} <= allowed
        for container in spec["containers"] + spec.get("initContainers", []):
            security = container["securityContext"]
            assert security["allowPrivilegeEscalation"] is False
            assert security["capabilities"] == {"drop": ["ALL"]}
            assert "privileged" not in security
            assert security["readOnlyRootFilesystem"] is True
            assert not any("hostPort" in port for port in container.get("ports", []))


def test_no_pod_gets_a_service_account_token(every: list[chart.Object]) -> None:
    for spec in pod_specs(every):
        assert spec["automountServiceAccountToken"] is False
        assert spec["serviceAccountName"]
    assert all(o["automountServiceAccountToken"] is False for o in every if o["kind"] == "ServiceAccount")
    assert not [o for o in every if o["kind"] in {"Role", "RoleBinding", "ClusterRole", "ClusterRoleBinding"}]


def test_no_secret_is_written_out(every: list[chart.Object]) -> None:
    assert not [o for o in every if o["kind"] == "Secret"]
    for spec in pod_specs(every):
        for container in spec["containers"]:
            for entry in container.get("env", []):
                if re.search(r"KEY$|SECRET|PASSWORD|TOKEN", entry["name"]) and "value" in entry:
                    assert entry["value"].startswith("/"), entry["name"]  # the path of a mounted file


def test_images_are_fixed(every: list[chart.Object]) -> None:
    for spec in pod_specs(every):
        for container in spec["containers"]:
            assert re.fullmatch(r"[^:@]+(:(?!latest$)[\w.-]+|@sha256:[0-9a-f]{64})", container["image"])


def test_the_cluster_may_choose_the_user() -> None:
    security = chart.of_kind(case("openshift"), "Deployment")["spec"]["template"]["spec"]["securityContext"]
    assert not {"runAsUser", "runAsGroup", "fsGroup"} & security.keys()
    assert security["runAsNonRoot"] is True


def test_all_that_is_written_to_is_memory_and_counts(every: list[chart.Object]) -> None:
    for objects, cache in ((chart.render(), 0), (case("mlflow"), 256)):
        spec = chart.of_kind(objects, "Deployment")["spec"]["template"]["spec"]
        volumes = {v["name"]: v["emptyDir"] for v in spec["volumes"] if "emptyDir" in v}
        assert all(v["medium"] == "Memory" and "sizeLimit" in v for v in volumes.values())
        total = sum(mebibytes(v["sizeLimit"]) for v in volumes.values())
        resources = spec["containers"][0]["resources"]
        assert mebibytes(resources["limits"]["memory"]) == 3 * 1024 + total == 3 * 1024 + 128 + cache
        assert mebibytes(resources["requests"]["memory"]) == 1536 + total
        mounts = {m["name"]: m["mountPath"] for m in spec["containers"][0]["volumeMounts"] if not m.get("readOnly")}
        assert mounts.keys() == volumes.keys()
        assert {mounts["tmp"], mounts["shm"]} == {"/tmp", "/dev/shm"}


# -- life --------------------------------------------------------------------------------------------------------------


def test_probes_ask_for_the_model_and_forgive_slowness(default: list[chart.Object]) -> None:
    container = chart.container(default)
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"http": 3000, "grpc": 3001}
    for probe, path in (("startupProbe", "/readyz"), ("readinessProbe", "/readyz"), ("livenessProbe", "/healthz")):
        assert container[probe]["httpGet"] == {"path": path, "port": "http"}
    startup, liveness = container["startupProbe"], container["livenessProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] == 180
    assert liveness["periodSeconds"] * liveness["failureThreshold"] >= 60


@pytest.mark.parametrize(("timeout", "stop"), [(60, 8), (12.5, 0), (600, 120)])
def test_a_pod_that_ends_has_time_for_what_it_accepted(timeout: float, stop: int) -> None:
    values = {"settings": {"requestTimeout": timeout}, "lifecycle": {"preStopSeconds": stop}}
    spec = chart.of_kind(chart.render(values), "Deployment")["spec"]["template"]["spec"]
    assert spec["containers"][0]["lifecycle"]["preStop"]["exec"]["command"] == ["sleep", str(stop)]
    assert spec["terminationGracePeriodSeconds"] > stop + timeout


def test_an_upgrade_takes_no_pod_before_its_successor_is_ready(default: list[chart.Object]) -> None:
    deployment = chart.of_kind(default, "Deployment")
    assert deployment["spec"]["strategy"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}
    assert deployment["spec"]["replicas"] == 2
    assert chart.of_kind(default, "PodDisruptionBudget")["spec"]["maxUnavailable"] == 1


def test_a_changed_value_rolls_the_pods() -> None:
    annotations = [
        chart.of_kind(chart.render(values), "Deployment")["spec"]["template"]["metadata"]["annotations"]
        for values in (None, {"model": {"realm": "other"}}, {"replicas": 3})
    ]
    assert annotations[0] != annotations[1]
    assert annotations[0] == annotations[2]


def test_pods_are_spread_by_what_they_are_selected_by(default: list[chart.Object]) -> None:
    deployment = chart.of_kind(default, "Deployment")
    constraints = deployment["spec"]["template"]["spec"]["topologySpreadConstraints"]
    assert [c["topologyKey"] for c in constraints] == ["topology.kubernetes.io/zone", "kubernetes.io/hostname"]
    assert all(c["labelSelector"] == deployment["spec"]["selector"] for c in constraints)


# -- network -----------------------------------------------------------------------------------------------------------


def test_selectors_are_name_instance_component_and_match_what_they_should() -> None:
    objects = case("canary")
    for suffix, component in (("", "server"), ("-canary", "canary")):
        deployment, service = (chart.of_kind(objects, kind, suffix) for kind in ("Deployment", "Service"))
        selector = deployment["spec"]["selector"]["matchLabels"]
        assert selector == service["spec"]["selector"]
        assert selector == {
            "app.kubernetes.io/name": "mien",
            "app.kubernetes.io/instance": "demo",
            "app.kubernetes.io/component": component,
        }
        assert selector.items() <= deployment["spec"]["template"]["metadata"]["labels"].items()
    budget = chart.of_kind(objects, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"]
    assert budget == chart.of_kind(objects, "Deployment")["spec"]["selector"]["matchLabels"]


def test_labels_of_the_user_never_enter_a_selector() -> None:
    values = {"commonLabels": {"team": "privacy"}, "podLabels": {"cost": "42"}}
    deployment = chart.of_kind(chart.render(values), "Deployment")
    assert deployment["metadata"]["labels"]["team"] == "privacy"
    assert {"team", "cost"} <= deployment["spec"]["template"]["metadata"]["labels"].keys()
    assert not {"team", "cost"} & deployment["spec"]["selector"]["matchLabels"].keys()


def test_the_service_names_its_protocols(default: list[chart.Object]) -> None:
    ports = {p["name"]: p for p in chart.of_kind(default, "Service")["spec"]["ports"]}
    assert (ports["http"]["port"], ports["http"]["targetPort"]) == (3000, "http")
    assert (ports["grpc"]["port"], ports["grpc"]["targetPort"]) == (3001, "grpc")
    assert ports["grpc"]["appProtocol"] == "kubernetes.io/h2c"
    with_tls = {p["name"]: p for p in chart.of_kind(case("grpc-tls"), "Service")["spec"]["ports"]}
    assert "appProtocol" not in with_tls["grpc"]


def test_the_network_policy_closes_both_ways(default: list[chart.Object]) -> None:
    policy = chart.of_kind(default, "NetworkPolicy")["spec"]
    assert sorted(policy["policyTypes"]) == ["Egress", "Ingress"]
    assert policy["egress"] == []
    assert all(rule["from"] and rule["ports"] for rule in policy["ingress"])  # an empty `from` is everybody
    assert policy["podSelector"]["matchExpressions"][0]["values"] == ["server", "canary"]


def test_nobody_may_mean_nobody() -> None:
    policy = chart.of_kind(chart.render({"networkPolicy": {"ingress": {"from": []}}}), "NetworkPolicy")["spec"]
    peers = [rule["from"] for rule in policy["ingress"]]
    assert len(peers) == 1
    assert peers[0][0]["podSelector"]["matchLabels"]["app.kubernetes.io/component"] == "test"


def test_a_followed_alias_opens_dns_and_the_registry_alone() -> None:
    egress = chart.of_kind(case("mlflow"), "NetworkPolicy")["spec"]["egress"]
    assert [sorted(port["port"] for port in rule["ports"]) for rule in egress] == [[53, 53], [443, 5000, 8333, 9000]]
    assert egress[1]["to"] == [{"ipBlock": {"cidr": "192.0.2.0/24"}}]


def test_metrics_are_scraped_from_where_it_is_allowed() -> None:
    policy = chart.of_kind(case("monitoring"), "NetworkPolicy")["spec"]["ingress"]
    assert any("namespaceSelector" in rule["from"][0] and len(rule["ports"]) == 1 for rule in policy)


def test_ingress_and_gateway_lead_to_both_doors_by_weight() -> None:
    routes = {o["kind"]: o for o in case("canary") if o["kind"].endswith("Route")}
    for kind, port in (("HTTPRoute", 3000), ("GRPCRoute", 3001)):
        backends = routes[kind]["spec"]["rules"][0]["backendRefs"]
        assert [(b["name"], b["port"], b["weight"]) for b in backends] == [
            ("demo-mien", port, 90),
            ("demo-mien-canary", port, 10),
        ]
    # A listener accepts one kind of route for a host name.
    assert not set(routes["HTTPRoute"]["spec"]["hostnames"]) & set(routes["GRPCRoute"]["spec"]["hostnames"])
    ingresses = {o["metadata"]["name"]: o for o in case("canary-ingress") if o["kind"] == "Ingress"}
    assert ingresses.keys() == {"demo-mien", "demo-mien-grpc", "demo-mien-canary", "demo-mien-grpc-canary"}
    annotations = ingresses["demo-mien-grpc-canary"]["metadata"]["annotations"]
    assert annotations["nginx.ingress.kubernetes.io/canary-weight"] == "5"
    assert annotations["nginx.ingress.kubernetes.io/backend-protocol"] == "GRPC"
    assert "annotations" not in ingresses["demo-mien"]["metadata"]
    backend = ingresses["demo-mien-canary"]["spec"]["rules"][0]["http"]["paths"][0]["backend"]["service"]
    assert backend == {"name": "demo-mien-canary", "port": {"name": "http"}}


def test_tls_comes_by_reference() -> None:
    ingress = chart.of_kind(case("keys-ingress"), "Ingress")
    assert ingress["spec"]["tls"] == [{"hosts": ["mien.example.com"], "secretName": "mien-tls"}]
    variables = chart.environment(case("grpc-tls"))
    assert variables["MIEN_GRPC_TLS_CERT"] == "/etc/mien/tls/tls.crt"


# -- model, keys, devices ----------------------------------------------------------------------------------------------


def test_the_model_comes_from_where_it_is_said(default: list[chart.Object]) -> None:
    assert chart.environment(default)["MIEN_MODEL"] == "/models/mien"
    pvc = case("pvc")
    assert chart.environment(pvc)["MIEN_MODEL"] == "/models/mounted"
    mount = next(m for m in chart.container(pvc)["volumeMounts"] if m["name"] == "model")
    assert mount == {"name": "model", "mountPath": "/models/mounted", "subPath": "mien-128", "readOnly": True}
    mlflow = chart.environment(case("mlflow"))
    assert mlflow["MIEN_MODEL"] == "models:/mien@champion"
    assert mlflow["MLFLOW_TRACKING_URI"] == "https://mlflow.example.com"
    assert mlflow["MIEN_MODEL_POLL"] == "30"
    assert mlflow["SSL_CERT_FILE"] == "/etc/mien/ca/ca.crt"
    sources = chart.container(case("mlflow"))["envFrom"]
    assert sources == [{"configMapRef": {"name": "mien-storage"}}, {"secretRef": {"name": "mien-mlflow"}}]


def test_the_canary_follows_the_candidate() -> None:
    objects = case("canary")
    assert chart.environment(objects)["MIEN_MODEL"] == "models:/mien@champion"
    assert chart.environment(objects, "-canary")["MIEN_MODEL"] == "models:/mien@candidate"


def test_keys_are_mounted_so_that_they_can_rotate(default: list[chart.Object]) -> None:
    objects = case("keys-ingress")
    mount = next(m for m in chart.container(objects)["volumeMounts"] if m["name"] == "keys")
    assert "subPath" not in mount  # which a changed Secret never reaches
    variables = chart.environment(objects)
    assert variables["MIEN_API_KEYS"] == f"{mount['mountPath']}/keys"
    assert "MIEN_INSECURE" not in variables
    assert chart.environment(default)["MIEN_INSECURE"] == "true"
    (key,) = chart.of_kind(objects, "Pod", "-test")["spec"]["containers"][0]["env"]
    assert key["valueFrom"]["secretKeyRef"]["name"] == "mien-test-key"


def test_gpu_pods_ask_for_the_device_and_fail_without() -> None:
    objects = case("gpu")
    resources = chart.container(objects)["resources"]
    assert resources["limits"]["nvidia.com/gpu"] == resources["requests"]["nvidia.com/gpu"] == 1
    assert chart.environment(objects)["MIEN_DEVICE"] == "cuda"
    assert chart.environment(objects)["MIEN_CUDA_GRAPHS"] == "true"
    spec = chart.of_kind(objects, "Deployment")["spec"]["template"]["spec"]
    assert spec["nodeSelector"] == {"nvidia.com/gpu.product": "NVIDIA-L4"}
    assert spec["tolerations"][0]["key"] == "nvidia.com/gpu"
    assert spec["runtimeClassName"] == "nvidia"


def test_torch_gets_the_threads_that_the_limit_pays_for(default: list[chart.Object]) -> None:
    assert chart.environment(default)["MIEN_CPU_THREADS"]["resourceFieldRef"]["resource"] == "limits.cpu"
    assert chart.environment(chart.render({"settings": {"cpuThreads": 2}}))["MIEN_CPU_THREADS"] == "2"
    assert "MIEN_CPU_THREADS" not in chart.environment(chart.render({"resources": {"limits": {"cpu": None}}}))


# -- scaling -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "kind"), [("hpa", "HorizontalPodAutoscaler"), ("keda", "ScaledObject")])
def test_whoever_scales_owns_the_number_of_pods(name: str, kind: str) -> None:
    objects = case(name)
    assert "replicas" not in chart.of_kind(objects, "Deployment")["spec"]
    scaler = chart.of_kind(objects, kind)["spec"]
    assert scaler["scaleTargetRef"] == {"apiVersion": "apps/v1", "kind": "Deployment", "name": "demo-mien"}
    behavior = scaler.get("behavior") or scaler["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
    assert behavior["scaleDown"]["stabilizationWindowSeconds"] == 600
    assert behavior["scaleUp"]["stabilizationWindowSeconds"] == 0


def test_scaling_follows_busy_requests_and_then_the_gpu() -> None:
    metrics = chart.of_kind(case("gpu"), "HorizontalPodAutoscaler")["spec"]["metrics"]
    assert [m["pods"]["metric"]["name"] for m in metrics] == ["mien_busy_requests", "DCGM_FI_DEV_GPU_UTIL"]
    assert metrics[0]["pods"]["target"] == {"type": "AverageValue", "averageValue": "3"}
    busy, gpu = chart.of_kind(case("keda"), "ScaledObject")["spec"]["triggers"]
    assert busy["metadata"]["query"] == (
        'sum(mien_queue_depth{namespace="prod",service="demo-mien"}'
        ' + mien_inflight_requests{namespace="prod",service="demo-mien"})'
    )
    assert busy["metadata"]["threshold"] == "3"
    assert busy["metadata"]["ignoreNullValues"] == gpu["metadata"]["ignoreNullValues"] == "false"
    assert "DCGM_FI_DEV_GPU_UTIL" in gpu["metadata"]["query"]


def test_the_adapters_rule_gives_the_name_that_the_hpa_asks_for() -> None:
    import yaml

    text = chart.of_kind(case("hpa"), "ConfigMap", "-prometheus-adapter")["data"]["rules.yaml"]
    rules: list[dict[str, Any]] = yaml.safe_load(text)
    assert rules[0]["name"]["as"] == "mien_busy_requests"
    assert "rate(" not in rules[0]["metricsQuery"]  # gauges


def test_the_dashboard_is_one(default: list[chart.Object]) -> None:
    board = chart.of_kind(case("monitoring"), "ConfigMap", "-dashboard")
    assert board["metadata"]["labels"]["grafana_dashboard"] == "1"
    panels = json.loads(board["data"]["mien.json"])["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels) >= 10
    assert all(panel["description"] and panel["targets"] for panel in panels)
