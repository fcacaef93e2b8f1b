"""On a CPU the cases of a target stay short, however many programs its kernel has: larger ones are left out. And who is
under way when the time is over is given up."""

from __future__ import annotations

import contextlib
import math
import random
import statistics
import time
from itertools import islice

import pytest

from moe_fuzz import strategies
from moe_fuzz.campaign.drive import drive
from moe_fuzz.campaign.drivers import FEW
from moe_fuzz.campaign.events import Note
from moe_fuzz.campaign.thrift import SELDOM, Thrift, extent
from moe_fuzz.contract import Capabilities, Contract, TargetInfo
from moe_fuzz.labels import Labels
from moe_fuzz.ops import get_space
from moe_fuzz.ops.space import Means
from moe_fuzz.options import RunOptions
from moe_fuzz.report.text import target_row
from moe_fuzz.verdict import HANG, PASS, REJECTED, UNJUDGED, Verdict
from moe_fuzz.worker.pool import Pool
from tests.cpu import test_worker as workers
from tests.cpu.campaign_fakes import SPACE, FakePool, Listener, always_good, bad, campaign, ran


def config(case, name):
    value = case.config[name]
    return value if isinstance(value, int) else len(Labels.parse(value))


def tokens(case):
    return sum(step.tokens for step in case.steps)


