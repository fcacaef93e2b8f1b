"""`moe-fuzz minimize`: from a failing case to the smallest one that fails the same way."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from moe_fuzz.campaign.broken import refuse
from moe_fuzz.campaign.confirm import Key, holds, rerun
from moe_fuzz.campaign.interfaces import Pool as PoolLike
from moe_fuzz.campaign.minimize import Minimized
from moe_fuzz.campaign.reduce import reduce
from moe_fuzz.case import Case, dumps_sequence
from moe_fuzz.cli import params, source
from moe_fuzz.errors import EnvironmentProblem, UsageError
from moe_fuzz.ops import get_space
from moe_fuzz.options import RunOptions
from moe_fuzz.verdict import REJECTED, Verdict
from moe_fuzz.worker.pool import Pool


@click.command(short_help="Make a failing case smaller.", epilog=source.CASE_HELP)
@click.argument("case", metavar="ID|CASE")
@click.option("--target", metavar="TARGET", help="The target it fails on, if not the one the case names.")
@params.option(
    "minimize-time",
    "--time",
    "minimize_time",
    type=params.DURATION,
    default=60.0,
    show_default=True,
    metavar="SECONDS",
    help="When to stop with the smallest case so far.",
)
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="Write the smaller case to this file.")
@params.fence
@params.device
@params.deadline
@params.memory
@params.state_dir
def command(
    case: str,
    target: str | None,
    minimize_time: float,
    output: Path | None,
    fence: str | None,
    device: str,
    deadline: float,
    memory: int | None,
    state_dir: Path,
) -> None:
    """Take away from CASE what its failure does not need. Findings are already minimized when they are reported; this
    is for more time, or for a case of your own."""
    found = source.load(case, state_dir)
    name = found.target(target)
    device = params.pick_device(device)
    limit = params.pick_memory(memory, device, 1)
    with Pool(workers=1, device=device, memory_limit=limit, providers=params.pick_providers()) as pool:
        pool.describe(name)
        result = minimize(pool, found, name, found.options(fence, device, deadline), minimize_time)
    for line in describe(found, result):
        click.echo(line)
    if output is not None:
        _write(output, result)


def minimize(pool: PoolLike, found: source.Source, target: str, options: RunOptions, seconds: float) -> Minimized:
    """Raises UsageError if the case does not fail, EnvironmentProblem if it cannot run."""
    space = get_space(found.case.op)
    key, verdict = _failure(pool, found, target, options)

    def show(tries: int, best: Case) -> None:
        if sys.stderr.isatty():
            click.echo(f"\r\x1b[2Ktry {tries}: {space.label(best)}"[:200], nl=False, err=True)

    result, _ = reduce(pool, space, tuple(found.cases), target, verdict, key, options, seconds, progress=show)
    if sys.stderr.isatty():
        click.echo("\r\x1b[2K", nl=False, err=True)
    return result


def _failure(pool: PoolLike, found: source.Source, target: str, options: RunOptions) -> tuple[Key, Verdict]:
    """What must stay the same: the finding's own failure if it shows, else the first one that does; and the verdict."""
    verdict = rerun(pool, found.cases, target, options)
    refuse(verdict)
    if verdict.kind == REJECTED:
        raise EnvironmentProblem(f"the case cannot run on {target}: {verdict.kind}", verdict.detail)
    if not verdict.bad:
        raise UsageError(
            f"the case does not fail on {target}", "nothing is to be minimized; --target names another one"
        )
    if found.finding is not None and holds(verdict, found.finding.raw):
        return found.finding.raw, verdict
    return verdict.key, verdict


def describe(found: source.Source, result: Minimized) -> list[str]:
    label = get_space(found.case.op).label
    if result.case == found.case and len(result.before) == len(found.cases) - 1:
        lines = [f"already minimal after {result.tries} tries: {label(found.case)}"]
    else:
        lines = [f"from  {label(found.case)}", f"to    {label(result.case)}"]
        lines += [f"      {line}" for line in result.explain]
        lines.append(f"{result.tries} tries; what is left fails in a fresh process")
    if not result.complete:
        lines.append("the time was up first: a longer --time may find a smaller one")
    if result.before:
        lines.append(f"it needs {len(result.before)} cases before it in the same process; --output keeps them all")
    else:
        lines += ["", f"moe-fuzz replay {result.case.inline()}"]
    return lines


def _write(path: Path, result: Minimized) -> None:
    text = dumps_sequence((*result.before, result.case)) if result.before else result.case.dumps(indent=1)
    try:
        path.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise EnvironmentProblem(f"{path} cannot be written: {error.strerror}", "choose another --output") from error
