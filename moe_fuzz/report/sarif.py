"""SARIF 2.1.0, as GitHub's code scanning and editors read it.

A rule is a check of a family of ops, or a way for a process to end: `routing/ids`, `process/crash`. A result is a
finding that fails, new or known; one that is gone is left out, so that its alert is closed. What tells a result from
another across runs is the finding's fingerprint, which has no line number in it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from moe_fuzz.errors import EXIT_CLEAN, EXIT_FINDING, UsageError
from moe_fuzz.ops import get_space
from moe_fuzz.report import Report, file_report, text
from moe_fuzz.report.story import Story, Told
from moe_fuzz.report.whole import Whole

SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"
FINGERPRINT = "moeFuzzFinding/v1"
PROCESS = "process"  # stands in a rule's name where checks have a family
ENDS = {
    "crash": "The process must not die: no signal, no abort, no device fault.",
    "hang": "A call must come back before its deadline.",
    "oom": "A call must not need more memory than the machine has.",
    "fence": "No byte outside a tensor is read or written, and no input is written to.",
}
_SITE = re.compile(r"(?P<file>[^\s:]+(?:\.\w+)):(?P<line>\d+)(?:\s+in\s+(?P<function>.+))?")

Json = dict[str, Any]


def render(story: Story, root: Path | None = None) -> str:
    """`root`: the checkout; files below it are named from there. By default the working directory."""
    root = (root or Path.cwd()).resolve()
    rules = _rules(story)
    order = {rule["id"]: at for at, rule in enumerate(rules)}
    told = [one for one in story.findings if one.status != "fixed"]
    run: Json = {
        "tool": {"driver": _driver(story, rules)},
        "automationDetails": {"id": "moe-fuzz/"},
        "columnKind": "unicodeCodePoints",
        "originalUriBaseIds": {"SRCROOT": {"uri": f"file://{quote(str(root))}/"}},
        "invocations": [_invocation(story)],
        "results": [_result(one, order, root) for one in told],
    }
    return json.dumps({"$schema": SCHEMA, "version": "2.1.0", "runs": [run]}, indent=1, allow_nan=False) + "\n"


@file_report("sarif", "SARIF 2.1.0: an alert for each finding, with the kernel's line where it is known")
def open_report(path: Path) -> Report:
    return Whole(path, render)


def rule_of(target: str, check: str) -> str:
    """`routing/ids`, of whichever op of the family."""
    try:
        space = get_space(target.partition("@")[0])
    except UsageError:  # an op that a plugin or a test brings along
        return f"{target.partition('@')[0]}/{check}"
    return f"{space.family}/{check}" if check in space.checks and check not in ENDS else f"{PROCESS}/{check}"


def _rules(story: Story) -> list[Json]:
    """All that could have fired, so that a run without results says what it looked for."""
    help_of = {f"{PROCESS}/{name}": line for name, line in ENDS.items()}
    for target in story.targets:
        op = target.partition("@")[0]
        try:
            checks = get_space(op).checks
        except UsageError:
            continue
        help_of |= {rule: line for check, line in checks.items() if (rule := rule_of(target, check)) not in help_of}
    for told in story.told.values():
        rule = rule_of(told.finding.target, told.finding.check)
        help_of.setdefault(rule, f"The check {told.finding.check} of {told.finding.target}.")
    return [_rule(name, line) for name, line in sorted(help_of.items())]


def _rule(name: str, line: str) -> Json:
    sentence = line[:1].upper() + line[1:].rstrip(".") + "."
    return {
        "id": name,
        "name": "".join(part.capitalize() for part in re.split(r"[^A-Za-z0-9]+", name)),
        "shortDescription": {"text": sentence},
        "defaultConfiguration": {"level": "error"},
        "properties": {"tags": ["correctness", "moe", name.partition("/")[0]]},
    }


def _driver(story: Story, rules: list[Json]) -> Json:
    driver: Json = {"name": "moe-fuzz", "rules": rules}
    if story.started is not None:
        driver["version"] = driver["semanticVersion"] = story.started.version
    return driver


def _result(told: Told, order: dict[str, int], root: Path) -> Json:
    finding = told.finding
    violation = next(iter(finding.verdict.violations), None)
    rule = rule_of(finding.target, finding.check)
    said = "\n".join(text.finding(finding, ""))
    result: Json = {
        "ruleId": rule,
        "ruleIndex": order[rule],
        "kind": "fail",
        "level": "error" if told.failed else "warning",
        "message": {"text": f"{finding.target}: {said}", "markdown": _markdown(told)},
        "locations": [_location(told, root)],
        "partialFingerprints": {FINGERPRINT: finding.id, "primaryLocationLineHash": f"{finding.id}:1"},
        "baselineState": "unchanged" if told.status in ("known", "base") else "new",
        "occurrenceCount": max(1, finding.times_seen),
        "properties": {
            "target": finding.target, "symptom": finding.symptom, "class": finding.finding_class,
            "clause": finding.clause, "status": told.status, "features": list(finding.features),
            "reproduces": finding.reproduces, "replay": finding.replay, "case": finding.case.to_json(),
            "budget": violation.budget if violation else None,
        },
    }  # fmt: skip
    if not told.failed:
        # Somebody has seen it already: a scanner is not to raise it again.
        why = f"{told.status} finding {finding.id}" + (f": {told.known_as}" if told.known_as else "")
        result["suppressions"] = [{"kind": "external", "justification": why}]
    return result


def _markdown(told: Told) -> str:
    finding = told.finding
    return f"**{finding.target}**: {finding.message}\n\n`{finding.label}`\n\n```\n{finding.replay}\n```\n"


def _location(told: Told, root: Path) -> Json:
    """The kernel's line where a stack or a sanitizer named it, else the finding's report: viewers want a file."""
    finding = told.finding
    function, file, line = place_of(told)
    logical = {"fullyQualifiedName": f"{finding.target}{f'.{function}' if function else ''}", "kind": "function"}
    location: Json = {"logicalLocations": [logical]}
    if file or told.path:
        artifact = _artifact(Path(file) if file else Path(told.path) / "report.md", root)
        location["physicalLocation"] = {"artifactLocation": artifact, "region": {"startLine": line or 1}}
    return location


def place_of(told: Told) -> tuple[str, str, int]:
    """(function, file, line) of a finding, each empty or 0 where it is not known. A site has the file's last name
    alone; the traceback below it has the path."""
    finding = told.finding
    violation = next(iter(finding.verdict.violations), None)
    site = (violation.site if violation else "") or finding.site
    match = _SITE.match(site)
    if match is None:
        return "", "", 0
    file, line = match["file"], int(match["line"])
    if "/" not in file:
        whole = re.search(rf'"([^"\n]*/{re.escape(file)})", line {line}\b', finding.verdict.detail)
        origin = str(finding.env.get("origin", ""))
        if whole:
            file = whole[1]
        elif Path(origin).name == file:
            file = origin
    return match["function"] or "", file, line


def _artifact(file: Path, root: Path) -> Json:
    whole = file if file.is_absolute() else root / file
    if whole.is_relative_to(root):
        return {"uri": quote(whole.relative_to(root).as_posix()), "uriBaseId": "SRCROOT"}
    return {"uri": f"file://{quote(whole.as_posix())}"}


def _invocation(story: Story) -> Json:
    summary = story.summary
    invocation: Json = {
        "executionSuccessful": summary is not None and summary.exit_code in (EXIT_CLEAN, EXIT_FINDING),
        "startTimeUtc": _stamp(story.began),
        "toolExecutionNotifications": list(_notifications(story)),
    }
    if summary is not None:
        invocation |= {"exitCode": summary.exit_code, "endTimeUtc": _stamp(datetime.now(UTC))}
        invocation["properties"] = {"seed": summary.seed, "cases": summary.cases, "verdicts": dict(summary.verdicts)}
        if summary.reason:
            invocation["exitCodeDescription"] = summary.reason
    return invocation


def _notifications(story: Story) -> Iterator[Json]:
    def note(level: str, said: str) -> Json:
        return {"level": level, "message": {"text": said}}

    if story.summary is None:
        yield note("error", "the campaign did not come to its end: what stands here is what was found so far")
    for gone in story.unavailable:
        yield note("warning", f"{gone.target} is not available: {gone.reason}")
    for event in story.flaky:
        check, symptom = event.verdict.key
        yield note("warning", f"flaky: {event.target}: {check} {symptom} was not seen again: {event.case.inline()}")
    for _, lost in story.lost:
        yield note("warning", f"worker lost on {lost.target}: {lost.reason}: {lost.label}")
    for seen in story.unexamined:
        yield note("warning", f"not examined: {seen.target}: {' '.join(seen.verdict.key)}: {seen.case.inline()}")
    for said in story.notes:
        yield note("note", said)
    for told in story.findings:
        if told.status == "fixed":
            yield note("note", f"gone: {told.finding.id} {told.finding.title} does not fail any more")


def _stamp(when: datetime) -> str:
    return when.strftime("%Y-%m-%dT%H:%M:%SZ")
