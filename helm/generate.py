"""values.schema.json and README.md of the chart, from the comments of values.yaml: ``python helm/generate.py``.

A comment directly above a key describes it. ``# @schema {...}`` in that comment is merged into the JSON schema that the
default alone would give. Objects are closed (a misspelt value is refused) except where ``@schema`` opens them; the root
also takes what Helm itself puts there: ``global``, and ``enabled``, by which a parent chart switches this one.

``--check`` writes nothing and exits with 1 where a file is not what it should be.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import yaml

CHART: Final = Path(__file__).resolve().parent / "mien"
_KEY: Final = re.compile(r"(?P<indent> *)(?P<key>[A-Za-z][A-Za-z0-9_.-]*):(?: .*)?")
_SCHEMA: Final = "@schema "


@dataclass
class Comment:
    """What stands above a key."""

    text: str = ""
    schema: dict[str, Any] = field(default_factory=dict)


def comments(source: str) -> dict[tuple[str, ...], Comment]:
    """The comment of each key that has one, by its path.

    Raises:
        ValueError: an ``@schema`` that is not a JSON object.
    """
    found: dict[tuple[str, ...], Comment] = {}
    path: list[tuple[int, str]] = []
    pending: list[str] = []
    for number, line in enumerate(source.splitlines(), 1):
        bare = line.strip()
        if bare.startswith("#"):
            pending.append(bare[1:].strip())
            continue
        match = _KEY.fullmatch(line)
        if match is None:
            pending = []  # an empty line ends a comment; list items have no values of their own
            continue
        indent = len(match["indent"])
        path = [(depth, key) for depth, key in path if depth < indent] + [(indent, match["key"])]
        if pending:
            comment = Comment(" ".join(part for part in pending if not part.startswith(_SCHEMA)))
            for part in pending:
                if part.startswith(_SCHEMA):
                    try:
                        comment.schema |= json.loads(part.removeprefix(_SCHEMA))
                    except ValueError as error:
                        raise ValueError(f"values.yaml, above line {number}: {error}") from error
            found[tuple(key for _, key in path)] = comment
        pending = []
    return found


def schema(values: dict[str, Any], notes: dict[tuple[str, ...], Comment]) -> dict[str, Any]:
    """The JSON schema (draft 7, which every Helm 3 and 4 knows) of the whole file."""
    root = _of(values, (), notes)
    root["properties"]["global"] = {"type": "object", "description": "Helm's own: shared by all charts of a release."}
    root["properties"]["enabled"] = {"type": "boolean", "description": "Helm's own: a parent chart's condition."}
    return {"$schema": "http://json-schema.org/draft-07/schema#", "title": "Values of the Mien chart", **root}


def _of(value: Any, path: tuple[str, ...], notes: dict[tuple[str, ...], Comment]) -> dict[str, Any]:
    note = notes.get(path, Comment())
    made: dict[str, Any] = {"description": note.text} if note.text else {}
    opened = "properties" in note.schema or note.schema.get("additionalProperties", False) is not False
    match value:
        case dict() if opened:
            made |= {"type": "object"}
        case dict():
            properties = {key: _of(inner, (*path, key), notes) for key, inner in value.items()}
            made |= {
                "type": "object",
                "additionalProperties": False,
                "properties": properties,
                # `key: null` takes a default away; what the templates cannot do without says so here.
                "required": [key for key, inner in properties.items() if _needed(inner)],
            }
        case list():
            made |= {"type": "array", "default": value}
        case bool():
            made |= {"type": "boolean", "default": value}
        case int():
            made |= {"type": "integer", "default": value}
        case float():
            made |= {"type": "number", "default": value}
        case str():
            made |= {"type": "string", "default": value}
        case None if "type" not in note.schema:
            raise ValueError(f"{'.'.join(path)}: a default of null needs an @schema that names the type")
    return made | note.schema


def _needed(made: dict[str, Any]) -> bool:
    kind = made["type"]
    return "properties" in made or (kind not in ("object", "array") and "null" not in kind)


def table(values: dict[str, Any], notes: dict[tuple[str, ...], Comment]) -> list[str]:
    """Markdown rows of all values, sections' own comments in a row of their own."""
    rows = ["| value | default | |", "| --- | --- | --- |"]

    def walk(inner: dict[str, Any], path: tuple[str, ...]) -> None:
        for key, value in inner.items():
            here = (*path, key)
            note = notes.get(here, Comment())
            name = f"`{'.'.join(here)}`"
            allowed = ", ".join(f"`{choice}`" for choice in note.schema.get("enum", []))
            text = " ".join(filter(None, [note.text, f"One of {allowed}." if allowed else ""])).replace("|", "\\|")
            if isinstance(value, dict) and value and "additionalProperties" not in note.schema:
                if text:
                    rows.append(f"| {name} | | {text} |")
                walk(value, here)
            else:
                rows.append(f"| {name} | `{json.dumps(value)}` | {text} |")

    walk(values, ())
    return rows


def readme(values: dict[str, Any], notes: dict[tuple[str, ...], Comment]) -> str:
    """The chart's README: its fixed head, then the table."""
    head = (CHART / "files" / "README.head.md").read_text().rstrip()
    return head + "\n\n## Values\n\n" + "\n".join(table(values, notes)) + "\n"


def generate() -> dict[Path, str]:
    """What each generated file should hold."""
    source = (CHART / "values.yaml").read_text()
    values, notes = yaml.safe_load(source), comments(source)
    return {
        CHART / "values.schema.json": json.dumps(schema(values, notes), indent=2) + "\n",
        CHART / "README.md": readme(values, notes),
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="helm/generate.py", description="values.yaml -> schema and README")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where a file is out of date")
    arguments = parser.parse_args()
    stale = [path for path, text in generate().items() if not path.is_file() or path.read_text() != text]
    for path in stale:
        if not arguments.check:
            path.write_text(generate()[path])
        sys.stdout.write(f"{path.relative_to(CHART.parents[1])} {'is out of date' if arguments.check else 'written'}\n")
    return int(arguments.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
