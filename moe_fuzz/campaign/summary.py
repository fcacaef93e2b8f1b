"""The sum of a campaign, and the exit code it ends in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from moe_fuzz.campaign.broken import reason
from moe_fuzz.campaign.events import Summary, TargetRow
from moe_fuzz.campaign.plan import Settings
from moe_fuzz.campaign.progress import Plan
from moe_fuzz.campaign.tally import Tally
from moe_fuzz.campaign.triage import Triage
from moe_fuzz.errors import EXIT_CLEAN, EXIT_ENVIRONMENT, EXIT_FINDING, EXIT_INTERNAL, EXIT_INTERRUPTED


def summarize(
    settings: Settings, plan: Plan, tally: Tally, triage: Triage, unavailable: Mapping[str, str], broken: int,
    interrupted: bool,
) -> Summary:  # fmt: skip
    """`unavailable`: target -> the reason. `broken`: cases that we failed on, other runs of them too."""
    new, known = tuple(triage.new.values()), tuple(triage.known.values())
    of_new, of_known = [f.target for f in new], [f.target for f in known]
    rows = tuple(tally.row(name, of_new, of_known, unavailable.get(name, "")) for name in settings.targets)
    code, reason = _exit(rows, bool(new), broken, interrupted)
    return Summary(
        seed=plan.seed,
        cases=tally.cases,
        planned=settings.cases,
        seconds=plan.seconds,
        verdicts=tally.verdicts(),
        new=new,
        known=known,
        fixed=tuple(triage.fixed.values()),
        flaky=tally.flaky,
        unexamined=triage.unexamined,
        rows=rows,
        interrupted=interrupted,
        exit_code=code,
        reason=reason,
    )


def _exit(rows: Sequence[TargetRow], new: bool, broken: int, interrupted: bool) -> tuple[int, str]:
    """A campaign that ran nothing must not look clean, so each target has to have run at least once."""
    if interrupted:
        return EXIT_INTERRUPTED, "interrupted; run the same command again to go on"
    if new:
        return EXIT_FINDING, f"there are findings, and {reason(broken)}" if broken else ""
    if broken:
        return EXIT_INTERNAL, reason(broken)
    reasons = [f"{row.target} is unavailable: {row.unavailable}" for row in rows if row.unavailable]
    for row in rows:
        if not row.unavailable and not row.ran:
            why = ", ".join(f"{count} {kind}" for kind, count in sorted(row.verdicts.items())) or "no case was run"
            reasons.append(f"{row.target}: nothing ran ({why})")
    return (EXIT_ENVIRONMENT, "; ".join(reasons)) if reasons else (EXIT_CLEAN, "")
