"""`moe-fuzz findings`: what campaigns have found so far."""

from __future__ import annotations

import json
from pathlib import Path

import click

from moe_fuzz.campaign.finding import Finding
from moe_fuzz.campaign.findings import load_findings
from moe_fuzz.campaign.state import StateDir
from moe_fuzz.cli import params
from moe_fuzz.cli.output import table

_HEAD = ("id", "target", "check", "symptom", "class", "seen", "first seen", "smallest input")


@click.command(short_help="List the findings in the state directory.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, with the cases.")
@params.state_dir
def command(as_json: bool, state_dir: Path) -> None:
    """List the findings in the state directory, the oldest first."""
    state = StateDir(state_dir)
    found = load_findings(state)
    for note in state.notes:
        click.echo(f"warning: {note}", err=True)
    if as_json:
        click.echo(json.dumps([finding.to_json() for finding in found], indent=1))
    elif not found:
        click.echo(f"no findings in {state_dir}")
    else:
        table([_row(finding) for finding in found], _HEAD)
        click.echo("\n`moe-fuzz show ID` shows one, `moe-fuzz replay ID` runs it again")


def _row(f: Finding) -> tuple[str, ...]:
    return (f.id, f.target, f.check, f.symptom, f.finding_class, str(f.times_seen), f.first_seen[:16], f.label)
