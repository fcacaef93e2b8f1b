"""The words of a campaign, for whatever shows them to a person. No line is wrapped: a replay line must stay whole."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from moe_fuzz.campaign.events import CampaignStarted, FindingReported, Summary, TargetRow
from moe_fuzz.campaign.finding import Finding
from moe_fuzz.contract import TargetInfo
from moe_fuzz.ops import get_space
from moe_fuzz.report.gate_text import gate
from moe_fuzz.verdict import BROKEN, CRASH, FLAKY, HANG, OOM, PASS, REJECTED, VIOLATION, Verdict

_MEANING = {
    VIOLATION: "a check found a broken rule",
    CRASH: "the worker died in it",
    HANG: "the worker was killed at the deadline",
    OOM: "there was not enough memory to run it",
    REJECTED: "refused with a clear error, outside what the target says it takes; or not judged in time",
    BROKEN: "moe-fuzz itself failed in it: please report what is told above",
    FLAKY: "seen once, not again in fresh workers",
}


_BARS = "▁▂▃▄▅▆▇█"


def duration(seconds: float) -> str:
    """`0.4 s`, `42 s`, `3 min 20 s`, `2 h 5 min`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if minutes else f"{hours} h"


def count(number: int, noun: str) -> str:
    """`1 case`, `1,204 cases`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def verdicts(counted: Mapping[str, int]) -> str:
    """`1,190 pass · 4 violation`: passes first, then by number."""
    ordered = sorted(counted.items(), key=lambda item: (item[0] != PASS, -item[1], item[0]))
    return " · ".join(f"{number:,} {kind}" for kind, number in ordered if number) or "none yet"


def header(event: CampaignStarted) -> list[str]:
    budget = " or ".join(
        part
        for part in (
            count(event.cases, "case") if event.cases is not None else "",
            duration(event.seconds) if event.seconds is not None else "",
        )
        if part
    )
    where = "the CPU" if event.device == "cpu" else event.device
    workers = f"{count(event.workers, 'worker')} on {where}"
    lines = [f"moe-fuzz {event.version}: {budget or 'no limit'}, seed {event.seed}, {workers}"]
    if event.resumed:
        lines.append("going on with an interrupted campaign")
    lines += [_target(info) for info in event.targets]
    lines += [f"note: {info.name} {said}" for info in event.targets if (said := unasked(info))]
    return lines + [f"note: {note}" for note in event.notes]


def _target(info: TargetInfo) -> str:
    return f"target {info.name}" + (f" from {info.origin}" if info.origin else "")


def unasked(info: TargetInfo) -> str:
    """What servers ask of its like, and a target that declares no contract is never asked; empty where there is
    nothing, or where somebody has said what it keeps. Who declares one, and no promise of a project beside it, may have
    forgotten which ids there are."""
    space, contract, can = get_space(info.op), info.contract, info.capabilities
    given = info.op != "nvfp4_quantize" or can.expert_scales  # ids at all
    experts_alone = given and "sentinel_ids" in space.faults and len(contract.accepts) < 2
    if info.declared:
        forgotten = experts_alone and info.silent
        return "is given ids of experts, and none of padding: it declares no Contract(accepts=…)" if forgotten else ""
    silent = can.is_padding and contract.padding == ("garbage",)
    asks = {
        "ids of no expert, as padding has (accepts)": experts_alone,
        "what it writes for padding rows (padding)": "is_padding" in space.fields and silent,
        "replays of a graph (graph)": not contract.graph,
    }
    missing = ", ".join(what for what, there in asks.items() if there)
    return missing and f"declares no contract, and is not asked for {missing}: @declares(contract=Contract(…))"


def found(event: FindingReported) -> str:
    """One line, at the moment of the finding."""
    known_as = f"  [{event.known_as}]" if event.known_as else ""
    return f"{'FOUND' if event.status == 'new' else event.status} {event.finding.id}  {event.finding.title}{known_as}"


def violation(target: str, verdict: Verdict) -> str:
    """What is wrong with a case first of all, in a line."""
    check, symptom = verdict.key
    said = next((line for one in verdict.violations for line in one.message.splitlines()), "")
    return f"{target}: {check} {symptom}" + (f": {said}" if said else "")


def finding(item: Finding, state_dir: str) -> list[str]:
    """What was found, on which smallest input, of which class, and the line that shows it again."""
    sequence = f", after {count(len(item.sequence), 'other case')} in the same process" if item.sequence else ""
    flaws = "" if item.reproduces == "always" else f", reproduces {item.reproduces}"
    return [
        f"{item.id}  {item.title}  [{item.finding_class}{flaws}]",
        f"  {item.message}",
        f"  smallest input: {item.label}{sequence}" + (f"  ({item.site})" if item.site else ""),
        f"  {item.replay}",
    ]


def alike(findings: Sequence[Finding]) -> list[str]:
    """What several findings of an op need in common: faults, or, of those without any, what the one that needs least of
    its target does. One defect shows in many ways: past a tensor's end, in what lies beside it, in wrong numbers."""
    groups: dict[tuple[str, str], list[Finding]] = {}
    for item in findings:
        faults = {f"{fault.name} on {fault.tensor}" for step in item.case.steps for fault in step.faults}
        if faults:
            groups.setdefault((item.case.op, ", ".join(sorted(faults))), []).append(item)
    plain = [item for item in findings if item.features and not item.case.fault_names]
    for item in plain:
        bases = [base for base in plain if base.target == item.target and set(base.features) <= set(item.features)]
        least = min(bases, key=lambda base: len(base.features))
        groups.setdefault((item.target, ", ".join(least.features)), []).append(item)
    return [f"{len(items)} of these need {faults}: one defect may be behind {', '.join(item.id for item in items)}"
            for (_, faults), items in groups.items() if len(items) > 1]  # fmt: skip


