"""The gate and its ledger, on fakes: what is known, fixed, expired, held back, and what it explains."""

from __future__ import annotations

import datetime
import time
from collections import Counter
from dataclasses import replace

import pytest

from moe_fuzz.campaign import events
from moe_fuzz.campaign.gate import judge as judging
from moe_fuzz.campaign.gate.ledger import Entry, strays
from moe_fuzz.campaign.gate.plan import QUARANTINED
from moe_fuzz.campaign.interfaces import own_sources
from moe_fuzz.report import text
from moe_fuzz.verdict import REJECTED, UNJUDGED, VIOLATION, Verdict
from tests.cpu.campaign_fakes import GOOD, TARGET, FakePool, Listener, always_good, bad, crash, nan_on_odd, when
from tests.cpu.gate_runs import KNOWN, NAN_ON_ODD, TODAY, gate, statuses


def test_a_known_finding_is_green_and_explains_its_kind_alone(tmp_path):
    listener = Listener()
    summary = gate(tmp_path / "1", when(nan_on_odd), listener, entries=(KNOWN,)).run()
    assert (summary.exit_code, summary.new, statuses(summary)) == (0, (), {"known-nan": "known"})
    [result] = summary.gate.entries
    assert result.seen > 1
    [reported] = listener.of(events.FindingReported)
    assert (reported.status, reported.entry["tracker"]) == ("known", "toy#1")

    def either(case):
        return nan_on_odd(case) or (case.config["bias"] and "ties" in case.fault_names)

    summary = gate(tmp_path / "2", when(either), entries=(KNOWN,)).run()
    assert summary.exit_code == 1
    assert [finding.features for finding in summary.new] == [("bias", "fault:ties")]


def test_what_is_known_hides_nothing_else_of_the_same_case_and_counts_once(tmp_path):
    twice = (*bad().violations, *bad("routing", "wrong").violations)
    more = Verdict(VIOLATION, (*twice, *bad("determinism", "differs").violations))
    for verdict, code in ((Verdict(VIOLATION, twice), 0), (more, 1)):
        listener = Listener()
        summary = gate(tmp_path / str(code), when(nan_on_odd, verdict), listener, entries=(KNOWN,), strict=True).run()
        assert summary.exit_code == code
        assert {finding.check for finding in summary.new} == ({"determinism"} if code else set())
        [result] = summary.gate.entries
        assert result.seen <= sum(event.verdict != "pass" for event in listener.of(events.CaseJudged)) + 1


def test_what_may_be_known_is_not_new_where_no_time_is_left_to_reduce_it(tmp_path):
    """What a reduction found is narrower than the defect: only reduced, a case can be told from it."""
    narrow = replace(KNOWN, features=("bias", "fault:nan_rows"), cases=(NAN_ON_ODD.with_config(bias=True),))

    def wrong(case):
        return nan_on_odd(case) and not case.config["bias"]

    for number, (verdict, code) in enumerate(((bad(), 0), (bad("determinism", "differs"), 1))):
        listener = Listener()
        late = gate(tmp_path / str(number), when(wrong, verdict), listener, entries=(replace(narrow, cases=()),),
                    strict=True)  # fmt: skip
        late._reducer_seconds = lambda: 0.0
        summary = late.run()
        assert (summary.exit_code, summary.unexamined > 0) == (code, True)
        told = [note.message for note in listener.of(events.Note) if "the time was up" in note.message]
        assert bool(told) is not bool(code)
        assert all("known-nan" in message for message in told)
        assert "No case broke a rule" not in "\n".join(text.summary(summary, "x"))


def test_a_known_crash_is_not_reduced_again_and_again(tmp_path):
    """Each try of such a reduction is a process."""
    judge = when(nan_on_odd, crash())
    [finding] = gate(tmp_path / "first", judge).run().new
    entry = Entry("known-crash", "toy#2", "@me", finding.id, TARGET, "crash", "SIGSEGV",
                  features=("dtype=float16", "fault:nan_rows"))  # fmt: skip
    listener = Listener()
    summary = gate(tmp_path / "then", judge, listener, entries=(entry,)).run()
    assert (summary.exit_code, summary.new, statuses(summary)) == (0, (), {"known-crash": "known"})
    reduced = len(listener.of(events.FindingConfirming))
    assert judging.LEARNED <= reduced < summary.gate.entries[0].seen / 2

    def either(case):
        return nan_on_odd(case) or (case.config["bias"] and "ties" in case.fault_names)

    summary = gate(tmp_path / "other", when(either, crash()), entries=(entry,)).run()
    assert [finding.features for finding in summary.new] == [("bias", "fault:ties")], "another crash is new"


