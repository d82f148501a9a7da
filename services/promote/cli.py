"""The command line of promote."""

from __future__ import annotations

import getpass
import os
import socket
import sys
from pathlib import Path
from typing import Annotated

import typer

from mien.errors import MienError
from services import gates

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

REFUSED = 3


@app.command()
def promote(
    mlflow: Annotated[
        str, typer.Option(envvar="MLFLOW_TRACKING_URI", help="Registry and tracking server.", show_default=False)
    ] = "",
    name: Annotated[str, typer.Option(help="Registered model.")] = "mien",
    candidate: Annotated[str, typer.Option(help="Alias of the version that is judged.")] = "candidate",
    champion: Annotated[str, typer.Option(help="Alias that moves.")] = "champion",
    gates_file: Annotated[
        Path, typer.Option("--gates", help="Conditions, each with its reason. [services/promote/gates.yaml]")
    ] = gates.DEFAULT,
    report: Annotated[
        Path | None, typer.Option(help="report.json about the candidate. [the newest that evaluate left in MLflow]")
    ] = None,
    run: Annotated[
        str | None, typer.Option(help="MLflow run of the evaluation to go by, instead of the newest.")
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="Also a version that was rolled back.")] = False,
    rollback: Annotated[bool, typer.Option("--rollback", help="Give the alias back to the champion before.")] = False,
    to: Annotated[str | None, typer.Option(help="With --rollback: a version that once was champion.")] = None,
    history: Annotated[bool, typer.Option("--history", help="Print who moved what and why, and stop.")] = False,
    who: Annotated[str, typer.Option(envvar="MIEN_ACTOR", help="For the trail. [you@this host]")] = "",
    why: Annotated[str, typer.Option(help="For the trail: your reason.")] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Decide, say so, and change nothing.")] = False,
) -> None:
    """Make the candidate the champion if its evaluation passes every gate.

    Exit codes: 0 done, or nothing to do; 1 the registry cannot be asked, try again; 2 wrong usage or gate file;
    3 refused: a gate failed, nothing was measured, or there is nothing to go back to.
    """
    if not mlflow:
        raise typer.BadParameter("--mlflow URI, or the variable MLFLOW_TRACKING_URI, names the registry")
    if report is not None and run is not None:
        raise typer.BadParameter("--report and --run both name a report")
    if to is not None and not rollback:
        raise typer.BadParameter("--to goes with --rollback")
    if rollback and (again or report is not None or run is not None):
        raise typer.BadParameter("a rollback asks no gates; it takes --to, --who and --why")
    from services.promote import promotion
    from services.promote.registry import Registry, read_report

    registry = Registry(mlflow, name)
    if history:
        for version in registry.versions():
            for event in registry.trail(version):
                typer.echo(f"version {version}: {event}")
        holder = registry.alias(champion)
        typer.echo(f"{champion}: models:/{name}/{holder}" if holder else f"no version of {name} is {champion}")
        return
    actor = who or _me()

    def say(text: str) -> None:
        typer.echo(text, err=True)

    if rollback:
        decision = promotion.roll_back(registry, who=actor, champion=champion, to=to, why=why, dry_run=dry_run, say=say)
    else:
        decision = promotion.promote(
            registry,
            promotion.load_rules(gates_file),
            who=actor,
            candidate=candidate,
            champion=champion,
            report=read_report(report) if report is not None else registry.report(run) if run is not None else None,
            again=again,
            why=why,
            dry_run=dry_run,
            say=say,
        )
    if decision.champion is None:
        typer.echo(f"no version of {name} is {champion}")
    elif dry_run and decision.changed:
        typer.echo(f"would be {champion}: models:/{name}/{decision.champion}; nothing was changed")
    else:
        typer.echo(f"{champion}: models:/{name}/{decision.champion}")


def _me() -> str:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user without an entry in passwd
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"


def main() -> None:
    """Run the command line; what the user can act on is one line on stderr. Exit codes as in :func:`promote`."""
    from services.promote.promotion import Refused

    try:
        app()
    except Refused as error:
        typer.echo(f"promote: refused: {error}", err=True)
        sys.exit(REFUSED)
    except gates.GateError as error:
        typer.echo(f"promote: {error}", err=True)
        sys.exit(2)
    except (MienError, OSError) as error:
        typer.echo(f"promote: {error}", err=True)
        sys.exit(1)
