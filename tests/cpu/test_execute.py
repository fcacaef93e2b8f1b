"""A step from inputs to verdict: what the target was given is used, what it returned is kept, checks run in order."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_fuzz.case import Case, Fault, Scalar, Step
from moe_fuzz.execute.runner import Runner
from moe_fuzz.labels import Labels
from moe_fuzz.ops import get_space
from moe_fuzz.ops.routing.space import SIMPLEST
from moe_fuzz.options import FenceOptions, RunOptions
from moe_fuzz.verdict import PASS, Verdict

ROUTERS = """
import random
import torch
from moe_fuzz import Contract, declares

def right(logits, top_k, renormalize=False, bias=None, scale=1.0, out=None):
    weights, ids = torch.softmax(logits.float(), -1).topk(top_k)
    if out is not None:
        out[0].copy_(weights)
        out[1].copy_(ids)
        return out
    return weights, ids.int()

def out_ignored(logits, top_k, out=None):
    return right(logits, top_k)

def weights_elsewhere(logits, top_k, out=None):
    weights, ids = right(logits, top_k, out=out)
    return weights.clone(), ids

@declares(contract=Contract(deterministic=True, batch_invariant=True))
def masks_its_input(logits, top_k):
    weights, ids = right(logits, top_k)
    logits.scatter_(1, ids.long(), float("-inf"))
    return weights, ids

_WEIGHTS, _IDS = torch.empty(4096), torch.empty(4096, dtype=torch.int32)

@declares(contract=Contract(deterministic=True, batch_invariant=True))
def same_buffers(logits, top_k):
    weights, ids = right(logits.double(), top_k)
    kept = _WEIGHTS[: weights.numel()].view(weights.shape), _IDS[: ids.numel()].view(ids.shape)
    kept[0].copy_(weights)
    kept[1].copy_(ids)
    return kept

_OWN = {}

@declares(contract=Contract(deterministic=True, batch_invariant=True))
def first_calls_buffers(logits, top_k):
    weights, ids = right(logits.double(), top_k)
    kept = _OWN.setdefault(weights.shape, (torch.empty_like(weights), torch.empty_like(ids)))
    kept[0].copy_(weights)
    kept[1].copy_(ids)
    return kept

@declares(contract=Contract(deterministic=True))
def heavy_and_moody(logits, top_k):
    weights, ids = right(logits, top_k)
    return weights * random.uniform(2, 3), ids

@declares(contract=Contract(deterministic=True, batch_invariant=True))
def served(logits, top_k):
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled() and not logits.is_inference()
    logits.requires_grad_(True)  # what a router that learns may do with it
    weights, ids = right(logits, top_k)
    weights.sum().backward()
    logits.requires_grad_(False)
    logits.grad = None
    return weights.detach(), ids

def index_of_32_bits(logits, top_k):
    return logits[torch.empty(1, dtype=torch.int32)]

def index_of_64_bits(logits, top_k):
    return logits[torch.empty(1, dtype=torch.int64)]

def index_that_was_written(logits, top_k):
    return logits[torch.full((1,), -1515870810)]

def contiguous_columns(logits, top_k):
    return right(logits.as_strided(logits.shape, (logits.stride(0), 1)), top_k)
"""


@pytest.fixture(scope="module")
def runner() -> Runner:
    return Runner("cpu")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "routers.py"
    path.write_text(ROUTERS)
    return path


def run(
    runner: Runner, target: str, *faults: Fault, rows: int = 5, options: RunOptions | None = None, **config: Scalar
) -> Verdict:  # fmt: skip
    whole = {**SIMPLEST, "experts": "0-7", "top_k": 2} | config
    case = Case("topk_softmax", whole, (Step(Labels.range(rows), Labels(), faults),), 3)
    get_space("topk_softmax").validate(case)
    return runner.run(case, f"topk_softmax@{target}", options or RunOptions())


@pytest.mark.parametrize(
    ("name", "symptom"), [("right", ""), ("out_ignored", "weights:out"), ("weights_elsewhere", "weights:out")]
)
def test_the_answer_comes_back_in_the_buffers_that_were_given(runner, file, name, symptom):
    assert run(runner, f"{file}:{name}").kind == PASS
    verdict = run(runner, f"{file}:{name}", out=True)
    assert [(v.check, v.symptom) for v in verdict.violations] == ([("structure", symptom)] if symptom else [])
    assert run(runner, f"{file}:{name}", out=True, rows=0).kind == PASS


def test_a_target_may_use_its_own_buffers_again(runner, file):
    """Relations call it again with fewer rows; what it returned first is still what is judged."""
    verdict = run(runner, f"{file}:same_buffers", Fault("nan_rows", "logits", Labels.parse("1")), rows=6)
    assert {v.check for v in verdict.violations} <= {"finite", "ids"}  # the row of NaN, which it does not care for
    assert all(v.where[0] == 1 for v in verdict.violations)
    assert run(runner, f"{file}:same_buffers", rows=6).kind == PASS


def test_what_a_target_has_allocated_in_one_case_it_may_return_in_the_next(runner, file):
    """Its memory was fenced, and stays where it is as long as the target holds it."""
    for rows in (6, 3, 6, 6, 3):
        assert run(runner, f"{file}:first_calls_buffers", rows=rows).kind == PASS


def test_an_index_out_of_memory_that_was_never_written_is_told(runner, file):
    for name, poison in (("index_of_32_bits", "-1515870811"), ("index_of_64_bits", "-6510615555426900571")):
        message = run(runner, f"{file}:{name}").violations[0].message
        assert message.endswith(f"; {poison} was never written: it is uninitialised memory"), message
    assert "uninitialised" not in run(runner, f"{file}:index_that_was_written").violations[0].message


def test_what_a_target_writes_into_its_inputs_is_not_there_when_it_is_called_again(runner, file):
    """Where nothing is read-only that is for no relation to see."""
    unfenced = RunOptions(fence=FenceOptions(hard=(), readonly=(), own="off"))
    assert run(runner, f"{file}:masks_its_input", options=unfenced).kind == PASS


def test_a_target_is_called_as_a_server_calls_it_whatever_mode_it_is_judged_in(runner, file):
    """Also by the relations, which call it from within the judgement."""
    verdict = run(runner, f"{file}:served", Fault("nan_rows", "logits", Labels.parse("1")), rows=6)
    assert {v.check for v in verdict.violations} <= {"finite", "ids"}, verdict
    unfenced = RunOptions(fence=FenceOptions(hard=(), readonly=(), own="off"))
    assert run(runner, f"{file}:served", rows=6, options=unfenced).kind == PASS


def test_violations_stand_in_the_order_of_attribution(runner, file):
    found = [v.check for v in run(runner, f"{file}:heavy_and_moody").violations]
    assert found == ["weights", "determinism"]


def test_a_column_stride_that_is_taken_for_1_shows(runner, file):
    assert run(runner, f"{file}:contiguous_columns").kind == PASS
    assert run(runner, f"{file}:contiguous_columns", Fault("transposed", "logits")).violations
