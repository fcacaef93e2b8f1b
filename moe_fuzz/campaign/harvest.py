"""What a campaign takes from the corpus of its state directory, and what it adds to it.

A campaign replays what the corpus held when it began: the list lies in replay.json, so one that was cut goes on with
the same. It adds every passing case that covers a point of the feature lattice which nothing in the corpus covers yet.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from moe_fuzz.campaign import corpus, lattice
from moe_fuzz.campaign.interfaces import Cases, Space
from moe_fuzz.campaign.state import StateDir
from moe_fuzz.case import Case
from moe_fuzz.contract import TargetInfo
from moe_fuzz.errors import MoeFuzzError
from moe_fuzz.restriction import Restriction
from moe_fuzz.verdict import PASS, Verdict

FOLDER = "corpus"
LIST = "replay.json"
MAX_ADDED = 2048  # entries of a target: `moe-fuzz corpus prune` makes room


class Harvest:
    """Safe to use from every thread."""

    def __init__(
        self, state: StateDir, targets: Mapping[str, tuple[TargetInfo, Space]], get_space: corpus.GetSpace
    ) -> None:  # fmt: skip
        """Reads the corpus. What is damaged is set aside, what is another version's is told and left."""
        self._state = state
        self._targets = targets
        self._lock = threading.Lock()
        self._corpus = corpus.load(state.path / FOLDER, get_space)
        for file, why in self._corpus.damaged.items():
            state.set_aside(str(file.relative_to(state.path)), why)
        self._corpus.damaged.clear()
        foreign = self._corpus.lines()
        if foreign:
            state.note(f"corpus: {len(foreign)} files are another version's, e.g. {foreign[0]}")
        self._covered: set[lattice.Cell] = set()
        self._count = dict.fromkeys(targets, 0)
        for entry in self._corpus.entries.values():
            if entry.case.target in self._count:
                self._count[entry.case.target] += 1
                self._covered |= lattice.cells(targets[entry.case.target][1], entry.case, entry.budget)

    def replayed(self, resumed: bool, limit: int, restriction: Restriction) -> dict[str, Cases]:
        """The cases that each target begins with, at most `limit`: those of a person first, then the nearest to a
        bound. resumed: goes on with the list of the campaign that was cut."""
        saved = self._state.read(LIST, _parse) if resumed else None
        if saved is None:
            saved = () if resumed else tuple(case for target in self._targets for case in self._of(target, limit))
            data = {"format": 1, "cases": [case.to_json() for case in saved]}
            self._state.write_text(LIST, json.dumps(data))
        return {
            target: tuple(case for case in saved if case.target == target and restriction.allows(case))
            for target in self._targets
        }

    def consider(self, target: str, case: Case, verdict: Verdict) -> None:
        """Takes in a case that passed, if it covers what nothing else does."""
        if verdict.kind != PASS or target not in self._targets:
            return
        case = case if case.target == target else replace(case, target=target)
        with self._lock:
            if self._count[target] >= MAX_ADDED:
                return
            found = lattice.cells(self._targets[target][1], case, verdict.budget)
            if found <= self._covered:
                return
            self._covered |= found
            entry = corpus.Entry(case, verdict.budget)
            self._count[target] += 1
            text = json.dumps(entry.to_json(), indent=1) + "\n"
            # Not synced: it is worth a case, and there are hundreds at the start.
            self._state.write_text(f"{FOLDER}/{entry.digest}.json", text, durable=False)

    def _of(self, target: str, limit: int) -> Cases:
        info, space = self._targets[target]
        own = [e for e in self._corpus.entries.values() if e.case.op == space.op and e.case.target in ("", target)]
        own.sort(key=lambda entry: (not entry.pinned, -entry.budget, entry.digest))
        cases = (replace(entry.case, target=target) for entry in own)
        return tuple(case for case in cases if not _refusal(space, case, info))[:limit]


def _refusal(space: Any, case: Case, info: TargetInfo) -> str:
    refusal = getattr(space, "refusal", None)
    return refusal(case, info) if refusal else ""


def _parse(data: Any) -> Cases:
    if data["format"] != 1:
        raise MoeFuzzError(f"format {data['format']!r} is not 1")
    return tuple(Case.from_json(case) for case in data["cases"])
