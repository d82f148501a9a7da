"""Alerts fire when they should and stay silent when they should: promtool's unit tests of the rules as rendered."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from serving.metrics import Metrics
from serving.problems import PROBLEMS
from tests.helm import chart

MONITORING = chart.values_of(chart.CHART / "ci" / "monitoring-values.yaml")
ALERTS = {
    "MienDown", "MienNoModel", "MienErrors", "MienOverloaded", "MienSlow", "MienQueue", "MienReloadFailed",
    "MienModelsDiffer",
}  # fmt: skip
POD = 'namespace="prod",service="demo-mien",pod="demo-mien-0"'
STREAM = f'{POD},operation="anonymize",transport="grpc-stream"'
OTHER = 'namespace="prod",service="demo-mien",pod="demo-mien-1"'


@pytest.fixture(scope="module")
def groups() -> list[chart.Object]:
    found: list[chart.Object] = chart.of_kind(chart.render(MONITORING), "PrometheusRule")["spec"]["groups"]
    return found


@pytest.fixture(scope="module")
def promtool() -> str:
    found = shutil.which("promtool")
    if found is None:
        pytest.skip("promtool is not installed (Debian: prometheus)")
    return found


def series(name: str, values: str, labels: str = POD) -> chart.Object:
    return {"series": f"{name}{{{labels}}}", "values": values}


def healthy() -> list[chart.Object]:
    """One pod, an hour, ten answers a second, each well within a second."""
    made = [
        series("up", "1x60"),
        series("mien_model_info", "1x60", f'{POD},digest="aa",version="0.1.0"'),
        series("mien_queue_depth", "0x60"),
        series("mien_inflight_requests", "1x60"),
        series("mien_requests_total", "0+600x60", f'{POD},operation="anonymize",transport="http",outcome="ok"'),
        series("mien_model_stale", "0x60"),
    ]
    for bound in ("0.5", "1", "10", "+Inf"):
        labels = f'{POD},operation="anonymize",transport="http",le="{bound}"'
        made.append(series("mien_request_seconds_bucket", "0+600x60", labels))
    return made


def without(name: str) -> list[chart.Object]:
    return [entry for entry in healthy() if not entry["series"].startswith(name)]


def failed(rate: int, outcome: str) -> list[chart.Object]:
    labels = f'{POD},operation="anonymize",transport="http",outcome="{outcome}"'
    return [*healthy(), series("mien_requests_total", f"0+{rate}x60", labels)]


SCENES: dict[str, tuple[list[chart.Object], str, set[str]]] = {
    "all is well": (healthy(), "30m", set()),
    "a wrong picture is not our failure": (failed(600, "invalid-image"), "30m", set()),
    "nobody asks for anything": (without("mien_request"), "30m", set()),
    "one in a thousand fails": (failed(1, "internal-error"), "30m", set()),
    "one in ten fails": (failed(66, "internal-error"), "30m", {"MienErrors"}),
    "not for long yet": (failed(66, "internal-error"), "4m", set()),
    "one in ten takes too long": (failed(66, "timeout"), "30m", {"MienErrors"}),
    "one in ten is refused": (failed(66, "overloaded"), "30m", {"MienOverloaded"}),
    "no pod answers": ([series("up", "0x60")], "10m", {"MienDown"}),
    "nothing is scraped": ([], "10m", {"MienDown"}),
    "a pod without a model": ([*without("mien_model_info")], "10m", {"MienNoModel"}),
    "one of two pods without a model": ([*healthy(), series("up", "1x60", OTHER)], "10m", {"MienNoModel"}),
    "slow answers": (
        [entry for entry in healthy() if 'le="0.5"' not in entry["series"] and 'le="1"' not in entry["series"]],
        "30m",
        {"MienSlow"},
    ),
    "streams of many minutes": (
        [
            *healthy(),
            series("mien_request_seconds_bucket", "0x60", f'{STREAM},le="10"'),
            series("mien_request_seconds_bucket", "0+600x60", f'{STREAM},le="+Inf"'),
        ],
        "30m", set(),
    ),
    "a long queue": ([*without("mien_queue_depth"), series("mien_queue_depth", "12x60")], "30m", {"MienQueue"}),
    "a queue for a moment": (
        [*without("mien_queue_depth"), series("mien_queue_depth", "12x3 0x60")], "30m", set(),
    ),
    "a model that did not load": (
        [*without("mien_model_stale"), series("mien_model_stale", "0x10 1x50")],
        "50m",  # as long as it lasts
        {"MienReloadFailed"},
    ),
    "a model that loaded at the second try": (
        [*without("mien_model_stale"), series("mien_model_stale", "0x10 1x1 0x40")],
        "12m",
        set(),
    ),
    "a pod that never had a model": (
        [*without("mien_model"), series("mien_model_stale", "1x60")],
        "30m",
        {"MienNoModel"},
    ),
    "two models for long": (
        [*healthy(), series("mien_model_info", "1x60", f'{OTHER},digest="bb",version="0.1.0"')],
        "40m",
        {"MienModelsDiffer"},
    ),
    "another release's trouble": (
        [*healthy(), series("mien_queue_depth", "99x60", 'namespace="prod",service="second-mien",pod="x"')],
        "30m", set(),
    ),
}  # fmt: skip


@pytest.mark.parametrize("scene", SCENES, ids=[name.replace(" ", "-") for name in SCENES])
def test_alerts(scene: str, groups: list[chart.Object], promtool: str, tmp_path: Path) -> None:
    inputs, when, expected = SCENES[scene]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": groups}))
    # Each alert is asked for by a query on ALERTS, so that labels and texts need not be repeated here.
    samples = [{"labels": f'{{alertname="{name}"}}', "value": 1} for name in sorted(expected)]
    test = {
        "interval": "1m",
        "input_series": inputs,
        "promql_expr_test": [
            {
                "expr": 'count by (alertname) (ALERTS{alertstate="firing"}) > bool 0',
                "eval_time": when,
                "exp_samples": samples,
            }
        ],
    }
    (tmp_path / "test.yaml").write_text(
        yaml.safe_dump({"rule_files": ["rules.yaml"], "evaluation_interval": "1m", "tests": [test]})
    )
    done = subprocess.run(
        [promtool, "test", "rules", "test.yaml"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_a_scene_in_which_it_fires(groups: list[chart.Object]) -> None:
    names = {rule["alert"] for group in groups for rule in group["rules"] if "alert" in rule}
    assert names == ALERTS == set().union(*(expected for *_, expected in SCENES.values()))


def test_every_alert_says_how_bad_it_is_and_where_to_read_on(groups: list[chart.Object]) -> None:
    runbook = (chart.ROOT / "docs" / "operations.md").read_text()
    for rule in (rule for group in groups for rule in group["rules"] if "alert" in rule):
        assert rule["labels"]["severity"] in {"critical", "warning"}
        assert rule["annotations"]["runbook"] == f"docs/operations.md#{rule['alert'].lower()}"
        assert f"### {rule['alert']}\n" in runbook


def expressions(groups: list[chart.Object]) -> list[str]:
    board = json.loads((chart.CHART / "files" / "dashboard.json").read_text())
    adapter = yaml.safe_load((chart.CHART / "files" / "prometheus-adapter.yaml").read_text())
    return [
        *(rule["expr"] for group in groups for rule in group["rules"]),
        *(target["expr"] for panel in board["panels"] for target in panel["targets"]),
        *(rule["metricsQuery"] for rule in adapter),
    ]


def test_rules_and_dashboard_ask_for_numbers_that_the_service_has(groups: list[chart.Object]) -> None:
    there = {sample.name for family in Metrics().registry.collect() for sample in family.samples}
    there |= {f"{family.name}{suffix}" for family in Metrics().registry.collect()
              for suffix in ("", "_total", "_bucket", "_sum", "_count")}  # fmt: skip
    asked = {name for text in expressions(groups) for name in re.findall(r"\b(?:mien|process)_\w+", text)}
    assert len(asked) >= 9
    assert asked <= there


def test_outcomes_that_rules_and_dashboard_name_are_outcomes(groups: list[chart.Object]) -> None:
    outcomes = {"ok", "failed", *(problem.slug for problem in PROBLEMS.values())}
    server = {problem.slug for problem in PROBLEMS.values() if problem.status >= 500}
    for text in expressions(groups):
        for named in re.findall(r'outcome=~?"([^"]+)"', text):
            assert set(named.split("|")) <= outcomes
            if "internal-error" in named:
                assert set(named.split("|")) == server


def test_the_dashboards_queries_are_promql(promtool: str, tmp_path: Path) -> None:
    board = json.loads((chart.CHART / "files" / "dashboard.json").read_text())
    texts = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    plain = [
        text.replace("$__rate_interval", "5m").replace("$namespace", "n").replace("$service", "s") for text in texts
    ]
    rules = [{"record": f"panel:{number}", "expr": text} for number, text in enumerate(plain)]
    path = tmp_path / "rules.yaml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    done = subprocess.run([promtool, "check", "rules", path], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
