"""`moe-fuzz sanitize`: which line of the kernel it is, by NVIDIA's compute-sanitizer."""

from __future__ import annotations

import json
from pathlib import Path

import click

from moe_fuzz.cli import params, source
from moe_fuzz.errors import EXIT_CLEAN, EXIT_ENVIRONMENT, EXIT_FINDING, EnvironmentProblem, UsageError
from moe_fuzz.ops import get_space
from moe_fuzz.sanitize import lane
from moe_fuzz.worker.pool import Pool


@click.command(short_help="Run one case under compute-sanitizer: which line of the kernel.", epilog=source.CASE_HELP)
@click.argument("case", metavar="CASE|ID")
@click.option("--target", metavar="TARGET", help="Run it on this target instead of the one the case names.")
@click.option("--tool", "tools", type=params.NAMES, default=",".join(lane.TOOLS), show_default=True, metavar="NAME,…")
@click.option("--time", "seconds", type=params.DURATION, default=lane.SECONDS, show_default=True, metavar="SECONDS",
              help="For each tool.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of lines.")
@params.device
@params.state_dir
@click.pass_context
def command(
    ctx: click.Context, case: str, target: str | None, tools: tuple[str, ...], seconds: float, as_json: bool,
    device: str, state_dir: Path,
) -> None:  # fmt: skip
    """Run CASE under compute-sanitizer, outside of our fences: memcheck, racecheck, initcheck, synccheck.

    Exit code 1 where a tool reports a defect, 0 where all of them looked and saw none, 3 where one could not look: it
    is not installed, refuses this device, or the case cannot run under it. Replays of a graph run as plain calls.
    """
    unknown = [name for name in tools if name not in lane.TOOLS]
    if unknown:
        raise UsageError(f"there is no tool {unknown[0]!r}", f"the tools are {', '.join(lane.TOOLS)}")
    found = source.load(case, state_dir)
    name = found.target(target)
    chosen = params.pick_device(device)
    if chosen != "cuda":
        raise EnvironmentProblem(f"{lane.NAME} looks at kernels on a GPU, and this runs on {chosen}",
                                 "`moe-fuzz replay` runs the case here, in memory fences")  # fmt: skip
    if lane.find() is None:
        raise EnvironmentProblem(f"{lane.NAME} is not on the PATH, nor in CUDA_HOME",
                                 "it comes with the CUDA toolkit, or the package nvidia-cuda-sanitizer-api")
    with Pool(workers=1, device=chosen, providers=params.pick_providers()) as pool:
        pool.describe(name)  # an unavailable target is told as such

        def tell(outcome: lane.Outcome) -> None:
            if not as_json:
                show(outcome)

        if not as_json:
            click.echo(f"{name}  {found.origin}\n  {get_space(found.case.op).label(found.case)}")
        outcomes = lane.sanitize(pool, found.cases, name, chosen, tools, seconds, tell)
    code = exit_code(outcomes)
    if as_json:
        data = {"target": name, "origin": found.origin, "case": found.case.to_json(), "exit_code": code}
        click.echo(json.dumps(data | {"tools": [outcome.to_json() for outcome in outcomes]}, indent=1))
    ctx.exit(code)


def exit_code(outcomes: tuple[lane.Outcome, ...]) -> int:
    if any(outcome.kind == lane.REPORTS for outcome in outcomes):
        return EXIT_FINDING
    return EXIT_CLEAN if all(outcome.kind in lane.ANSWERED for outcome in outcomes) else EXIT_ENVIRONMENT


def show(outcome: lane.Outcome) -> None:
    color = {lane.REPORTS: "red", lane.CLEAN: "green"}.get(outcome.kind, "yellow")
    head = click.style(f"{outcome.tool:10}{outcome.kind}", fg=color, bold=True)
    click.echo(f"{head}  {outcome.seconds:.1f} s" + (f"  {outcome.message}" if outcome.message else ""))
    for report in outcome.reports:
        click.echo(f"  {report.sentence}")
