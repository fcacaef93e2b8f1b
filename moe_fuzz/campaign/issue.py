"""report.md of a finding: an issue that can be filed as it stands. What a maintainer needs first comes first."""

from __future__ import annotations

from moe_fuzz.campaign.finding import Finding
from moe_fuzz.case import Case
from moe_fuzz.errors import UsageError
from moe_fuzz.ops import get_space
from moe_fuzz.verdict import Violation

TRIES = 20  # of a replay in a bisection, where a finding does not show every time


def render_issue(finding: Finding, repro: bool) -> str:
    """Markdown: what was expected and got, on which smallest input, how to see it again. `repro`: repro.py is there."""
    lines = [f"# {finding.title}", "", finding.message, "", "## See it again", ""]
    lines += ["```", finding.replay, "```", ""]
    lines += ["`python repro.py` shows it with the target alone, without moe-fuzz.", ""] if repro else []
    lines += ["## What is wrong", "", *_facts(finding), ""]
    lines += ["## Smallest input found", "", finding.label or finding.case.dumps(), "", *_config(finding.case), ""]
    if finding.sequence:
        count = len(finding.sequence)
        lines += [
            f"It fails only after {_count(count, 'other case')} ran in the same process: they are the culprit, "
            "the case is the victim. `sequence.json` holds them in order.", "",
        ]
    if finding.features:
        lines += ["It still needs: " + ", ".join(f"`{feature}`" for feature in finding.features) + ".", ""]
    if not finding.minimal:
        lines += ["The time for minimization ended early; a smaller input may exist.", ""]
    lines += _way(finding)
    if finding.faces:
        lines += ["## Other inputs, taken for the same defect", ""]
        lines += ["If one of them goes on failing when another is fixed, it is a defect of its own.", ""]
        for face in finding.faces:
            lines += [f"- {face.label} ({face.reason})", "", f"      moe-fuzz replay {face.case.inline()}", ""]
    if finding.sanitizer:
        lines += ["## compute-sanitizer", "", *(f"- {line}" for line in finding.sanitizer), ""]
    if finding.env:
        lines += ["## Versions", "", *(f"- {name}: {value}" for name, value in finding.env.items()), ""]
    lines += ["## Find the commit that broke it", "", "```sh", bisect(finding), "```", "",
              "In a checkout of the target, `BUILD` being what builds and installs it (`true`, if nothing does). What "
              "cannot be built or loaded is skipped. `--target OP@PROVIDER` gives the same input to another "
              "implementation.", ""]  # fmt: skip
    if finding.verdict.detail:
        lines += ["## Output", "", "```", finding.verdict.detail.replace("```", "'''").rstrip(), "```", ""]
    lines += _details("case.json", ["```json", finding.case.dumps(indent=1), "```"])
    lines += [f"moe-fuzz finding `{finding.id}`, first seen {finding.first_seen or 'at an unknown time'}.", ""]
    return "\n".join(lines)


def bisect(finding: Finding) -> str:
    """Shell lines that find the first commit of the target that fails. A replay ends in 0 (good), 1 (bad) or more
    (nothing was tested), which is what `git bisect run` needs but for the last: it skips on 125."""
    replay = f"{finding.replay}; code=$?"
    if finding.reproduces != "always":
        replay = f"for try in $(seq {TRIES}); do {replay}; [ $code -eq 0 ] || break; done"
    test = f"{{ BUILD; }} || exit 125; {replay}; [ $code -gt 1 ] && exit 125; exit $code"
    return f"git bisect start BAD_COMMIT GOOD_COMMIT\ngit bisect run sh -c '{test}'"


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
    over = f"{violation.budget:.3g}, where rounding alone explains at most 1" if violation.budget is not None else ""
    facts = [
        ("Target", f"`{finding.target}`"),
        ("Check", f"`{finding.check}`, symptom `{finding.symptom}`"),
        ("Rule", _rule(finding)),
        ("Where", where),
        ("Step", "" if violation.step is None else f"{violation.step} of {len(finding.case.steps)}, counted from 0"),
        ("Expected", violation.expected),
        ("Got", violation.got),
        ("Site", violation.site or finding.site),
        ("Error over bound", over),
        ("Also wrong on this input", "; ".join(f"`{v.check}`: {v.message}" for v in finding.verdict.violations[1:])),
        ("Reproduces", finding.reproduces),
        ("Class", class_),
    ]
    return [f"- {name}: {value}" for name, value in facts if value]


def _rule(finding: Finding) -> str:
    """What the check asks for, in the op's own words; empty for an op that is not ours."""
    try:
        return get_space(finding.target.partition("@")[0]).checks.get(finding.check, "")
    except UsageError:
        return ""


def _config(case: Case) -> list[str]:
    """The config as a table, and each step in a line. An axis's labels count its elements: what was taken away left the
    names of the others as they were."""
    lines = ["| " + " | ".join(case.config) + " |", "|" + " --- |" * len(case.config)]
    lines += ["| " + " | ".join(_written(value) for value in case.config.values()) + " |", ""]
    for at, step in enumerate(case.steps):
        faults = ", ".join(
            f"`{fault.name}` on {fault.tensor}" + (f" rows {fault.rows}" if fault.rows else "") for fault in step.faults
        )
        name = f"step {at}" if len(case.steps) > 1 else "rows"
        lines.append(f"- {name}: {_count(step.tokens, 'token')}" + (f" ({step.rows})" if step.tokens else "")
                     + (f"; {faults}" if faults else ""))  # fmt: skip
    return [*lines, f"- run {case.mode}, seed {case.seed}"]


def _way(finding: Finding) -> list[str]:
    """How it became so small."""
    lines = [f"First seen on: {finding.minimized_from}", ""] if finding.minimized_from else []
    if finding.explain:
        lines += ["Taken away while it kept failing:", "", *(f"- {item}" for item in finding.explain)]
    return _details("How it was made smaller", lines) if lines else []


def _details(name: str, lines: list[str]) -> list[str]:
    return [f"<details><summary>{name}</summary>", "", *lines, "", "</details>", ""]


def _written(value: object) -> str:
    return str(value).replace("|", "\\|") if value != "" else "(none)"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
