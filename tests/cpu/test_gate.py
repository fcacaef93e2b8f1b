"""The gate on fakes: its plan, what is new, known, flaky, fixed, expired, and the exit codes."""

from __future__ import annotations

import datetime
import time
from collections import Counter
from dataclasses import replace

import pytest

from moe_fuzz.campaign import events
from moe_fuzz.campaign.findings import load_findings
from moe_fuzz.campaign.gate.engine import Gate
from moe_fuzz.campaign.gate.ledger import Entry
from moe_fuzz.campaign.gate.plan import PROFILES, QUARANTINED, Profile
from moe_fuzz.campaign.gate.settings import GateSettings
from moe_fuzz.campaign.interfaces import Sanitized
from moe_fuzz.campaign.state import StateDir
from moe_fuzz.report import junit, text
from moe_fuzz.report.story import Story
from moe_fuzz.verdict import REJECTED, Verdict
from tests.cpu.campaign_fakes import (
    GOOD,
    SOURCES,
    TARGET,
    FakePool,
    Listener,
    always_good,
    bad,
    crash,
    nan_on_odd,
    toy,
    when,
)

TODAY = datetime.date(2026, 11, 21)
SMALL = Profile("small", 60.0, 300, {"cpu": 64, "cuda": 64}, {"cpu": 16, "cuda": 16}, "for tests")
NAN_ON_ODD = toy(experts=1, top_k=1, rows=1, faults=("nan_rows",))
#: The entry of the bug that `nan_on_odd` is.
KNOWN = Entry(
    "known-nan", "toy#1", "@me", target=TARGET, check="routing", symptom="wrong", features=("fault:nan_rows",),
    cases=(NAN_ON_ODD,),
)  # fmt: skip


def gate(tmp_path, judge, listener=None, *, base=None, pool=None, sanitize=None, **changes):
    given = {"targets": (TARGET,), "profile": SMALL, "cases": 200, "seconds": None, "seed": 7, "device": "cuda",
             "workers": 1, "today": TODAY}  # fmt: skip
    made = Gate(
        GateSettings(**(given | changes)), pool or FakePool(judge, int(changes.get("workers", 1))), StateDir(tmp_path),
        listener or Listener(), base=base, sources=SOURCES, sanitize=sanitize,
    )  # fmt: skip
    made.listener = made._emit
    return made


def judged(listener) -> list[tuple]:
    """The list of cases and verdicts that a gate told, without the seconds."""
    return [tuple(replace(event, seconds=0.0).to_json().values()) for event in listener.of(events.CaseJudged)]


def statuses(summary) -> dict[str, str]:
    return {result.entry["name"]: result.status for result in summary.gate.entries}


def test_a_finding_about_memory_gets_the_line_of_a_sanitizer(tmp_path):
    listener, judge = Listener(), when(nan_on_odd, crash("illegal-access", "routing.py:40 in topk"))
    made = gate(tmp_path, judge, listener, sanitize=lambda *_: Sanitized("routing.py:118 in _kernel", ("memcheck: x",)))
    [finding] = made.run().new
    assert finding.verdict.violations[0].site == "routing.py:118 in _kernel"
    assert finding.sanitizer == ("memcheck: x",)


# ---- the plan -------------------------------------------------------------------------------------------------------


def test_two_gates_of_one_plan_say_the_same_whatever_the_workers(tmp_path):
    def either(case):
        return nan_on_odd(case) or (case.config["bias"] and "ties" in case.fault_names)

    def slow(case, history, options):
        time.sleep((int(case.digest, 16) % 3) / 2000)  # rounds end in another order than they began
        return when(either)(case, history, options)

    told, found = [], []
    for name, workers in (("a", 1), ("b", 3)):
        listener = Listener()
        summary = gate(tmp_path / name, slow, listener, cases=300, workers=workers).run()
        told.append(judged(listener))
        found.append([(f.id, f.case.digest) for f in summary.new])
    assert told[0] == told[1]
    assert found[0] == found[1]
    assert len(found[0]) == 2
    assert len(told[0]) == len({row[4] + row[3] for row in told[0]}) == 300


