"""Reduction in one process, whose answer is asked of a fresh one: few fresh workers, and nothing believed that a
process only says because of what it ran before."""

from __future__ import annotations

import pytest

from moe_fuzz.campaign.reduce import reduce
from moe_fuzz.options import RunOptions
from tests.cpu.campaign_fakes import GOOD, SPACE, TARGET, FakePool, bad, crash, toy

BIG = toy(61, 8, 257, ["nan_rows", "ties"], dtype="float16", bias=True)
KEY = ("routing", "wrong")


def reduced(judge, cases=(BIG,), key=KEY, seconds=60.0, **options):
    """What is left, its verdict, and the pool. It fails in a fresh process."""
    pool, told = FakePool(judge), []
    with pool.fresh() as worker:
        verdict = worker.run(cases, TARGET, RunOptions())[-1]
    pool.fresh_runs = 0
    found, verdict = reduce(pool, SPACE, cases, TARGET, verdict, key, RunOptions(), seconds,
                            progress=lambda tries, case: told.append(tries), **options)  # fmt: skip
    assert verdict.key == key
    with pool.fresh() as worker:
        assert worker.run((*found.before, found.case), TARGET, RunOptions())[-1].key == key
    assert told == sorted(told)
    pool.fresh_runs -= 1
    return found, pool


def nan_among_seven(case, history, options):
    return bad() if "nan_rows" in case.fault_names and len(case.experts) >= 7 else GOOD


def test_hundreds_of_tries_take_two_fresh_workers():
    found, pool = reduced(nan_among_seven)
    assert (len(found.case.experts), found.case.steps[0].tokens, found.case.fault_names) == (7, 1, ("nan_rows",))
    assert found.complete
    assert found.tries > 15
    assert pool.fresh_runs == 2
    assert {"rows: 257 → 1", "dtype: float16 → float32"} <= set(found.explain)


def test_a_process_that_stays_broken_is_not_believed():
    """From its first bad call on this target answers everything wrong: in one process a case of nothing seems to fail.
    """

    def sticky(case, history, options):
        return bad() if any(nan_among_seven(one, (), options).bad for one in (*history, case)) else GOOD

    found, pool = reduced(sticky)
    assert len(found.case.experts) == 7
    assert found.case.fault_names == ("nan_rows",)
    assert pool.fresh_runs > 10  # each try a fresh worker, from the last case that fails in one
    assert found.complete
    assert {"faults: nan_rows, ties → nan_rows", "experts: 0-60 → 0-6"} <= set(found.explain)


def test_a_process_that_gets_well_is_not_believed_either():
    """Only the first call of a process is wrong: one process says of each smaller case that it passes."""
    found, pool = reduced(lambda case, history, options: GOOD if history else nan_among_seven(case, (), options))
    assert len(found.case.experts) == 7
    assert pool.fresh_runs > 10


@pytest.mark.parametrize("how", ["sequence", "sometimes", "death", "spent"])
def test_where_one_process_can_say_nothing_each_try_has_its_own(how):
    judge, cases, key, options = nan_among_seven, (BIG,), KEY, {}
    if how == "sequence":
        first = toy(8, 2, 4, ["inf_rows"])
        cases = (first, BIG)

        def judge(case, history, options):
            return nan_among_seven(case, (), options) if first in history else GOOD

    elif how == "sometimes":
        options = {"runs": 3}
    elif how == "death":
        key = ("crash", "SIGSEGV")

        def judge(case, history, options):
            return crash() if nan_among_seven(case, (), options).bad else GOOD

    else:

        def judge(case, history, options):
            from dataclasses import replace

            return replace(bad(), spent=True) if nan_among_seven(case, (), options).bad else GOOD

    found, pool = reduced(judge, cases, key, **options)
    assert len(found.case.experts) == 7
    assert pool.fresh_runs >= found.tries > 10


def test_tries_bound_both_reductions():
    for judge in (nan_among_seven, lambda case, history, options: nan_among_seven(case, (), options)):
        found, _ = reduced(judge, tries=5)
        assert found.tries <= 12
        assert not found.complete
    assert reduced(nan_among_seven, tries=5)[0].case == reduced(nan_among_seven, tries=5)[0].case


def test_without_time_nothing_is_lost():
    found, _ = reduced(nan_among_seven, seconds=0.0)
    assert found.case == BIG
    assert not found.complete
