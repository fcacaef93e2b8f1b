"""What a campaign asks of this lane for a finding that is about memory. Free of torch."""

from __future__ import annotations

from moe_fuzz.campaign.interfaces import Cases, Sanitize, Sanitized
from moe_fuzz.sanitize import lane
from moe_fuzz.sanitize.lane import Outcome, Places

SECONDS = 60.0  # for each tool: a finding has been minimized, so its case is small


def automatic(pool: Places, device: str) -> Sanitize:
    """What sanitizes the cases of a finding, in the interpreter of its target."""

    def run(cases: Cases, target: str) -> Sanitized:
        return told(lane.sanitize(pool, cases, target, device, seconds=SECONDS))

    return run


def told(outcomes: tuple[Outcome, ...]) -> Sanitized:
    """The line of the kernel, by the first tool that names one, and what each of them gave."""
    sites = (report.site for outcome in outcomes for report in outcome.reports)
    return Sanitized(next(filter(None, sites), ""), tuple(outcome.line for outcome in outcomes))
