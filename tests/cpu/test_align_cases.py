"""Whole cases of align, through fences, checks and binding: ours and torch's pass, in every mode that a CPU has."""

from __future__ import annotations

import os
from itertools import islice

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

import pytest

from moe_fuzz import strategies
from moe_fuzz.campaign.selftest import draw
from moe_fuzz.case import Case, Fault, Step
from moe_fuzz.execute.runner import Runner
from moe_fuzz.labels import Labels
from moe_fuzz.ops import get_space
from moe_fuzz.ops.align.space import MAX_EXPERTS, MAX_TOP_K
from moe_fuzz.options import RunOptions
from moe_fuzz.verdict import PASS, REJECTED, VIOLATION

SPACE = get_space("align")
TARGETS = ["align@torch", pytest.param("align@builtin", marks=pytest.mark.interpreter)]


def case_of(*steps, mode="eager", **config):
    whole = {**SPACE.simplest, "experts": "0-7", "top_k": 2} | config
    case = Case("align", whole, steps, 3, mode)
    SPACE.validate(case)
    return case


def step(rows, *faults):
    return Step(Labels.range(rows), Labels(), faults)


@pytest.fixture(scope="module")
def runner():
    return Runner("cpu")


@pytest.mark.parametrize("target", TARGETS)
def test_the_grid_passes(runner, target):
    info, proved, modes = runner.describe(target), 0, set()
    for case in islice(strategies.grid(SPACE, info, "cpu", 11), 70):
        verdict = runner.run(case, target, RunOptions())
        assert verdict.kind == PASS, (SPACE.label(case), verdict)
        proved += verdict.parity
        modes.add(case.mode)
    assert proved > 40
    assert modes == {"eager", "graph", "piecewise"}


@pytest.mark.parametrize("target", TARGETS)
def test_what_is_drawn_goes_as_far_as_the_contract(runner, target):
    axes = {axis.name: axis.values for axis in SPACE.axes(runner.describe(target))}
    assert (max(axes["experts"]), max(axes["top_k"])) == (MAX_EXPERTS, MAX_TOP_K) == (8192, 64)


@pytest.mark.interpreter
def test_more_slots_than_a_block_has_are_drawn_often(runner):
    """Where programs have slots of their own, each adds up what all have counted."""
    cases = islice(draw("align", runner.describe("align@builtin"), "cpu", 11), 1500)
    assert sum(case.steps[0].tokens * int(case.config["top_k"]) > 1024 for case in cases) > 75


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("expert_map", ["none", "permuted"])
def test_beyond_a_thousand_experts(runner, target, expert_map):
    for experts, top_k in (("0-1023", 8), ("0-1024", 8), ("0-1099", 8), ("0-4096", 33), ("0-8191", 64)):
        case = case_of(step(33), experts=experts, top_k=top_k, expert_map=expert_map)
        verdict = runner.run(case, target, RunOptions())
        assert (verdict.kind, verdict.parity) == (PASS, True)


@pytest.mark.parametrize("target", TARGETS)
def test_an_idle_step_between_others(runner, target):
    steps = (step(5), step(0), step(5, Fault("minus_one_ids", "ids", Labels.range(5))), step(5))
    for mode in ("eager", "graph"):
        assert runner.run(case_of(*steps, mode=mode), target, RunOptions()).kind == PASS


def test_a_plan_without_an_inverse_is_one_where_that_is_said(runner, tmp_path):
    """A user's function that declares nothing owes the op's results; one that says so may leave the inverse out."""
    file = tmp_path / "mine.py"
    file.write_text(
        "from moe_fuzz.contract import Capabilities, declares\n"
        "from moe_fuzz.targets.torch import align\n"
        "def three(ids, block_size, num_experts):\n"
        "    return align(ids, block_size, num_experts)[:3]\n"
        "says = declares(capabilities=Capabilities(absent=('inverse',)))(lambda *given: three(*given))\n"
    )
    verdict = runner.run(case_of(step(3)), f"align@{file}:three", RunOptions())
    assert verdict.kind == VIOLATION
    assert verdict.key[0] == "structure"
    assert runner.run(case_of(step(3)), f"align@{file}:says", RunOptions()).kind == PASS


def test_what_is_not_declared_is_not_asked(runner, tmp_path):
    file = tmp_path / "plain.py"
    file.write_text("from moe_fuzz.targets.torch_align import align\ndef mine(ids, block_size, num_experts):\n"
                    "    return align(ids, block_size, num_experts)\n")  # fmt: skip
    info = runner.describe(f"align@{file}:mine")
    assert info.contract.accepts == ("distinct",)
    assert not info.capabilities.expert_map
    case = case_of(step(3, Fault("minus_one_ids", "ids", Labels.range(1))))
    assert runner.run(case, info.name, RunOptions()).kind == REJECTED
    assert runner.run(case_of(step(3)), info.name, RunOptions()).kind == PASS


@pytest.mark.interpreter
def test_a_store_before_the_counts_kills_the_worker_or_shows(runner):
    """Of the whole of what is around a tensor, the bytes right before it are watched by a canary."""
    case = case_of(step(1, Fault("minus_one_ids", "ids", Labels.range(1))), experts="0-0", top_k=1)
    verdict = runner.run(case, "align@planted.counts_before_the_table", RunOptions())
    assert "canary" in {violation.check for violation in verdict.violations}
