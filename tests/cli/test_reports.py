from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from moe_fuzz import report
from moe_fuzz.campaign import events
from moe_fuzz.campaign.finding import Finding
from moe_fuzz.case import Fault
from moe_fuzz.labels import Labels
from moe_fuzz.report import ndjson, text
from moe_fuzz.report.plain import Plain
from moe_fuzz.report.terminal import Terminal
from moe_fuzz.verdict import CRASH, Verdict, Violation


def progress(cases: int = 50) -> events.Progress:
    return events.Progress(cases, 200, 5.0, 10.0, {"pass": cases - 1, "crash": 1}, 1, 2, eta=15.0)


def started() -> events.CampaignStarted:
    return events.CampaignStarted("0.1.0", (), "cpu", 2, 7, 200, 60.0, "there")


def test_plain_lines_of_progress_come_every_ten_seconds() -> None:
    lines: list[str] = []
    now = [0.0]
    plain = Plain(lines.append, lambda: now[0])
    plain.handle(started())
    before = len(lines)
    for second in range(35):
        now[0] = float(second)
        plain.handle(progress())
    assert len(lines) - before == 3
    assert lines[-1].startswith("5.0 s  50 of 200 cases  10.0/s  49 pass · 1 crash  1 finding")
    assert lines[-1].endswith("15 s left")


def test_what_is_wrong_is_told_before_it_is_confirmed_and_once(finding: Finding) -> None:
    lines: list[str] = []
    plain = Plain(lines.append)
    raised = replace(finding.verdict, violations=(Violation("error", "ValueError", "raised ValueError: E\nmore"),))
    killed = Verdict(CRASH, (Violation("crash", "killed:SIGKILL", "somebody killed the worker"),))
    for verdict in (raised, raised, killed, finding.verdict):
        plain.handle(events.ViolationSeen("a@b", finding.case, verdict))
    assert lines == [
        "suspect, to be confirmed: a@b: error ValueError: raised ValueError: E",
        f"suspect, to be confirmed: a@b: {finding.check} {finding.symptom}: {finding.message}",
    ]


def test_a_number_that_json_has_no_word_for_ends_no_campaign(finding: Finding, tmp_path: Path) -> None:
    """As how far NaN is off; it was an internal error."""
    nan = Violation("bound", "nan", "y is NaN", budget=math.inf, allowed=(0.0, math.inf))
    with (tmp_path / "events").open("w") as stream:
        ndjson.Ndjson(stream).handle(events.ViolationSeen("a@b", finding.case, Verdict("violation", (nan,))))
    [told] = json.loads((tmp_path / "events").read_text())["verdict"]["violations"]
    assert (nan.budget, told["budget"], told["allowed"]) == (None, None, [0.0, None])


def test_terminal_never_breaks_a_replay_line(finding: Finding) -> None:
    screen = io.StringIO()
    terminal = Terminal(Console(file=screen, force_terminal=True, width=40, legacy_windows=False))
    summary = events.Summary(
        7, 50, 200, 5.0, {"pass": 49, "crash": 1}, (finding,), (), (), 1, 2, (events.TargetRow("a@b", 50),), False, 1
    )
    for event in (
        started(),
        events.PhaseStarted("grid", 200),
        progress(),
        events.FindingMinimizing("a@b", "ids", "twice", 3, "[bold]x[/bold] " * 9),
        events.FindingReported(finding, "new", "x" * 90),
        events.FlakySeen("a@b", finding.case, finding.verdict),
        events.Note("[bold]careful[/]"),
        events.CampaignFinished(summary),
    ):
        terminal.handle(event)
        terminal._live.refresh()  # else what is shown for a moment depends on the refreshing thread's luck
    terminal.close()
    shown = screen.getvalue()
    assert f"    moe-fuzz replay {finding.case.inline()}\n" in shown
    assert "x" * 90 in shown
    assert "minimizing ids twice, try 3" in shown
    assert "[bold]careful[/]" in shown  # no markup, neither above
    assert "[bold]x" in shown  # nor in the status
    assert "\x1b[?25h" in shown  # the cursor is given back


class Broken:
    def __init__(self, error: BaseException) -> None:
        self.error = error

    def handle(self, event: events.Event) -> None:
        raise self.error

    def close(self) -> None:
        raise AssertionError("a report that was dropped is not closed again")


def test_a_broken_report_is_dropped_and_the_others_go_on() -> None:
    said: list[str] = []
    lines: list[str] = []
    broadcast = report.Broadcast({"a": Broken(OSError(28, "full")), "b": Plain(lines.append)}, said.append)
    broadcast(events.Note("one"))
    broadcast(events.Note("two"))
    broadcast.close()
    assert lines == ["note: one", "note: two"]
    assert said == ["the report a is incomplete: full"]
    assert broadcast.failed == ["a"]


def test_a_bug_in_a_report_is_not_hidden() -> None:
    broadcast = report.Broadcast({"a": Broken(KeyError("x"))}, print)
    with pytest.raises(KeyError):
        broadcast(events.Note("one"))


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.42, "0.4 s"), (59.4, "59 s"), (59.9, "1 min"), (200, "3 min 20 s"), (7500, "2 h 5 min")]
)
def test_durations(seconds: float, said: str) -> None:
    assert text.duration(seconds) == said


def test_every_kind_has_help() -> None:
    assert "ndjson" in report.kinds()
    assert all(kind.help for kind in report.kinds().values())


def test_findings_that_need_the_same_are_told_to_be_one_defect_perhaps(finding: Finding) -> None:
    [step] = finding.case.steps
    laid = replace(finding.case, steps=(replace(step, faults=(Fault("nan_rows", "logits", Labels.parse("0")),)),))
    other = replace(laid, config={**laid.config, "renormalize": not laid.config["renormalize"]})
    bare = replace(finding.case, steps=(replace(step, faults=()),))
    a, b, c = (replace(finding, id=name, case=case, features=())
               for name, case in (("a", laid), ("b", other), ("c", bare)))  # fmt: skip
    assert text.alike([a, b, c]) == ["2 of these need nan_rows on logits: one defect may be behind a, b"]
    assert text.alike([a, c]) == text.alike([c, replace(c, id="d")]) == []
    needs = (("d", ("E>1", "block=1")), ("e", ("block=1",)), ("f", ("k>1",)))
    plain = [replace(c, id=name, features=features) for name, features in needs]
    assert text.alike([c, *plain]) == ["2 of these need block=1: one defect may be behind d, e"]
    assert text.alike([plain[0], replace(plain[1], target="align@another")]) == []
    summary = events.Summary(7, 50, 200, 5.0, {"crash": 2}, (a, b), (), (), 0, 0, (), False, 1)
    assert "  2 of these need nan_rows on logits: one defect may be behind a, b" in text.summary(summary, "there")
