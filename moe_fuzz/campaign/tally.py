"""Counters of a campaign, one row for each target. Safe to use from every thread."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from moe_fuzz.campaign.events import BUDGET_BINS, TargetRow
from moe_fuzz.verdict import PADDING, PADDING_COUNTS, PASS, UNINTERPRETED, UNJUDGED, Verdict

#: Of a row's stats, cases without a verdict: those not run, as they would take too long, and those given up at the end.
TOO_SLOW, CUT = "too-slow", "cut"


@dataclass
class _Row:
    verdicts: Counter[str] = field(default_factory=Counter)
    parity: int = 0
    budget: float = 0.0
    seconds: float = 0.0
    fence_seconds: float = 0.0
    flaky: int = 0
    budgets: Counter[int] = field(default_factory=Counter)  # bin of the budget used -> passed cases
    stats: Counter[str] = field(default_factory=Counter)  # sums of Verdict.stats

    def add(self, other: _Row) -> None:
        self.verdicts.update(other.verdicts)
        self.parity += other.parity
        self.budget = max(self.budget, other.budget)
        self.seconds += other.seconds
        self.fence_seconds += other.fence_seconds
        self.flaky += other.flaky
        self.budgets.update(other.budgets)
        self.stats.update(other.stats)


class Tally:
    """How many cases of each target gave which verdict, and what they cost."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rows: dict[str, _Row] = {}

    def count(self, target: str, verdict: Verdict) -> None:
        one = _Row(
            Counter({verdict.kind: 1}), int(verdict.parity), verdict.budget, verdict.seconds, verdict.fence_seconds
        )
        one.stats.update(verdict.stats)
        if verdict.kind == PASS and verdict.budget:  # 0: nothing was judged against a bound, or it was exact
            one.budgets[min(BUDGET_BINS - 1, int(verdict.budget * BUDGET_BINS))] = 1
        self._add(target, one)

    def count_other(self, target: str, what: str) -> None:
        """TOO_SLOW or CUT."""
        self._add(target, _Row(stats=Counter({what: 1})))

    def count_flaky(self, target: str) -> None:
        self._add(target, _Row(flaky=1))

    def merge(self, other: Tally) -> None:
        with other._lock:
            rows = [(target, row) for target, row in other._rows.items()]
        for target, row in rows:
            self._add(target, row)

    def _add(self, target: str, row: _Row) -> None:
        with self._lock:
            self._rows.setdefault(target, _Row()).add(row)

    @property
    def cases(self) -> int:
        with self._lock:
            return sum(row.verdicts.total() for row in self._rows.values())

    @property
    def flaky(self) -> int:
        with self._lock:
            return sum(row.flaky for row in self._rows.values())

    def verdicts(self) -> dict[str, int]:
        with self._lock:
            return dict(sum((row.verdicts for row in self._rows.values()), Counter()))

    def row(self, target: str, new: Iterable[str], known: Iterable[str], unavailable: str) -> TargetRow:
        """The summary's line; `new` and `known` are the targets of the findings."""
        with self._lock:
            row = self._rows.get(target, _Row())
            return TargetRow(
                target, row.verdicts.total(), dict(row.verdicts), row.parity, row.budget, row.seconds,
                row.fence_seconds, list(new).count(target), list(known).count(target), row.flaky, unavailable,
                tuple(row.budgets[at] for at in range(BUDGET_BINS)) if row.budgets else (), _padding(row.stats),
                _uninterpreted(row.stats), int(row.stats[UNJUDGED]),
                int(row.stats[TOO_SLOW]), int(row.stats[CUT]),
            )  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        with self._lock:
            return {
                target: vars(row) | {name: dict(getattr(row, name)) for name in ("verdicts", "budgets", "stats")}
                for target, row in self._rows.items()
            }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Tally:
        """Raises TypeError, ValueError or AttributeError if `data` is not a tally's."""
        tally = cls()
        for target, fields in data.items():
            verdicts = Counter({str(kind): int(count) for kind, count in fields["verdicts"].items()})
            budgets = Counter({int(at): int(count) for at, count in fields.get("budgets", {}).items()})
            stats = Counter({str(name): number + 0 for name, number in fields.get("stats", {}).items()})
            apart = ("verdicts", "budgets", "stats")
            numbers = {name: value + 0 for name, value in fields.items() if name not in apart}
            tally._add(target, _Row(verdicts, budgets=budgets, stats=stats, **numbers))
        return tally


def _uninterpreted(stats: Mapping[str, float]) -> dict[str, int]:
    found = ((name.partition("/"), int(number)) for name, number in sorted(stats.items()))
    return {what: number for (kind, _, what), number in found if kind == UNINTERPRETED}


def _padding(stats: Mapping[str, float]) -> dict[str, dict[str, int]]:
    """The counts of padding out of all: kind of run -> what -> how many."""
    kinds = sorted({name.split("/")[1] for name in stats if name.startswith(f"{PADDING}/")})
    return {kind: {what: int(stats.get(f"{PADDING}/{kind}/{what}", 0)) for what in PADDING_COUNTS} for kind in kinds}
