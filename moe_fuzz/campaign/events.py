"""What a campaign says while it runs: one frozen dataclass for each thing that can happen.

The campaign calls `emit(event)`, one event at a time, and knows nothing of who listens; reports subscribe.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, NamedTuple

from moe_fuzz.campaign.finding import Finding
from moe_fuzz.campaign.results import BUDGET_BINS, EntryResult, GateResult, Summary, TargetRow, plain  # noqa: F401
from moe_fuzz.case import Case
from moe_fuzz.contract import TargetInfo
from moe_fuzz.verdict import Verdict


@dataclass(frozen=True)
class Event:
    """Something that happened. `kind` is its name in NDJSON."""

    kind: ClassVar[str] = "event"

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind} | {f.name: plain(getattr(self, f.name)) for f in fields(self)}


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
    notes: tuple[str, ...] = ()  # "device cpu: Triton kernels run in its interpreter"
    plan: str = ""  # of a gate: the digest of its list of cases


@dataclass(frozen=True)
class TargetUnavailable(Event):
    kind: ClassVar[str] = "target-unavailable"
    target: str
    reason: str
    hint: str = ""


@dataclass(frozen=True)
class PhaseStarted(Event):
    """A phase begins: `resume`, `known`, `corpus`, `grid` or `generate`; of a gate `ledger`, `corpus`, `grid` or
    `generate`."""

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


#: Statuses of a finding that turn nothing red.
TOLERATED = ("known", "fixed", "flaky", "base", "robustness")


@dataclass(frozen=True)
class FindingReported(Event):
    """A confirmed finding. `status`: "new", or "known" if an earlier campaign had found it. Of a gate, "known" is what
    the ledger tells of; also "flaky", if it does not fail each time, "base", if it fails on the base build too, and
    "robustness", if it is new and breaks nobody's promise."""

    kind: ClassVar[str] = "finding-reported"
    finding: Finding
    status: str
    path: str  # its folder; empty where it is on nobody's disk
    entry: Mapping[str, Any] = field(default_factory=dict)  # of the ledger, for a known one

    @property
    def known_as(self) -> str:
        """Where the ledger tells of it: `name, tracker (owner)`; empty where it does not."""
        return "{name}, {tracker} ({owner})".format_map(self.entry) if self.entry else ""


@dataclass(frozen=True)
class FindingFixed(Event):
    """A finding of an earlier campaign, or of a gate's ledger, that does not fail any more."""

    kind: ClassVar[str] = "finding-fixed"
    finding: Finding
    path: str
    entry: Mapping[str, Any] = field(default_factory=dict)  # of the ledger


@dataclass(frozen=True)
class FlakySeen(Event):
    """A bad verdict that fresh workers did not show again. It never turns a campaign red."""

    kind: ClassVar[str] = "flaky-seen"
    target: str
    case: Case
    verdict: Verdict


@dataclass(frozen=True)
class CaseJudged(Event):
    """A case of a gate's plan, in the plan's order: two gates of one plan say the same, but for the seconds."""

    kind: ClassVar[str] = "case-judged"
    phase: str
    target: str
    case: str  # its digest, whoever is under test
    label: str
    verdict: str  # its kind
    check: str  # of the first violation; empty for a case that passed
    symptom: str
    seconds: float
    alone: bool = False  # it ran in a process of its own, on account of an entry of the ledger


@dataclass(frozen=True)
class EntryJudged(Event):
    """An entry of the ledger, as soon as its case ran; the end has the same once more, with the sightings."""

    kind: ClassVar[str] = "ledger-entry"
    result: EntryResult


@dataclass(frozen=True)
class WorkerLost(Event):
    """A worker was killed by somebody else: the out-of-memory killer, or a person."""

    kind: ClassVar[str] = "worker-lost"
    target: str
    reason: str
    case: Case | None = None  # the one it ran; it runs again, in a fresh worker
    label: str = ""  # the case, for a person


class Cell(NamedTuple):
    """How often the cases of a target had a class of configs, a fault and a mode together."""

    target: str
    config_class: str  # ALL_CONFIGS, or one of those that the op's space knows (`features`)
    fault: str  # NO_FAULT, or its name
    mode: str
    cases: int  # refused ones do not count: they covered nothing
    bad: int
    budget: float  # largest error over bound that was still accepted


#: Of a cell: whatever the config is, and no fault at all.
ALL_CONFIGS, NO_FAULT = "all", "none"


@dataclass(frozen=True)
class CoverageCounted(Event):
    """What the cases of this run were made of. Told once, before the end."""

    kind: ClassVar[str] = "coverage"
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class WorkersCounted(Event):
    """What the pool counted of its processes: started, dead of a case, replaced, … Told once, before the end."""

    kind: ClassVar[str] = "workers"
    counts: Mapping[str, float]


@dataclass(frozen=True)
class Note(Event):
    kind: ClassVar[str] = "note"
    message: str


@dataclass(frozen=True)
class CampaignFinished(Event):
    kind: ClassVar[str] = "campaign-finished"
    summary: Summary
