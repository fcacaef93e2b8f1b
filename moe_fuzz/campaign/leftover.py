"""Runs again the rounds that were running when an earlier campaign was killed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial

from moe_fuzz.campaign.badcase import BadCase
from moe_fuzz.campaign.broken import Broken
from moe_fuzz.campaign.interfaces import Cases, Pool
from moe_fuzz.campaign.progress import Plan
from moe_fuzz.campaign.state import StateDir
from moe_fuzz.campaign.triage import Triage
from moe_fuzz.case import Case
from moe_fuzz.errors import EnvironmentProblem
from moe_fuzz.options import RunOptions
from moe_fuzz.verdict import Verdict

MAX_REPLAYS = 2  # of a case that was running, and nothing else was, when a campaign died


class Leftover:
    """`save` puts the plan on disk."""

    def __init__(
        self, pool: Pool, state: StateDir, plan: Plan, triage: Triage, options: RunOptions, broken: Broken,
        save: Callable[[], None],
    ) -> None:  # fmt: skip
        self._pool = pool
        self._state = state
        self._plan = plan
        self._triage = triage
        self._options = options
        self._broken = broken
        self._save = save

    def replay(self, name: str, target: str, cases: Cases, attempts: int) -> None:
        """One case at a time, so that it is known which one runs if the campaign dies again: a kill from outside is no
        case's doing, and one that takes the machine with it must not do so for ever."""
        with self._pool.lease() as worker:
            for at, case in enumerate(cases):
                if attempts >= MAX_REPLAYS:
                    self._plan.set_aside(target, case)
                    self._save()
                else:
                    self._state.begin_round(name, target, cases[at:], attempts + 1)
                    try:
                        worker.run((case,), target, self._options, partial(self._ran, target, at, case))
                    except (Exception, KeyboardInterrupt):  # a full disk, an interrupt: not the case's doing
                        with contextlib.suppress(EnvironmentProblem):
                            self._state.begin_round(name, target, cases[at:], attempts)
                        raise
                attempts = 0
        self._state.end_round(name)

    def _ran(self, target: str, at: int, case: Case, _: int, verdict: Verdict, history: Cases) -> None:
        self._broken.saw(target, case, verdict)
        if verdict.bad:
            self._triage.offer((-1, at), BadCase(target, case, verdict, history))
