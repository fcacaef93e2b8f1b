"""Ranks with a process each, on a host: they run the same case, and one that dies or hangs ends the group by name."""

from __future__ import annotations

import itertools
import time

import pytest

from moe_fuzz import strategies
from moe_fuzz.case import Case, Step
from moe_fuzz.labels import Labels
from moe_fuzz.ops import get_space
from moe_fuzz.options import RunOptions
from moe_fuzz.verdict import CRASH, HANG, PASS, REJECTED, VIOLATION, Verdict, Violation
from moe_fuzz.worker.group import blamed, joined
from moe_fuzz.worker.pool import Pool
from moe_fuzz.worker.ranks import next_part

SPACE = get_space("allreduce_rmsnorm")
TORCH = "allreduce_rmsnorm@torch"
QUICK = RunOptions(deadline=2.0)


def case(tokens: int = 3, ranks: int = 2, mode: str = "ranks", steps: int = 1, **changes: object) -> Case:
    config = {**SPACE.simplest, "ranks": ranks, **changes}
    found = Case("allreduce_rmsnorm", config, (Step(Labels.range(tokens)),) * steps, 3, mode)
    SPACE.validate(found)
    return found


@pytest.fixture(scope="module")
def pool():
    with Pool(1, "cpu") as made:
        yield made


def test_ranks_of_two_and_three_processes_pass(pool):
    cases = [case(), case(ranks=3), case(captured=True, steps=2), case(groups=2, burst=3, pace="random"),
             case(tokens=0), case(mode="eager"), case(hidden=33, dtype="float32", residual=False)]  # fmt: skip
    with pool.lease(TORCH) as worker:
        verdicts = worker.run(cases, TORCH, RunOptions())
        assert len(worker.ranks.pids) == 5  # a group of two, one of three
    assert [verdict.kind for verdict in verdicts] == [PASS] * len(cases), verdicts
    assert sum(verdict.parity for verdict in verdicts) >= 5


def test_cases_of_a_campaign_pass_in_groups(pool):
    drawn = strategies.grid(SPACE, pool.describe(TORCH), "cpu", seed=4)
    cases = list(itertools.islice((one for one in drawn if one.mode == "ranks" and one.config["ranks"] <= 3), 12))
    with pool.lease(TORCH) as worker:
        verdicts = worker.run(cases, TORCH, RunOptions())
    bad = [(SPACE.label(one), verdict) for one, verdict in zip(cases, verdicts, strict=True) if verdict.kind != PASS]
    assert not bad, bad[:2]


def test_a_rank_that_dies_costs_one_verdict_and_is_named(pool):
    target = "allreduce_rmsnorm@planted.last_rank_aborts"
    ends: list[float] = []
    with pool.lease(target) as worker:
        verdicts = worker.run([case(), case(tokens=1), case(), case()], target, QUICK,
                              lambda index, verdict, history: ends.append(time.monotonic()))  # fmt: skip
    assert [verdict.kind for verdict in verdicts] == [PASS, CRASH, PASS, PASS], verdicts
    violation = verdicts[1].violations[0]
    assert violation.symptom == "exit:3"
    assert violation.message.startswith("rank 1 of 2")
    assert ends[2] - ends[1] < 5.0


