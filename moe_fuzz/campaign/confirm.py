"""Confirmation: a bad case must be bad again in fresh workers before anybody is told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from operator import itemgetter

from moe_fuzz.campaign.interfaces import Cases, Pool, Worker
from moe_fuzz.case import Case, targets_of
from moe_fuzz.options import RunOptions
from moe_fuzz.verdict import CRASH, HANG, Verdict, Violation

TRIES = 3
RECENT = 32  # cases before the bad one, which are tried first
PATIENCE = 3  # deadlines that a case must outlast to have hung
Key = tuple[str, str]  # (check, symptom)


@dataclass(frozen=True)
class Confirmation:
    """The bad case, and the cases that must run before it in one process (none if it fails alone)."""

    case: Case
    sequence: Cases
    verdict: Verdict
    reproduces: str  # "always" | "sometimes 1/3"

    @property
    def always(self) -> bool:
        return self.reproduces == "always"


def matching(verdict: Verdict, key: Key) -> Violation | None:
    """The verdict's violation with this check and symptom."""
    return next((v for v in verdict.violations if (v.check, v.symptom) == key), None)


def holds(verdict: Verdict, key: Key) -> bool:
    """Whether a verdict shows the same failure. One without violations is known by its kind alone."""
    return matching(verdict, key) is not None or (verdict.bad and not verdict.violations and verdict.key == key)


def killed(verdict: Verdict) -> bool:
    """Whether somebody else ended the worker: the out-of-memory killer, or a person."""
    return verdict.kind == CRASH and verdict.key[1].startswith("killed:")


def in_order(worker: Worker, cases: Cases, target: str, options: RunOptions) -> list[Verdict]:
    """The verdicts of cases that share a process, each on the target that `targets_of` says."""
    verdicts: list[Verdict] = []
    for name, part in groupby(zip(targets_of(cases, target), cases, strict=True), key=itemgetter(0)):
        verdicts += worker.run([case for _, case in part], name, options)
    return verdicts


def rerun(
    pool: Pool, cases: Cases, target: str, options: RunOptions, environment: Mapping[str, str] | None = None
) -> Verdict:
    """The verdict of the last of `cases`, all run in this order by one worker that never ran anything else. Being
    killed from outside says nothing about a case; such a worker is replaced, and believed the third time.
    `environment`: variables of its process alone."""
    for _ in range(TRIES):
        with pool.fresh(environment) as worker:
            verdicts = in_order(worker, cases, target, options)
        if not any(map(killed, verdicts)):
            break
    return verdicts[-1]


def confirm(pool: Pool, target: str, case: Case, history: Cases, key: Key, options: RunOptions) -> Confirmation | None:
    """Runs the case again, alone, then after its history. None: it does not come back, so it is flaky."""
    # A hang costs a whole deadline to see, and what is only slow (a foreign kernel in Triton's interpreter, a machine
    # that others use) is none: so it gets a longer one, and once is enough.
    enough = 1 if key[0] == HANG else TRIES
    if key[0] == HANG:
        options = replace(options, deadline=PATIENCE * options.deadline)
    seen: list[Verdict] = []
    tried = 0
    while tried < TRIES and len(seen) < enough:
        verdict = rerun(pool, (case,), target, options)
        tried += 1
        if holds(verdict, key):
            seen.append(verdict)
    if seen and not (killed(seen[0]) and len(seen) < tried):  # who is killed sometimes is in somebody's way
        return Confirmation(case, (), seen[0], _how_often(len(seen), tried))
    # Most culprits ran shortly before, and the reducer has less to take away.
    for past in dict.fromkeys((history[-RECENT:], history) if history else ()):
        verdict = rerun(pool, (*past, case), target, options)
        if holds(verdict, key):
            return Confirmation(case, past, verdict, "always")
    return None


def _how_often(seen: int, tried: int) -> str:
    return "always" if seen == tried else f"sometimes {seen}/{tried}"
