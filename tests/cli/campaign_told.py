"""The events of a campaign in which everything happened that a report tells of."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from moe_fuzz.campaign import events
from moe_fuzz.campaign.events import Cell
from moe_fuzz.campaign.finding import Finding
from moe_fuzz.contract import TargetInfo
from moe_fuzz.report.story import Story
from moe_fuzz.verdict import CRASH, VIOLATION, Verdict, Violation

TARGET = "topk_softmax@builtin"
OTHER = "topk_sigmoid@torch"
HOSTILE = "<script>alert(1)</script> ]]> & \x1b[31m \x00 |`%0A::error::\n```"  # what a damaged library may have written
LEDGER = {"name": "nan-crash", "tracker": "acme/kernels#12", "owner": "ada"}  # of an entry, what reports tell
CLOSED = f"{TARGET}: ids twice: 6 of them were new; more like them are not examined"
ROW = events.TargetRow(TARGET, 90, {"pass": 80, "violation": 9, "crash": 1}, 70, 0.4, 4.0, 0.5, 1, 1, 1,
                       budgets=(60, 15, 4, *[0] * 16, 1))  # fmt: skip


def findings(finding: Finding) -> tuple[Finding, Finding, Finding]:
    """A new one, a known one, a fixed one."""
    crash = Violation("crash", "SIGSEGV", HOSTILE, site="routing.py:40 in topk")
    trace = 'Fatal Python error\n  File "/opt/lib/kernels/routing.py", line 40 in topk\n'
    known = replace(
        finding, id="1111111111", check="crash", symptom="SIGSEGV", message=HOSTILE, site="routing.py in topk",
        raw=("crash", "SIGSEGV"), verdict=Verdict(CRASH, (crash,), detail=trace),
    )  # fmt: skip
    gone = replace(finding, id="2222222222", target=OTHER, symptom="out-of-range", raw=("ids", "out-of-range"))
    return finding, known, gone


def summary(finding: Finding, **changes: object) -> events.Summary:
    new, known, gone = findings(finding)
    rows = (ROW, events.TargetRow(OTHER, 10, {"pass": 10}, 8, 0.1, 1.0))
    counts = {"pass": 90, "violation": 9, "crash": 1}
    whole = events.Summary(7, 100, 100, 5.0, counts, (new,), (known,), (gone,), 1, 1, rows, False, 1)
    return replace(whole, **changes)  # type: ignore[arg-type]


def told(finding: Finding, end: bool = True, **changes: object) -> list[events.Event]:
    """The stream; `end=False`: it was cut before the last event. `changes` are the summary's."""
    new, known, gone = findings(finding)
    case = finding.case
    infos = tuple(TargetInfo(name, *name.split("@")) for name in (TARGET, OTHER))
    killed = Verdict(CRASH, (Violation("crash", "killed:SIGKILL", "somebody killed the worker"),))
    hang = Verdict("hang", (Violation("hang", "deadline", "no verdict within 10 s"),))
    flaky = Verdict(VIOLATION, (Violation("isolation", "bits", "row 1 differs"),))
    stream = [
        events.TargetUnavailable("align@vllm", "vllm is not installed", "pip install it"),
        events.CampaignStarted("0.1.0", infos, "cpu", 2, 7, 100, None, "there"),
        events.PhaseStarted("known", 2),
        events.FindingReported(known, "known", "there/findings/1111111111", LEDGER),
        events.FindingFixed(gone, "there/findings/2222222222"),
        events.Progress(20, 100, 1.0, 20.0, {"pass": 20}, 0, 0, 4.0),
        events.ViolationSeen(TARGET, case, finding.verdict),
        events.ViolationSeen(TARGET, case, hang),  # which nobody gets to examine
        events.WorkerLost(TARGET, "killed:SIGKILL", case, "a case T=3"),
        events.ViolationSeen(TARGET, case, killed),
        events.Progress(60, 100, 3.0, 20.0, {"pass": 59, "violation": 1}, 0, 1, 2.0),
        events.FindingReported(new, "new", f"there/findings/{new.id}"),
        events.FlakySeen(TARGET, case, flaky),
        events.FlakySeen(TARGET, case, killed),  # no second word of a worker that somebody killed
        events.Note(HOSTILE),
        events.Note(CLOSED),
    ]
    if end:
        cells = (
            Cell(TARGET, "all", "none", "eager", 50, 0, 0.4), Cell(TARGET, "all", "nan_rows", "eager", 40, 9, 0.0),
            Cell(TARGET, "E>8", "nan_rows", "eager", 4, 4, 0.0), Cell(OTHER, "all", "none", "graph", 10, 0, 0.1),
        )  # fmt: skip
        stream += [events.CoverageCounted(cells), events.WorkersCounted({"forks": 4, "deaths": 1, "fork_seconds": 0.2})]
        stream += [events.CampaignFinished(summary(finding, **changes))]
    return stream


def story(stream: Iterable[events.Event]) -> Story:
    made = Story()
    for event in stream:
        made.take(event)
    return made
