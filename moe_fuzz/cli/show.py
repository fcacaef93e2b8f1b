"""`moe-fuzz show`: what a case is made of, in words."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import click

from moe_fuzz.case import Case, Step, inline_sequence
from moe_fuzz.cli import params, source
from moe_fuzz.errors import UsageError
from moe_fuzz.ops import get_space

_MODES = {
    "eager": "eager",
    "graph": "graph (buckets of {} tokens, each captured once over static buffers, all in one pool; then replayed)",
    "piecewise": "piecewise (as graph, buckets of {} tokens, but producer, router and consumer in graphs of their own)",
    "ranks": "ranks (a layer: as graph, over the gathered batch of several data-parallel ranks; an all-reduce: a "
    "process for each rank; {} rows)",
}


@click.command(short_help="Show what a case is made of.", epilog=source.CASE_HELP)
@click.argument("case", metavar="CASE")
@click.option("--json", "form", flag_value="json", help="Print the case as canonical JSON, as in a case.json.")
@click.option("--inline", "form", flag_value="inline", help="Print the case as one word, `mfz1:…`.")
@click.option("--values", is_flag=True, help="Print the tensors too (asks a worker).")
@params.device
@params.state_dir
def command(case: str, form: str | None, values: bool, device: str, state_dir: Path) -> None:
    """Show the config, the steps, the faults and the replay line of CASE. Of a sequence, its last case."""
    found = source.load(case, state_dir)
    if form == "json":
        click.echo(found.case.dumps(indent=1))
    elif form == "inline":
        click.echo(found.case.inline())
    else:
        click.echo("\n".join(describe(found)))
    if values:
        if not found.case.target:
            raise UsageError("this case names no target, and the tensors are laid as a target takes them",
                             "give a finding's id, or a case that has a target")  # fmt: skip
        for name, text in tables(found.case, params.pick_device(device)).items():
            click.echo(f"\n{name}\n{text}")


def describe(found: source.Source) -> list[str]:
    """The lines for a person."""
    case, space = found.case, get_space(found.case.op)
    lines = [
        space.label(case),
        "",
        f"digest   {case.digest}",
        f"from     {found.origin}",
        f"target   {case.target or '(none: replay it with --target)'}",
        f"mode     {_MODES[case.mode].format(', '.join(map(str, case.buckets)))}",
        f"seed     {case.seed}",
        f"classes  {', '.join(sorted(space.features(case)))}",
        "config",
    ]
    width = max(map(len, case.config), default=0)
    lines += [f"  {key.ljust(width)}  {_word(value)}" for key, value in case.config.items()]
    for index, step in enumerate(case.steps):
        lines += _step(case, index, step, space.faults)
    if len(found.cases) > 1:
        lines.append(f"before   {len(found.cases) - 1} cases run in the same process first:")
        for earlier in found.cases[:-1]:
            elsewhere = f"  on {earlier.target}" if earlier.target not in ("", case.target) else ""
            lines.append(f"  {get_space(earlier.op).label(earlier)}{elsewhere}")
    lines += ["", f"moe-fuzz replay {inline_sequence(found.cases) if len(found.cases) > 1 else case.inline()}"]
    return lines


def _step(case: Case, index: int, step: Step, faults: Mapping[str, str]) -> list[str]:
    rows = f"{step.tokens} tokens" + (f" (rows {step.rows})" if step.tokens else "")
    padding = f", of them {len(step.padding)} padding (rows {step.padding})" if step.padding else ""
    values = f", values of stream {step.stream}" if step.stream is not None else ""
    memory = ", in the buffers of an earlier step where they fit" if step.refilled else ""
    lines = [f"step {index}   {rows}{padding}{values}{memory}"]
    streams = [case.stream(at) for at in range(len(case.steps))]
    for fault in step.faults:
        place = f" in {fault.tensor}" if fault.tensor else ""
        which = f" rows {fault.rows}" if fault.rows else ""
        source = f" from stream {fault.stream}" if fault.stream is not None else ""
        source = f" from step {streams.index(fault.stream)}" if fault.stream in streams else source
        lines.append(f"  fault  {fault.name}{place}{which}{source}: {faults.get(fault.name, '')}".rstrip(": "))
    return lines


def _word(value: object) -> str:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def tables(case: Case, device: str) -> Mapping[str, str]:
    """Tensor name → its shape, dtype and values as text, made by a worker: this process has no torch."""
    from moe_fuzz.campaign.repro import tensors
    from moe_fuzz.worker.pool import Pool

    with Pool(workers=1, device=device, providers=params.pick_providers()) as pool, pool.fresh() as worker:
        return tensors.tables(worker.exhibit(case, case.target))