def summary(result: Summary, state_dir: str) -> list[str]:
    """The end of a campaign, to be understood by somebody who saw nothing else of it."""
    lines = [_verdict(result), "", "tested"]
    lines += [f"  {target_row(row)}" for row in result.rows]
    seen = [kind for kind in _MEANING if result.verdicts.get(kind)]
    lines += [f"  {kind}: {_MEANING[kind]}" for kind in seen]
    for row in result.rows:
        lines += [f"  {line}" for line in padding(row)]
    if result.new:
        lines += ["", "new findings"]
        for item in result.new:
            lines += [f"  {line}" for line in finding(item, state_dir)]
        lines += [f"  {line}" for line in alike(result.new)]
    if result.known:
        lines += ["", "known before, and still there"]
        for item in result.known:
            lines += [f"  {item.id}  {item.title}", f"    {item.replay}"]
    if result.fixed:
        lines += ["", "known before, and gone: these cases do not fail any more"]
        lines += [f"  {item.id}  {item.title}" for item in result.fixed]
    lines += gate(result)
    lines += ["", *_rest(result, state_dir)]
    return lines


def _verdict(result: Summary) -> str:
    ran = f"{count(result.cases, 'case')} in {duration(result.seconds)}"
    if result.planned is not None and result.planned != result.cases:
        ran = f"{result.cases:,} of {count(result.planned, 'planned case')} in {duration(result.seconds)}"
    start = "interrupted after" if result.interrupted else "finished:"
    if result.new:
        return f"{start} {ran}, {count(len(result.new), 'new finding')}"
    return f"{start} {ran}, no new finding"


def target_row(row: TargetRow) -> str:
    if row.unavailable:
        return f"{row.target}: not run, {row.unavailable}"
    parts = [f"{row.target}: {count(row.cases, 'case')} ({verdicts(row.verdicts)})"]
    if row.cases and not row.ran:
        refused = "was refused" + " or not judged in time" * bool(row.unjudged)
        parts.append(f"every one of them {refused}: nothing was tested")
    if row.uninterpreted:
        needs, number = " and ".join(row.uninterpreted), sum(row.uninterpreted.values())
        parts.append(f"{number:,} of them need {needs}, which Triton's interpreter has not: they run on a GPU alone")
    if row.unjudged:
        parts.append(f"{row.unjudged:,} of them took too long to judge, which says nothing of the target: "
                     "is the machine overloaded, or are they slow to interpret?")  # fmt: skip
    if row.too_slow:
        left_out = f"{count(row.too_slow, 'larger case')} left out for smaller ones"
        parts.append(f"{left_out}: too slow on this CPU, and for a GPU to run")
    if row.cut:
        parts.append(f"{count(row.cut, 'case')} given up, under way when the time was over")
    if row.parity:
        parts.append(f"on {row.parity:,} of them wrong outputs were proved to be rejected")
    if row.budget:
        shape = f" ({histogram(row.budgets)} of 0 to 100%)" if row.budgets else ""
        parts.append(f"largest error {row.budget:.0%} of its bound{shape}")
    return "; ".join(parts)


def padding(row: TargetRow) -> list[str]:
    """A table of the padding that the target's batches had: what a server's have is told in vllm#37758."""
    if not row.padding:
        return []
    heads = "".join(f"{head:>18}" for head in ("NaN in padding", "Inf in padding", "mean pad tokens"))
    lines = [f"padding in the batches of {row.target}", f"  {'run':<20}{'steps with padding':>20}{heads}"]
    for kind, counts in row.padding.items():
        steps = counts["steps"] or 1
        shares = [f"{counts[what]:,} ({counts[what] / steps:.0%})" for what in ("nan", "inf")]
        shares.append(f"{counts['tokens'] / steps:.1f}")
        lines.append(f"  {kind:<20}{counts['steps']:>20,}" + "".join(f"{share:>18}" for share in shares))
    return lines


def histogram(counts: Sequence[int]) -> str:
    """`█▅▂·▁…`: a character a bin, as high as the root of its count: one case among thousands can be seen."""
    most = max(counts, default=0) or 1
    return "".join("·" if not n else _BARS[round((len(_BARS) - 1) * math.sqrt(n / most))] for n in counts)


def nothing_found(result: Summary) -> str:
    """Of a campaign without a finding."""
    if result.bad:
        return f"{count(result.bad, 'case')} of {result.cases:,} broke a rule, and no finding has come of it"
    return "No case broke a rule. That is evidence for the cases that ran, and no proof"


def _rest(result: Summary, state_dir: str) -> list[str]:
    lines = []
    known = result.known or (result.gate is not None and result.gate.entries)
    if not result.new and not known and any(row.ran for row in result.rows):
        lines.append(nothing_found(result) + (":" if not result.bad else "."))
        lines += [] if result.bad else ["a longer --time or another --seed tries others."]
    if result.flaky:
        lines.append(f"{count(result.flaky, 'bad case')} not seen again in fresh workers (flaky), so not counted.")
    if result.unexamined:
        later = "" if result.gate is not None else ": the next run takes them up"
        lines.append(f"{count(result.unexamined, 'bad case')} not examined, for want of time or as one of many{later}.")
    lines.append(f"seed {result.seed}; findings and corpus are in {state_dir}")
    if result.new:
        files = "report.md (an issue to file), case.json, repro.py"
        lines.append(f"each finding's folder, {Path(state_dir) / 'findings' / 'ID'}, holds {files}")
    if result.reason and result.gate is None:
        lines.append(f"exit code {result.exit_code}: {result.reason}")
    return lines
