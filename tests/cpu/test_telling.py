"""What tests on a device say of verdicts: nothing of it is cut, and only what is bad fails."""

from __future__ import annotations

import pytest

from moe_fuzz.campaign.selftest import Outcome
from moe_fuzz.case import Case, Step
from moe_fuzz.labels import Labels
from moe_fuzz.ops import get_space
from moe_fuzz.ops.routing.space import SIMPLEST
from moe_fuzz.verdict import PASS, REJECTED, VIOLATION, Verdict, Violation
from tests.gpu.telling import DETAIL, IN_FULL, all_pass, bug_found, told, told_all

SPACE = get_space("topk_softmax")
CASE = Case("topk_softmax", {**SIMPLEST, "experts": "0-7", "top_k": 2}, (Step(Labels.range(3)),), 1)
MESSAGE = "row 2: " + "a long story, " * 40 + "and its end"
BAD = Verdict(VIOLATION, (
    Violation("weights", "off", MESSAGE, "weights", (2, 1), "0.5", "0.25", 3.5, "kernel.py:7",
              after="the router chose"),
    Violation("replay", "ids", "other bits"),
), detail="x" * 5000 + "\nValueError: the last line")  # fmt: skip


def test_a_verdict_is_told_in_full() -> None:
    text = told(BAD, CASE)
    assert text.startswith(SPACE.label(CASE))
    for part in (VIOLATION, "weights [off]", "the router chose: row 2", MESSAGE, "kernel.py:7", "weights[2, 1]",
                 "expected 0.5, got 0.25", "3.5 of its bound", "replay [ids] other bits", CASE.inline()):  # fmt: skip
        assert part in text
    assert text.count("x") >= DETAIL - 100
    assert text.count("x" * (DETAIL + 1)) == 0
    assert "  | ValueError: the last line" in text


def test_those_that_are_not_told_in_full_are_named() -> None:
    text = told_all([BAD] * (IN_FULL + 2), [CASE] * (IN_FULL + 2))
    assert text.count(MESSAGE) == IN_FULL
    assert text.count(f"{VIOLATION} weights/off") == 2


def test_all_pass_fails_on_what_is_bad_and_says_it() -> None:
    all_pass([CASE], [Verdict(PASS)])
    all_pass([CASE], [Verdict(REJECTED)], (PASS, REJECTED))
    all_pass([CASE], [BAD], excused=lambda verdict: verdict is BAD)
    with pytest.raises(AssertionError) as failed:
        all_pass([CASE] * 2, [Verdict(PASS), BAD])
    assert str(failed.value).startswith("1 of 2 cases:\n")
    assert MESSAGE in str(failed.value)


@pytest.mark.parametrize(("cases", "verdicts"), [([], []), ([CASE], [])])
def test_nothing_that_ran_is_no_pass(cases: list[Case], verdicts: list[Verdict]) -> None:
    with pytest.raises(AssertionError):
        all_pass(cases, verdicts)


def test_an_outcome_is_told_with_what_others_saw() -> None:
    outcome = Outcome("bug", "topk_softmax@planted.bug", "weights", "vllm#1", False, 12, 3.25, message=MESSAGE,
                      others=("replay", "written"), seen=9, compile_seconds=1.5)  # fmt: skip
    with pytest.raises(AssertionError) as failed:
        bug_found(outcome)
    for part in ("weights did not fire", "12 cases, 9 of them taken", "3.2 s", "1.5 s", "replay, written", MESSAGE):
        assert part in str(failed.value)
    bug_found(Outcome("bug", "topk_softmax@planted.bug", "weights", "vllm#1", True, 1, 0.0))
    with pytest.raises(AssertionError, match="others do too"):
        bug_found(Outcome("bug", "topk_softmax@planted.bug", "weights", "vllm#1", True, 1, 0.0, silent=False))