@pytest.mark.parametrize("most", [24, 5])
def test_a_crash_behind_many_that_are_known_is_new(tmp_path, most, monkeypatch):
    """On the space of a router, where NaN rows are the plainer ones: what crashes with others, and is reduced, crashes
    for the known reason in the end. What those cases had in common with it must not stand for it; nor does the number
    of those that were known stand for a case without NaN rows."""
    target = "topk_softmax@fake"
    monkeypatch.setattr(judging, "MAX_KNOWN", most)

    def known(case):
        return "nan_rows" in case.fault_names

    def other(case):
        config = case.config  # rare: the known one has been reduced often before the first of these comes
        return len(case.experts) > 128 and config["top_k"] == 4 and bool(config["renormalize"])

    def run(name, crashes, *entries):
        return gate(tmp_path / name, when(crashes, crash("SIGABRT")), entries=entries, targets=(target,), cases=1500,
                    strict=True, sources=own_sources()).run()  # fmt: skip

    [finding] = run("first", known).new
    entry = Entry("known-crash", "toy#2", "@me", finding.id, target, "crash", "SIGABRT",
                  features=("E>1", "T>1", "fault:nan_rows"))  # fmt: skip
    summary = run("known", known, entry)
    assert (summary.exit_code, summary.new) == (0, ())
    met = []

    def both(case):
        met.append(other(case) and not known(case))
        return known(case) or other(case)

    summary = run("both", both, entry)
    assert any(met[:1500]), "the plan has none of these: take others"
    assert summary.exit_code == 1
    assert [finding.case.config["top_k"] for finding in summary.new] == [4]


def test_a_reduction_that_time_cuts_short_is_not_new_where_it_may_be_known(tmp_path):
    """It ended before anybody knows what the smallest case is."""
    narrow = replace(KNOWN, features=("bias", "fault:nan_rows"), cases=())
    listener = Listener()

    def slowly(case, history, options):
        time.sleep(0.002)
        return bad() if nan_on_odd(case) and not case.config["bias"] else GOOD

    late = gate(tmp_path, slowly, listener, entries=(narrow,), strict=True)
    late._reducer_seconds = lambda: 0.003
    summary = late.run()
    assert (summary.exit_code, summary.new) == (0, ())
    assert summary.unexamined


@pytest.mark.parametrize("odd", range(4))
def test_what_passes_but_for_a_run_that_was_not_judged_is_not_fixed(tmp_path, odd):
    """It runs once beside others and three times alone: only if these all pass it is gone."""
    runs = Counter()

    def judge(case, history, options):
        if case.digest != NAN_ON_ODD.digest:
            return GOOD
        runs[case.digest] += 1
        return Verdict(REJECTED, stats={UNJUDGED: 1}) if runs[case.digest] == 1 + odd else GOOD

    summary = gate(tmp_path, judge, entries=(KNOWN,)).run()
    assert statuses(summary) == {"known-nan": "not-run" if odd else "fixed"}
    assert summary.exit_code == (0 if odd else 1)


def test_a_finding_is_known_by_its_fingerprint(tmp_path):
    [finding] = gate(tmp_path / "1", when(nan_on_odd)).run().new
    entry = Entry(finding.id, "toy#1", "@me", fingerprint=finding.id, cases=(finding.case,))
    summary = gate(tmp_path / "2", when(nan_on_odd), entries=(entry,)).run()
    assert (summary.exit_code, summary.new) == (0, ())
    assert [f.id for f in summary.known] == [finding.id]
    other = replace(entry, fingerprint="0" * 10, name="0" * 10)
    assert gate(tmp_path / "3", when(nan_on_odd), entries=(other,)).run().exit_code == 1


