"""`moe-fuzz replay`: does this case still fail?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from moe_fuzz.campaign.confirm import TRIES, holds, killed, rerun
from moe_fuzz.campaign.finding import Finding
from moe_fuzz.campaign.interfaces import Pool as PoolLike
from moe_fuzz.campaign.locate import is_memory_fault, locate
from moe_fuzz.cli import params, source
from moe_fuzz.errors import EXIT_CLEAN, EXIT_ENVIRONMENT, EXIT_FINDING, EnvironmentProblem
from moe_fuzz.ops import get_space
from moe_fuzz.options import RunOptions
from moe_fuzz.verdict import PASS, REJECTED, Verdict, Violation
from moe_fuzz.worker.pool import Pool

FIXED, FAILED, ERROR = "FIXED", "FAILED", "ERROR"
_CODES = {FIXED: EXIT_CLEAN, FAILED: EXIT_FINDING, ERROR: EXIT_ENVIRONMENT}
_COLORS = {FIXED: "green", FAILED: "red", ERROR: "yellow"}


@dataclass(frozen=True)
class Answer:
    """What a replay says. `lines` explain it."""

    word: str
    lines: tuple[str, ...]


@click.command(short_help="Run one case again: FIXED (0), FAILED (1) or ERROR (3).", epilog=source.CASE_HELP)
@click.argument("case", metavar="CASE|ID")
@click.option("--target", metavar="TARGET", help="Run it on this target instead of the one the case names.")
@click.option("--times", type=click.IntRange(1, 1000), metavar="N", help="Tries. [default: 1; 3 for a flaky one]")
@params.device
@params.deadline
@params.memory
@params.state_dir
@click.pass_context
def command(
    ctx: click.Context,
    case: str,
    target: str | None,
    times: int | None,
    device: str,
    deadline: float,
    memory: int | None,
    state_dir: Path,
) -> None:
    """Run CASE again in a fresh process, and say FIXED (exit code 0), FAILED (1) or ERROR (3).

    ERROR means that the question has no answer here: the target is not available, does not take such a case, or the
    memory did not suffice.
    """
    found = source.load(case, state_dir)
    name = found.target(target)
    tries = times or (TRIES if found.finding and found.finding.reproduces != "always" else 1)
    try:
        device = params.pick_device(device)
        limit = params.pick_memory(memory, device, 1)
        with Pool(workers=1, device=device, memory_limit=limit, providers=params.pick_providers()) as pool:
            pool.describe(name)  # an unavailable target is told as such, not as a case that failed
            answer = replay(pool, found, name, RunOptions(deadline=deadline), tries)
    except EnvironmentProblem as error:
        answer = Answer(ERROR, (error.message, *([error.hint] if error.hint else [])))
    click.echo(f"{click.style(answer.word, fg=_COLORS[answer.word], bold=True)}  {name}  {found.origin}")
    click.echo(f"  {get_space(found.case.op).label(found.case)}")
    for line in answer.lines:
        click.echo(f"  {line}")
    ctx.exit(_CODES[answer.word])


def replay(pool: PoolLike, found: source.Source, target: str, options: RunOptions, tries: int = 1) -> Answer:
    """Runs the cases in one fresh process, up to `tries` times, until the last of them is bad."""
    verdict = Verdict(PASS)
    tried = 0
    while tried < tries and verdict.kind == PASS:
        verdict = rerun(pool, found.cases, target, options)
        tried += 1
    if verdict.kind == PASS:
        return Answer(FIXED, (f"passed {tried} times in fresh processes" if tried > 1 else "passes",))
    if verdict.kind == REJECTED or killed(verdict):
        return Answer(ERROR, (_why_not(verdict), *([verdict.detail] if verdict.detail else [])))
    lines = [f"failed on try {tried} of {tries}"] if tries > 1 else []
    lines += [] if verdict.violations else [f"{verdict.kind}: the worker reached its memory limit (--memory)"]
    if found.finding is not None:
        lines.append(compare(found.finding, verdict))
    for violation in explain(pool, found, target, options, verdict):
        lines += describe(violation)
    return Answer(FAILED, (*lines, *verdict.detail.splitlines()[-12:]))


def explain(
    pool: PoolLike, found: source.Source, target: str, options: RunOptions, verdict: Verdict
) -> Sequence[Violation]:
    """The violations; a memory fault with the tensor, the side and the access it is due to."""
    if not (verdict.violations and is_memory_fault(verdict.key)):
        return verdict.violations
    tensors = get_space(found.case.op).tensors
    return (locate(pool, found.cases, target, options, verdict, verdict.key, tensors), *verdict.violations[1:])


def compare(finding: Finding, verdict: Verdict) -> str:
    if holds(verdict, finding.raw) or holds(verdict, (finding.check, finding.symptom)):
        return f"the same failure as in finding {finding.id}: {finding.check} {finding.symptom}"
    check, symptom = verdict.key
    was = f"{finding.check} {finding.symptom}"
    return f"another failure than in finding {finding.id}: that was {was}, this is {check} {symptom}"


def describe(violation: Violation) -> list[str]:
    where = f" at {violation.tensor or 'output'}[{', '.join(map(str, violation.where))}]" if violation.where else ""
    lines = [f"{violation.check} {violation.symptom}{where}: {violation.message}"]
    if violation.expected or violation.got:
        lines.append(f"  expected {violation.expected or '-'}, got {violation.got or '-'}")
    if violation.budget is not None:
        lines.append(f"  error over bound: {violation.budget:.3g}")
    if violation.site:
        lines.append(f"  in {violation.site}")
    return lines


def _why_not(verdict: Verdict) -> str:
    if verdict.kind == REJECTED:
        return "the target refuses such a case: it lies outside what it declares to take"
    return f"the process was killed from outside ({verdict.key[1].removeprefix('killed:')})"
