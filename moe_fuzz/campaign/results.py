"""What a campaign came to: its sum, target by target, and what a gate adds to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from moe_fuzz.campaign.finding import Finding
from moe_fuzz.verdict import BAD, NOT_RUN


def plain(value: Any) -> Any:
    if hasattr(value, "to_json"):
        return value.to_json()
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    return value


#: Of the histogram of error budgets: each bin is a twentieth of the bound.
BUDGET_BINS = 20


@dataclass(frozen=True)
class TargetRow:
    """One target's line of the summary."""

    target: str
    cases: int = 0
    verdicts: Mapping[str, int] = field(default_factory=dict)  # verdict kind -> cases
    parity: int = 0  # cases on which binding proved that a wrong output is rejected
    budget: float = 0.0  # largest error over bound that was still accepted
    seconds: float = 0.0  # in the worker
    fence_seconds: float = 0.0
    new: int = 0
    known: int = 0
    flaky: int = 0
    unavailable: str = ""  # the reason, if it never ran
    budgets: tuple[int, ...] = ()  # passed cases by the share of the bound that their largest error used, BUDGET_BINS
    #: of ops whose batches are padded: kind of run -> what of verdict.PADDING_COUNTS -> steps, or rows
    padding: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    uninterpreted: Mapping[str, int] = field(default_factory=dict)  # what the interpreter has not -> cases rejected
    unjudged: int = 0  # of those rejected: answers that were not judged in time, which is not the target's fault
    too_slow: int = 0  # cases not run, and others in their place, as they would have taken too long here
    cut: int = 0  # cases that were under way when the time was over, and have no verdict

    @property
    def ran(self) -> bool:
        """Whether the target really ran at least once: being refused, or out of memory, is not running."""
        return any(count for kind, count in self.verdicts.items() if kind not in NOT_RUN)

    def to_json(self) -> dict[str, Any]:
        return {f.name: plain(getattr(self, f.name)) for f in fields(self)} | {"ran": self.ran}


@dataclass(frozen=True)
class EntryResult:
    """What became of an entry of the ledger on one target.

    known: it failed as told, or explained what did · quiet: it is told to fail sometimes, and did not · flaky: it is
    told to fail always, and does not each time · changed: it fails otherwise now · fixed: it passes each time ·
    expired · absent: it is not in force here · unseen: it has no case to run, and nothing was like it · not-run ·
    no-target: it is of none that is known or asked for, and `target` is its pattern.
    A gate is red on `fixed` and `expired`.
    """

    entry: Mapping[str, Any]
    target: str
    status: str
    message: str  # for a person, with the way out
    seen: int = 0  # bad cases that it explained

    def to_json(self) -> dict[str, Any]:
        return {f.name: plain(getattr(self, f.name)) for f in fields(self)}


@dataclass(frozen=True)
class GateResult:
    """What a gate knows beside what every campaign does. Its plan has `Summary.planned` cases, of which
    `Summary.cases` ran; `Summary.new` are the findings that nobody knew."""

    profile: str
    plan: str  # digest of the list of cases
    floor: int  # cases below which it counts as not having run
    held_back: int  # cases not run: a known finding takes their process down, and enough of them ran
    red: tuple[str, ...]  # ids of the findings that turn it red: of `new`, those of class contract; all if strict
    entries: tuple[EntryResult, ...] = ()  # of the ledger
    on_base: tuple[Finding, ...] = ()  # fail on the base build too
    unstable: tuple[Finding, ...] = ()  # do not fail each time

    def to_json(self) -> dict[str, Any]:
        return {f.name: plain(getattr(self, f.name)) for f in fields(self)}


@dataclass(frozen=True)
class Summary:
    """What a campaign came to."""

    seed: int
    cases: int
    planned: int | None
    seconds: float
    verdicts: Mapping[str, int]
    new: tuple[Finding, ...]
    known: tuple[Finding, ...]  # failed again, or were met again
    fixed: tuple[Finding, ...]
    flaky: int
    unexamined: int  # bad cases left in `pending`, for the next run
    rows: tuple[TargetRow, ...]
    interrupted: bool
    exit_code: int
    reason: str = ""  # why the exit code is neither 0 nor 1; of a gate, why it is red too
    gate: GateResult | None = None  # of a gate

    @property
    def bad(self) -> int:
        """Cases that broke a rule, whatever came of it."""
        return sum(self.verdicts.get(kind, 0) for kind in BAD)

    def to_json(self) -> dict[str, Any]:
        return {f.name: plain(getattr(self, f.name)) for f in fields(self)}
