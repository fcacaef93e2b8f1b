"""`moe-fuzz list`: what there is to test, and with what."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

import click

from moe_fuzz.cli.output import table
from moe_fuzz.config import Config
from moe_fuzz.ops import OPS, get_space
from moe_fuzz.options import ProviderOptions


def _ops() -> Iterator[dict[str, Any]]:
    for op in OPS:
        yield {"op": op, "description": get_space(op).description}


def _targets() -> Iterator[dict[str, Any]]:
    from moe_fuzz.targets.registry import known
    from moe_fuzz.targets.sources import whereabouts

    providers = (click.get_current_context().obj or {}).get("config", Config()).providers
    for target in known():
        row = {"target": target.name, "op": target.op, "provider": target.provider, "location": target.location}
        variant = target.name.partition("@")[2].partition(".")[2]
        options = providers.get(target.provider, ProviderOptions())
        if options.python:  # its packages are not this interpreter's; `doctor` asks it
            yield row | {"from": f"what {options.python} has"}
        else:
            yield row | {"from": whereabouts(target.provider, variant, {**os.environ, **options.env})}


def _checks() -> Iterator[dict[str, Any]]:
    for op in OPS:
        for name, text in get_space(op).checks.items():
            yield {"check": name, "op": op, "description": text}


def _faults() -> Iterator[dict[str, Any]]:
    for op in OPS:
        space = get_space(op)
        for name, text in space.faults.items():
            tensors = sorted({place.tensor for place in space.places if place.fault == name})
            yield {"fault": name, "op": op, "tensors": ", ".join(tensors), "description": text}


def _presets() -> Iterator[dict[str, Any]]:
    for op in OPS:
        for name, part in get_space(op).presets.items():
            yield {"preset": name, "op": op, "config": ", ".join(f"{key}={value}" for key, value in part.items())}


_KINDS = {"ops": _ops, "targets": _targets, "checks": _checks, "faults": _faults, "presets": _presets}


@click.command(short_help="List ops, targets, checks, faults or presets.")
@click.argument("kind", type=click.Choice(tuple(_KINDS)))
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(kind: str, as_json: bool) -> None:
    """List what moe-fuzz knows: ops, targets, checks, faults or model presets.

    Whether a target can be run on this machine, `moe-fuzz doctor` says: that takes a worker.
    """
    rows = list(_KINDS[kind]())
    if as_json:
        click.echo(json.dumps(rows, indent=1))
    elif not rows:
        click.echo(f"there are no {kind}")
    else:
        table([tuple(str(value) for value in row.values()) for row in rows], tuple(rows[0]))
