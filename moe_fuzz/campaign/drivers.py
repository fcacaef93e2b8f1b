"""The drivers: threads that take units of the plan, draw their rounds, and have workers run them.

There is one more than there are workers, so that drawing overlaps running. A worker is leased for each round.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Protocol

from moe_fuzz.campaign.drive import Enough, derive_seed, drive
from moe_fuzz.campaign.interfaces import Cases, Pool, Sources, Space
from moe_fuzz.campaign.plan import ROUND, Unit
from moe_fuzz.campaign.state import StateDir
from moe_fuzz.campaign.thrift import extent
from moe_fuzz.case import Case
from moe_fuzz.contract import TargetInfo
from moe_fuzz.errors import MoeFuzzError
from moe_fuzz.options import RunOptions
from moe_fuzz.verdict import Verdict

MIN_EXAMPLES = 16  # of Hypothesis, whose first rounds are its simplest
CASES_A_ROUND = 8  # about what a round holds: how many examples a shard's budget makes
FEW = 2  # cases of the grid in a round, where each tells something of the next
ALIKE = 2  # cases of a round that run, where nothing is compiled


class _Late(Exception):
    """Ends a round between two cases."""


class Host(Protocol):
    """The campaign, as far as its drivers know it."""

    def next_unit(self) -> Unit | None:
        """The next piece of the plan, or None when there is no more to do."""
        ...

    def over(self, unit: Unit) -> bool:
        """Whether to leave the unit at once."""
        ...

    def left_out(self, unit: Unit, case: Case) -> bool:
        """Whether the case is not to be run, whatever the plan says."""
        ...

    def too_slow(self, unit: Unit, case: Case) -> bool:
        """Whether another one is to be run in its place, as it would take too long."""
        ...

    def late(self) -> bool:
        """Whether the time of the campaign is over: of a round, no further case is begun."""
        ...

    def given_up(self, unit: Unit) -> None:
        """A case was under way when the time was over, and not soon after, and has no verdict."""
        ...

    def verdict(self, unit: Unit, at: int, cases: Cases, verdict: Verdict, history: Cases) -> None:
        """A verdict of case `at` of the unit, the last of `cases`."""
        ...

    def finished(self, unit: Unit) -> None: ...

    def failed(self, error: BaseException) -> None: ...


class Drivers:
    """`count` threads; daemons, so that a hung call cannot keep the process alive after an interrupt."""

    def __init__(
        self, host: Host, pool: Pool, state: StateDir, sources: Sources, options: RunOptions,
        seed: int, device: str, known: dict[str, tuple[TargetInfo, Space]],
    ) -> None:  # fmt: skip
        self._host = host
        self._pool = pool
        self._state = state
        self._sources = sources
        self._options = options
        self._seed = seed
        self._device = device
        self._known = known
        self._threads: list[threading.Thread] = []

    def start(self, count: int) -> None:
        for slot in range(count):
            thread = threading.Thread(target=self._work, args=(str(slot),), name=f"driver-{slot}", daemon=True)
            self._threads.append(thread)
            thread.start()

    @property
    def alive(self) -> bool:
        return any(thread.is_alive() for thread in self._threads)

    def join(self, seconds: float) -> None:
        for thread in self._threads:
            thread.join(seconds / len(self._threads))

    def _work(self, slot: str) -> None:
        try:
            while (unit := self._host.next_unit()) is not None:
                if self._run(unit, slot):
                    self._host.finished(unit)
        except BaseException as error:  # noqa: BLE001 - carried to the main thread, which raises it
            self._host.failed(error)

    def _run(self, unit: Unit, slot: str) -> bool:
        """Runs a unit to its end; False if it was left before."""
        ran = drawn = 0
        info, space = self._known[unit.target]
        # Of cases that are alike the first ones find nearly all that all do (benchmarks/guidance.py). Where a config is
        # compiled, which takes as long as hundreds of cases, none is dropped.
        dear = self._device != "cpu" and info.capabilities.compiles
        alike = None if dear or unit.phase != "generate" else ALIKE
        seen: set[str] = set()
        twins = False  # whether cases that this unit ran before may run again

        def run(cases: Cases) -> None:
            nonlocal ran, drawn
            if self._host.over(unit):
                raise Enough
            if not twins:  # Hypothesis repeats parts of earlier rounds, and the simplest round begins every take
                named = {case.digest: case for case in cases}
                cases = tuple(case for digest, case in named.items() if digest not in seen)
                seen.update(named)
            cases = cases[:alike]
            for part in _batches(cases[: unit.budget - ran], 2 * ROUND):
                if self._host.over(unit):
                    raise Enough
                drawn += len(part)
                ran += len(part) - self._round(unit, slot, ran, part)
            if ran >= unit.budget:
                raise Enough

        if unit.phase != "generate":
            planned, size = unit.cases, ROUND
            if unit.phase == "grid" and self._device == "cpu":  # the cheap ones tell what the others will cost
                planned, size = tuple(sorted(planned, key=lambda case: extent(space, case))), FEW
            try:
                for part in _batches(planned, size):
                    run(part)
            except Enough:
                pass
            return drawn >= unit.budget
        rounds = self._sources.rounds(space, info, self._device)
        take = 0
        while ran < unit.budget and not self._host.over(unit):
            before = drawn
            examples = max(MIN_EXAMPLES, unit.budget // (alike or CASES_A_ROUND))
            drive(rounds, derive_seed(self._seed, unit.target, unit.phase, unit.index, take), examples, run)
            if drawn == before and not self._host.over(unit):
                if twins:
                    raise MoeFuzzError(f"the strategies of {unit.target} draw no cases", "this is a bug in moe-fuzz")
                twins = True  # a space so small that there is nothing new in it
            take += 1
        return ran >= unit.budget

    def _round(self, unit: Unit, slot: str, at: int, cases: Cases) -> int:
        """Has a worker run the cases, but for those that take too long: returns how many these are."""

        def on_verdict(index: int, verdict: Verdict, history: Cases) -> None:
            self._host.verdict(unit, at + index, cases[: index + 1], verdict, history)
            if index + 1 < len(cases) and self._host.late():
                raise _Late

        cases = tuple(case for case in cases if not self._host.left_out(unit, case))
        wanted = len(cases)
        cases = tuple(case for case in cases if not self._host.too_slow(unit, case))
        if not cases:
            return wanted
        with self._pool.lease() as worker:
            self._state.begin_round(slot, unit.target, cases)
            with contextlib.suppress(_Late):
                verdicts = worker.run(cases, unit.target, self._options, on_verdict)
                if len(verdicts) < len(cases):
                    self._host.given_up(unit)
            self._state.end_round(slot)
        return wanted - len(cases)


def _batches(cases: Cases, size: int) -> Iterator[Cases]:
    for at in range(0, len(cases), size):
        yield cases[at : at + size]


