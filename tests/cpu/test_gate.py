"""The gate on fakes: what is new, on the base build too, or flaky, and the exit codes."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import replace

import pytest

from moe_fuzz.campaign import events
from moe_fuzz.campaign.findings import load_findings, write_finding
from moe_fuzz.campaign.gate.judge import Judge
from moe_fuzz.campaign.interfaces import Sanitized
from moe_fuzz.campaign.state import StateDir
from moe_fuzz.contract import UNDECLARED
from moe_fuzz.report import junit, text
from moe_fuzz.report.story import Story
from moe_fuzz.verdict import REJECTED, Verdict
from tests.cpu.campaign_fakes import GOOD, TARGET, FakePool, Listener, always_good, bad, crash, nan_on_odd, when
from tests.cpu.gate_runs import KNOWN, gate


def test_a_finding_about_memory_gets_the_line_of_a_sanitizer(tmp_path):
    listener, judge = Listener(), when(nan_on_odd, crash("illegal-access", "routing.py:40 in topk"))
    made = gate(tmp_path, judge, listener, sanitize=lambda *_: Sanitized("routing.py:118 in _kernel", ("memcheck: x",)))
    [finding] = made.run().new
    assert finding.verdict.violations[0].site == "routing.py:118 in _kernel"
    assert finding.sanitizer == ("memcheck: x",)


# ---- findings -------------------------------------------------------------------------------------------------------


def test_a_new_finding_is_red_and_on_disk_once(tmp_path):
    listener = Listener()
    summary = gate(tmp_path, when(nan_on_odd), listener).run()
    [finding] = summary.new
    assert (summary.exit_code, summary.gate.red) == (1, (finding.id,))
    assert [f.id for f in load_findings(StateDir(tmp_path))] == [finding.id]
    assert [(e.finding.id, e.status) for e in listener.of(events.FindingReported)] == [(finding.id, "new")]
    assert gate(tmp_path, when(nan_on_odd)).run().exit_code == 1  # what lies there makes nothing known


def test_what_breaks_no_promise_is_told_and_not_red(tmp_path):
    judge = when(nan_on_odd, bad("order", "ascending"))  # the fake's project promises `routing` alone
    listener = Listener()
    summary = gate(tmp_path / "1", judge, listener).run()
    assert (summary.exit_code, len(summary.new), summary.gate.red) == (0, 1, ())
    assert [event.status for event in listener.of(events.FindingReported)] == ["robustness"]
    assert f"not red without --strict: {summary.new[0].id}" in "\n".join(text.summary(summary, "x"))
    assert gate(tmp_path / "2", judge, strict=True).run().exit_code == 1


def test_a_target_that_promises_nothing_is_held_to_the_contract(tmp_path):
    class Silent(FakePool):
        def describe(self, target):
            return replace(super().describe(target), clauses={})

    judge = when(nan_on_odd, bad("order", "ascending"))
    summary = gate(tmp_path, judge, pool=Silent(judge)).run()
    (found,) = summary.new
    assert (summary.exit_code, found.clause) == (1, UNDECLARED)
    assert f"and so owe the op's contract: {found.id}" in "\n".join(text.summary(summary, "x"))


def test_what_fails_on_the_base_build_is_not_new(tmp_path):
    listener = Listener()
    summary = gate(tmp_path / "1", when(nan_on_odd), listener, base=FakePool(when(nan_on_odd))).run()
    assert (summary.exit_code, summary.new, len(summary.gate.on_base)) == (0, (), 1)
    assert [event.status for event in listener.of(events.FindingReported)] == ["base"]
    assert gate(tmp_path / "2", when(nan_on_odd), base=FakePool(always_good)).run().exit_code == 1
    listener = Listener()
    none_there = FakePool(always_good, unavailable=(TARGET,))
    assert gate(tmp_path / "3", when(nan_on_odd), listener, base=none_there).run().exit_code == 1
    assert any("is not on the base build" in note.message for note in listener.of(events.Note))


def test_what_is_not_seen_again_is_flaky(tmp_path):
    once = set()

    def judge(case, history, options):
        if nan_on_odd(case) and not once:
            once.add(case.digest)
            return bad()
        return GOOD

    listener = Listener()
    summary = gate(tmp_path, judge, listener).run()
    assert (summary.exit_code, summary.flaky, summary.new) == (0, 1, ())
    assert len(listener.of(events.FlakySeen)) == 1
    assert "1 case of 200 broke a rule, and no finding has come of it" in "\n".join(text.summary(summary, "x"))


def test_what_fails_sometimes_is_flaky_and_told_with_its_case(tmp_path):
    runs = Counter()

    def judge(case, history, options):
        runs[case.digest] += 1
        return bad() if nan_on_odd(case) and runs[case.digest] % 3 == 1 else GOOD

    listener = Listener()
    summary = gate(tmp_path, judge, listener).run()
    assert (summary.exit_code, summary.new) == (0, ())
    assert summary.gate.unstable
    assert {event.status for event in listener.of(events.FindingReported)} == {"flaky"}
    assert summary.gate.unstable[0].replay in "\n".join(text.summary(summary, "x"))


@pytest.mark.parametrize("certain", [True, False])
def test_a_reduction_that_ends_where_nothing_is_certain(tmp_path, certain):
    """The case itself is: then it is told as it was met. Else the smallest is told, as flaky."""
    runs = Counter()

    def judge(case, history, options):
        if not nan_on_odd(case):
            return GOOD
        runs[case.digest] += 1
        minimal = case.steps[0].tokens == 1 and len(case.experts) == 1
        often = 3 if minimal else 1000 if certain else 4  # as often as the reducer asks
        return GOOD if runs[case.digest] > often else bad()

    summary = gate(tmp_path, judge).run()
    assert summary.exit_code == certain
    if certain:
        assert all(finding.case.steps[0].tokens > 1 or len(finding.case.experts) > 1 for finding in summary.new)
        assert not any(finding.minimal for finding in summary.new)
    else:
        assert all(finding.reproduces.startswith("sometimes") for finding in summary.gate.unstable)


def test_a_finding_of_the_base_build_does_not_hide_a_new_one(tmp_path):
    """The base is wrong for one number of experts, the change for all odd ones."""
    one = when(lambda case: nan_on_odd(case) and len(case.experts) == 1)
    assert gate(tmp_path / "1", one, base=FakePool(one)).run().exit_code == 0

    def later(case, history, options):  # so that the base's own is met, and told, first
        met.append(nan_on_odd(case) and len(case.experts) == 1)
        return when(nan_on_odd)(case, history, options) if any(met) else GOOD

    met: list[bool] = []
    for name, judge in (("first", later), ("reduced", when(nan_on_odd))):  # and else the reducer goes down to it
        summary = gate(tmp_path / name, judge, base=FakePool(one)).run()
        assert summary.exit_code == 1
        assert bool(summary.gate.on_base) == (name == "first")
        assert all(len(finding.case.experts) > 1 for finding in summary.new)


def test_a_flaky_finding_does_not_hide_one_that_is_certain(tmp_path):
    """With one expert it comes and goes, and with more it stays, once the first of these was met."""
    runs = Counter()

    def judge(case, history, options):
        if not nan_on_odd(case):
            return GOOD
        if len(case.experts) > 1:
            return bad() if runs else GOOD
        runs[case.digest] += 1
        return bad() if runs[case.digest] < 5 else GOOD

    summary = gate(tmp_path, judge).run()
    assert summary.gate.unstable
    assert summary.exit_code == 1
    assert all(len(finding.case.experts) > 1 for finding in summary.new)


@pytest.mark.parametrize("flaky", [True, False], ids=["flaky", "on the base build"])
def test_many_harmless_ones_do_not_hide_one_that_is_certain(tmp_path, flaky):
    """All of one kind; and the certain one, of one number of experts, comes when more were met than are examined."""
    runs, met = Counter(), set()

    def harmless(case):
        return len(case.experts) != 61

    def judge(case, history, options):
        if harmless(case):
            met.add(case.digest)
            runs[case.digest] += 1
            return GOOD if flaky and runs[case.digest] > 1 else bad()
        return bad() if len(met) > 30 else GOOD

    base = None if flaky else FakePool(when(harmless))
    summary = gate(tmp_path, judge, cases=120, base=base).run()
    assert (len(summary.gate.on_base) > 0) != flaky
    assert summary.exit_code == 1
    assert summary.new
    assert all(len(finding.case.experts) == 61 for finding in summary.new)


def test_the_same_file_on_both_sides_is_no_comparison(tmp_path):
    class Here(FakePool):
        def describe(self, target):
            return replace(super().describe(target), origin="/builds/kernels.py")

    listener = Listener()
    judge = when(nan_on_odd)
    summary = gate(tmp_path, judge, listener, pool=Here(judge), base=Here(judge)).run()
    assert (summary.exit_code, summary.gate.on_base) == (1, ())
    assert any("/builds/kernels.py on the base build too" in note.message for note in listener.of(events.Note))


def test_what_is_taken_for_a_finding_of_robustness_can_make_it_contract(tmp_path):
    class Same:
        @staticmethod
        def same_defect(earlier, finding):
            return "they are alike"

    state, listener = StateDir(tmp_path), Listener()
    [contract] = gate(tmp_path, when(nan_on_odd)).run().new
    lenient = replace(contract, finding_class="robustness", clause="nobody promised")
    for other in (replace(contract, id="0123456789"), contract):  # another face, and the very same
        judge = Judge(state, {}, listener, {}, lambda finding: finding.finding_class == "contract")
        write_finding(state, lenient)
        judge.new[lenient.id] = lenient
        assert judge._met_before(other, Same())
        assert (judge.new[lenient.id].finding_class, judge.new[lenient.id].clause) == ("contract", contract.clause)
        assert listener.of(events.FindingReported)[-1].status == "new"
    assert len(listener.of(events.FindingReported)) == 2


# ---- nothing ran ----------------------------------------------------------------------------------------------------


def test_too_little_is_not_green(tmp_path):
    def slow(case, history, options):
        time.sleep(0.2)
        return GOOD

    summary = gate(tmp_path, slow, cases=None, seconds=1.0).run()
    assert 0 < summary.cases < summary.gate.floor == 16
    assert summary.exit_code == 3
    assert "asks for 16" in summary.reason


def test_refusals_are_not_running(tmp_path):
    summary = gate(tmp_path / "1", lambda *_: Verdict(REJECTED)).run()
    assert summary.exit_code == 3
    assert "nothing ran" in summary.reason

    def mostly(case, history, options):
        return GOOD if int(case.digest[:2], 16) % 10 == 0 else Verdict(REJECTED)  # about 6 of 64

    summary = gate(tmp_path / "2", mostly, cases=None).run()
    assert summary.exit_code == 3
    assert "asks for 16" in summary.reason


def test_a_target_that_is_not_there(tmp_path):
    pool = FakePool(always_good, unavailable=("toy@gone",))
    summary = gate(tmp_path, None, pool=pool, targets=(TARGET, "toy@gone")).run()
    assert summary.exit_code == 3
    assert "toy@gone is unavailable" in summary.reason


def test_an_interrupt_and_an_error(tmp_path):
    def interrupts(event):
        if isinstance(event, events.CaseJudged):
            raise KeyboardInterrupt

    summary = gate(tmp_path / "1", always_good, interrupts).run()
    assert (summary.exit_code, summary.interrupted) == (130, True)

    def breaks(case, history, options):
        raise RuntimeError("oh")

    with pytest.raises(RuntimeError, match="oh"):
        gate(tmp_path / "2", breaks).run()


def test_the_end_is_json(tmp_path):
    listener = Listener()
    summary = gate(tmp_path, when(nan_on_odd), listener, entries=(replace(KNOWN, symptom="else"),)).run()
    data = listener.of(events.CampaignFinished)[0].to_json()["summary"]["gate"]
    assert data["red"] == [finding.id for finding in summary.new]
    assert data["entries"][0]["entry"]["tracker"] == "toy#1"
    assert data["plan"] == summary.gate.plan


# ---- reports --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("judge", "changes", "status", "failed"),
    [
        (when(nan_on_odd), {}, "new", True),
        (when(nan_on_odd, bad("order", "ascending")), {}, "robustness", False),
        (when(nan_on_odd, bad("order", "ascending")), {"strict": True}, "new", True),
        (when(nan_on_odd), {"entries": (KNOWN,)}, "known", False),
        (when(nan_on_odd), {"base": FakePool(when(nan_on_odd))}, "base", False),
        (always_good, {"entries": (KNOWN,)}, "fixed", True),
    ],
)
def test_junit_is_red_where_the_gate_is(tmp_path, judge, changes, status, failed):
    story = Story()
    summary = gate(tmp_path, judge, story.take, **changes).run()
    assert [told.status for told in story.findings] == [status]
    text_of = junit.render(story)
    assert ("<failure" in text_of or "<error" in text_of) == failed == (summary.exit_code == 1)
    assert story.cells
