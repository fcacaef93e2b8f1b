"""The proof that the checks can fire: a small campaign on each planted bug, until the check that must catch it does.

Nothing is read from disk and nothing is kept: the cases are a function of the op and the seed, so two self-tests of one
version find the same bugs in the same cases.
"""

from __future__ import annotations

import itertools
import os
import time
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any, Protocol

from moe_fuzz import strategies
from moe_fuzz.campaign.broken import refuse
from moe_fuzz.campaign.drive import derive_seed, drive
from moe_fuzz.campaign.interfaces import Cases, Pool, Worker
from moe_fuzz.campaign.locate import is_memory_fault, locate
from moe_fuzz.case import Case
from moe_fuzz.contract import TargetInfo
from moe_fuzz.ops import get_space
from moe_fuzz.options import FenceOptions, RunOptions
from moe_fuzz.verdict import CRASH, HANG, REJECTED, Verdict, Violation
from moe_fuzz.verdict import OOM as OOM_VERDICT

BATCH = 16  # cases handed to a worker at once, at most: it begins with one, because a bug found ends the batch's use
_BATCH_SECONDS = 0.25  # that a batch may take, by what the last one took; what is run behind the bug is run for nothing
_AT_ONCE = min(3, os.cpu_count() or 1)  # fresh workers that are asked at the same time where a fault lies
HANG_DEADLINE = 3.0  # seconds for a case of a bug that hangs: the others of it are small
DEADLINE = 10.0  # for any other, as in campaigns: a case is slow where many processes share a GPU, and that is no find
COMPILE_DEADLINE = 60.0
_ROUNDS = 8  # drawn from one seed: of many more, most are variations of each other
_OF_A_ROUND = 2  # cases taken of each, because a bug is found by another config sooner than by more cases of one
OOM = "oom"  # how the catalog names it; it is a kind of verdict
FENCE = "fence"  # the check that is no code: the worker dies in a fence, and the parent says which
_NO_FENCE = FenceOptions(hard=(), readonly=(), own="off")


class Planted(Protocol):
    """What is read of a planted bug; they are declared in moe_fuzz.planted.catalog."""

    @property
    def name(self) -> str: ...
    @property
    def op(self) -> str: ...
    @property
    def target(self) -> str: ...
    @property
    def check(self) -> str: ...
    @property
    def symptom(self) -> str: ...
    @property
    def upstream(self) -> str: ...
    @property
    def only(self) -> bool: ...
    @property
    def fence(self) -> str: ...
    @property
    def devices(self) -> tuple[str, ...]: ...
    @property
    def processes(self) -> int: ...


@dataclass(frozen=True)
class Outcome:
    """What came of one planted bug."""

    name: str
    target: str
    check: str  # the check that must catch it
    upstream: str
    found: bool
    cases: int
    seconds: float  # without those of compiling, and of starting the first worker; with those after one that died
    inline: str = ""  # the case that found it
    message: str = ""  # what the check said of it
    others: tuple[str, ...] = ()  # checks that fired too, before or with the expected one
    silent: bool | None = None  # with `alone`: no other check fires on the same cases. None: not asked
    seen: int = 0  # cases the target took; a bug cannot be found by cases that are all rejected
    compile_seconds: float = 0.0
    start_seconds: float = 0.0  # until a worker had loaded the target: it imports torch, and on a GPU makes a context

    @property
    def passed(self) -> bool:
        return self.found and self.silent is not False

    def to_json(self) -> dict[str, Any]:
        return {**self.__dict__, "others": list(self.others), "passed": self.passed}


def run_planted(
    planted: Planted,
    pool: Pool,
    seed: int,
    max_cases: int,
    max_seconds: float,
    checks: tuple[str, ...] | None = None,
    device: str = "cpu",
) -> Outcome:
    """Runs cases on the planted bug until its check fires, or the budget is spent. `checks`: those on; None: all."""
    target, asked = planted.target, time.monotonic()
    info = pool.describe(target)
    start = time.monotonic()
    cases = itertools.islice(draw(planted.op, info, device, seed), max_cases)
    outcome = Outcome(planted.name, target, planted.check, planted.upstream, False, 0, 0.0)
    options = _options(planted, checks)
    with closing(_verdicts(cases, target, pool, options, start + max_seconds)) as verdicts:
        outcome = _until_found(planted, pool, options, verdicts, outcome)
    seconds = time.monotonic() - start - outcome.compile_seconds
    return replace(outcome, seconds=seconds, start_seconds=start - asked)


def _until_found(
    planted: Planted, pool: Pool, options: RunOptions, verdicts: Iterator[tuple[Case, Verdict]], outcome: Outcome
) -> Outcome:  # fmt: skip
    """The outcome after the first verdict that shows the bug by its check, or after all of them."""
    target = planted.target
    for case, verdict in verdicts:
        refuse(verdict)
        violations = violations_of(verdict)
        if planted.check == FENCE and is_memory_fault(verdict.key):
            tensors = get_space(case.op).tensors
            fault = locate(pool, (case,), target, options, verdict, verdict.key, tensors, at_once=_AT_ONCE)
            violations = (fault, *violations[1:])
        fired = {violation.check for violation in violations}
        caught = next((violation for violation in violations if _is_it(violation, planted)), None)
        outcome = replace(
            outcome,
            cases=outcome.cases + 1,
            seen=outcome.seen + (verdict.kind != REJECTED),
            compile_seconds=outcome.compile_seconds + verdict.compile_seconds,
            others=tuple(sorted({*outcome.others, *fired} - {planted.check})),
            found=caught is not None,
        )
        if caught is not None:
            return replace(outcome, inline=replace(case, target=target).inline(), message=caught.message)
    return outcome


