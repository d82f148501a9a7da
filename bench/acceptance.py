"""The service's acceptance runs, one after the other: ``python -m bench.acceptance``.

Each is a test of ``tests/serving`` that ``make test`` runs shortened or not at all. They run alone, because they
measure: beside each other none would mean anything. What each prints as JSON and how long it took goes to
``bench/acceptance.json`` and, as a table for docs/serving.md, to standard output; a run that fails leaves the tail of
its output there, and the next one begins. All of them take half an hour of a machine that does nothing else.

Exit status: 1 where a run failed.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parents[1]
TESTS: Final = "tests/serving"

#: Name, what it promises, where it is, and the most seconds it may take.
RUNS: Final = (
    ("strace", "no file is opened for writing, no canary stays", "test_promises.py", "200_requests", 900),
    ("timing", "a wrong password looks like the right one", "test_promises_recover.py", "500_times", 900),
    ("length", "lengths tell nothing", "test_promises_recover.py", "length_is_the_same", 300),
    ("swap", "models are exchanged under load", "test_promises_load.py", "every_5_s", 240),
    ("overload", "overload sheds", "test_promises_load.py", "within_10_percent", 240),
    ("sigterm", "SIGTERM loses nothing", "test_promises_load.py", "sigterm", 120),
    ("callers", "64 callers for 5 minutes", "test_promises_load.py", "64_callers", 600),
    ("fuzz", "broken pictures end in documented errors", "test_fuzz.py", "", 300),
    ("abuse", "slow and broken uploads hold no worker", "test_abuse.py", "", 300),
    ("operations", "Prometheus scrapes it, its rules hold", "test_operations.py", "", 240),
    ("page", "a person with a browser", "test_page.py", "", 300),
    ("schema", "the OpenAPI document holds", "test_schemathesis.py", "", 1600),
)


def main() -> None:
    names = [run[0] for run in RUNS]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "acceptance.json")
    asked = parser.parse_args()
    report: dict[str, Any] = {"began": datetime.now(UTC).isoformat(timespec="seconds"), "cpus": os.cpu_count()}
    report["runs"] = {}
    for name, promise, file, keyword, limit in RUNS:
        if name in asked.only:
            print(f"... {name}", file=sys.stderr, flush=True)  # noqa: T201
            report["runs"][name] = {"promise": promise, **run(file, keyword, limit)}
            asked.out.write_text(json.dumps(report, indent=2) + "\n")
    print(table(report))  # noqa: T201
    sys.exit(any(not found["passed"] for found in report["runs"].values()))


def run(file: str, keyword: str, limit: int) -> dict[str, Any]:
    """One run in a process of its own."""
    command = [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", "--timeout", str(limit)]
    command += [f"{TESTS}/{file}", *(["-k", keyword] if keyword else [])]
    began, load = time.monotonic(), os.getloadavg()[0]
    with tempfile.TemporaryFile() as printed:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "MIEN_SOAK": "1"},
            stdin=subprocess.DEVNULL,
            stdout=printed,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            # A test has its own limit; this is for what hangs at the end.
            status = process.wait(2 * limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            status = process.wait(30)
        printed.seek(0)
        output = printed.read().decode(errors="replace")
    lines = output.splitlines()
    return {
        "command": f"MIEN_SOAK=1 pytest -s {TESTS}/{file}" + (f" -k {keyword}" if keyword else ""),
        "passed": status == 0 and " passed" in lines[-1],
        "skipped": [line for line in lines if line.startswith("SKIPPED")],
        "summary": lines[-1] if lines else "",
        "seconds": round(time.monotonic() - began),
        # Of the machine when it began: what else ran is in every figure.
        "load_before": round(load, 1),
        "figures": [figures for line in lines if (figures := _figures(line)) is not None],
        **({} if status == 0 else {"tail": lines[-40:]}),
    }


def _figures(line: str) -> dict[str, Any] | None:
    # Pytest's dots stand before what a test prints.
    start = line.find("{")
    if start < 0 or line[:start].strip(".sF"):
        return None
    try:
        found = json.loads(line[start:])
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def table(report: dict[str, Any]) -> str:
    """Markdown."""
    rows = ["| promise | run | came out |", "| --- | --- | --- |"]
    for found in report["runs"].values():
        figures = "; ".join(json.dumps(figures) for figures in found["figures"])
        came_out = f"{'passed' if found['passed'] else '**failed**'}, {len(found['skipped'])} skipped, "
        came_out += f"{found['seconds']} s, load {found['load_before']}{': ' + figures if figures else ''}"
        rows.append(f"| {found['promise']} | `{found['command']}` | {came_out} |")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
