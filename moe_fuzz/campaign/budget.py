"""What a campaign has time for: which phases are over, which cases are too slow, and what goes on after the end.

Without a time, and of cases on a GPU, nothing here ever says no.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace

from moe_fuzz.campaign.interfaces import Space
from moe_fuzz.campaign.plan import GRID_SHARE, Settings, Unit
from moe_fuzz.campaign.progress import Plan
from moe_fuzz.campaign.thrift import Thrift
from moe_fuzz.case import Case
from moe_fuzz.contract import TargetInfo
from moe_fuzz.ops.space import Means
from moe_fuzz.options import RunOptions
from moe_fuzz.verdict import Verdict

GRACE = 2.0  # seconds that cases under way have when the time is over


class Budget:
    """The plan knows what is spent, earlier runs of this campaign included. Safe to use from every thread."""

    def __init__(self, settings: Settings, plan: Plan, targets: Mapping[str, tuple[TargetInfo, Space]]) -> None:
        self._settings = settings
        self._plan = plan
        thrifty = settings.device == "cpu" and settings.seconds is not None  # who asks for cases gets them all
        self._thrift = {name: Thrift(space, Means.of(info, "cpu")) for name, (info, space) in targets.items()
                        if thrifty}  # fmt: skip

    def late(self) -> bool:
        return self._settings.seconds is not None and self._plan.seconds >= self._settings.seconds

    def phase_over(self, phase: str) -> bool:
        seconds = self._settings.seconds
        share = {"corpus": 2 * GRID_SHARE, "grid": GRID_SHARE}.get(phase)
        return share is not None and seconds is not None and self._plan.seconds > seconds / share

    def too_slow(self, unit: Unit, case: Case) -> bool:
        thrift = self._thrift.get(unit.target)
        return thrift is not None and unit.phase != "corpus" and thrift.too_slow(case)

    def learn(self, target: str, case: Case, verdict: Verdict) -> None:
        if target in self._thrift:
            self._thrift[target].learn(case, verdict)

    def bounded(self, options: RunOptions) -> RunOptions:
        """Of cases of the plan, which are given up after the end. What is suspect has no such bound."""
        if self._settings.seconds is None:
            return options
        return replace(options, until=time.monotonic() + self._settings.seconds - self._plan.seconds + GRACE)

    def reducer_seconds(self) -> float:
        """What a reduction may take: its own budget, and all of them together no more than that beyond the time."""
        most = self._settings.minimize_seconds
        if self._settings.seconds is None:
            return most
        return min(most, self._settings.seconds + most - self._plan.seconds)
