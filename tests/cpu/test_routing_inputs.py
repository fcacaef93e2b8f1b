"""Materialized inputs: a function of labels alone, and each fault lays what it says."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_fuzz import strategies
from moe_fuzz.case import Case, Fault, Step
from moe_fuzz.contract import PADDING_DIALECTS, Capabilities, Contract, TargetInfo
from moe_fuzz.fence import open_arena
from moe_fuzz.labels import Labels
from moe_fuzz.ops import get_space
from moe_fuzz.ops.routing.inputs import element_bits, materialize
from moe_fuzz.ops.routing.space import SIMPLEST

SPACE = get_space("topk_softmax")
INFO = TargetInfo("topk_softmax@all", "topk_softmax", "all", contract=Contract(padding=PADDING_DIALECTS),
                  capabilities=Capabilities(out=True, alignment=1))  # fmt: skip


def case_of(*faults: Fault, rows: int = 9, experts: int = 64, **config: object) -> Case:
    whole = {**SIMPLEST, "experts": str(Labels.range(experts)), "top_k": 2} | config
    case = Case("topk_softmax", whole, (Step(Labels.range(rows), Labels(), faults),), 5)
    SPACE.validate(case)
    return case


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_what_is_left_keeps_its_bits_when_rows_and_experts_go(data):
    case = data.draw(strategies.rounds(SPACE, INFO, "cpu"))[0]
    step = case.steps[0]
    rows = Labels.of(data.draw(st.lists(st.sampled_from(list(step.rows)), max_size=5)) if step.rows else [])
    experts = Labels.of(data.draw(st.lists(st.sampled_from(list(case.experts)), min_size=1, max_size=9)))
    smaller = SPACE.keep(case.with_step(0, step.keep_rows(rows)), "experts", experts)
    whole, part = materialize(case, 0), materialize(smaller, 0)
    at, columns = rows.positions(step.rows), experts.positions(case.experts)
    assert torch.equal(element_bits(part.plain["logits"]), element_bits(whole.plain["logits"][at][:, columns]))
    if case.config["bias"]:
        assert torch.equal(element_bits(part.plain["bias"]), element_bits(whole.plain["bias"][columns]))
    if case.config["is_padding"]:
        assert torch.equal(part.plain["is_padding"], whole.plain["is_padding"][at])


def test_steps_differ():
    case = case_of()
    two = Case(case.op, case.config, case.steps * 2, case.seed)
    assert not torch.equal(materialize(two, 0).plain["logits"], materialize(two, 1).plain["logits"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    ("name", "holds"),
    [
        ("nan_rows", lambda x: x.isnan().all()),
        ("inf_rows", lambda x: (x == torch.inf).all()),
        ("neg_inf_rows", lambda x: (x == -torch.inf).all()),
        ("partial_nan", lambda x: 0.15 < x.isnan().double().mean() < 0.55),
        ("partial_inf", lambda x: (x == torch.inf).any() and (x == -torch.inf).any() and x.isfinite().any()),
        ("masked_experts", lambda x: (x == -torch.inf).any() and x.isfinite().any() and not x.isnan().any()),
        ("shifted_rows", lambda x: (x.amin(dim=1) * x.amax(dim=1) > 0).all() and x.abs().amin() > 2**4),
        ("huge_rows", lambda x: x.isfinite().all() and (x == torch.finfo(x.dtype).max).any() and (x < -1e4).any()),
        (
            "ladder",
            lambda x: x.isfinite().all() and (x == 0).any() and x.abs().max() >= 2**12 and x.unique().numel() > 9,
        ),
        ("ties", lambda x: all(len(set(row.tolist())) <= 3 for row in x)),
        ("stale_rows", lambda x: x.isfinite().all() and x.unique().numel() > 9),
    ],
)
def test_a_row_fault_changes_its_rows_and_no_other(name, holds, dtype):
    rows = Labels.parse("2,5-6")
    clean = materialize(case_of(dtype=dtype), 0).plain["logits"]
    laid = materialize(case_of(Fault(name, "logits", rows), dtype=dtype), 0).plain["logits"]
    assert holds(laid[list(rows)])
    changed = (element_bits(clean) != element_bits(laid)).any(dim=1)
    assert changed.nonzero().flatten().tolist() == list(rows)


def test_nan_rows_have_both_signs_and_payloads():
    for dtype in ("float32", "bfloat16", "float16"):
        laid = materialize(case_of(Fault("nan_rows", "logits", Labels.range(9)), dtype=dtype), 0).plain["logits"]
        bits = element_bits(laid)
        assert (bits < 0).any()
        assert (bits > 0).any()
        assert bits.unique().numel() == 4


@pytest.mark.parametrize("name", ["extreme_bias", "negative_bias"])
def test_bias_faults(name):
    bias = materialize(case_of(Fault(name, "bias"), bias=True), 0).plain["bias"]
    if name == "negative_bias":
        assert (bias < -1).all()
    else:
        assert (bias == -torch.inf).any()
        assert bias[bias.isfinite()].abs().max() >= 2**7
        assert (bias > 0).any()


def test_layout_faults_reach_the_target():
    case = case_of(Fault("noncontiguous", "logits"), Fault("misaligned", "logits"))
    inputs = materialize(case, 0)
    with open_arena("cpu") as arena:
        logits = inputs.place(arena, Capabilities(alignment=1))["logits"]
        assert logits.stride(0) > logits.shape[1]
        assert logits.storage_offset() in (1, 2, 3)
        assert torch.equal(logits, inputs.plain["logits"])


def test_a_transposed_view_has_the_same_values_and_packed_columns():
    gaps = set()
    for seed in range(12):
        case = replace(case_of(Fault("transposed", "logits"), rows=4, experts=6), seed=seed)
        inputs = materialize(case, 0)
        with open_arena("cpu") as arena:
            logits = inputs.place(arena, Capabilities())["logits"]
            assert logits.stride(0) == 1
            gaps.add(logits.stride(1) - 4)
            assert torch.equal(logits, inputs.plain["logits"])
            fewer = inputs.replace(logits=inputs.plain["logits"][:2]).place(arena, Capabilities())["logits"]
            assert fewer.stride() == logits.stride()  # rows of the same view
    assert min(gaps) >= 0
    assert len(gaps) > 3


@pytest.mark.parametrize("rows", [0, 1])
def test_a_transposed_view_may_be_small(rows):
    inputs = materialize(case_of(Fault("transposed", "logits"), rows=rows, experts=1, top_k=1), 0)
    with open_arena("cpu") as arena:
        assert inputs.place(arena, Capabilities())["logits"].shape == (rows, 1)
