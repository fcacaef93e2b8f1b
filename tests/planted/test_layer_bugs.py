"""The planted layers: friendly input shows none of them, each shows on its own, and a finding names who did what."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from dataclasses import replace

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

import pytest
import torch

from moe_fuzz.campaign.badcase import BadCase
from moe_fuzz.campaign.examine import Examiner
from moe_fuzz.case import Case, Fault, Step
from moe_fuzz.labels import Labels
from moe_fuzz.ops import get_space
from moe_fuzz.options import RunOptions
from moe_fuzz.planted.catalog import PLANTED, get_planted
from moe_fuzz.planted.layer_catalog import LAYER
from moe_fuzz.reference.moe_layer import moe_layer
from moe_fuzz.worker.pool import Pool

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
KERNELS = ("nan_blind_layer", "raw_sentinel")
EVERY = pytest.mark.parametrize("planted", [
    pytest.param(bug, id=bug.name, marks=[pytest.mark.interpreter] if bug.name in KERNELS else []) for bug in LAYER
])  # fmt: skip
SPACE = get_space("moe_layer")


def load(name):
    planted = get_planted(name)
    return getattr(importlib.import_module(f"moe_fuzz.planted.{planted.module}"), planted.function)


def case(name: str, *steps: Step, mode: str = "eager", seed: int = 5, **changes: object) -> Case:
    dialect = get_planted(name).contract["padding"][0]
    config = {**SPACE.simplest, "experts": "0-5", "top_k": 2, "is_padding": True, "dialect": dialect, **changes}
    found = Case("moe_layer", config, steps, seed, mode, f"moe_layer@planted.{name}")
    SPACE.validate(found)
    return found


def step(tokens: int, padding: str = "", fault: str = "", rows: str = "") -> Step:
    laid = (Fault(fault, "hidden", Labels.parse(rows or padding)),) if fault else ()
    return Step(Labels.range(tokens), Labels.parse(padding), laid)


def run(runner, *cases: Case):
    return [runner.run(one, one.target, RunOptions()) for one in cases][-1]


@pytest.fixture(scope="module")
def runner():
    """A worker's runner, in this process."""
    from moe_fuzz.execute.runner import Runner

    return Runner("cpu")


def test_they_are_in_the_catalog():
    assert all(bug in PLANTED for bug in LAYER)
    assert len(LAYER) >= 6


@EVERY
def test_the_docstring_names_the_upstream_issue(planted):
    function = load(planted.name)
    assert planted.upstream in inspect.getdoc(function)
    imports = {line for line in inspect.getsource(sys.modules[function.__module__]).splitlines() if "import" in line}
    assert not [line for line in imports if "moe_fuzz" in line]


@EVERY
def test_friendly_input_shows_nothing(planted):
    """No padding, one rank, one shard, eight slots or more."""
    gen = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=gen).bfloat16()

    tensors = [draw(8, 16), draw(6, 16) / 2, draw(6, 16, 16) / 4, draw(6, 16, 8) / 4]
    options = {"scoring": "softmax", "renormalize": True, "scale": 1.0, "dialect": "distinct", "activation": "silu",
               "gate_layout": "first", "ranks": 1, "shards": 1}  # fmt: skip
    y, weights, ids = load(planted.name)(*tensors, 2, **options)
    want = moe_layer(*tensors, 2, **options)
    assert torch.equal(ids, want[2])
    assert torch.allclose(weights, want[1], atol=1e-5)
    assert torch.allclose(y.float(), want[0].float(), atol=2.0**-6 * float(want[0].abs().max()))


