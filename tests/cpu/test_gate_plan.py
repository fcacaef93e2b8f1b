"""The plan of a gate, on fakes: the same list of cases whatever the workers, and a prefix of it where time is short."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from dataclasses import replace

from moe_fuzz.campaign import events
from moe_fuzz.campaign.gate import engine, plan
from moe_fuzz.campaign.gate.engine import CASES_SHARE, QUIET_SHARE
from moe_fuzz.campaign.gate.plan import PROFILES
from moe_fuzz.campaign.plan import ROUND
from moe_fuzz.config_tables import GATE_PROFILES
from moe_fuzz.report import text
from tests.cpu.campaign_fakes import GOOD, TARGET, FakePool, Listener, always_good, bad, nan_on_odd, toy, when
from tests.cpu.gate_runs import KNOWN, SMALL, gate, judged


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


def test_on_a_gpu_the_grid_is_dealt_among_generated_rounds(tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "OF_THE_GRID", 2)  # the toys' grid has four rounds

    def phases(device):
        listener = Listener()
        gate(tmp_path / device, always_good, listener, cases=1000, device=device).run()
        return [row[1] for row in judged(listener)]

    host, device = phases("cpu"), phases("cuda")
    assert host == sorted(host, key=["grid", "generate"].index)  # where nothing is compiled, all of it comes first
    assert Counter(host) == Counter(device)
    blocks = [phase for phase, _ in itertools.groupby(device)]
    assert blocks[:3] == ["grid", "generate", "grid"]
    assert device[: 2 * ROUND + 1] == [*["grid"] * (2 * ROUND), "generate"]


def test_a_gate_that_meets_nothing_bad_goes_on_for_longer(tmp_path, monkeypatch):
    def slow(answer):
        def run(case, history, options):
            time.sleep(0.01)
            return when(answer)(case, history, options)

        return run

    assert CASES_SHARE < QUIET_SHARE < 1
    monkeypatch.setattr(engine, "CASES_SHARE", 0.02)
    quiet = gate(tmp_path / "quiet", slow(lambda case: False), cases=1000, seconds=6.0).run()
    bad = gate(tmp_path / "bad", slow(lambda case: True), cases=1000, seconds=6.0).run()
    assert 4 * bad.cases < quiet.cases < 1000


def first_rounds(tmp_path):
    """The cases of the first two rounds of a plan of 200."""
    pool = FakePool(always_good)
    gate(tmp_path / "planned", None, pool=pool, cases=200).run()
    return pool.leased[:ROUND], pool.leased[ROUND : 2 * ROUND]


def test_a_round_of_cases_that_hang_does_not_last_to_its_end(tmp_path):
    """Each of them takes its deadline, and a round has many."""
    listener = Listener()

    def hanging(case, history, options):
        time.sleep(0.4)
        return bad()

    # three seconds: on a busy machine the plan alone has taken one
    summary = gate(tmp_path / "hanging", hanging, listener, cases=200, seconds=3.0).run()
    assert 3 <= len(judged(listener)) == summary.cases < ROUND, "the first round was cut when its time was up"
    assert summary.new
    assert summary.exit_code == 1


def test_what_is_bad_is_judged_while_its_round_goes_on(tmp_path):
    def judge(case, history, options):
        time.sleep(0.05)
        return bad()

    pool, begun = FakePool(judge), []

    def listen(event):
        if isinstance(event, events.CaseJudged):
            begun.append(len(pool.leased))

    gate(tmp_path / "gate", None, listen, pool=pool, cases=200, seconds=1.0).run()
    assert 1 <= begun[0] < ROUND


def test_what_time_cuts_hides_no_bad_case_behind_it(tmp_path):
    """The first round is under way, and still good, when the second one meets something bad and the time is up."""
    first, second = first_rounds(tmp_path)

    def judge(case, history, options):
        time.sleep(0.5 if case in first else 0.01)
        return when(lambda case: case in second)(case, history, options)

    summary = gate(tmp_path / "cut", judge, cases=200, seconds=1.5, workers=2).run()
    assert summary.new
    assert summary.exit_code == 1
    assert summary.cases > ROUND


def test_rounds_that_are_good_do_not_last_to_their_end_either(tmp_path):
    """Where each case is compiled for, those under way would take longer than all that was before."""
    pool = FakePool(lambda case, history, options: time.sleep(0.4) or GOOD)
    began = time.monotonic()
    summary = gate(tmp_path / "slow", None, pool=pool, cases=200, seconds=1.5, workers=2).run()
    assert 1 <= summary.cases < ROUND
    assert len(pool.leased) < 2 * ROUND, "both rounds were cut"
    assert time.monotonic() - began < 0.4 * ROUND


def test_the_profiles_grow_and_leave_room(tmp_path):
    assert tuple(PROFILES) == GATE_PROFILES
    quick, default, deep = PROFILES.values()
    assert (quick.seconds, default.seconds) < (120, 600)
    for device in ("cpu", "cuda"):
        assert quick.cases[device] < default.cases[device] < deep.cases[device]
        assert all(0 < profile.floor[device] < profile.cases[device] for profile in PROFILES.values())
