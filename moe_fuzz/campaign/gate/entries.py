"""The ledger's entries against what their cases gave: known, fixed, flaky, changed, expired."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from dataclasses import replace

from moe_fuzz.campaign import events
from moe_fuzz.campaign.badcase import BadCase
from moe_fuzz.campaign.confirm import TRIES
from moe_fuzz.campaign.events import EntryResult
from moe_fuzz.campaign.finding import Finding
from moe_fuzz.campaign.gate.ledger import Entry
from moe_fuzz.campaign.interfaces import Cases, Space
from moe_fuzz.contract import TargetInfo
from moe_fuzz.verdict import PASS, Verdict, Violation

RED = ("fixed", "expired")

#: Runs the cases in a fresh worker and gives the verdict of the last.
Fresh = Callable[[Cases], Verdict]


def judge_entry(
    entry: Entry, info: TargetInfo, space: Space, verdict: Verdict, fresh: Fresh, today: datetime.date,
    emit: Callable[[events.Event], None], bad_case: Callable[[BadCase], None],
) -> EntryResult:  # fmt: skip
    """What became of it. verdict: of its case, in whatever worker it ran first. bad_case: takes a failure that is not
    the one it tells of."""
    cases = entry.cases_for(info.name)
    shown = [entry.shows(verdict)]
    if not shown[0]:
        again = [fresh(cases) for _ in range(TRIES)]
        shown += map(entry.shows, again)
        # Each of them has to pass for a defect to be gone: what failed otherwise, or could not be run, is told first.
        ranked = sorted(again, key=lambda one: (not entry.shows(one), not one.bad, one.kind == PASS))
        verdict = ranked[0]
    finding = finding_of(entry, info, space, verdict)
    expired = entry.expired(today)
    if any(shown):
        emit(events.FindingReported(finding, "known", "", entry.to_json()))
        if expired:
            return _expired(entry, info)
        if entry.always and not shown[0]:
            told = f"failed {sum(shown)} of {len(shown)} times, and is told to fail always"
            return _result(entry, info, "flaky", f'{told}: write reproduces = "sometimes"')
        return _result(entry, info, "known", "fails as told")
    if expired:
        return _expired(entry, info)
    if verdict.bad:
        bad_case(BadCase(info.name, cases[-1], verdict, cases[:-1]))
        check, symptom = verdict.key
        return _result(entry, info, "changed", f"fails otherwise now: {check} {symptom}")
    if verdict.kind != PASS:
        return _result(entry, info, "not-run", f"gave {verdict.kind}: {verdict.detail or 'it could not be run'}")
    if not entry.always:
        return _result(entry, info, "quiet", "did not fail this time")
    emit(events.FindingFixed(finding, "", entry.to_json()))
    passed = f"passed {TRIES} times in fresh workers"
    return _result(entry, info, "fixed", f"{passed}: remove the entry, and let {entry.tracker} know")


def without_case(entry: Entry, info: TargetInfo, seen: int, today: datetime.date) -> EntryResult:
    """Of one that has nothing to run: `seen` bad cases of the plan were like it."""
    if entry.expired(today):
        return _expired(entry, info)
    if seen:
        return _result(entry, info, "known", "cases of the plan fail as told")
    return _result(entry, info, "unseen", "no case of the plan failed like it")


def not_run(entry: Entry, info: TargetInfo, message: str) -> EntryResult:
    """Of one whose case did not run."""
    return _result(entry, info, "not-run", message)


def absent(entry: Entry, info: TargetInfo, why: str, today: datetime.date) -> EntryResult:
    """Of one that is not in force here: what it told of is new, but its day comes all the same."""
    return _expired(entry, info) if entry.expired(today) else _result(entry, info, "absent", why)


def stray(entry: Entry, today: datetime.date) -> EntryResult:
    """Of one that no target is meant by: no gate would ever run its case."""
    late = entry.expired(today)
    message = f"{f'expired on {entry.expires}, and ' if late else ''}{no_target(entry)}"
    return EntryResult(entry.to_json(), entry.pattern, "expired" if late else "no-target", message)


def no_target(entry: Entry) -> str:
    return f"no target that is known or asked for is {entry.pattern}: correct its target, or remove the entry"


def finding_of(entry: Entry, info: TargetInfo, space: Space, verdict: Verdict) -> Finding:
    """The finding that an entry tells of, as its case shows it today."""
    cases = entry.cases_for(info.name)
    seen = next((v for v in verdict.violations if entry.shows(verdict.only(v))), None)
    violation = seen or Violation(entry.check or verdict.kind, entry.symptom, entry.note or "as the ledger tells")
    class_, clause = info.classify(violation.check, violation.symptom, entry.features)
    return Finding(
        id=entry.fingerprint or entry.name,
        target=info.name,
        check=entry.check or violation.check,
        symptom=violation.symptom,
        message=violation.story,
        finding_class=class_,
        clause=clause,
        case=cases[-1],
        verdict=replace(verdict, violations=(violation, *(v for v in verdict.violations if v != seen))),
        raw=entry.raw or (violation.check, violation.symptom),
        features=entry.features,
        scope=entry.features,
        sequence=cases[:-1],
        reproduces=entry.reproduces,
        label=space.label(cases[-1]),
        own=entry.fence,
    )


def _expired(entry: Entry, info: TargetInfo) -> EntryResult:
    message = f"expired on {entry.expires}: mend it, or let {entry.owner} set another date"
    return _result(entry, info, "expired", message)


def _result(entry: Entry, info: TargetInfo, status: str, message: str) -> EntryResult:
    return EntryResult(entry.to_json(), info.name, status, message)
