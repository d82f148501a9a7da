"""The decisions: whether a candidate becomes the champion, and what a champion is rolled back to.

What makes the order of the writes safe: events are written before the alias moves. A job that dies in between leaves
an event more than happened, and the next one decides again; never a champion that nobody signed for, and never one that
was rolled back and is promoted again by the clock.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from mien import store
from mien.errors import MienError, ModelIntegrityError
from services import gates
from services.gates import Gates, Verdict
from services.promote.registry import Event, Registry, RegistryError, Report

# Figures of two models are comparable when these are the same: the same faces under the same codes, judged alike.
COMPARABLE: Final = ("format", "data.digest", "data.split", "seed", "faces", "fpr")

Say = Callable[[str], None]


class Refused(MienError):
    """The candidate does not become the champion, or there is nothing to go back to; trying again changes nothing."""


@dataclass(frozen=True)
class Rules:
    """Gates, and the sha256 of the file that they were read from."""

    gates: Gates
    sha256: str


@dataclass(frozen=True)
class Decision:
    """What was (or, on a dry run, would be) decided.

    Attributes:
        champion: the version that has the alias now; None where none has.
        changed: whether the alias moves.
        verdicts: of the gates, empty where none had to be asked.
    """

    champion: str | None
    changed: bool
    verdicts: tuple[Verdict, ...] = ()


def promote(
    registry: Registry,
    rules: Rules,
    *,
    who: str,
    candidate: str = "candidate",
    champion: str = "champion",
    report: Report | None = None,
    again: bool = False,
    why: str = "",
    dry_run: bool = False,
    say: Say = lambda _: None,
) -> Decision:
    """Move the alias ``champion`` to the candidate when every gate holds.

    Nothing changes where there is no candidate or it is the champion already.

    Args:
        who: goes into the trail.
        report: of the candidate; None takes the newest that an evaluation left in MLflow.
        again: also a version that was rolled back.
        why: a person's reason, added to what the gates said.
        dry_run: decide and write nothing.
        say: told, line by line, what was found.

    Raises:
        Refused: a gate failed, nothing was measured, or the version was rolled back.
        RegistryError: the registry does not answer, or another promotion came between.
        mien.errors.ModelError: the candidate's files cannot be read.
    """
    new, old = registry.alias(candidate), registry.alias(champion)
    if new is None:
        say(f"no version of {registry.name} is {candidate}; nothing to do")
        return Decision(old, False)
    if new == old:
        say(f"version {new} is {champion} already; nothing to do")
        return Decision(old, False)
    last = _last(registry.trail(new))
    if last is not None and last.what == "rolled-back" and not again:
        raise Refused(f"version {new} was rolled back ({last}); register another one, or say --again")

    digest = _digest(registry, new)
    if report is None:
        report = next(registry.reports(digest), None)
    if report is None:
        raise Refused(
            f"nobody measured version {new}: python -m services.evaluate --model models:/{registry.name}/{new}"
            f" --mlflow {registry.uri}"
        )
    if report.figures["model.digest"] != digest:
        raise Refused(
            f"{report.source} is about a model with digest {report.figures['model.digest'][:12]}...,"
            f" version {new} has {digest[:12]}..."
        )
    say(f"version {new} ({digest[:12]}...) by {report.source}; {champion}: {f'version {old}' if old else 'none'}")
    theirs = _figures_of(registry, old, report, say) if old else None
    verdicts = tuple(gates.check(rules.gates, report.figures, theirs))
    for verdict in verdicts:
        say(f"  {verdict}")
    details = {
        "evaluation": report.source, "report": report.sha256, "digest": digest,
        "gates.version": str(rules.gates.version), "gates.sha256": rules.sha256,
    }  # fmt: skip
    failed = gates.failed(verdicts)
    if failed:
        reasons = "; ".join(f"{v.gate} (measured: {_measured(v)})" for v in failed)
        event = Event("refused", who, f"{len(failed)} of {len(verdicts)} gates failed: {reasons}", details=details)
        if not dry_run and not _same(registry.trail(new), event):
            registry.write(new, event)
        raise Refused(f"version {new} stays {candidate}: {event.why}")
    said = f"{len(verdicts)} of {len(verdicts)} gates of version {rules.gates.version} hold"
    event = Event("promoted", who, f"{why}; {said}" if why else said, other=old, details=details)
    if not dry_run:
        if (registry.alias(candidate), registry.alias(champion)) != (new, old):
            raise RegistryError("the aliases moved while the gates were asked: another promotion runs")
        registry.write(new, event)
        registry.point(champion, new)
    return Decision(new, True, verdicts)


def roll_back(
    registry: Registry,
    *,
    who: str,
    champion: str = "champion",
    to: str | None = None,
    why: str = "",
    dry_run: bool = False,
    say: Say = lambda _: None,
) -> Decision:
    """Give the alias back to the version that had it before, or to another one that once had it.

    The version that loses it is not promoted again by itself.

    Args:
        to: a version; None is the one before, so a second rollback goes one further back.
        who, why, dry_run, say: as for :func:`promote`.

    Raises:
        Refused: there is no champion, none before it, or ``to`` never was it: that would go round the gates.
        RegistryError: the registry does not answer.
        mien.errors.ModelError: the files of the version cannot be read; then it is better not served.
    """
    present = registry.alias(champion)
    if present is None:
        raise Refused(f"no version of {registry.name} is {champion}; there is nothing to roll back")
    if to == present:
        say(f"version {to} is {champion} already; nothing to do")
        return Decision(present, False)
    if to is None:
        promotions = [event for event in registry.trail(present) if event.what == "promoted"]
        if not promotions or promotions[-1].other is None:
            raise Refused(f"version {present} is the first {champion} that is known of; name one with --to")
        to = promotions[-1].other
    elif to not in registry.versions():
        raise Refused(f"{registry.name} has no version {to}")
    elif not any(event.what == "promoted" for event in registry.trail(to)) and not _was_before(registry, to):
        raise Refused(f"version {to} never was {champion}; only the gates make it so")
    say(f"version {present} -> version {to} ({_digest(registry, to)[:12]}...)")
    if not dry_run:
        reason = why or "no reason given"
        registry.write(present, Event("rolled-back", who, reason, other=to))
        registry.write(to, Event("restored", who, reason, other=present))
        registry.point(champion, to)
    return Decision(to, True)


def _figures_of(registry: Registry, version: str, mine: Report, say: Say) -> dict[str, Any]:
    """The champion's figures on the candidate's faces; none where it was not judged on them, which fails its gates."""
    there = False
    for theirs in registry.reports(_digest(registry, version)):
        there = True
        if all(theirs.figures.get(key) == mine.figures.get(key) for key in COMPARABLE):
            say(f"  compared with version {version} by {theirs.source}")
            return theirs.figures
    said = "on the same faces" if there else "at all"
    say(f"  version {version}, the champion, was not judged {said}; evaluate it with the candidate's --data and --seed")
    return {}


def _digest(registry: Registry, version: str) -> str:
    """Sha256 of a version's weights, of the very files that the registry gives now, past any cache."""
    from storage.registry import fetch

    with tempfile.TemporaryDirectory() as fresh:
        try:
            return store.load_config(fetch(f"models:/{registry.name}/{version}", cache=fresh)).digest
        except ModelIntegrityError as error:
            raise Refused(str(error)) from error


def _last(trail: list[Event]) -> Event | None:
    """The event that decided whether the version is, or was, the champion."""
    return next((event for event in reversed(trail) if event.what != "refused"), None)


def _was_before(registry: Registry, version: str) -> bool:
    """Champions from before there was a trail are known by those that followed them."""
    return any(
        event.what == "promoted" and event.other == version
        for other in registry.versions()
        for event in registry.trail(other)
    )


def _same(trail: list[Event], event: Event) -> bool:
    """Whether the newest event says this already: a job that asks twice an hour must not write a novel."""
    if not trail:
        return False
    last = trail[-1]
    return (last.what, last.why, last.details) == (event.what, event.why, event.details)


def _measured(verdict: Verdict) -> str:
    return "not measured" if verdict.measured is None else f"{verdict.measured:.6g}"


def load_rules(path: Path) -> Rules:
    """A gate file; raises :class:`services.gates.GateError`."""
    return Rules(gates.load(path), gates.digest(path))
