"""GitHub Actions: annotations on standard output, and the summary of the step.

A workflow shows at most ten errors and ten warnings of a step, so a campaign of many findings annotates the first ones
as they come and counts the rest in the last. Inside a workflow (GITHUB_ACTIONS=true) this report is on by itself.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from moe_fuzz.campaign import events
from moe_fuzz.report import Report, file_report, text
from moe_fuzz.report.sarif import place_of
from moe_fuzz.report.story import Story, Told

SUMMARY = "GITHUB_STEP_SUMMARY"
MOST = 9  # annotations of a kind, and one for the rest
LIMIT = 1 << 20  # bytes of a step's summary: of a longer one GitHub shows nothing
_NOWHERE = Path(os.devnull)


class Github:
    """`path` is appended to: other steps, or other campaigns of this step, may have written there before."""

    def __init__(self, path: Path, write: Callable[[str], None]) -> None:
        """Raises OSError if the file cannot be written."""
        self._path = path
        self._write = write
        self._story = Story()
        self._annotated: set[str] = set()
        self._done = False
        with path.open("a", encoding="utf-8"):
            pass

    def handle(self, event: events.Event) -> None:
        self._story.take(event)
        match event:
            case events.FindingReported():
                told = self._story.told[event.finding.id]
                if told.failed and len(self._annotated) < MOST:
                    self._annotated.add(event.finding.id)
                    self._write(annotation(told))
            case events.CampaignFinished():
                self._finish()

    def close(self) -> None:
        if not self._done and self._story.started is not None:
            self._finish()

    def _finish(self) -> None:
        self._done = True
        story = self._story
        failed = [told for told in story.findings if told.failed]
        rest = len(failed) - len(self._annotated)
        if rest > 0:
            self._write(command("error", f"{text.count(rest, 'more new finding')}: see the summary", "moe-fuzz"))
        for event in story.flaky[:MOST]:
            check, symptom = event.verdict.key
            said = f"{check} {symptom}: bad once, not again in fresh workers\nmoe-fuzz replay {event.case.inline()}"
            self._write(command("warning", said, f"flaky: {event.target}"))
        if len(story.flaky) > MOST:
            self._write(command("warning", f"{len(story.flaky) - MOST} more flaky cases", "moe-fuzz"))
        if story.summary is None:
            self._write(command("error", "the campaign did not come to its end", "moe-fuzz"))
        elif story.summary.reason:
            kind = "error" if story.summary.exit_code else "notice"
            self._write(command(kind, f"exit code {story.summary.exit_code}: {story.summary.reason}", "moe-fuzz"))
        with self._path.open("a", encoding="utf-8") as file:
            file.write(markdown(story))


@file_report(
    "github",
    "annotations on standard output, and PATH or the step's summary; on by itself in a GitHub workflow",
    default=lambda: Path(os.environ.get(SUMMARY) or _NOWHERE),
)
def open_report(path: Path) -> Report:
    return Github(path, lambda line: print(line, flush=True))


def annotation(told: Told) -> str:
    finding = told.finding
    _, file, line = place_of(told)
    where = {"file": _from_here(file), "line": str(line)} if file else {}
    return command("error", "\n".join(text.finding(finding, "")), finding.title, **where)


def command(kind: str, message: str, title: str, **fields: str) -> str:
    """A workflow command; what it says cannot end it or begin another."""
    given = ",".join(f"{key}={_escape(value, ':,')}" for key, value in {**fields, "title": title}.items())
    return f"::{kind} {given}::{_escape(message)}"


def markdown(story: Story) -> str:
    """The summary of a step."""
    lines = [f"## moe-fuzz: {_outcome(story)}", ""]
    if story.started is not None:
        where = "the CPU" if story.started.device == "cpu" else story.started.device
        lines += [f"moe-fuzz {story.started.version}, seed {story.started.seed}, "
                  f"{text.count(story.started.workers, 'worker')} on {where}.", ""]  # fmt: skip
    if story.summary is not None:
        lines += ["| target | cases | verdicts | parity | largest error | new | known |"]
        lines += ["|---|--:|---|--:|--:|--:|--:|"]
        for row in story.summary.rows:
            error = f"{row.budget:.0%} of its bound" if row.budget else ""
            verdicts = _html(row.unavailable) if row.unavailable else text.verdicts(row.verdicts)
            numbers = f"{row.cases:,}", f"{row.parity:,}", str(row.new), str(row.known)
            cells = [_code(row.target), numbers[0], verdicts, numbers[1], error, *numbers[2:]]
            lines.append("".join(f"| {cell.replace('|', chr(92) + '|')} " for cell in cells) + "|")
        lines.append("")
    tail = _rest(story)
    room = LIMIT - len("\n".join([*lines, *tail]).encode()) - 200
    left_out = 0
    for told in story.findings:
        part = _finding(told)
        size = len("\n".join(part).encode()) + 1
        if size > room:
            left_out += 1
            continue
        room -= size
        lines += part
    if left_out:
        lines += [f"{text.count(left_out, 'finding')} more did not fit in here.", ""]
    return "\n".join([*lines, *tail, ""])


def _outcome(story: Story) -> str:
    failed = sum(told.failed for told in story.findings)
    found = text.count(failed, "new finding") if failed else "no new finding"
    if story.summary is None:
        return f"not finished, {found} so far"
    ran = f"{text.count(story.summary.cases, 'case')} in {text.duration(story.summary.seconds)}"
    start = "interrupted after" if story.summary.interrupted else ""
    reason = f" ({story.summary.reason})" if story.summary.reason else ""
    return f"{start} {ran}, {found}{reason}".strip()


def _finding(told: Told) -> list[str]:
    finding = told.finding
    return [
        f"<details{' open' if told.failed else ''}><summary>{_html(told.status)}: <code>{_html(finding.id)}</code> "
        f"{_html(finding.title)}: {_html(finding.message)}</summary>", "",
        *([f"- ledger: {_html(told.known_as)}"] if told.known_as else []),
        f"- smallest input: {_code(finding.label)}", f"- class: {finding.finding_class}"
        + (f": {_html(finding.clause)}" if finding.clause else ""), "",
        "```", finding.replay, "```", "", "</details>", "",
    ]  # fmt: skip


def _rest(story: Story) -> list[str]:
    lines = [f"- flaky: {_code(event.target)}: {_html(' '.join(event.verdict.key))}" for event in story.flaky[:50]]
    lines += [f"- worker lost on {_code(lost.target)}: {_html(lost.reason)}" for _, lost in list(story.lost)[:50]]
    lines += [f"- not available: {_code(one.target)}: {_html(one.reason)}" for one in story.unavailable[:50]]
    lines += [f"- note: {_html(said)}" for said in story.notes[:50]]
    return [*lines, ""] if lines else []


def _escape(said: str, more: str = "") -> str:
    for char in f"%\r\n{more}":
        said = said.replace(char, f"%{ord(char):02X}")
    return said


def _code(said: str) -> str:
    return f"`{said.replace('`', chr(39)).replace(chr(10), ' ')}`"


def _html(said: str) -> str:
    return said.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("\n", " ")


def _from_here(file: str) -> str:
    try:
        return str(Path(file).resolve().relative_to(Path.cwd()))
    except ValueError:
        return file
