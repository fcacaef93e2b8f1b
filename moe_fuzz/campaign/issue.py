"""report.md of a finding: an issue that can be filed as it stands."""

from __future__ import annotations

from moe_fuzz.campaign.finding import Finding
from moe_fuzz.verdict import Violation


def render_issue(finding: Finding, repro: bool) -> str:
    """Markdown: what was expected and got, on which smallest input, how to see it again. `repro`: repro.py is there."""
    lines = [f"# {finding.title}", "", finding.message, "", *_facts(finding), ""]
    lines += ["## Smallest input found", "", finding.label or finding.case.dumps(), ""]
    if finding.sequence:
        count = len(finding.sequence)
        lines += [
            f"It fails only after {_count(count, 'other case')} ran in the same process: they are the culprit, "
            "the case is the victim. `sequence.json` holds them in order.", "",
        ]
    if finding.features:
        lines += ["It still needs: " + ", ".join(f"`{feature}`" for feature in finding.features) + ".", ""]
    if finding.explain:
        lines += ["Taken away while it kept failing:", "", *(f"- {item}" for item in finding.explain), ""]
    if finding.minimized_from:
        lines += [f"First seen on: {finding.minimized_from}", ""]
    if not finding.minimal:
        lines += ["The time for minimization ended early; a smaller input may exist.", ""]
    if finding.faces:
        lines += ["## Other inputs, taken for the same defect", ""]
        lines += ["If one of them goes on failing when another is fixed, it is a defect of its own.", ""]
        for face in finding.faces:
            lines += [f"- {face.label} ({face.reason})", "", f"      moe-fuzz replay {face.case.inline()}", ""]
    if finding.sanitizer:
        lines += ["## compute-sanitizer", "", *(f"- {line}" for line in finding.sanitizer), ""]
    lines += ["## See it again", "", "```", finding.replay, "```", ""]
    lines += ["`python repro.py` shows it with the target alone, without moe-fuzz.", ""] if repro else []
    lines += ["<details><summary>case.json</summary>", "", "```json", finding.case.dumps(indent=1), "```"]
    lines += ["", "</details>", ""]
    if finding.env:
        lines += ["## Versions", "", *(f"- {name}: {value}" for name, value in finding.env.items()), ""]
    if finding.verdict.detail:
        lines += ["## Output", "", "```", finding.verdict.detail.replace("```", "'''").rstrip(), "```", ""]
    return "\n".join(lines)


def _facts(finding: Finding) -> list[str]:
    violation = next(iter(finding.verdict.violations), Violation(finding.check, finding.symptom, finding.message))
    where = violation.tensor
    if violation.where:
        where = f"{where or 'output'}[{', '.join(map(str, violation.where))}]"
    class_ = finding.finding_class
    if finding.clause:
        class_ += f": {finding.clause}"
    elif class_ == "robustness":
        class_ += ": breaks a rule of moe-fuzz that the target's project never promised to keep"
    facts = [
        ("Target", f"`{finding.target}`"),
        ("Check", f"`{finding.check}`, symptom `{finding.symptom}`"),
        ("Where", where),
        ("Expected", violation.expected),
        ("Got", violation.got),
        ("Site", violation.site or finding.site),
        ("Error over bound", "" if violation.budget is None else f"{violation.budget:.3g}"),
        ("Also wrong on this input", "; ".join(f"`{v.check}`: {v.message}" for v in finding.verdict.violations[1:])),
        ("Reproduces", finding.reproduces),
        ("Class", class_),
    ]
    return [f"- {name}: {value}" for name, value in facts if value]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
