"""Errors of our own while a case ran. They end no campaign: each place that fails is told once, with a case, and the
exit code says at the end that not all was well."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

from moe_fuzz.campaign import events
from moe_fuzz.campaign.interfaces import OnVerdict, Pool, Worker
from moe_fuzz.case import Case
from moe_fuzz.contract import TargetInfo
from moe_fuzz.errors import MoeFuzzError
from moe_fuzz.options import RunOptions
from moe_fuzz.verdict import BROKEN, Verdict

_MOST = 5  # places that are told


class Broken:
    """Safe to use from every thread."""

    def __init__(self, emit: Callable[[events.Event], None]) -> None:
        self._emit = emit
        self._lock = threading.Lock()
        self._told: set[str] = set()
        self._again: set[tuple[str, str]] = set()
        self.count = 0

    def saw(self, target: str, case: Case, verdict: Verdict, again: bool = False) -> None:
        """again: it ran to confirm what it showed, or something smaller; then a case counts once, however often."""
        if verdict.kind != BROKEN:
            return
        what, _, _ = verdict.detail.partition("\n")
        place = what.rpartition(" (")[2] or what
        with self._lock:
            self.count += (target, case.digest) not in self._again
            if again:
                self._again.add((target, case.digest))
            if place in self._told or len(self._told) == _MOST:
                return
            self._told.add(place)
        line = replace(case, target=target).inline()
        self._emit(events.Note(f"moe-fuzz itself failed on a case of {target}, which has no verdict: {what}; "
                               f"please report it, with what this prints: moe-fuzz replay {line}"))  # fmt: skip


@dataclass(frozen=True)
class Watched:
    """A pool of whose fresh workers `broken` hears: what confirms a bad case, or makes it smaller, takes a verdict that
    is none for "not seen again", and tells nobody."""

    pool: Pool
    broken: Broken

    @property
    def environment(self) -> Mapping[str, Any]:
        return self.pool.environment

    def versions(self, target: str) -> Mapping[str, Any]:
        return self.pool.versions(target)

    def describe(self, target: str) -> TargetInfo:
        return self.pool.describe(target)

    def lease(self, target: str = "") -> AbstractContextManager[Worker]:
        return self.pool.lease(target)

    @contextmanager
    def fresh(self, environment: Mapping[str, str] | None = None) -> Iterator[Worker]:
        with self.pool.fresh(environment) as worker:
            yield _WatchedWorker(worker, self.broken)


@dataclass(frozen=True)
class _WatchedWorker:
    worker: Worker
    broken: Broken

    def run(
        self, cases: Sequence[Case], target: str, options: RunOptions, on_verdict: OnVerdict | None = None
    ) -> list[Verdict]:
        verdicts = self.worker.run(cases, target, options, on_verdict)
        for case, verdict in zip(cases, verdicts, strict=False):  # fewer, where the time is up
            self.broken.saw(target, case, verdict, again=True)
        return verdicts


def reason(count: int) -> str:
    """Why a campaign does not end well; empty if no case broke us."""
    return f"moe-fuzz itself failed on {count} case{'s'[:count > 1]}" if count else ""


def refuse(verdict: Verdict) -> None:
    """Raises MoeFuzzError on a verdict that is none."""
    if verdict.kind == BROKEN:
        what, _, text = verdict.detail.partition("\n")
        raise MoeFuzzError(f"moe-fuzz itself failed on this case: {what}",
                           f"please report it with this traceback:\n{text}")  # fmt: skip
