"""`moe-fuzz replay`: does this case still fail?"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from moe_fuzz.campaign.broken import refuse
from moe_fuzz.campaign.confirm import TRIES, holds, killed, rerun
from moe_fuzz.campaign.finding import Finding
from moe_fuzz.campaign.interfaces import Pool as PoolLike
from moe_fuzz.campaign.locate import is_memory_fault, locate
from moe_fuzz.cli import params, source
from moe_fuzz.errors import EXIT_CLEAN, EXIT_ENVIRONMENT, EXIT_FINDING, EnvironmentProblem
from moe_fuzz.ops import get_space
from moe_fuzz.options import RunOptions
from moe_fuzz.verdict import PASS, REJECTED, UNJUDGED, Verdict, Violation
from moe_fuzz.worker.pool import Pool

FIXED, FAILED, ERROR = "FIXED", "FAILED", "ERROR"
_CODES = {FIXED: EXIT_CLEAN, FAILED: EXIT_FINDING, ERROR: EXIT_ENVIRONMENT}
_COLORS = {FIXED: "green", FAILED: "red", ERROR: "yellow"}


_MEANS = {
    FIXED: "the case passes",
    FAILED: "the case fails",
    ERROR: "no answer: the target is unavailable or refuses such a case, or somebody ended the process",
}


@dataclass(frozen=True)
class Answer:
    """What a replay says. `lines` explain it."""

    word: str
    lines: tuple[str, ...]
    verdicts: tuple[Verdict, ...] = ()  # of the case, a try each
    violations: tuple[Violation, ...] = ()  # of the last one, a memory fault with its tensor
    same: bool | None = None  # as the finding's own failure; None: no finding was named, or nothing failed

    def to_json(self, found: source.Source, target: str, device: str) -> dict[str, Any]:
        """One document: what was asked, what came of it, and what that means."""
        return {
            "answer": self.word,
            "exit_code": _CODES[self.word],
            "meaning": _MEANS[self.word],
            "target": target,
            "device": device,
            "origin": found.origin,
            "finding": found.finding.id if found.finding else None,
            "same_failure": self.same,
            "verdicts": [verdict.to_json() for verdict in self.verdicts],
            "violations": [asdict(violation) for violation in self.violations],
            "explanation": list(self.lines),
            "before": [case.to_json() for case in found.cases[:-1]],
            "case": found.case.to_json(),
        }


@click.command(short_help="Run one case again: FIXED (0), FAILED (1) or ERROR (3).", epilog=source.CASE_HELP)
@click.argument("case", metavar="CASE|ID")
@click.option("--target", metavar="TARGET", help="Run it on this target instead of the one the case names.")
@click.option("--times", type=click.IntRange(1, 1000), metavar="N", help="Tries. [default: 1; 3 for a flaky one]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of lines.")
@params.fence
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
    as_json: bool,
    fence: str | None,
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
            answer = replay(pool, found, name, found.options(fence, device, deadline), tries)
    except EnvironmentProblem as error:
        answer = Answer(ERROR, (error.message, *([error.hint] if error.hint else [])))
    if as_json:
        click.echo(json.dumps(answer.to_json(found, name, device), indent=1))
        ctx.exit(_CODES[answer.word])
    click.echo(f"{click.style(answer.word, fg=_COLORS[answer.word], bold=True)}  {name}  {found.origin}")
    click.echo(f"  {get_space(found.case.op).label(found.case)}")
    for line in answer.lines:
        click.echo(f"  {line}")
    ctx.exit(_CODES[answer.word])


def replay(pool: PoolLike, found: source.Source, target: str, options: RunOptions, tries: int = 1) -> Answer:
    """Runs the cases in one fresh process, up to `tries` times, until the last of them is bad."""
    verdict = Verdict(PASS)
    verdicts: tuple[Verdict, ...] = ()
    while len(verdicts) < tries and verdict.kind == PASS:
        verdict = rerun(pool, found.cases, target, options)
        verdicts += (verdict,)
    refuse(verdict)
    tried = len(verdicts)
    if verdict.kind == PASS:
        return Answer(FIXED, (f"passed {tried} times in fresh processes" if tried > 1 else "passes",), verdicts)
    if verdict.kind == REJECTED or killed(verdict):
        return Answer(ERROR, (_why_not(verdict), *([verdict.detail] if verdict.detail else [])), verdicts)
    lines = [f"failed on try {tried} of {tries}"] if tries > 1 else []
    lines += [] if verdict.violations else [f"{verdict.kind}: the worker reached its memory limit (--memory)"]
    if found.finding is not None:
        lines.append(compare(found.finding, verdict))
    violations = tuple(explain(pool, found, target, options, verdict))
    for violation in violations:
        lines += describe(violation)
    same = None if found.finding is None else same_failure(found.finding, verdict)
    return Answer(FAILED, (*lines, *verdict.detail.splitlines()[-12:]), verdicts, violations, same)


def explain(
    pool: PoolLike, found: source.Source, target: str, options: RunOptions, verdict: Verdict
) -> Sequence[Violation]:
    """The violations; a memory fault with the tensor, the side and the access it is due to."""
    if not (verdict.violations and is_memory_fault(verdict.key)):
        return verdict.violations
    tensors = get_space(found.case.op).tensors
    return (locate(pool, found.cases, target, options, verdict, verdict.key, tensors), *verdict.violations[1:])


def same_failure(finding: Finding, verdict: Verdict) -> bool:
    return holds(verdict, finding.raw) or holds(verdict, (finding.check, finding.symptom))


def compare(finding: Finding, verdict: Verdict) -> str:
    if same_failure(finding, verdict):
        return f"the same failure as in finding {finding.id}: {finding.check} {finding.symptom}"
    check, symptom = verdict.key
    was = f"{finding.check} {finding.symptom}"
    return f"another failure than in finding {finding.id}: that was {was}, this is {check} {symptom}"


def describe(violation: Violation) -> list[str]:
    where = f" at {violation.tensor or 'output'}[{', '.join(map(str, violation.where))}]" if violation.where else ""
    lines = [f"{violation.check} {violation.symptom}{where}: {violation.story}"]
    if violation.expected or violation.got:
        lines.append(f"  expected {violation.expected or '-'}, got {violation.got or '-'}")
    if violation.budget is not None:
        lines.append(f"  error over bound: {violation.budget:.3g}")
    if violation.site:
        lines.append(f"  in {violation.site}")
    return lines


def _why_not(verdict: Verdict) -> str:
    if UNJUDGED in verdict.stats:
        return "the answer was not judged in time: is the machine overloaded?"
    if verdict.kind == REJECTED:
        return "the target refuses such a case: it lies outside what it declares to take"
    return f"the process was killed from outside ({verdict.key[1].removeprefix('killed:')})"