def test_an_entry_that_passes_three_times_is_red(tmp_path):
    listener = Listener()
    made = gate(tmp_path, always_good, listener, entries=(KNOWN,))
    summary = made.run()
    assert (summary.exit_code, statuses(summary)) == (1, {"known-nan": "fixed"})
    assert "remove the entry" in summary.reason
    assert made._pool.fresh_runs == 3
    assert [event.entry["name"] for event in listener.of(events.FindingFixed)] == ["known-nan"]


def test_an_entry_that_fails_sometimes_may_pass(tmp_path):
    sometimes = replace(KNOWN, reproduces="sometimes")
    summary = gate(tmp_path, always_good, entries=(sometimes,)).run()
    assert (summary.exit_code, statuses(summary)) == (0, {"known-nan": "quiet"})


def test_an_entry_that_should_fail_always_and_does_not_is_annotated(tmp_path):
    runs = Counter()

    def judge(case, history, options):
        runs[case.digest] += 1
        return bad() if case.digest == NAN_ON_ODD.digest and runs[case.digest] == 2 else GOOD

    summary = gate(tmp_path, judge, entries=(KNOWN,)).run()
    assert (summary.exit_code, statuses(summary)) == (0, {"known-nan": "flaky"})
    assert 'reproduces = "sometimes"' in summary.gate.entries[0].message


@pytest.mark.parametrize(("expires", "code"), [(TODAY, 1), (TODAY + datetime.timedelta(1), 0)])
def test_an_expired_entry_is_red_and_still_explains(tmp_path, expires, code):
    summary = gate(tmp_path, when(nan_on_odd), entries=(replace(KNOWN, expires=expires),)).run()
    assert (summary.exit_code, summary.new) == (code, ())
    assert statuses(summary) == {"known-nan": "expired" if code else "known"}


def test_an_expired_entry_is_red_although_its_case_did_not_run(tmp_path):
    """Time was up, or so it says on the clock, before the first round."""
    entries = (replace(KNOWN, name="late", expires=TODAY), KNOWN)
    summary = gate(tmp_path, always_good, entries=entries, seconds=0.0).run()
    assert statuses(summary) == {"late": "expired", "known-nan": "not-run"}
    assert summary.exit_code == 1


def test_an_entry_that_fails_otherwise_is_news(tmp_path):
    summary = gate(tmp_path, when(nan_on_odd, bad("routing", "worse")), entries=(KNOWN,)).run()
    assert statuses(summary) == {"known-nan": "changed"}
    assert summary.exit_code == 1
    assert [finding.symptom for finding in summary.new] == ["worse"]


def test_an_entry_without_a_case_is_known_by_what_the_plan_shows(tmp_path):
    bare = replace(KNOWN, cases=(), reproduces="sometimes")
    summary = gate(tmp_path / "1", when(nan_on_odd), entries=(bare,)).run()
    assert (summary.exit_code, statuses(summary)) == (0, {"known-nan": "known"})
    assert statuses(gate(tmp_path / "2", always_good, entries=(bare,)).run()) == {"known-nan": "unseen"}


def test_versions_and_architectures_say_where_an_entry_is_in_force(tmp_path):
    class Released(FakePool):
        def describe(self, target):
            return replace(super().describe(target), origin="toylib 0.33.0, /lib.so; toy(x)")

    def run(name, **changes):
        pool = Released(when(nan_on_odd))
        made = gate(tmp_path / name, None, pool=pool, arch="sm90", entries=(replace(KNOWN, **changes),))
        summary = made.run()
        return summary.exit_code, statuses(summary)["known-nan"]

    assert run("1", arch=("sm90", "sm100")) == (0, "known")
    assert run("2", versions={"toylib": "<0.34"}) == (0, "known")
    assert run("3", versions={"toylib": "<0.33"}) == (1, "absent")
    assert run("4", versions={"torch": ">=1"}) == (1, "absent")
    assert run("5", versions={"nobody": ">=1"}) == (0, "known")  # what cannot be told
    assert run("6", arch=("sm100",)) == (1, "absent")