def test_a_rank_that_hangs_costs_one_verdict_is_named_and_the_group_is_back_within_five_seconds(pool, tmp_path):
    file = tmp_path / "sleepy.py"
    file.write_text(
        "import time, torch\n"
        "from moe_fuzz.contract import Capabilities, Contract, declares\n"
        "from moe_fuzz.targets.torch_allreduce import allreduce_rmsnorm as sound\n"
        "@declares(contract=Contract(deterministic=True), capabilities=Capabilities(processes=('cpu',)))\n"
        "def call(x, residual, gamma, eps, *, group):\n"
        "    while x.shape[-2] == 5 and group.rank == 1:\n"
        "        time.sleep(0.01)\n"
        "    return sound(x, residual, gamma, eps, group=group)\n"
    )
    target = f"allreduce_rmsnorm@{file}:call"
    ends: list[float] = []
    with pool.lease(target) as worker:
        started = time.monotonic()
        verdicts = worker.run([case(), case(tokens=5), case(), case(ranks=3, tokens=5), case()], target, QUICK,
                              lambda index, verdict, history: ends.append(time.monotonic()))  # fmt: skip
    assert [verdict.kind for verdict in verdicts] == [PASS, HANG, PASS, HANG, PASS], verdicts
    for at, size in ((1, 2), (3, 3)):
        violation = verdicts[at].violations[0]
        assert violation.message.startswith(f"rank 1 of {size}: no verdict within 2 s"), violation.message
        assert "sleepy.py:7" in violation.site
        assert ends[at + 1] - ends[at] < 5.0
    assert ends[1] - ends[0] < QUICK.deadline + 2.0
    assert ends[-1] - started < 30


def test_no_rank_waits_in_its_call_for_what_our_own_work_costs_another(pool, tmp_path):
    """A kernel would spin meanwhile, and might give up. Here rank 1 takes a second longer to make its inputs."""
    file = tmp_path / "measured.py"
    file.write_text(
        "import time\n"
        "import torch.distributed as dist\n"
        "from moe_fuzz.contract import Capabilities, Contract, declares\n"
        "from moe_fuzz.execute import meeting, steps\n"
        "from moe_fuzz.targets.torch_allreduce import allreduce_rmsnorm as sound\n"
        "made = steps.Steps.inputs\n"
        "def slowly(self, index):\n"
        "    time.sleep(1.0 * meeting.rank())\n"
        "    return made(self, index)\n"
        "steps.Steps.inputs = slowly\n"
        "@declares(contract=Contract(), capabilities=Capabilities(processes=('cpu',)))\n"
        "def call(x, residual, gamma, eps, *, group):\n"
        "    began = time.monotonic()\n"
        "    dist.barrier(group.process_group)\n"
        "    if time.monotonic() - began > 0.6 and x.shape[-2] == 4:\n"
        "        raise RuntimeError('waited for its peer')\n"
        "    return sound(x, residual, gamma, eps, group=group)\n"
    )
    target = f"allreduce_rmsnorm@{file}:call"
    with pool.lease(target) as worker:
        verdicts = worker.run([case(), case(tokens=4)], target, RunOptions())  # the first one makes the group
    assert [verdict.kind for verdict in verdicts] == [PASS, PASS], verdicts


def test_an_error_of_one_rank_is_one_of_the_case(pool, tmp_path):
    file = tmp_path / "picky.py"
    file.write_text(
        "from moe_fuzz.contract import Capabilities, Contract, declares\n"
        "from moe_fuzz.targets.torch_allreduce import allreduce_rmsnorm as sound\n"
        "@declares(contract=Contract(deterministic=True), capabilities=Capabilities(processes=('cpu',)))\n"
        "def call(x, residual, gamma, eps, *, group):\n"
        "    found = sound(x, residual, gamma, eps, group=group)\n"
        "    if group.rank == 1 and x.shape[-2] == 2:\n"
        "        raise ValueError('not on this rank')\n"
        "    if group.rank == 1 and x.shape[-2] == 4:\n"
        "        found[1][0, 0] += 64\n"
        "    return found\n"
    )
    target = f"allreduce_rmsnorm@{file}:call"
    with pool.lease(target) as worker:
        verdicts = worker.run([case(), case(tokens=2), case(tokens=4), case()], target, QUICK)
    assert [verdict.kind for verdict in verdicts] == [PASS, VIOLATION, VIOLATION, PASS], verdicts
    assert [violation.check for violation in verdicts[1].violations] == ["error"]
    assert "rank 1" in verdicts[1].violations[0].message
    assert "not on this rank" in verdicts[1].violations[0].message
    assert "ranks" in {violation.check for violation in verdicts[2].violations}


