"""JUnit XML, as Jenkins, GitLab and Buildkite read it: a suite for each target, a test case for each finding.

Red is what turns the campaign red: a new finding fails, a known one is skipped, a fixed one passes. The first test case
of a suite is the target's campaign as a whole. A case whose worker was killed from outside is there too, skipped: it
runs again in a fresh worker, and what comes of that is a finding or nothing.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from pathlib import Path

from moe_fuzz.campaign.events import TargetRow
from moe_fuzz.errors import EXIT_CLEAN, EXIT_FINDING
from moe_fuzz.report import Report, file_report, text
from moe_fuzz.report.story import Story, Told
from moe_fuzz.report.whole import Whole

SUITE = "moe-fuzz"  # of the campaign itself
_ILLEGAL = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # characters that XML 1.0 cannot hold


def render(story: Story) -> str:
    suites = [_target(story, target) for target in story.targets]
    suites.append(_campaign(story, any(_number(suite, "failure", "error") for suite in suites)))
    root = ET.Element("testsuites", {"name": SUITE})
    root.extend(suites)
    for name, tag in (("failures", "failure"), ("errors", "error")):
        root.set(name, str(_number(root, tag)))
    root.set("tests", str(len(list(root.iter("testcase")))))
    root.set("time", f"{story.seconds:.3f}")
    ET.indent(root)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n"


@file_report("junit", "JUnit XML: a test case for each finding, each target, and each case whose worker was killed")
def open_report(path: Path) -> Report:
    return Whole(path, render)


def _target(story: Story, target: str) -> ET.Element:
    row = story.row(target)
    suite = _suite(story, target, row.seconds if row else 0.0)
    case = _case(suite, target, "campaign", row.seconds if row else 0.0)
    gone = next((one for one in story.unavailable if one.target == target), None)
    if gone is not None:
        # One that was asked for by name has a row, and without it the campaign is not what was asked for.
        _say(case, "error" if row else "skipped", f"not available: {gone.reason}", gone.hint, "unavailable")
    elif row is not None:
        _ran(case, row)
    for told in story.findings:
        if told.finding.target == target:
            _finding(suite, told)
    for event in story.flaky:
        if event.target == target:
            check, symptom = event.verdict.key
            case = _case(suite, target, f"flaky: {check} {symptom} ({event.case.digest})")
            _say(case, "skipped", "bad once, and not again in fresh workers", _replay(event.case.inline()))
    for _, lost in story.lost:
        if lost.target == target:
            case = _case(suite, target, f"worker killed: {lost.label or lost.reason}")
            inline = _replay(lost.case.inline()) if lost.case else ""
            _say(case, "skipped", f"{lost.reason}; the case runs again in a fresh worker", inline, "worker-killed")
    for seen in story.unexamined:
        if seen.target == target:
            check, symptom = seen.verdict.key
            case = _case(suite, target, f"not examined: {check} {symptom} ({seen.case.digest})")
            tag = "skipped" if story.summary else "error"
            said = "bad, and not examined before the end: the next run does"
            _say(case, tag, said, _replay(seen.case.inline()), "unexamined")
    return _counted(suite)


def _finding(suite: ET.Element, told: Told) -> None:
    finding = told.finding
    case = _case(suite, finding.target, f"{finding.check} {finding.symptom} [{finding.id}]", finding.verdict.seconds)
    body = "\n".join([*text.finding(finding, ""), *([f"  {told.path}"] if told.path else [])])
    if told.failed:
        _say(case, "failure", finding.message, body, finding.finding_class)
    elif told.status == "fixed":
        _output(case, f"a finding of an earlier campaign, which does not fail any more\n{body}")
    else:
        status = f"{told.status} ({told.known_as})" if told.known_as else told.status
        _say(case, "skipped", f"{status}: {finding.message}", body)


def _ran(case: ET.Element, row: TargetRow) -> None:
    if not row.ran:
        said = f"nothing ran: {text.verdicts(row.verdicts)}"
        _say(case, "error", said, "", "nothing-ran")
    _output(case, text.target_row(row))


def _campaign(story: Story, red: bool) -> ET.Element:
    """What went wrong with the campaign and is no target's: JUnit must not look green where the exit code does not."""
    suite = _suite(story, SUITE, story.seconds)
    case = _case(suite, SUITE, "the campaign came to its end")
    summary = story.summary
    if summary is None:
        said = "the campaign did not come to its end: what stands here is what was found so far"
        _say(case, "error", said, "", "cut")
    elif summary.exit_code not in (EXIT_CLEAN, EXIT_FINDING) or (summary.exit_code == EXIT_FINDING and not red):
        _say(case, "error", f"exit code {summary.exit_code}: {summary.reason or 'see its output'}", "", "exit-code")
    if story.notes:
        _output(case, "\n".join(story.notes))
    return _counted(suite)


def _suite(story: Story, name: str, seconds: float) -> ET.Element:
    stamp = story.began.strftime("%Y-%m-%dT%H:%M:%S")
    suite = ET.Element("testsuite", {"name": name, "timestamp": stamp, "time": f"{seconds:.3f}"})
    if story.started is not None:
        facts = {"version": story.started.version, "seed": story.started.seed, "device": story.started.device}
        row = story.row(name)
        facts |= {"cases": row.cases, **row.verdicts} if row else {}
        properties = ET.SubElement(suite, "properties")
        for key, value in facts.items():
            ET.SubElement(properties, "property", {"name": key, "value": str(value)})
    return suite


def _case(suite: ET.Element, target: str, name: str, seconds: float = 0.0) -> ET.Element:
    classname = target if target == SUITE else f"{SUITE}.{target}"
    return ET.SubElement(
        suite, "testcase", {"classname": _legal(classname), "name": _legal(name), "time": f"{seconds:.3f}"}
    )


def _say(case: ET.Element, tag: str, message: str, body: str = "", kind: str = "") -> None:
    element = ET.SubElement(case, tag, {"message": _legal(message)})
    if kind:
        element.set("type", kind)
    element.text = _legal(body)


def _output(case: ET.Element, body: str) -> None:
    ET.SubElement(case, "system-out").text = _legal(body)


def _counted(suite: ET.Element) -> ET.Element:
    suite.set("tests", str(len(suite.findall("testcase"))))
    for name, tag in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
        suite.set(name, str(_number(suite, tag)))
    return suite


def _number(element: ET.Element, *tags: str) -> int:
    return sum(1 for tag in tags for _ in element.iter(tag))


def _replay(inline: str) -> str:
    return f"moe-fuzz replay {inline}"


def _legal(said: str) -> str:
    return _ILLEGAL.sub("\N{REPLACEMENT CHARACTER}", said)
