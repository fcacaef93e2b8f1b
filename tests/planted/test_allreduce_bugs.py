"""The planted all-reduces: friendly input shows none of them, and each shows on its own."""

from __future__ import annotations

import importlib
import inspect
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

import pytest
import torch

from moe_fuzz.case import Case, Fault, Step
from moe_fuzz.execute.peers import Peers
from moe_fuzz.labels import Labels
from moe_fuzz.ops import get_space
from moe_fuzz.options import RunOptions
from moe_fuzz.planted.allreduce_catalog import ALLREDUCE
from moe_fuzz.planted.catalog import PLANTED, get_planted
from moe_fuzz.reference.allreduce_rmsnorm import allreduce_rmsnorm

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
KERNELS = ("workspace_in_whole_blocks", "gamma_in_whole_vectors", "clears_whole_vectors_of_out")
EVERY = pytest.mark.parametrize("planted", [
    pytest.param(bug, id=bug.name, marks=[pytest.mark.interpreter] if bug.name in KERNELS else []) for bug in ALLREDUCE
])  # fmt: skip
SPACE = get_space("allreduce_rmsnorm")


def load(name):
    planted = get_planted(name)
    return getattr(importlib.import_module(f"moe_fuzz.planted.{planted.module}"), planted.function)


def case(name: str, *steps: Step, mode: str = "eager", seed: int = 5, **changes: object) -> Case:
    found = Case("allreduce_rmsnorm", {**SPACE.simplest, **changes}, steps or (step(4),), seed, mode,
                 f"allreduce_rmsnorm@planted.{name}")  # fmt: skip
    SPACE.validate(found)
    return found


def step(tokens: int, fault: str = "", tensor: str = "x0", rows: str = "") -> Step:
    laid = (Fault(fault, tensor, Labels.parse(rows)),) if fault else ()
    return Step(Labels.range(tokens), Labels(), laid)


@pytest.fixture(scope="module")
def runner():
    """A worker's runner, in this process."""
    from moe_fuzz.execute.runner import Runner

    return Runner("cpu")


def test_they_are_in_the_catalog():
    assert all(bug in PLANTED for bug in ALLREDUCE)
    assert len(ALLREDUCE) >= 15
    assert {bug.check for bug in ALLREDUCE if bug.only} >= set(SPACE.checks)


@EVERY
def test_the_docstring_names_the_upstream_issue(planted):
    function = load(planted.name)
    assert planted.upstream in inspect.getdoc(function)
    imports = {line for line in inspect.getsource(sys.modules[function.__module__]).splitlines() if "import" in line}
    assert not [line for line in imports if "moe_fuzz" in line]


@EVERY
def test_friendly_input_shows_nothing(planted):
    """Two ranks in step, one call, 16 rows of 256 columns, numbers of ordinary size, everything of one dtype."""
    gen = torch.Generator().manual_seed(0)
    x, residual = (torch.randn(shape, generator=gen).bfloat16() for shape in ((2, 16, 256), (16, 256)))
    gamma = torch.randn(256, generator=gen).bfloat16()
    group = Peers(2, None, torch.device("cpu"), 16 * 256 * 2, "phases", "together", 0)
    contract = planted.contract
    rounds = contract.get("rounds", ("residual",))
    if planted.name in ("workspace_in_whole_blocks", "zero_is_not_there_yet"):
        x, residual = x.abs() + 1, residual.abs() + 1  # 8192 elements are whole blocks; nothing is -0
    normed, residual_out = load(planted.name)(x, residual, gamma, 1e-6, group=group)
    group.check()
    wanted = allreduce_rmsnorm(x, residual, gamma, 1e-6, rounds=rounds)
    if planted.name not in ("stale_residual", "sums_before_rounding", "flags_by_size"):
        assert torch.equal(residual_out[0], wanted[1])
        assert torch.equal(residual_out[1], wanted[1])
        assert torch.allclose(normed.float(), wanted[0].float().expand(2, -1, -1), rtol=2.0**-6, atol=1e-3)
    assert normed.shape == x.shape


@pytest.mark.parametrize(("name", "given"), [
    ("no_end_barrier", {"pace": "ahead", "burst": 3}),
    ("flag_before_data", {"pace": "random", "burst": 3}),
    ("memory_of_the_world", {"pace": "random", "burst": 3, "groups": 2}),
    ("own_part_first", {"ranks": 5, "dtype": "float32", "recipe": "wide"}),
    ("rotated_partitions", {"steps": (step(16),), "ranks": 4, "dtype": "float32", "recipe": "wide"}),
    ("sums_before_rounding", {"hidden": 256}),
    ("mean_times_ranks", {"ranks": 3, "dtype": "float32", "recipe": "integer", "hidden": 256}),
    ("stale_residual", {}),
    ("cluster_of_seven", {"hidden": 896}),
    ("second_pass_is_packed", {"steps": (step(3, "noncontiguous", "residual"),)}),
    ("gamma_taken_for_x", {"gamma_dtype": "float32"}),
    ("two_shot_tail", {"steps": (step(5),)}),
    ("done_before_committed", {"steps": (step(1),), "out": True}),
    ("normed_in_dtype_of_gamma", {"gamma_dtype": "float32"}),
    ("empty_batch_raises", {"steps": (step(0),)}),
    ("flags_by_size", {"steps": (step(9),)}),
    ("pairs_of_vectors", {"steps": (step(1),), "hidden": 8}),
    ("tile_with_nan_in_float64", {"steps": (step(8, "nan_rows", "x1", "3"),), "dtype": "float32", "hidden": 512}),
    ("few_rows_by_other_arithmetic", {"steps": (step(64),), "dtype": "float32", "hidden": 512}),
    ("residual_read_after_its_store", {"out": "in_place"}),
    ("one_stage_adds_before_rounding", {"hidden": 256}),
    ("two_stages_by_other_arithmetic", {"steps": (step(64),), "dtype": "float32", "hidden": 512}),
    ("order_of_arrival", {"ranks": 8, "dtype": "float32", "recipe": "wide", "hidden": 256}),
])  # fmt: skip
def test_each_shows_on_its_own_input(runner, name, given):
    planted, fired = get_planted(name), set()
    steps = given.pop("steps", ())
    for seed in range(20):
        made = case(name, *steps, seed=seed, **given)
        fired |= {violation.check for violation in runner.run(made, made.target, RunOptions()).violations}
        if planted.check in fired:
            break
    assert planted.check in fired
    if planted.only:
        assert fired == {planted.check}


@pytest.mark.parametrize("pace", ["together", "late", "ahead", "random"])
def test_a_sound_protocol_shows_nothing_however_ranks_run(runner, pace):
    """The device on which bugs are planted is right itself, at any pace, in bursts, with two groups at once."""
    for tokens in (0, 1, 5):
        made = case("sums_before_rounding", step(tokens), pace=pace, burst=3, groups=2, ranks=4, residual=False,
                    out=True)  # fmt: skip
        assert not runner.run(made, made.target, RunOptions()).violations