def run_alone(
    planted: Planted, pool: Pool, seed: int, max_cases: int, max_seconds: float, device: str = "cpu"
) -> Outcome:  # fmt: skip
    """Proves that only its check finds the bug: found with that check alone, and silence from all others together on
    as many cases."""
    every = tuple(get_space(planted.op).checks)
    alone = tuple(check for check in every if check == planted.check)  # none for a crash, which needs no check
    outcome = run_planted(planted, pool, seed, max_cases, max_seconds, alone, device)
    rest = tuple(check for check in every if check != planted.check)
    start = time.monotonic()
    cases = itertools.islice(draw(planted.op, pool.describe(outcome.target), device, seed), outcome.cases)
    fired: set[str] = set()
    ran = 0
    for _, verdict in _verdicts(cases, outcome.target, pool, _options(planted, rest), start + max_seconds):
        ran += 1
        fired |= {violation.check for violation in violations_of(verdict)}
    fired -= {planted.check}  # a dead worker is seen whatever is judged: it is a verdict, not a check to turn off
    silent = not fired and ran == outcome.cases  # cut short by time, the silence proves nothing
    seconds = outcome.seconds + time.monotonic() - start
    return replace(outcome, others=tuple(sorted(fired)), silent=silent, seconds=seconds)


def draw(op: str, info: TargetInfo, device: str, start: int) -> Iterator[Case]:
    """The grid and generated cases take turns, and these have no end: the same list for the same arguments.

    What the grid meets by its pairs it meets early; what takes the sizes of a model is for the others to find.
    """
    grid, generated = strategies.grid(get_space(op), info, device, start), _generated(op, info, device, start)
    while part := tuple(itertools.islice(grid, BATCH)):
        yield from part
        yield from itertools.islice(generated, BATCH)
    yield from generated


def _generated(op: str, info: TargetInfo, device: str, start: int) -> Iterator[Case]:
    """Cases without end, none twice."""
    space = get_space(op)
    seen: set[str] = set()
    for part in itertools.count():
        drawn: list[tuple[Case, ...]] = []
        drive(strategies.rounds(space, info, device, 1), derive_seed(start, info.name, part), _ROUNDS, drawn.append)
        for case in (case for cases in drawn for case in cases[:_OF_A_ROUND]):
            if case.digest not in seen:  # each drive starts from the simplest rounds, so they come again and again
                seen.add(case.digest)
                yield case


def options_of(planted: Planted) -> RunOptions:
    """How a planted bug is run where all checks are on."""
    return _options(planted, None)


def _options(planted: Planted, checks: tuple[str, ...] | None) -> RunOptions:
    """These checks and no other: the fences stand only where they are asked for."""
    fence = FenceOptions(own=planted.fence) if checks is None or FENCE in checks else _NO_FENCE
    return RunOptions(checks, fence, HANG_DEADLINE if planted.check == HANG else DEADLINE, COMPILE_DEADLINE)


def violations_of(verdict: Verdict) -> tuple[Violation, ...]:
    """What fired. Running out of memory is no violation of a kernel, but it is what some bugs are planted for."""
    if verdict.kind == OOM_VERDICT:
        return (Violation(OOM, verdict.kind, "a worker ran out of memory"),)
    return verdict.violations


def _is_it(violation: Violation, planted: Planted) -> bool:
    return violation.check == planted.check and planted.symptom in ("", violation.symptom)


def _verdicts(
    cases: Iterator[Case], target: str, pool: Pool, options: RunOptions, until: float
) -> Generator[tuple[Case, Verdict]]:
    """Runs batches until the cases or the time are spent; verdicts in the order of the cases. All in one worker: in
    another's process every kernel is loaded anew, and a bug that outlives a call is not there."""
    size, waiting = 1, deque[Case]()
    with pool.lease() as worker:
        while time.monotonic() < until:
            waiting.extend(itertools.islice(cases, max(0, size - len(waiting))))
            batch = tuple(itertools.islice(waiting, size))
            if not batch:
                return
            began = time.monotonic()
            verdicts = _up_to_a_death(worker, batch, target, options)
            each = (time.monotonic() - began) / len(verdicts)
            size = max(1, min(2 * size, BATCH, int(_BATCH_SECONDS / max(each, 1e-6))))
            yield from [(waiting.popleft(), verdict) for verdict in verdicts]


class _Died(Exception):
    """A case has cost the worker its process."""


def _up_to_a_death(worker: Worker, batch: Cases, target: str, options: RunOptions) -> list[Verdict]:
    """The verdicts of a batch, up to the first that ended the process: each case behind it may end another, which takes
    seconds to start, and if that was the bug nobody asks."""
    seen: list[Verdict] = []

    def take(index: int, verdict: Verdict, history: Cases) -> None:
        seen.append(verdict)
        if verdict.spent or verdict.kind in (CRASH, HANG, OOM_VERDICT):
            raise _Died

    try:
        return worker.run(batch, target, options, take)
    except _Died:
        return seen