#: op -> seconds of three calls of a kernel that is not laid out as ours: a program a row with a loop over k, one a
#: slot, one a slot and block of columns with a loop over the other side, one a row and block, one a row and group.
KERNELS = {
    "topk_softmax": lambda case: 0.003 * tokens(case) * (2 + config(case, "top_k")),
    "align": lambda case: 0.006 * tokens(case) * config(case, "top_k"),
    "experts_bf16": lambda case: 0.003 * tokens(case) * config(case, "top_k") * (
        -(-config(case, "intermediate") // 32) * (1 + config(case, "hidden") // 64)
        + -(-config(case, "hidden") // 32) * (1 + config(case, "intermediate") // 64)),
    "nvfp4_quantize": lambda case: 0.003 * tokens(case) * config(case, "blocks"),
    "grouped_topk": lambda case: 0.01 * tokens(case) * config(case, "topk_group"),
}  # fmt: skip


def cases_of(op, rounds=100):
    """What a campaign runs on a CPU: of the grid the first, then what is drawn."""
    info = TargetInfo(f"{op}@it", op, "it", contract=Contract(),
                      capabilities=Capabilities(out=True, alignment=1, compiles=True), triton=True)  # fmt: skip
    space, found = get_space(op), []
    grid = sorted(islice(strategies.grid(space, info, "cpu", 1), 32), key=lambda case: extent(space, case))
    drive(strategies.rounds(space, info, "cpu"), 1, rounds, lambda cases: found.extend(cases[:2]))
    return Thrift(space, Means.of(info, "cpu")), space, Means.of(info, "cpu"), [*grid, *found]


@pytest.mark.parametrize("op", KERNELS)
def test_a_kernel_with_many_programs_runs_short_cases(op):
    thrift, space, means, cases = cases_of(op, 250)
    noise, taken, left_out = random.Random(0), [], []
    for at in range(0, len(cases), FEW):
        seconds = {case: (space.cost(case, means) + KERNELS[op](case)) * noise.uniform(0.8, 1.3)
                   for case in cases[at : at + FEW]}  # fmt: skip
        slow = {case for case in seconds if thrift.too_slow(case)}
        left_out += [seconds[case] for case in seconds if case in slow]
        for case in seconds.keys() - slow:
            taken.append(seconds[case])
            thrift.learn(case, Verdict(PASS, seconds=seconds[case]))
    after = taken[32:]
    assert len(after) > 0.5 * (len(cases) - 32), "about half of what is drawn is small, at least"
    assert statistics.median(after) < 0.6
    assert sum(seconds > 2 for seconds in after) <= 0.05 * len(after)
    assert sum(seconds > 1.5 for seconds in after) > 0, "some are larger all the same"
    assert max(taken) < 10, "the deadline"
    assert statistics.median(left_out) > 2, "nothing small is left out"


@pytest.mark.parametrize("op", KERNELS)
@pytest.mark.parametrize("busy", [False, True])
def test_nothing_is_left_out_of_a_kernel_that_costs_what_is_expected(op, busy):
    """Nor hardly anything where the machine is busy, so that cases take three times as long and some of them ten times.
    Nothing is learned from what hangs."""
    thrift, space, means, cases = cases_of(op)
    noise, left_out = random.Random(0), 0
    for at, case in enumerate(cases):
        left_out += thrift.too_slow(case)
        factor = min(12, noise.lognormvariate(1.0, 0.6)) if busy else noise.uniform(0.5, 2.5)
        seconds = space.cost(case, means) * factor
        thrift.learn(case, Verdict(PASS, seconds=seconds) if at % 10 else Verdict(HANG, seconds=10.0))
    assert left_out <= (0.03 * len(cases) if busy else 0)


def test_a_target_of_which_all_is_slow_is_tested_all_the_same():
    thrift, _, _, cases = cases_of("topk_softmax")
    taken = 0
    for case in cases:
        if not thrift.too_slow(case):
            taken += 1
            seconds = 5.0 + 0.01 * tokens(case)
            thrift.learn(case, Verdict(REJECTED, seconds=seconds, stats={UNJUDGED: 1}))
    assert taken >= len(cases) // (2 * SELDOM)


def test_what_is_refused_at_once_is_no_quick_case():
    """Of a target that refuses every other case, whatever its size."""
    thrift, space, means, cases = cases_of("topk_softmax")
    taken = []
    for at, case in enumerate(cases):
        if thrift.too_slow(case):
            continue
        seconds = space.cost(case, means) + KERNELS["topk_softmax"](case)
        if at % 2:
            thrift.learn(case, Verdict(REJECTED, seconds=0.001))
        else:
            taken.append(seconds)
            thrift.learn(case, Verdict(PASS, seconds=seconds))
    assert sum(seconds > 2 for seconds in taken[16:]) <= 0.05 * len(taken)


def slow_rows(case, history, options):
    """A program a row, of a tenth of a second: nobody waits here."""
    return Verdict(PASS, seconds=0.01 + 0.1 * tokens(case), parity=True)


def test_a_campaign_replaces_what_is_too_slow(tmp_path):
    made = campaign(tmp_path / "slow", slow_rows, cases=400, device="cpu", seconds=600)
    summary = made.run()
    assert summary.rows[0].too_slow > 50
    generated = [tokens(case) for case in made.pool.leased[-300:]]
    assert sum(rows > 16 for rows in generated) <= 10 < sum(rows == 7 for rows in generated)
    assert len(made.pool.leased) >= 400 - 27, "of what is drawn others run in their place"
    grid = [extent(SPACE, case) for case in made.pool.leased if case.seed == made.pool.leased[0].seed]
    assert grid == sorted(grid)
    for device, seconds in (("cuda", 600), ("cpu", None)):  # who asks for cases alone gets them all
        whole = campaign(tmp_path / device, slow_rows, cases=400, device=device, seconds=seconds)
        assert (whole.run().rows[0].too_slow, len(whole.pool.leased)) == (0, 400)


def test_a_plan_of_short_cases_is_the_seeds_alone(tmp_path):
    made = [campaign(tmp_path / str(count), always_good, cases=300, device="cpu", workers=count) for count in (1, 3)]
    assert [one.run().cases for one in made] == [300, 300]
    assert ran(made[0]) == ran(made[1])


# ---- when the time is over ------------------------------------------------------------------------------------------


def test_a_round_ends_with_the_case_in_which_the_time_ends(tmp_path):
    def judge(case, history, options):
        time.sleep(0.3)
        return Verdict(PASS, seconds=0.3)

    summary = campaign(tmp_path, judge, cases=None, seconds=0.5).run()
    assert summary.cases <= 4  # and not the eight of a round
    assert summary.seconds < 8 * 0.3
    assert not list((tmp_path / "inflight").iterdir())


@pytest.mark.parametrize("do", ["spin", "compile_for_ever"])
def test_a_worker_gives_up_what_is_under_way_at_the_end(do):
    with Pool(1, "cpu", runner=workers.RUNNER) as pool, pool.lease() as worker:
        worker.run([workers.case("pass")], "toy@here", RunOptions())
        began = time.monotonic()
        cases = [workers.case("pass"), workers.case(do), workers.case("pass")]
        verdicts = worker.run(cases, "toy@here", RunOptions(until=began + 1.0))
        assert [verdict.kind for verdict in verdicts] == [PASS]
        assert time.monotonic() - began < 8  # a hang takes 10
        assert worker.pid is None
        [verdict] = worker.run([workers.case("pass")], "toy@here", RunOptions())
        assert verdict.kind == PASS


class Spinning(FakePool):
    """Whose worker is a process, and spins whatever it is given."""

    def __init__(self, pool):
        super().__init__(always_good)
        self._pool = pool

    @contextlib.contextmanager
    def lease(self, target=""):
        yield self

    def run(self, cases, target, options, on_verdict=None):
        with self._pool.lease() as worker:
            return worker.run([workers.case("spin")] * len(cases), "toy@here", options, on_verdict)


def test_what_is_given_up_is_told_and_neither_a_hang_nor_gone_on_with(tmp_path, monkeypatch):
    monkeypatch.setattr("moe_fuzz.campaign.budget.GRACE", 0.3)
    with Pool(2, "cpu", runner=workers.RUNNER) as pool:
        pool.describe("toy@here")
        made = campaign(tmp_path, always_good, cases=None, seconds=0.5, device="cpu", pool=Spinning(pool))
        summary = made.run()
    assert (summary.new, summary.unexamined, summary.verdicts) == ((), 0, {})
    assert summary.rows[0].cut >= 1
    assert "given up, under way when the time was over" in target_row(summary.rows[0])
    assert summary.seconds < 8  # a hang takes 10
    assert not list((tmp_path / "inflight").iterdir())


def test_a_suspect_is_confirmed_after_the_time(tmp_path):
    """By runs that no end of the campaign cuts, which is told."""

    def judge(case, history, options):
        time.sleep(0.2)
        asked.append(options.until)
        return bad()

    asked, listener = [], Listener()
    summary = campaign(tmp_path, judge, listener, cases=None, seconds=1.0, device="cpu", minimize_seconds=0.5).run()
    assert len(summary.new) == 1
    assert len([note for note in listener.of(Note) if "what is suspect is still confirmed" in note.message]) == 1
    assert asked[0] < math.inf == asked[-1]
