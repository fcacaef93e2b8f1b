"""What was told of a campaign so far, for reports that are written as a whole."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

from moe_fuzz.campaign import events
from moe_fuzz.campaign.confirm import killed
from moe_fuzz.campaign.finding import Finding

MAX_SAMPLES = 512  # of the progress: of a longer campaign every second one is forgotten, again and again
MAX_LOST = 1000


@dataclass(frozen=True)
class Told:
    """A finding, as last heard of."""

    finding: Finding
    status: str  # "new", or one of events.TOLERATED
    path: str  # its folder; empty where it is on nobody's disk
    seconds: float  # into the campaign
    known_as: str = ""  # where the ledger tells of it

    @property
    def failed(self) -> bool:
        return self.status not in events.TOLERATED


@dataclass
class Story:
    """Fed with every event. `summary` is None while the campaign runs, and stays so if it never comes to its end."""

    began: datetime = field(default_factory=lambda: datetime.now(UTC))
    started: events.CampaignStarted | None = None
    unavailable: list[events.TargetUnavailable] = field(default_factory=list)
    told: dict[str, Told] = field(default_factory=dict)
    flaky: list[events.FlakySeen] = field(default_factory=list)
    lost: deque[tuple[float, events.WorkerLost]] = field(default_factory=lambda: deque(maxlen=MAX_LOST))
    notes: list[str] = field(default_factory=list)
    samples: list[tuple[float, int]] = field(default_factory=list)  # seconds, cases
    cells: tuple[events.Cell, ...] = ()
    workers: dict[str, float] = field(default_factory=dict)
    summary: events.Summary | None = None
    seconds: float = 0.0  # into the campaign, as last heard
    _seen: dict[tuple[str, str, str], events.ViolationSeen] = field(default_factory=dict)
    _every: int = 1
    _heard: int = 0

    def take(self, event: events.Event) -> None:
        match event:
            case events.CampaignStarted():
                self.started = event
            case events.TargetUnavailable():
                self.unavailable = [*(one for one in self.unavailable if one.target != event.target), event]
            case events.Progress():
                self._sample(event.seconds, event.cases)
            case events.ViolationSeen():
                if not killed(event.verdict):
                    self._seen.setdefault((event.target, *event.verdict.key), event)
            case events.FindingReported():
                self._tell(event.finding, event.status, event.path, event.known_as)
            case events.FindingFixed():
                self._tell(event.finding, "fixed", event.path)
            case events.FlakySeen():
                if not killed(event.verdict):  # of whose worker it was told already
                    self.flaky.append(event)
                self._seen.pop((event.target, *event.verdict.key), None)
            case events.WorkerLost():
                self.lost.append((self.seconds, event))
            case events.CoverageCounted():
                self.cells = event.cells
            case events.WorkersCounted():
                self.workers = dict(event.counts)
            case events.Note():
                self.notes.append(event.message)
            case events.CampaignFinished():
                self._finish(event.summary)

    @property
    def findings(self) -> list[Told]:
        """Those that fail first, then the order of finding."""
        return sorted(self.told.values(), key=lambda one: not one.failed)

    @property
    def unexamined(self) -> list[events.ViolationSeen]:
        """Bad cases, one of each kind, of which it was never told what they came to."""
        known = {(one.finding.target, *key) for one in self.told.values() for key in one.finding.symptoms}
        return [event for key, event in self._seen.items() if key not in known]

    @property
    def targets(self) -> list[str]:
        """All that something is known of, in the order of the campaign."""
        infos = [info.name for info in self.started.targets] if self.started else []
        rows = [row.target for row in self.summary.rows] if self.summary else []
        rest = [one.target for one in self.unavailable] + [one.finding.target for one in self.told.values()]
        return list(dict.fromkeys([*rows, *infos, *rest]))

    def row(self, target: str) -> events.TargetRow | None:
        return next((row for row in self.summary.rows if row.target == target), None) if self.summary else None

    def _tell(self, finding: Finding, status: str, path: str, known_as: str = "") -> None:
        self.told[finding.id] = Told(finding, status, path, self.seconds, known_as)

    def _sample(self, seconds: float, cases: int) -> None:
        self.seconds = max(self.seconds, seconds)
        self._heard += 1
        if self._heard % self._every == 0:
            self.samples.append((seconds, cases))
        if len(self.samples) > MAX_SAMPLES:
            del self.samples[::2]
            self._every *= 2

    def _finish(self, summary: events.Summary) -> None:
        self.summary = summary
        self.samples.append((summary.seconds, summary.cases))
        self.seconds = summary.seconds
        for finding in (*summary.new, *summary.known, *summary.fixed):  # which know their faces and sightings by now
            if finding.id in self.told:
                self.told[finding.id] = replace(self.told[finding.id], finding=finding)