def test_an_entry_that_is_not_in_force_expires_all_the_same(tmp_path):
    for number, where in enumerate(({"versions": {"torch": ">=1"}}, {"arch": ("sm100",)})):
        entries = (replace(KNOWN, expires=TODAY, **where),)
        summary = gate(tmp_path / str(number), always_good, arch="sm90", entries=entries).run()
        assert (summary.exit_code, statuses(summary)) == (1, {"known-nan": "expired"})


def test_a_package_that_nothing_is_known_of_is_told(tmp_path):
    listener, versions = Listener(), {"trch": "<1", "Torch": "<1"}
    gate(tmp_path, when(nan_on_odd), listener, entries=(replace(KNOWN, versions=versions),)).run()
    [started] = listener.of(events.CampaignStarted)
    [note] = [note for note in started.notes if "versions" in note]
    assert note.startswith("ledger: known-nan: versions names trch: nothing is known of such a package here")


@pytest.mark.parametrize(("expires", "code", "status"), [(None, 0, "no-target"), (TODAY, 1, "expired")])
def test_an_entry_of_no_target_is_told_and_expires(tmp_path, expires, code, status):
    lost = replace(KNOWN, name="lost", target="toy@tagret", expires=expires)
    assert strays((KNOWN, lost), (TARGET,)) == (lost,)
    summary = gate(tmp_path, always_good, entries=(lost,), strays=(lost,)).run()
    assert (summary.exit_code, statuses(summary)) == (code, {"lost": status})
    told = "\n".join(text.summary(summary, "x"))
    assert "toy@tagret" in told
    assert "no target that is known or asked for is toy@tagret: correct its target, or remove the entry" in told


def test_an_entry_is_of_a_target_that_its_case_is_for():
    assert strays((replace(KNOWN, target="*@vllm"),), ("topk_softmax@vllm",))
    assert not strays((replace(KNOWN, target="*@vllm"),), ("toy@vllm",))
    assert not strays((replace(KNOWN, target="*@vllm", cases=()),), ("topk_softmax@vllm",))


def test_crash_class_entries_run_alone_and_are_held_back(tmp_path):
    """Cases like a known crash run in processes of their own, and no more of them than are needed."""

    def judge(case, history, options):
        if nan_on_odd(case):
            return crash()
        return bad("routing", "after a crash's kind") if any(map(nan_on_odd, history)) else GOOD

    entry = Entry("known-crash", "toy#2", "@me", target=TARGET, check="crash", symptom="SIGSEGV",
                  features=("fault:nan_rows", "E odd"), cases=(NAN_ON_ODD,))  # fmt: skip
    listener = Listener()
    made = gate(tmp_path, judge, listener, entries=(entry,), cases=600)
    summary = made.run()
    assert (summary.exit_code, summary.new, statuses(summary)) == (0, (), {"known-crash": "known"})
    alone = [event for event in listener.of(events.CaseJudged) if event.alone]
    assert len(alone) == QUARANTINED
    assert {event.verdict for event in alone} == {"crash"}
    assert not any(nan_on_odd(case) for case in made._pool.leased)
    assert summary.gate.held_back > 0
    assert summary.cases == summary.planned == 600 - summary.gate.held_back
    assert summary.gate.entries[0].seen == QUARANTINED


def test_a_crash_that_the_ledger_does_not_cover_is_red(tmp_path):
    entry = Entry("known-crash", "toy#2", "@me", target=TARGET, check="crash", symptom="SIGSEGV",
                  features=("fault:nan_rows", "E odd"), cases=(NAN_ON_ODD,))  # fmt: skip

    def either(case):
        return nan_on_odd(case) or "ties" in case.fault_names

    summary = gate(tmp_path, when(either, crash()), entries=(entry,), strict=True).run()
    assert summary.exit_code == 1
    assert {finding.features for finding in summary.new} == {("fault:ties",)}


def test_entries_of_other_targets_do_not_run(tmp_path):
    summary = gate(tmp_path, always_good, entries=(replace(KNOWN, target="toy@other", expires=TODAY),)).run()
    assert (summary.exit_code, summary.gate.entries) == (0, ())
