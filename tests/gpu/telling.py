"""What a test on a device says when it fails: all of it, since nobody is there to ask again.

pytest shortens the repr of what is no text, and a verdict's message and traceback stand at the end of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from moe_fuzz.campaign.selftest import Outcome
from moe_fuzz.case import Case
from moe_fuzz.ops import get_space
from moe_fuzz.verdict import PASS, Verdict

IN_FULL = 5  # verdicts; of the others it is said what they are
DETAIL = 1500  # last characters of it, where an error says what it is


def told(verdict: Verdict, case: Case | None = None) -> str:
    """A verdict in several lines, under the label of its case; with the case itself, to replay."""
    lines = [f"{_label(case)}{verdict.kind}"]
    for v in verdict.violations:
        lines.append(f"  {v.check} [{v.symptom}] {v.story}" + (f", at {v.site}" if v.site else ""))
        if v.expected or v.got:
            place = f"{v.tensor}{list(v.where)}" if v.tensor else "result"
            lines.append(f"    {place}: expected {v.expected}, got {v.got}"
                         + (f", {v.budget:.3g} of its bound" if v.budget is not None else ""))  # fmt: skip
    lines += [f"  | {line}" for line in verdict.detail[-DETAIL:].splitlines()]
    return "\n".join([*lines, f"  {case.inline()}"] if case else lines)


def told_all(verdicts: Sequence[Verdict], cases: Sequence[Case] = ()) -> str:
    """Several verdicts, the first of them in full."""
    whole = [*cases, *[None] * (len(verdicts) - len(cases))]
    lines = [told(verdict, case) for verdict, case in zip(verdicts[:IN_FULL], whole, strict=False)]
    lines += [f"{_label(case)}{verdict.kind} {'/'.join(verdict.key)}"
              for verdict, case in zip(verdicts[IN_FULL:], whole[IN_FULL:], strict=True)]  # fmt: skip
    return "\n".join(lines)


def all_pass(
    cases: Sequence[Case],
    verdicts: Sequence[Verdict],
    kinds: Collection[str] = (PASS,),
    excused: Callable[[Verdict], bool] = lambda verdict: False,
) -> None:
    """Fails unless each case has a verdict of these kinds, or one that is excused; tells all that have not."""
    __tracebackhide__ = True
    assert cases, "there was no case"
    assert len(cases) == len(verdicts), f"{len(cases)} cases, {len(verdicts)} verdicts"
    bad = [(case, verdict) for case, verdict in zip(cases, verdicts, strict=True)
           if verdict.kind not in kinds and not excused(verdict)]  # fmt: skip
    if bad:
        several = told_all([verdict for _, verdict in bad], [case for case, _ in bad])
        raise AssertionError(f"{len(bad)} of {len(cases)} cases:\n{several}")


def bug_found(outcome: Outcome) -> None:
    """Fails unless a planted bug was found; where it was asked for, by its check alone."""
    __tracebackhide__ = True
    if not outcome.passed:
        raise AssertionError(told_outcome(outcome))


def told_outcome(outcome: Outcome) -> str:
    """What came of a planted bug, in several lines."""
    others = ", ".join(outcome.others) or "none"
    return "\n".join([
        f"{outcome.target}: {outcome.check} " + ("fired" if outcome.found else "did not fire")
        + {None: "", True: ", and no other", False: ", and others do too, or time ran out"}[outcome.silent],
        f"  {outcome.cases} cases, {outcome.seen} of them taken; {outcome.seconds:.1f} s, "
        f"compiling {outcome.compile_seconds:.1f} s",
        f"  other checks that fired: {others}",
        *([f"  {outcome.message}"] if outcome.message else []),
        *([f"  {outcome.inline}"] if outcome.inline else []),
    ])  # fmt: skip


def _label(case: Case | None) -> str:
    return f"{get_space(case.op).label(case)}: " if case else ""
