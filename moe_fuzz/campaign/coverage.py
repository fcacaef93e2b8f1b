"""What the cases of a campaign were made of: target, class of configs, fault, mode. Safe to use from every thread."""

from __future__ import annotations

import threading
from collections.abc import Iterator

from moe_fuzz.campaign.events import ALL_CONFIGS, NO_FAULT, Cell
from moe_fuzz.campaign.interfaces import Space
from moe_fuzz.case import Case
from moe_fuzz.verdict import BROKEN, PASS, REJECTED, Verdict

_Key = tuple[str, str, str, str]


class Coverage:
    """A case counts in every cell that it has a part in: each of its classes with each of its faults."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._cells: dict[_Key, list[float]] = {}  # cases, bad ones, largest budget of those that passed

    def count(self, target: str, space: Space, case: Case, verdict: Verdict) -> None:
        if verdict.kind in (REJECTED, BROKEN):
            return
        budget = verdict.budget if verdict.kind == PASS else 0.0
        keys = list(_keys(target, space, case))
        with self._lock:
            for key in keys:
                cell = self._cells.setdefault(key, [0, 0, 0.0])
                cell[0] += 1
                cell[1] += verdict.bad
                cell[2] = max(cell[2], budget)

    def cells(self) -> tuple[Cell, ...]:
        with self._lock:
            found = sorted(self._cells.items())
        return tuple(Cell(*key, int(cases), int(bad), budget) for key, (cases, bad, budget) in found)


def _keys(target: str, space: Space, case: Case) -> Iterator[_Key]:
    classes = [ALL_CONFIGS, *(name for name in space.features(case) if not name.startswith("fault:"))]
    for fault in set(case.fault_names) or {NO_FAULT}:
        for name in classes:
            yield target, name, fault, case.mode
