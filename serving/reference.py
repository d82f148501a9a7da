"""The tables of docs/serving.md, from the code they describe: ``python -m serving.reference`` writes them anew."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel

from serving.metrics import Metrics
from serving.options import EditOptions
from serving.problems import PROBLEMS
from serving.settings import Settings

PAGE: Final = Path(__file__).resolve().parents[1] / "docs" / "serving.md"
_BLOCK: Final = re.compile(r"(<!-- (?P<name>[a-z]+): generated -->\n).*?(<!-- end -->)", re.S)
# Defaults that depend on the machine.
_COMPUTED: Final = {"model": "`models/mien-128`", "workers": "CPUs, at most 8"}


def settings() -> str:
    """Every environment variable."""
    return _table(
        ("variable", "default", "what"),
        (
            (f"`MIEN_{name.upper()}`", _default(Settings, name), field.description or "")
            for name, field in Settings.model_fields.items()
        ),
    )


def options() -> str:
    """What a request may say beside the picture."""
    return _table(
        ("field", "default", "what"),
        (
            (f"`{name}`", _default(EditOptions, name), field.description or "")
            for name, field in EditOptions.model_fields.items()
        ),
    )


def problems() -> str:
    """Every error a caller can get."""
    return _table(
        ("problem", "HTTP", "gRPC", "title", "retry after"),
        (
            (f"`{p.slug}`", str(p.status), p.grpc, p.title, "" if p.retry_after is None else f"{p.retry_after} s")
            for p in PROBLEMS.values()
        ),
    )


def metrics() -> str:
    """Every metric of our own."""
    rows = []
    for metric in Metrics().registry.collect():
        if metric.name.startswith("mien_"):
            name = f"{metric.name}_total" if metric.type == "counter" else metric.name
            rows.append((f"`{name}`", metric.type, metric.documentation))
    return _table(("metric", "type", "what"), sorted(rows))


TABLES: Final[dict[str, Callable[[], str]]] = {
    "settings": settings,
    "options": options,
    "problems": problems,
    "metrics": metrics,
}


def render(page: str) -> str:
    """A page with its tables as they should be.

    Raises:
        KeyError: it asks for a table there is not.
    """
    return _BLOCK.sub(lambda found: f"{found[1]}{TABLES[found['name']]()}\n{found[3]}", page)


def _default(model: type[BaseModel], name: str) -> str:
    if name in _COMPUTED:
        return _COMPUTED[name]
    default: Any = model.model_fields[name].default
    return "" if default is None else f"`{str(default).lower() if isinstance(default, bool) else default}`"


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def main() -> None:
    """Write the page anew."""
    PAGE.write_text(render(PAGE.read_text()))
    sys.stdout.write(f"{PAGE}\n")


if __name__ == "__main__":
    main()