@pytest.mark.parametrize("name", ["no_end_barrier", "sums_before_rounding"])
def test_planted_protocols_run_across_processes_too(pool, name, tmp_path):
    """The device of the planted bugs over memory that processes share: the sound one passes, at every pace."""
    file = tmp_path / f"{name}_ranks.py"
    file.write_text(
        "from moe_fuzz.contract import Capabilities, Contract, declares\n"
        f"from moe_fuzz.planted.allreduce import {name} as bug\n"
        "@declares(contract=Contract(deterministic=True), capabilities=Capabilities(processes=('cpu',), out=True))\n"
        "def call(x, residual, gamma, eps, *, group, out=None):\n"
        "    return bug(x, residual, gamma, eps, group=group, out=out)\n"
    )
    target = f"allreduce_rmsnorm@{file}:call"
    with pool.lease(target) as worker:
        verdicts = worker.run([case(tokens=20, residual=False, pace="late"), case(tokens=20, residual=False)], target,
                              QUICK)  # fmt: skip
    if name == "sums_before_rounding":
        assert [verdict.kind for verdict in verdicts] == [PASS] * 2, verdicts


def test_a_target_without_processes_refuses_the_mode(pool):
    target = "allreduce_rmsnorm@builtin"
    with pool.lease(target) as worker:
        (verdict,) = worker.run([case()], target, QUICK)
    assert verdict.kind == REJECTED
    assert "2 ranks with a process each" in verdict.detail


def test_rounds_are_cut_where_the_number_of_processes_changes():
    cases = [case(), case(), case(ranks=3), case(mode="eager")]
    assert [one.processes for one in cases] == [2, 2, 3, 1]
    assert next_part(cases) == (2, tuple(cases[:2]))
    assert next_part(cases[2:]) == (3, (cases[2],))


def test_who_is_to_blame():
    waits, calls, device, idle = 3, 1, 2, 0
    sleeping = "Thread 0x1 (most recent call first):\n  File \"/x/target.py\", line 5 in call\n"
    gathering = "Thread 0x1 (most recent call first):\n  File \"/torch/distributed/c10d.py\", line 5 in all_gather\n"
    assert blamed([waits, calls], ["", sleeping]) == [1]
    assert blamed([calls, calls, calls], [gathering, sleeping, gathering]) == [1]
    synchronizing = "Thread 0x1 (most recent call first):\n  File \"/torch/cuda/__init__.py\", line 9 in synchronize\n"
    assert blamed([calls, calls], [synchronizing, sleeping]) == [1]
    assert blamed([device, calls], [synchronizing, sleeping]) == [1]
    assert blamed([waits, idle, device], ["", "", ""]) == [1]
    assert blamed([device, waits], ["", ""]) == [0]
    assert blamed([calls, calls], [gathering, gathering]) == [0, 1]
    assert blamed([waits, waits], ["", ""]) == [0, 1]


def test_verdicts_of_ranks_become_one():
    hurt = Violation("canary", "normed:right", "bytes behind normed were written")
    wrong = Violation("bound", "normed:off", "row 0")
    elsewhere = Violation("error", "elsewhere", "rank 1: it raised")
    assert joined([Verdict(PASS, parity=True), Verdict(PASS, parity=True)]) == Verdict(PASS, parity=True)
    found = joined([Verdict(VIOLATION, (wrong,)), Verdict(VIOLATION, (wrong, hurt))])
    assert found.violations == (wrong, Violation("canary", "normed:right", "rank 1: bytes behind normed were written"))
    raised = Violation("error", "ValueError", "it raised")
    found = joined([Verdict(VIOLATION, (elsewhere,)), Verdict(VIOLATION, (raised,), spent=True)])
    assert [violation.symptom for violation in found.violations] == ["ValueError"]
    assert found.spent