@pytest.mark.parametrize(("name", "cases"), [
    ("sentinel_wraps_map", [{"steps": (step(8, "0-3"),), "dp": 2, "mode": "ranks", "experts": "0-1", "top_k": 1}]),
    ("shard_offset_ignored", [{"steps": (step(4),), "ep": 2}]),
    ("bias_of_every_shard", [{"steps": (step(4),), "ep": 2, "expert_bias": "dtype"}]),
    ("amax_of_all_ranks", [{"steps": (step(4, "3", "inf_rows"),)}]),
    ("dense_combine", [{"steps": (step(4, "3", "nan_rows"),)}]),
    ("shards_added_in_16_bits", [{"steps": (step(64),), "ep": 3, "top_k": 4, "recipe": "fine", "hidden": 64,
                                  "expert_bias": "float32", "scoring": "sigmoid", "is_padding": False}]),
    ("rounded_logits_of_few_rows", [{"steps": (step(4),), "recipe": "dense"}]),
    ("gate_in_tf32", [{"steps": (step(4),), "recipe": "dense", "gate_dtype": "float32"}]),
    ("idle_rank_skipped", [{"steps": (step(8, "4-7"),), "mode": "ranks", "dp": 2, "ep": 2}]),
    ("rank_bucket_baked", [{"steps": (step(8, "1-3,5-7"), step(8, "6-7")), "mode": "ranks", "dp": 2}]),
    ("shifted_tail_block", [{"steps": (step(1),), "experts": "0-6"}, {"steps": (step(64),), "experts": "0-6"}]),
])  # fmt: skip
def test_each_shows_on_its_own_input(runner, name, cases):
    made = [case(name, *one.pop("steps"), **one) for one in map(dict, cases)]
    verdict = run(runner, *made)
    assert verdict.violations, "found nothing"
    assert verdict.violations[0].check == get_planted(name).check


def test_shapes_and_padding_alone_show_nothing(runner):
    """What each of them needs is what it was planted with: without it, the checks have nothing to say."""
    for name in ("sentinel_wraps_map", "shard_offset_ignored", "bias_of_every_shard", "amax_of_all_ranks",
                 "shards_added_in_16_bits", "dense_combine", "idle_rank_skipped", "rank_bucket_baked"):  # fmt: skip
        assert run(runner, case(name, step(8, "6-7"))).violations == ()


# ---- who did what ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def examiner():
    def examine(one: Case, *before: Case, seconds: float = 8.0):
        with Pool(1, "cpu") as pool:
            info = pool.describe(one.target)
            with pool.lease() as worker:
                verdict = worker.run((*before, one), one.target, RunOptions())[-1]
            bad = BadCase(one.target, one, verdict, tuple(before))
            return Examiner(pool, info, SPACE, RunOptions(), "cpu").examine(bad, seconds, lambda *_: None)

    return examine


@pytest.mark.interpreter
def test_the_finding_of_vllm_37758_names_both_halves(examiner):
    found = examiner(case("nan_blind_layer", step(6, "4-5", "nan_rows"), is_padding=False))
    assert found.check == "crash"
    assert found.message.startswith("the router gave row ")
    assert "the ids [0, 0], one expert twice; then the experts began: the worker died of SIGSEGV" in found.message
    assert found.case.fault_names == ("nan_rows",)
    assert found.site == "layer.py in _finalize_kernel"


@pytest.mark.interpreter
def test_a_sentinel_taken_for_an_index_is_located_and_told(examiner):
    found = examiner(case("raw_sentinel", step(3, "2"), top_k=1, edge="left"))
    assert (found.check, found.symptom) == ("fence", "w13:left:read")
    assert found.message == ("the router gave padding row 0 the ids [-1], as the dialect minus_one has it; then the "
                             "experts began: reads past the left edge of w13")  # fmt: skip


def test_culprit_and_victim_are_two_cases(examiner):
    culprit = case("shifted_tail_block", step(1), experts="0-6", top_k=2)
    innocent = case("shifted_tail_block", step(16), experts="0-4")
    victim = case("shifted_tail_block", step(16), experts="0-6", seed=6)
    found = examiner(victim, innocent, culprit)
    assert len(found.sequence) == 1
    assert found.sequence[0].steps[0].tokens == 1
    assert "the victim: it passes alone, and fails after its culprit, moe_layer T=1" in found.message


def test_culprit_and_victim_are_two_steps_of_a_case(examiner):
    one = case("shifted_tail_block", step(16), step(1), step(16), step(16), experts="0-6")
    found = examiner(one, seconds=60.0)  # to its end
    assert not found.sequence
    assert len(found.case.steps) == 2
    assert "step 1 is the victim: without what step 0 leaves behind, its calls pass" in found.message
    assert replace(found.case, steps=found.case.steps[1:]).steps[0].tokens <= 16
