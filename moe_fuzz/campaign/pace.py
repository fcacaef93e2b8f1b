"""How far a campaign is, and when it will be done."""

from __future__ import annotations

from moe_fuzz.campaign import events
from moe_fuzz.campaign.plan import Settings
from moe_fuzz.campaign.tally import Tally


def progress(
    settings: Settings, total: Tally, seconds: float, rate: float, findings: int, waiting: int
) -> events.Progress:
    """seconds: of the budget that are spent. rate: cases a second. waiting: violations not examined yet."""
    etas = []
    if settings.seconds is not None:
        etas.append(max(0.0, settings.seconds - seconds))
    if settings.cases is not None and rate:
        etas.append((settings.cases - total.cases) / rate)
    return events.Progress(
        total.cases, settings.cases, seconds, rate, total.verdicts(), findings, waiting, min(etas, default=None)
    )
