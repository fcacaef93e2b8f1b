"""What a campaign says while it runs: one frozen dataclass for each thing that can happen.

The campaign calls `emit(event)`, one event at a time, and knows nothing of who listens; reports subscribe.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from moe_fuzz.campaign.finding import Finding
from moe_fuzz.case import Case
from moe_fuzz.contract import TargetInfo
from moe_fuzz.verdict import Verdict


@dataclass(frozen=True)
class Event:
    """Something that happened. `kind` is its name in NDJSON."""

    kind: ClassVar[str] = "event"

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind} | {f.name: _plain(getattr(self, f.name)) for f in fields(self)}


def _plain(value: Any) -> Any:
    if hasattr(value, "to_json"):
        return value.to_json()
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value


@dataclass(frozen=True)
class CampaignStarted(Event):
    """The header: what runs, where, from which seed."""

    kind: ClassVar[str] = "campaign-started"
    version: str
    targets: tuple[TargetInfo, ...]
    device: str
    workers: int
    seed: int
    cases: int | None  # how many will run; None: until the time is up
    seconds: float | None
    state_dir: str
    resumed: bool = False  # goes on where an interrupted campaign stopped
    notes: tuple[str, ...] = ()  # "Triton's interpreter: no CUDA graphs"


@dataclass(frozen=True)
class TargetUnavailable(Event):
    kind: ClassVar[str] = "target-unavailable"
    target: str
    reason: str
    hint: str = ""


@dataclass(frozen=True)
class PhaseStarted(Event):
    """A phase begins: `resume`, `known`, `corpus`, `grid` or `generate`."""

    kind: ClassVar[str] = "phase-started"
    name: str
    planned: int | None  # cases, findings or rounds to go through; None: until the time is up


@dataclass(frozen=True)
class Progress(Event):
    """At most a few a second."""

    kind: ClassVar[str] = "progress"
    cases: int
    planned: int | None
    seconds: float
    rate: float  # cases a second, since this run began
    verdicts: Mapping[str, int]  # verdict kind -> cases
    findings: int  # new ones
    waiting: int  # violations that wait to be examined
    eta: float | None = None  # seconds to the end of the budget, where it can be told


@dataclass(frozen=True)
class ViolationSeen(Event):
    """A bad verdict that no reported finding explains, before anything is known of it."""

    kind: ClassVar[str] = "violation-seen"
    target: str
    case: Case
    verdict: Verdict


@dataclass(frozen=True)
class FindingConfirming(Event):
    kind: ClassVar[str] = "finding-confirming"
    target: str
    check: str
    symptom: str
    label: str  # the case, for a person


@dataclass(frozen=True)
class FindingMinimizing(Event):
    kind: ClassVar[str] = "finding-minimizing"
    target: str
    check: str
    symptom: str
    tries: int
    label: str  # the smallest case so far


@dataclass(frozen=True)
class FindingReported(Event):
    """A confirmed finding is on disk. `status`: "new", or "known" if an earlier campaign had found it."""

    kind: ClassVar[str] = "finding-reported"
    finding: Finding
    status: str
    path: str  # its folder


@dataclass(frozen=True)
class FindingFixed(Event):
    """A finding of an earlier campaign that does not fail any more."""

    kind: ClassVar[str] = "finding-fixed"
    finding: Finding
    path: str


@dataclass(frozen=True)
class FlakySeen(Event):
    """A bad verdict that fresh workers did not show again. It never turns a campaign red."""

    kind: ClassVar[str] = "flaky-seen"
    target: str
    case: Case
    verdict: Verdict


@dataclass(frozen=True)
class WorkerLost(Event):
    """A worker was killed by somebody else: the out-of-memory killer, or a person."""

    kind: ClassVar[str] = "worker-lost"
    target: str
    reason: str


@dataclass(frozen=True)
class Note(Event):
    kind: ClassVar[str] = "note"
    message: str


@dataclass(frozen=True)
class Warning(Event):
    """Something the reader should act on."""

    kind: ClassVar[str] = "warning"
    message: str
    hint: str = ""


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

    @property
    def ran(self) -> bool:
        """Whether the target really ran at least once: being refused, or out of memory, is not running."""
        return any(count for kind, count in self.verdicts.items() if kind not in ("rejected", "out-of-memory"))

    def to_json(self) -> dict[str, Any]:
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self)} | {"ran": self.ran}


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
    reason: str = ""  # why the exit code is neither 0 nor 1

    def to_json(self) -> dict[str, Any]:
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self)}


@dataclass(frozen=True)
class CampaignFinished(Event):
    kind: ClassVar[str] = "campaign-finished"
    summary: Summary
