"""A bad case made small in good time: its tries run in one process, and what they end with in a fresh one.

A fresh worker for each try is certain and slow, on a GPU a second or two, so that a minute was over after thirty. One
process runs hundreds of tries in that time. What it says may be wrong where the target keeps something from call to
call: so its answer is asked of a fresh worker, and must still fail in the process that gave it, after all the others.
Where it does not, the last step of the way that holds is the start of a reduction by fresh workers alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from time import monotonic

from moe_fuzz.campaign.confirm import Key, holds, rerun
from moe_fuzz.campaign.interfaces import Cases, Pool, Space
from moe_fuzz.campaign.minimize import Minimized, Reducer, explain
from moe_fuzz.case import Case
from moe_fuzz.options import RunOptions
from moe_fuzz.verdict import VIOLATION, Verdict

SCOUT_SHARE = 0.6  # of the seconds, at most: the rest is for fresh workers

Progress = Callable[[int, Case], None]


def reduce(
    pool: Pool, space: Space, cases: Cases, target: str, verdict: Verdict, key: Key, options: RunOptions,
    seconds: float, *, runs: int = 1, tries: int | None = None, progress: Progress | None = None,
) -> tuple[Minimized, Verdict]:  # fmt: skip
    """The smallest cases that fail as `key` says, and the verdict of a fresh worker on the last of them.

    cases: the bad one behind those that must run before it; `verdict` is of a fresh worker. runs: of a fresh worker,
    where it fails sometimes. tries: of each of the two reductions; with them alone the clock has no part in the answer.
    """
    ends = monotonic() + seconds
    seen: dict[Cases, Verdict] = {cases: verdict}

    def fails(tried: Cases) -> bool:
        for _ in range(runs):
            verdict = rerun(pool, tried, target, options)
            if holds(verdict, key):
                seen[tried] = verdict
                return True
        return False

    start, before = cases, 0
    if len(cases) == runs == 1 and verdict.kind == VIOLATION and not verdict.spent:
        share = SCOUT_SHARE * seconds
        scouted, way, still = _scout(pool, space, cases[0], target, key, options, share, tries, progress)
        start, before = _last_that_fails(way, cases, fails), scouted.tries
        if still and start[-1] == scouted.case:
            return scouted, seen[start]

    def told(tried: int, case: Case) -> None:
        if progress is not None:
            progress(before + tried, case)

    reducer = Reducer(space, fails, ends - monotonic(), progress=told, tries=tries)
    found = reducer.run(start[-1], start[:-1])
    facts = explain(cases[-1], found.case, len(cases) - 1, len(found.before))
    return replace(found, tries=before + found.tries, explain=facts), seen[(*found.before, found.case)]


def _scout(
    pool: Pool, space: Space, case: Case, target: str, key: Key, options: RunOptions, seconds: float,
    tries: int | None, progress: Progress | None,
) -> tuple[Minimized, tuple[Case, ...], bool]:  # fmt: skip
    """What one worker reduces the case to, the way there, and whether it still fails in that worker at the end."""
    with pool.fresh() as worker:

        def fails(tried: Cases) -> bool:
            return holds(worker.run(tried, target, options)[-1], key)

        reducer = Reducer(space, fails, seconds, progress=progress, tries=tries)
        found = reducer.run(case)
        still = fails((found.case,))
    return found, (*(one for one in reducer.way if one != found.case), found.case), still


def _last_that_fails(way: tuple[Case, ...], first: Cases, fails: Callable[[Cases], bool]) -> Cases:
    """The last case of the way that fails in a fresh worker; what comes behind one that does not hardly ever does."""
    if way and (way[-1] == first[-1] or fails(way[-1:])):
        return way[-1:]
    low, high = -1, len(way) - 1
    while high - low > 1:
        middle = (low + high) // 2
        if fails(way[middle : middle + 1]):
            low = middle
        else:
            high = middle
    return way[low : low + 1] if low >= 0 else first
