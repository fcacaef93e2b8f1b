"""Errors of our own while a case ran. They end no campaign: each place that fails is told once, with a case, and the
exit code says at the end that not all was well."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace

from moe_fuzz.campaign import events
from moe_fuzz.case import Case
from moe_fuzz.errors import MoeFuzzError
from moe_fuzz.verdict import BROKEN, Verdict

_MOST = 5  # places that are told


class Broken:
    """Safe to use from every thread."""

    def __init__(self, emit: Callable[[events.Event], None]) -> None:
        self._emit = emit
        self._lock = threading.Lock()
        self._told: set[str] = set()
        self.count = 0

    def saw(self, target: str, case: Case, verdict: Verdict) -> None:
        if verdict.kind != BROKEN:
            return
        what, _, _ = verdict.detail.partition("\n")
        place = what.rpartition(" (")[2] or what
        with self._lock:
            self.count += 1
            if place in self._told or len(self._told) == _MOST:
                return
            self._told.add(place)
        line = replace(case, target=target).inline()
        self._emit(events.Note(f"moe-fuzz itself failed on a case of {target}, which has no verdict: {what}; "
                               f"please report it, with what this prints: moe-fuzz replay {line}"))  # fmt: skip


def reason(count: int) -> str:
    """Why a campaign does not end well; empty if no case broke us."""
    return f"moe-fuzz itself failed on {count} case{'s'[:count > 1]}" if count else ""


def refuse(verdict: Verdict) -> None:
    """Raises MoeFuzzError on a verdict that is none."""
    if verdict.kind == BROKEN:
        what, _, text = verdict.detail.partition("\n")
        raise MoeFuzzError(f"moe-fuzz itself failed on this case: {what}",
                           f"please report it with this traceback:\n{text}")  # fmt: skip
