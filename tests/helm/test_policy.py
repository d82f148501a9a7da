"""A policy scanner's opinion of what the chart renders. Its findings are mended, or stand here with their reason."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Final

import pytest
import yaml

from tests.helm import chart

CHECKOV: Final = "checkov==3.3.30"
DEPLOYMENT, TEST_POD = "Deployment.prod.demo-mien", "Pod.prod.demo-mien-test"

# Check -> (resources it may fail for, why it may).
ACCEPTED: Final[dict[str, tuple[set[str], str]]] = {
    "CKV_K8S_43": (
        {DEPLOYMENT, f"{DEPLOYMENT}-canary", TEST_POD},
        "image.digest fixes the digest where one is known; the default is a fixed tag, and `latest` is refused.",
    ),
    "CKV_K8S_15": (
        {DEPLOYMENT, f"{DEPLOYMENT}-canary", TEST_POD},
        "A fixed tag or a digest does not change; Always would make each restart depend on the registry.",
    ),
    "CKV_K8S_40": ({DEPLOYMENT}, "OpenShift chooses the user itself, a high one; only its values leave it out."),
    "CKV_K8S_9": ({TEST_POD}, "The pod of `helm test` runs once and ends: its exit code is its health."),
    "CKV_K8S_8": ({TEST_POD}, "The pod of `helm test` runs once and ends: its exit code is its health."),
    "CKV_K8S_35": (
        {DEPLOYMENT, TEST_POD},
        "MLflow and boto3 read their credentials from variables alone; the test pod gets the one key it tries.",
    ),
}


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_a_policy_scanner_finds_nothing_that_has_no_reason(tmp_path: Path) -> None:
    """checkov in an environment of its own: its pins and ours do not agree."""
    uv = shutil.which("uv") or str(chart.ROOT / ".cache" / "uv" / "bin" / "uv")
    if not Path(uv).exists():
        pytest.skip("no uv to install checkov with (`make env` brings it)")
    rendered = tmp_path / "rendered"
    rendered.mkdir()
    for case in [None, *chart.CASES]:
        name = case.stem if case else "defaults"
        objects = chart.render(chart.values_of(case) if case else None)
        (rendered / f"{name}.yaml").write_text(yaml.safe_dump_all(objects))
    command = [uv, "tool", "run", "--quiet", "--from", CHECKOV, "checkov", "--directory", str(rendered)]
    command += ["--framework", "kubernetes", "--output", "json", "--quiet", "--soft-fail", "--skip-download"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=540, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout)
    assert report["summary"]["passed"] > 1000
    assert report["summary"]["parsing_errors"] == 0
    failed = {(check["check_id"], check["resource"]) for check in report["results"]["failed_checks"]}
    accepted = {(check, resource) for check, (resources, _) in ACCEPTED.items() for resource in resources}
    assert failed <= accepted
    # What no longer fails has no business in the list.
    assert {check for check, _ in failed} == ACCEPTED.keys()
