"""docs/serving.md says what is there."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from serving import reference
from serving.settings import Settings

ROOT = Path(__file__).resolve().parents[2]


def test_the_tables_are_those_of_the_code() -> None:
    page = reference.PAGE.read_text()
    assert reference.render(page) == page, "python -m serving.reference"
    for name, table in reference.TABLES.items():
        assert f"<!-- {name}: generated -->\n{table()}\n" in page


def test_every_setting_and_metric_has_a_description() -> None:
    for table in (reference.settings(), reference.metrics(), reference.options()):
        for row in table.splitlines()[2:]:
            assert len(row.split(" | ")[-1].strip(" |")) > 5, row


def test_every_variable_that_the_page_names_is_read(monkeypatch: Any) -> None:
    named = set(re.findall(r"\bMIEN_[A-Z_]+\b", reference.PAGE.read_text()))
    assert named == {f"MIEN_{name.upper()}" for name in Settings.model_fields}


def test_every_path_of_the_page_answers(run_engine: Callable[..., Any], tiny_model: Path) -> None:
    running = run_engine(tiny_model)
    page = reference.PAGE.read_text()
    named = {(m, p) for line in page.splitlines() for m, p in re.findall(r"`(GET|POST) (/[^`]*)`", line)}
    assert len(named) == 9
    for method, path in named:
        # A POST without a body is refused as such, not as unknown.
        assert running.ask(method, path).status_code in ({200} if method == "GET" else {400, 415}), path
    described = {
        (method.upper(), path)
        for path, operations in running.ask("GET", "/openapi.json").json()["paths"].items()
        for method in operations
    }
    assert described <= named