def test_a_timed_gate_is_a_prefix(tmp_path):
    def slow(case, history, options):
        time.sleep(0.01)
        return GOOD

    whole, cut = Listener(), Listener()
    gate(tmp_path / "whole", always_good, whole, cases=400).run()
    summary = gate(tmp_path / "cut", slow, cut, cases=400, seconds=2.0, workers=2).run()
    ran = judged(cut)
    assert 0 < len(ran) < 400
    assert ran == judged(whole)[: len(ran)]
    assert (summary.cases, summary.planned, summary.exit_code) == (len(ran), 400, 0)
    assert f"{len(ran)} of 400 cases" in "\n".join(text.summary(summary, "x"))


def test_the_plan_of_a_target_does_not_depend_on_the_others(tmp_path):
    alone, among = Listener(), Listener()
    gate(tmp_path / "1", always_good, alone, cases=None).run()
    gate(tmp_path / "2", always_good, among, cases=None, targets=("toy@other", TARGET)).run()
    assert judged(alone) == [row for row in judged(among) if row[2] == TARGET]
    assert len(judged(among)) == 2 * SMALL.cases["cuda"]


def test_a_file_has_one_plan_in_every_checkout(tmp_path):
    told = []
    for folder in ("/home/me/repo/kernels", "/ci/build"):
        listener = Listener()
        gate(tmp_path, always_good, listener, targets=(f"toy@{folder}/my.py:f",)).run()
        plan = listener.of(events.CampaignStarted)[0].plan
        told.append((plan, [row[3:] for row in judged(listener)]))
    assert told[0] == told[1]


def test_another_seed_is_another_plan_and_the_state_directory_has_no_part_in_it(tmp_path):
    first, again, other = Listener(), Listener(), Listener()
    for listener, seed in ((first, 1), (again, 1), (other, 2)):
        gate(tmp_path, when(nan_on_odd), listener, seed=seed).run()
    assert judged(first) == judged(again) != judged(other)
    digests = [listener.of(events.CampaignStarted)[0].plan for listener in (first, again, other)]
    assert digests[0] == digests[1] != digests[2]


def test_phases_come_in_order_and_the_corpus_runs_on_each_target(tmp_path):
    listener = Listener()
    stored = (toy(experts=3), toy(experts=3), toy(experts=5), replace(toy(), op="another"))
    gate(tmp_path, always_good, listener, corpus=stored, entries=(replace(KNOWN, reproduces="sometimes"),),
         targets=(TARGET, "toy@other")).run()  # fmt: skip
    assert [event.name for event in listener.of(events.PhaseStarted)] == ["ledger", "corpus", "grid", "generate"]
    ran = [row[2:4] for row in judged(listener) if row[1] == "corpus"]
    both = (stored[0], stored[2])
    assert ran == [(target, replace(c, target="").digest) for target in (TARGET, "toy@other") for c in both]


def test_the_profiles_grow_and_leave_room(tmp_path):
    quick, default, deep = PROFILES.values()
    assert (quick.seconds, default.seconds) < (120, 600)
    for device in ("cpu", "cuda"):
        assert quick.cases[device] < default.cases[device] < deep.cases[device]
        assert all(0 < profile.floor[device] < profile.cases[device] for profile in PROFILES.values())


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
    assert gate(tmp_path, judge, pool=Silent(judge)).run().exit_code == 1


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


def test_the_minimal_case_has_to_fail_three_times_too(tmp_path):
    """A reduction may end where the failure is no longer certain."""
    runs = Counter()

    def judge(case, history, options):
        if not nan_on_odd(case):
            return GOOD
        runs[case.digest] += 1
        minimal = case.steps[0].tokens == 1 and len(case.experts) == 1
        return GOOD if minimal and runs[case.digest] > 1 else bad()

    [finding] = gate(tmp_path, judge).run().gate.unstable
    assert finding.reproduces.startswith("sometimes")


# ---- the ledger -----------------------------------------------------------------------------------------------------


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
        return GOOD if case.config["bias"] and len(case.experts) == 61 else Verdict(REJECTED)

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
