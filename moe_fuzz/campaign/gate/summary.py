"""The sum of a gate: what is red, why, and the exit code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from moe_fuzz.campaign.broken import reason
from moe_fuzz.campaign.finding import Finding
from moe_fuzz.campaign.gate.entries import RED
from moe_fuzz.campaign.gate.judge import Judge
from moe_fuzz.campaign.gate.plan import FixedPlan
from moe_fuzz.campaign.gate.settings import GateSettings
from moe_fuzz.campaign.interfaces import Space
from moe_fuzz.campaign.results import EntryResult, GateResult, Summary, TargetRow
from moe_fuzz.campaign.tally import Tally
from moe_fuzz.contract import TargetInfo
from moe_fuzz.errors import (
    EXIT_CLEAN,
    EXIT_ENVIRONMENT,
    EXIT_FINDING,
    EXIT_INTERNAL,
    EXIT_INTERRUPTED,
    EnvironmentProblem,
)
from moe_fuzz.verdict import NOT_RUN


def summarize(
    settings: GateSettings, plan: FixedPlan, targets: Mapping[str, tuple[TargetInfo, Space]],
    unavailable: Mapping[str, EnvironmentProblem], tally: Tally, judge: Judge, entries: Sequence[EntryResult],
    seconds: float, broken: int, interrupted: bool,
) -> Summary:  # fmt: skip
    new, known = tuple(judge.new.values()), tuple(judge.known.values())
    rows = tuple(
        _row(tally, judge, name, unavailable[name].message if name in unavailable else "") for name in settings.targets
    )
    red = tuple(f.id for f in new if settings.strict or turns_red(f, targets[f.target][0]))
    floor = min(settings.profile.floor[settings.device] * len(targets), plan.cases)
    code, reason = _exit(settings, rows, red, entries, floor, tally, broken, interrupted)
    return Summary(
        seed=plan.seed,
        cases=tally.cases,
        planned=plan.cases,
        seconds=seconds,
        verdicts=tally.verdicts(),
        new=new,
        known=known,
        fixed=(),
        flaky=judge.flaky.total() + len(judge.unstable),
        unexamined=judge.unexamined,
        rows=rows,
        interrupted=interrupted,
        exit_code=code,
        reason=reason,
        gate=GateResult(
            settings.profile.name, plan.digest, floor, plan.held_back, red, tuple(entries),
            tuple(judge.on_base.values()), tuple(judge.unstable.values()),
        ),
    )  # fmt: skip


def turns_red(finding: Finding, info: TargetInfo) -> bool:
    """Whether a finding breaks what somebody promised. Where a target says nothing at all of what its project promises,
    as a kernel under development, the op's contract is what it was put under test for."""
    return finding.finding_class == "contract" or info.silent


def _row(tally: Tally, judge: Judge, target: str, unavailable: str) -> TargetRow:
    of_new = [finding.target for finding in judge.new.values()]
    of_known = [finding.target for finding in judge.known.values()]
    for _ in range(judge.flaky[target] + sum(f.target == target for f in judge.unstable.values())):
        tally.count_flaky(target)
    return tally.row(target, of_new, of_known, unavailable)


def _exit(
    settings: GateSettings, rows: Sequence[TargetRow], red: Sequence[str], entries: Sequence[EntryResult], floor: int,
    tally: Tally, broken: int, interrupted: bool,
) -> tuple[int, str]:  # fmt: skip
    """A gate that ran nothing must not be green, so each target has to have run, and enough of all of them."""
    if interrupted:
        return EXIT_INTERRUPTED, "interrupted"
    reasons = [f"{len(red)} new: {', '.join(red)}"] if red else []
    stale = [result for result in entries if result.status in RED]
    reasons += [f"ledger: {result.entry['name']} ({result.entry['tracker']}) {result.message}" for result in stale]
    if reasons:
        return EXIT_FINDING, "; ".join([*reasons, *([reason(broken)] if broken else [])])
    if broken:
        return EXIT_INTERNAL, reason(broken)
    reasons = [f"{row.target} is unavailable: {row.unavailable}" for row in rows if row.unavailable]
    for row in rows:
        if not row.unavailable and not row.ran:
            why = ", ".join(f"{count} {kind}" for kind, count in sorted(row.verdicts.items())) or "no case was run"
            reasons.append(f"{row.target}: nothing ran ({why})")
    ran = sum(count for kind, count in tally.verdicts().items() if kind not in NOT_RUN)
    if not reasons and ran < floor:
        said = f"only {ran} cases ran, and the profile {settings.profile.name} asks for {floor} of these targets"
        reasons.append(f"{said}; a busy or slow machine? give more --time, or a smaller profile")
    return (EXIT_ENVIRONMENT, "; ".join(reasons)) if reasons else (EXIT_CLEAN, "")
