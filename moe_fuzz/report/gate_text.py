"""The words for the end of a gate, beside those that every campaign has."""

from __future__ import annotations

from moe_fuzz.campaign.events import EntryResult, Summary
from moe_fuzz.contract import UNDECLARED

_ORDER = ("fixed", "expired", "flaky", "changed", "no-target", "not-run", "unseen", "quiet", "absent", "known")


def gate(result: Summary) -> list[str]:
    """What a gate came to; nothing for another campaign."""
    found = result.gate
    if found is None:
        return []
    state = {0: "green", 1: "red"}.get(result.exit_code, "no verdict")
    ran = f"{result.cases:,} of {result.planned:,} cases"
    lines = ["", f"gate {state}: profile {found.profile}, plan {found.plan}, {ran}"]
    if result.reason:
        lines.append(f"  {result.reason}")
    if found.held_back:
        lines.append(f"  {found.held_back:,} cases were held back: known findings take their process down")
    owed = [finding.id for finding in result.new if finding.id in found.red and finding.clause == UNDECLARED]
    if owed:
        lines.append(f"  red, as their targets declare no promises and so owe the op's contract: {', '.join(owed)}")
    tolerated = [finding.id for finding in result.new if finding.id not in found.red]
    if tolerated:
        lines.append(f"  of class robustness, and so not red without --strict: {', '.join(tolerated)}")
    if found.on_base:
        lines += ["", "not new: these fail on the base build too"]
        lines += [f"  {finding.id}  {finding.title}" for finding in found.on_base]
    if found.unstable:
        lines += ["", "flaky: these do not fail each time, and are not red"]
        for finding in found.unstable:
            lines += [f"  {finding.id}  {finding.title}, {finding.reproduces}", f"    {finding.replay}"]
    if found.entries:
        lines += ["", "ledger"]
        lines += [f"  {entry(one)}" for one in sorted(found.entries, key=lambda one: _ORDER.index(one.status))]
    return lines


def entry(result: EntryResult) -> str:
    """One line of an entry of the ledger."""
    name, tracker, owner = (result.entry[key] for key in ("name", "tracker", "owner"))
    seen = f", explained {result.seen} cases of the plan" if result.seen else ""
    return f"{result.status}: {name}  {result.target}  {tracker} ({owner}): {result.message}{seen}"
