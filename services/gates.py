"""Gates: what a model must measure before it may become the champion. A file of conditions, each with its reason.

``services.evaluate`` says pass or fail per gate in its report, ``services.promote`` moves the alias only when all hold;
both read the same file through this module. The file knows nothing of Mien: it compares the figures of a flat
``report.json`` by key, so it can be read, argued about and versioned by itself.
"""

from __future__ import annotations

import hashlib
import math
import operator
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from mien.errors import MienError

DEFAULT: Final = Path(__file__).parent / "promote" / "gates.yaml"

Operator = Literal["<=", "<", ">=", ">", "=="]
_COMPARE: Final[dict[Operator, Callable[[float, float], bool]]] = {
    "<=": operator.le,
    "<": operator.lt,
    ">=": operator.ge,
    ">": operator.gt,
    "==": operator.eq,
}


class GateError(MienError):
    """The gate file cannot be read, or is not one this version knows."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Gate(_Record):
    """One condition on one figure, or on one figure relative to the present champion's."""

    key: str = Field(min_length=1, description="key of the flat report")
    op: Operator
    value: float = Field(allow_inf_nan=False, description="the bound; with `of: champion`, what is added to its figure")
    of: Literal["bound", "champion"] = Field(
        "bound", description="champion: the bound is the present champion's figure plus `value` (no regression)"
    )
    why: str = Field(min_length=20, description="the reason for the bound, for who must decide about an exception")

    def __str__(self) -> str:
        bound = f"{self.value:g}" if self.of == "bound" else f"champion's {self.value:+g}"
        return f"{self.key} {self.op} {bound}"


class Gates(_Record):
    """A gate file."""

    version: int = Field(ge=1, description="raised by hand with each change of a bound; goes into the audit trail")
    gates: tuple[Gate, ...] = Field(min_length=1)

    @field_validator("gates")
    @classmethod
    def _no_condition_twice(cls, gates: tuple[Gate, ...]) -> tuple[Gate, ...]:
        seen = [(gate.key, gate.op, gate.of) for gate in gates]
        twice = sorted({key for key, op, of in seen if seen.count((key, op, of)) > 1})
        if twice:
            raise ValueError(f"bounds the same way twice: {', '.join(twice)}")
        return gates


@dataclass(frozen=True)
class Verdict:
    """What a gate said of a report.

    Attributes:
        measured: the report's figure, None where it has none (which fails: what was not measured is not known to hold).
        bound: what it was compared with, None where the gate did not apply (no champion to compare with).
        passed: whether the gate holds.
        reason: in words, when ``measured`` and ``bound`` do not say it all; else empty.
    """

    gate: Gate
    measured: float | None
    bound: float | None
    passed: bool
    reason: str = ""

    def __str__(self) -> str:
        measured = "not measured" if self.measured is None else f"{self.measured:.6g}"
        text = f"{'pass' if self.passed else 'FAIL'}  {self.gate}  (measured: {measured})"
        return f"{text}: {self.reason}" if self.reason else text


def load(path: str | os.PathLike[str] = DEFAULT) -> Gates:
    """Read a gate file (YAML).

    Raises:
        GateError: it is missing, malformed, or has no gate: an empty file would let everything through.
    """
    import yaml

    try:
        raw = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise GateError(f"cannot read the gates {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise GateError(f"{path} is not YAML: {error}") from error
    try:
        return Gates.model_validate(raw)
    except ValidationError as error:
        details = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'file'}: {e['msg']}" for e in error.errors())
        raise GateError(f"{path} is not a gate file this version knows: {details}") from error


def digest(path: str | os.PathLike[str] = DEFAULT) -> str:
    """Sha256 of the file's bytes, hex: names the very rules a decision was made by; raises :class:`GateError`."""
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError as error:
        raise GateError(f"cannot read the gates {path}: {error.strerror}") from error


def check(gates: Gates, report: Mapping[str, Any], champion: Mapping[str, Any] | None = None) -> list[Verdict]:
    """Hold every gate against a flat report.

    Args:
        gates: the conditions.
        report: flat figures; values that are no finite numbers count as not measured.
        champion: figures of the present champion, for the gates ``of: champion``. None where there is no champion:
            these gates then pass, as there is nothing to be worse than. A champion *without* the figure fails them.

    Returns:
        One verdict a gate, in the file's order.
    """
    return [_verdict(gate, report, champion) for gate in gates.gates]


def failed(verdicts: Sequence[Verdict]) -> list[Verdict]:
    """Those that did not pass."""
    return [verdict for verdict in verdicts if not verdict.passed]


def _verdict(gate: Gate, report: Mapping[str, Any], champion: Mapping[str, Any] | None) -> Verdict:
    measured = _figure(report, gate.key)
    bound: float | None = gate.value
    if gate.of == "champion":
        if champion is None:
            return Verdict(gate, measured, None, measured is not None, "there is no champion to compare with")
        theirs = _figure(champion, gate.key)
        bound = None if theirs is None else theirs + gate.value
    if measured is None:
        return Verdict(gate, None, bound, False, "the report has no such figure")
    if bound is None:
        return Verdict(gate, measured, None, False, "the champion's report has no such figure; evaluate it again")
    return Verdict(gate, measured, bound, _COMPARE[gate.op](measured, bound))


def _figure(report: Mapping[str, Any], key: str) -> float | None:
    value = report.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)
