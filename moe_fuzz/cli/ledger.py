"""`moe-fuzz ledger add`: from a finding to its entry in the ledger, with the case that shows it."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import click

from moe_fuzz import config
from moe_fuzz.campaign.findings import find
from moe_fuzz.campaign.gate import ledger_file
from moe_fuzz.campaign.state import StateDir
from moe_fuzz.cli import params
from moe_fuzz.cli.gate import ledger_path
from moe_fuzz.errors import EnvironmentProblem, UsageError


def _day(value: Any) -> datetime.date:
    try:
        day = datetime.date.fromisoformat(value)
    except ValueError:
        raise ValueError(f"{value!r} is not a day: write it like 2027-06-30") from None
    if day <= datetime.date.today():
        raise ValueError(f"{day} has come already, so the gate would be red at once: name a day to come")
    return day


DAY = params.Parsed("day", _day, datetime.date)


@click.group(short_help="Write findings into the ledger of known ones.")
@click.pass_context
def command(ctx: click.Context) -> None:
    """The ledger lists the findings that a project knows of: a gate tolerates them."""
    ctx.default_map = {"add": ctx.default_map}  # click hands it on to one level only


@command.command(short_help="Write the entry of a finding.")
@click.argument("finding")
@click.option("--tracker", required=True, metavar="REF", help="The issue: its address, or like vllm#39391, KERNEL-12.")
@click.option("--owner", required=True, metavar="WHO", help="Who looks at it.")
@click.option("--expires", type=DAY, metavar="DATE", help="From that day on the gate is red, e.g. 2027-06-30.")
@click.option("--note", default="", help="For a person.")
@click.option("--ledger", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", show_envvar=True,
              envvar=config.env_name("gate-ledger"), help="[default: the one that gates read]")
@params.state_dir
def add(
    finding: str, tracker: str, owner: str, expires: datetime.date | None, note: str, ledger: Path | None,
    state_dir: Path,
) -> None:  # fmt: skip
    """Write the entry of FINDING, an id or the beginning of one, at the end of the ledger."""
    found = find(StateDir(state_dir), finding)
    path = ledger or configured() or ledger_path()
    known = {entry.fingerprint for entry in ledger_file.load(path, missing_ok=True)}
    if known & found.ids:
        raise UsageError(f"{path} has an entry for {found.id}", "change that one")
    text = ledger_file.render(found, path.parent.resolve(), tracker, owner, expires, note)
    ledger_file.check(text)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(text if path.stat().st_size else text.lstrip("\n"))
    except OSError as error:
        raise EnvironmentProblem(f"{path} cannot be written: {error.strerror}") from error
    click.echo(f"{path}: {found.id}  {found.title}")


def configured() -> Path | None:
    """The ledger that the configuration names."""
    context = click.get_current_context(silent=True)
    value = (context.obj or {}).get("config", config.Config()).gate.get("ledger") if context else None
    return Path(value) if value else None
