"""The campaign end to end, on fakes: the list of cases, findings, exit codes."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from dataclasses import replace

import pytest

from moe_fuzz.campaign import events
from moe_fuzz.campaign.findings import load_findings
from moe_fuzz.campaign.plan import units
from moe_fuzz.campaign.state import StateDir
from moe_fuzz.campaign.tally import Tally
from moe_fuzz.case import loads_sequence
from moe_fuzz.errors import EnvironmentProblem, MoeFuzzError, UsageError
from moe_fuzz.report import text
from moe_fuzz.verdict import CRASH, HANG, OOM, PASS, REJECTED, UNJUDGED, VIOLATION, Verdict
from tests.cpu.campaign_fakes import (
    GOOD,
    TARGET,
    FakePool,
    Listener,
    always_good,
    bad,
    campaign,
    crash,
    nan_on_odd,
    ran,
    settings,
    toy,
    when,
)

# ---- the list of cases ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cases", [1, 3, 64, 65, 333])
def test_exactly_as_many_cases_as_asked_for(tmp_path, cases):
    made = campaign(tmp_path, always_good, cases=cases)
    summary = made.run()
    assert summary.cases == len(made.pool.leased) == cases
    assert summary.verdicts == {"pass": cases}
    assert summary.exit_code == 0


def test_the_list_of_cases_does_not_depend_on_the_number_of_workers(tmp_path):
    one = campaign(tmp_path / "1", when(nan_on_odd), workers=1, cases=500)
    three = campaign(tmp_path / "3", when(nan_on_odd), workers=3, cases=500)
    assert one.run().cases == three.run().cases == 500
    assert ran(one) == ran(three)
    assert len(ran(one)) > 400


def test_another_seed_gives_another_list(tmp_path):
    lists = []
    for seed in (1, 2):
        made = campaign(tmp_path / str(seed), always_good, seed=seed, cases=100)
        made.run()
        lists.append(ran(made))
    assert lists[0] != lists[1]


def test_the_grid_takes_at_most_a_quarter_and_targets_share_evenly(tmp_path):
    made = campaign(tmp_path, always_good, cases=41, targets=(TARGET, "toy@other"), shard_cases=7)
    summary = made.run()
    assert [(row.target, row.cases) for row in summary.rows] == [(TARGET, 21), ("toy@other", 20)]
    phases = [event.name for event in made._listener.of(events.PhaseStarted)]
    assert phases == ["grid", "generate"]


def test_each_of_many_targets_has_its_turn_soon():
    """Of the grid, which is drawn no further than it is run, and of what is generated."""
    drawn: Counter[str] = Counter()

    def grid(target):
        for seed in range(70):
            drawn[target] += 1
            yield toy(seed=seed)

    names = tuple(f"toy@{at}" for at in range(12))
    planned = units(settings(targets=names, cases=None, seconds=60.0, shard_cases=256), names, grid)
    first = list(itertools.islice(planned, 12))
    assert [(unit.target, unit.budget) for unit in first] == [(name, 32) for name in names]
    assert set(drawn.values()) == {32}
    rest = list(itertools.islice(planned, 48))
    assert [unit.budget for unit in rest] == [32] * 12 + [6] * 12 + [32] * 12 + [256] * 12
    assert [unit.order for unit in (*first, *rest)] == list(range(60))
    drawn.clear()
    over = {"grid"}.__contains__
    late = units(settings(targets=names, cases=None, seconds=60.0, shard_cases=256), names, grid, {}, over)
    assert next(late).phase == "generate"
    assert not drawn
    alone = units(settings(targets=names[:1], cases=700, shard_cases=256), names[:1], grid)
    assert [unit.budget for unit in alone] == [32, 32, 6, 256, 256, 118]


def test_cases_that_the_grid_has_no_time_for_are_generated():
    """And those that an earlier run of the campaign had time for are not counted again."""
    def grid(target):
        return (toy(seed=seed) for seed in range(70))

    asked = []

    def over(phase):
        asked.append(phase)
        return phase == "grid" and asked.count("grid") > 2

    one = settings(targets=("toy@0",), cases=700, seconds=60.0, shard_cases=256)
    cut = list(units(one, ("toy@0",), grid, {}, over))
    assert [(unit.phase, unit.budget) for unit in cut] == [
        ("grid", 32), ("grid", 32), ("generate", 256), ("generate", 256), ("generate", 124)
    ]  # fmt: skip
    done = {(unit.line, unit.index) for unit in cut[:3]}
    later = list(units(one, ("toy@0",), grid, {}, {"grid"}.__contains__, lambda unit: (unit.line, unit.index) in done))
    assert later == cut


def test_a_budget_in_seconds_ends(tmp_path):
    summary = campaign(tmp_path, always_good, cases=None, seconds=1.0).run()
    assert summary.cases > 10
    assert 1.0 <= summary.seconds < 20
    assert summary.exit_code == 0


# ---- findings -------------------------------------------------------------------------------------------------------


def test_a_finding_is_contract_where_anything_of_its_verdict_is(tmp_path):
    nobodys, promised = bad("order", "ascending").violations, bad("routing", "wrong").violations
    for name, violations, told in (
        ("first", (*nobodys, *promised), ("order", "contract", "routing: README: top k is top k")),
        ("alone", nobodys, ("order", "robustness", None)),
        ("own", (*promised, *nobodys), ("routing", "contract", "README: top k is top k")),
    ):
        verdict = replace(bad(), violations=violations)
        summary = campaign(tmp_path / name, when(nan_on_odd, verdict), cases=200).run()
        check, class_, clause = told
        found = next(finding for finding in summary.new if finding.check == check)
        assert (found.check, found.finding_class) == (check, class_)
        assert clause is None or found.clause == clause


def test_a_bug_is_found_minimized_and_reported_once(tmp_path):
    listener = Listener()
    summary = campaign(tmp_path, when(nan_on_odd), listener, cases=400, workers=2).run()
    [finding] = summary.new
    assert summary.exit_code == 1
    assert finding.case.fault_names == ("nan_rows",)
    assert (len(finding.case.experts), finding.case.steps[0].tokens, finding.case.config["top_k"]) == (1, 1, 1)
    assert finding.features == ("fault:nan_rows",)
    assert (finding.finding_class, finding.reproduces) == ("contract", "always")
    assert finding.times_seen > 1
    [reported] = listener.of(events.FindingReported)
    assert (reported.finding.id, reported.status) == (finding.id, "new")
    [on_disk] = load_findings(StateDir(tmp_path))
    assert on_disk == finding
    assert not list((tmp_path / "pending").iterdir())
    assert not list((tmp_path / "inflight").iterdir())


def test_the_same_bug_has_the_same_fingerprint_whatever_the_seed(tmp_path):
    ids = {campaign(tmp_path / str(s), when(nan_on_odd), seed=s, cases=400).run().new[0].id for s in range(4)}
    assert len(ids) == 1


def test_two_bugs_with_one_symptom_are_two_findings(tmp_path):
    def either(case):
        return nan_on_odd(case) or (case.config["bias"] and "ties" in case.fault_names)

    summary = campaign(tmp_path, when(either), cases=600).run()
    assert {finding.features for finding in summary.new} == {("fault:nan_rows",), ("bias", "fault:ties")}


def test_a_known_finding_is_not_new_again(tmp_path):
    first = campaign(tmp_path, when(nan_on_odd)).run()
    listener = Listener()
    second = campaign(tmp_path, when(nan_on_odd), listener, seed=8).run()
    assert (first.exit_code, second.exit_code) == (1, 0)
    assert [f.id for f in second.known] == [f.id for f in first.new]
    assert not second.new
    [reported] = listener.of(events.FindingReported)
    assert reported.status == "known"


def test_a_finding_that_is_fixed_is_told_and_explains_nothing(tmp_path):
    [finding] = campaign(tmp_path, when(nan_on_odd)).run().new
    listener = Listener()
    summary = campaign(tmp_path, always_good, listener).run()
    assert [event.finding.id for event in listener.of(events.FindingFixed)] == [finding.id]
    assert [f.id for f in summary.fixed] == [finding.id]
    assert (summary.exit_code, summary.known) == (0, ())
    again = campaign(tmp_path, when(lambda case: nan_on_odd(case) and case.digest != finding.case.digest)).run()
    assert again.exit_code == 1


def test_a_finding_that_could_not_be_judged_in_time_is_not_gone(tmp_path):
    [finding] = campaign(tmp_path, when(nan_on_odd)).run().new

    def judge(case, history, options):
        return Verdict(REJECTED, stats={UNJUDGED: 1}) if nan_on_odd(case) else GOOD

    summary = campaign(tmp_path, judge).run()
    assert (summary.fixed, [f.id for f in summary.known]) == ((), [finding.id])
    assert 0 < summary.rows[0].unjudged == summary.verdicts[REJECTED]


@pytest.mark.parametrize("kind", [CRASH, HANG, OOM])
def test_a_finding_whose_worker_is_gone_is_not(tmp_path, kind):
    """Whatever ended it, nobody has seen the case pass."""
    [finding] = campaign(tmp_path, when(nan_on_odd)).run().new
    replayed = []

    def judge(case, history, options):
        if case == finding.case and not replayed:
            replayed.append(case)
            return bad(kind, "closed-pipe", kind)
        return GOOD

    summary = campaign(tmp_path, judge).run()
    assert (summary.fixed, [f.id for f in summary.known]) == ((), [finding.id])
    assert replayed


def test_what_does_not_come_back_is_flaky(tmp_path):
    def judge(case, history, options):
        return bad() if len(pool.leased) == 50 and pool.fresh_runs == 0 else GOOD

    pool, listener = FakePool(judge), Listener()
    summary = campaign(tmp_path, judge, listener, pool=pool).run()
    assert (summary.exit_code, summary.flaky, summary.new) == (0, 1, ())
    assert len(listener.of(events.FlakySeen)) == 1
    stats = json.loads((tmp_path / "stats.json").read_text())
    assert [entry["target"] for entry in stats["flaky"]] == [TARGET]
    assert not list((tmp_path / "pending").iterdir())


def test_a_state_dependent_failure_names_culprit_and_victim(tmp_path):
    def judge(case, history, options):
        poisoned = any("inf_rows" in earlier.fault_names for earlier in history)
        return bad("parity", "stale") if poisoned and case.config["bias"] else GOOD

    summary = campaign(tmp_path, judge, cases=300).run()
    assert summary.exit_code == 1
    finding = summary.new[0]
    [culprit] = finding.sequence
    assert culprit.fault_names == ("inf_rows",)
    assert culprit.steps[0].tokens == 1
    assert finding.case.fault_names == ()
    assert loads_sequence(finding.replay.split()[-1]) == (*finding.sequence, finding.case)
    assert (tmp_path / "findings" / finding.id / "sequence.json").exists()
    assert load_findings(StateDir(tmp_path))[0].sequence == (culprit,)


def test_a_memory_fault_is_located(tmp_path):
    def judge(case, history, options):
        fence = options.fence
        if len(case.experts) < 8:
            return GOOD
        seen = fence.hard is None or "logits" in fence.hard
        seen = seen and fence.sides in ("both", "right") and fence.access == "any"
        return crash(site="routing.py:12 in _kernel") if seen else GOOD

    [finding] = campaign(tmp_path, judge).run().new
    assert (finding.check, finding.symptom) == ("fence", "logits:right:read")
    assert finding.site == "routing.py in _kernel"
    assert finding.raw == ("crash", "SIGSEGV")
    assert len(finding.case.experts) == 8
    again = campaign(tmp_path, judge, seed=9).run()
    assert (again.exit_code, len(again.known)) == (0, 1)


def test_the_number_of_minimized_findings_of_a_kind_is_capped(tmp_path):
    def judge(case, history, options):
        # Many faces of one symptom, none of which explains the others.
        return bad() if len(case.fault_names) == 2 or case.config["dtype"] != "float32" else GOOD

    listener = Listener()
    summary = campaign(tmp_path, judge, listener, cases=600).run()
    assert 1 <= len(summary.new) <= 3


def test_max_findings_stops_the_campaign(tmp_path):
    judge = when(lambda case: bool(case.fault_names))
    summary = campaign(tmp_path, judge, cases=20_000, max_findings=1).run()
    assert len(summary.new) == 1
    assert summary.cases < 20_000


# ---- exit codes -----------------------------------------------------------------------------------------------------


def test_a_campaign_in_which_nothing_ran_is_not_clean(tmp_path):
    summary = campaign(tmp_path, lambda case, history, options: Verdict(REJECTED)).run()
    assert summary.exit_code == 3
    assert "nothing ran" in summary.reason


def test_memory_without_end_is_a_finding(tmp_path):
    def judge(case, history, options):
        return Verdict(OOM) if "ties" in case.fault_names else GOOD

    [finding] = campaign(tmp_path, judge, cases=100).run().new
    assert (finding.check, finding.symptom, finding.case.fault_names) == ("oom", "out-of-memory", ("ties",))


def test_an_unavailable_target_is_told_and_the_others_run(tmp_path):
    listener, pool = Listener(), FakePool(always_good, unavailable=("toy@gone",))
    summary = campaign(tmp_path, always_good, listener, pool=pool, targets=(TARGET, "toy@gone"), cases=50).run()
    assert (summary.exit_code, summary.cases) == (3, 50)
    assert [event.target for event in listener.of(events.TargetUnavailable)] == ["toy@gone"]
    assert "not installed" in summary.reason


def test_no_target_at_all(tmp_path):
    pool = FakePool(always_good, unavailable=(TARGET,))
    assert campaign(tmp_path, always_good, pool=pool).run().exit_code == 3
    with pytest.raises(UsageError, match="no target"):
        settings(targets=())


@pytest.mark.parametrize("wrong", [{"cases": 0}, {"seconds": -1.0}, {"workers": 0}, {"deadline": float("nan")}])
def test_settings_that_make_no_sense_are_refused(wrong):
    with pytest.raises(UsageError, match=next(iter(wrong))):
        settings(**wrong)


def test_a_broken_pool_ends_the_campaign_with_its_error(tmp_path):
    def judge(case, history, options):
        raise EnvironmentProblem("the zygote died", "look at its log")

    with pytest.raises(EnvironmentProblem, match="zygote died"):
        campaign(tmp_path, judge).run()
    assert list((tmp_path / "inflight").iterdir())


def test_events_are_json(tmp_path):
    listener = Listener()
    campaign(tmp_path, when(nan_on_odd), listener).run()
    kinds = {json.loads(json.dumps(event.to_json()))["kind"] for event in listener.events}
    assert {"campaign-started", "phase-started", "finding-reported", "campaign-finished"} <= kinds


def test_strategies_that_draw_nothing_are_an_error(tmp_path):
    from dataclasses import replace

    from hypothesis import strategies as st

    made = campaign(tmp_path, always_good)
    made._sources = replace(made._sources, rounds=lambda space, info, device: st.just(()))
    with pytest.raises(MoeFuzzError, match="draw no cases"):
        made.run()


def test_the_histogram_of_error_budgets() -> None:
    """Passed cases that were judged against a bound, by the share they used; what failed is no part of it."""
    tally = Tally()
    for budget in (0.0, 0.01, 0.049, 0.05, 0.51, 1.0):
        tally.count("toy@good", Verdict(PASS, budget=budget))
    tally.count("toy@good", Verdict(VIOLATION, budget=0.3))
    merged = Tally.from_json(json.loads(json.dumps(tally.to_json())))
    merged.merge(tally)
    row = merged.row("toy@good", (), (), "")
    assert {at: count for at, count in enumerate(row.budgets) if count} == {0: 4, 1: 2, 10: 2, 19: 2}
    assert text.histogram((9, 1, 0, 4)) == "█▃·▆"
