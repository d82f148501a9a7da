"""Prometheus metrics of a run, served by its launcher: the last line of the run's log, as gauges.

Trainers come and go with restarts and have better things to do than to answer a scraper, so the process above them
reads what they wrote. Rank 0 alone writes ``log.jsonl``; the other nodes export nothing but that they are up. Standard
library alone: a GPU machine without a registry runs this too.
"""

from __future__ import annotations

import json
import math
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Final

# What alerts are about has a name of its own; everything else a run logs is mien_training_figure{name="..."}.
_NAMED: Final = {
    "nimg": ("mien_training_images_seen", "Images seen since the run began, restarts included."),
    "time": (
        "mien_training_last_log_timestamp_seconds",
        "When the run last logged; it stands still when the run does.",
    ),
    "images_per_second": ("mien_training_images_per_second", "Images per second since the log line before."),
    "data_wait": ("mien_training_data_wait_ratio", "Share of the time that the trainer waited for data, 0 to 1."),
}
_TAIL: Final = 65536  # bytes, many lines


def expose(runs: Path) -> str:
    """The metrics in Prometheus' text format.

    Args:
        runs: folder of runs; the one whose ``log.jsonl`` was written last is shown.
    """
    lines = ["# HELP mien_training_up The launcher runs.", "# TYPE mien_training_up gauge", "mien_training_up 1"]
    values = _last(runs)
    for key, (name, text) in _NAMED.items():
        if key in values:
            lines += [f"# HELP {name} {text}", f"# TYPE {name} gauge", f"{name} {_number(values.pop(key))}"]
    if values:
        name = "mien_training_figure"
        lines += [f"# HELP {name} What the run logged last.", f"# TYPE {name} gauge"]
        lines += [f'{name}{{name="{_label(key)}"}} {_number(value)}' for key, value in sorted(values.items())]
    return "\n".join(lines) + "\n"


def serve(port: int, runs: Path) -> ThreadingHTTPServer:
    """Answer ``GET /metrics`` in a daemon thread; raises OSError where the port is taken. Port 0 picks a free one."""

    class Handler(BaseHTTPRequestHandler):
        timeout = 10

        def do_GET(self) -> None:
            found = self.path.partition("?")[0] == "/metrics"
            body = expose(runs).encode() if found else b"only /metrics is here\n"
            self.send_response(200 if found else 404)
            self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8" if found else "text/plain")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """A scrape is no news."""

    server = ThreadingHTTPServer(("", port), Handler)
    threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()
    return server


def _last(runs: Path) -> dict[str, float]:
    """Figures of the last lines of the newest log, each by its latest value: losses and validations log apart."""
    try:
        log = max(runs.glob("*/log.jsonl"), key=lambda path: path.stat().st_mtime)
        with open(log, "rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - _TAIL))
            tail = file.read()
    except (OSError, ValueError):  # no run here, or it was just removed
        return {}
    values: dict[str, float] = {}
    for line in tail.split(b"\n"):
        try:
            entry = json.loads(line)
        except ValueError:  # the first line may be cut, the last one half written
            continue
        if isinstance(entry, dict):
            values |= {k: float(v) for k, v in entry.items() if isinstance(v, int | float)}
    return values


def _number(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    return ("+Inf" if value > 0 else "-Inf") if math.isinf(value) else repr(value)


def _label(text: str) -> str:
    return re.sub(r'[\\"\n]', "_", text)
