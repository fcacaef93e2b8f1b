"""Plain lines for a pipe, a log or a CI job: flushed one by one, with a line of progress every ten seconds."""

from __future__ import annotations

import time
from collections.abc import Callable

from moe_fuzz.campaign import events
from moe_fuzz.campaign.confirm import killed
from moe_fuzz.report import text
from moe_fuzz.report.gate_text import entry

PERIOD = 10.0  # seconds between lines of progress


class Plain:
    """`write` takes one line without its end."""

    def __init__(self, write: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._write = write
        self._clock = clock
        self._next = clock() + PERIOD
        self._state_dir = ""
        self._moments = Moments()

    def handle(self, event: events.Event) -> None:
        for line in self._lines(event):
            self._write(line)

    def close(self) -> None:
        """Nothing is held back."""

    def _lines(self, event: events.Event) -> list[str]:
        match event:
            case events.CampaignStarted():
                self._state_dir = event.state_dir
                return text.header(event)
            case events.Progress():
                if self._clock() < self._next:
                    return []
                self._next = self._clock() + PERIOD
                return [progress(event)]
            case events.CampaignFinished():
                return ["", *text.summary(event.summary, self._state_dir)]
            case _:
                return self._moments.lines(event)


class Moments:
    """Events that are worth a line when they happen, on any screen."""

    def __init__(self) -> None:
        self._suspects: set[tuple[str, str, str]] = set()

    def lines(self, event: events.Event) -> list[str]:
        if not isinstance(event, events.ViolationSeen):
            return _moment(event)
        kind = (event.target, *event.verdict.key)
        if kind in self._suspects or killed(event.verdict):
            return []
        # Until it is confirmed and reduced may take minutes, and often the first line says what is wrong.
        self._suspects.add(kind)
        return [f"suspect, to be confirmed: {text.violation(event.target, event.verdict)}"]


def _moment(event: events.Event) -> list[str]:
    match event:
        case events.TargetUnavailable():
            return [f"not available: {event.target}: {event.reason}"] + ([f"  {event.hint}"] if event.hint else [])
        case events.PhaseStarted():
            return [f"phase {event.name}" + (f": {event.planned:,}" if event.planned is not None else "")]
        case events.FindingReported():
            lines = [text.found(event), f"  {event.finding.label}", f"  {event.path}"]
            return lines if event.path else lines[:1]
        case events.EntryJudged() if event.result.status not in ("known", "quiet"):
            return [f"ledger: {entry(event.result)}"]
        case events.FindingFixed():
            return [f"gone: {event.finding.id}  {event.finding.title} does not fail any more"]
        case events.FlakySeen():
            check, symptom = event.verdict.key
            return [f"flaky: {event.target}: {check} {symptom} was not seen again (case {event.case.digest})"]
        case events.WorkerLost():
            return [f"worker lost on {event.target}: {event.reason}"]
        case events.Note():
            return [f"note: {event.message}"]
        case _:
            return []


def progress(event: events.Progress) -> str:
    done = f"{event.cases:,}" + (f" of {event.planned:,}" if event.planned is not None else "")
    parts = [
        text.duration(event.seconds),
        f"{done} cases",
        f"{event.rate:.1f}/s",
        text.verdicts(event.verdicts),
        text.count(event.findings, "finding"),
    ]
    if event.waiting:
        parts.append(f"{event.waiting} waiting to be examined")
    if event.eta is not None:
        parts.append(f"{text.duration(event.eta)} left")
    return "  ".join(parts)
