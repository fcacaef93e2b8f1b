"""Materialized inputs: a function of labels alone, and each fault lays what it says."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_fuzz import strategies
from moe_fuzz.case import Case, Fault, Step
from moe_fuzz.contract import PADDING_DIALECTS, Capabilities, Contract, TargetInfo
from moe_fuzz.errors import CaseError
from moe_fuzz.faults import FAULTS, Canvas
from moe_fuzz.fence import open_arena
from moe_fuzz.labels import Labels
from moe_fuzz.ops import get_space
from moe_fuzz.ops.inputs import element_bits
from moe_fuzz.ops.routing.inputs import _fresh, materialize
from moe_fuzz.reference.routing import defined_rows

SPACE = get_space("topk_softmax")
GROUPED = get_space("grouped_topk")
INFO = TargetInfo("topk_softmax@all", "topk_softmax", "all", contract=Contract(padding=PADDING_DIALECTS),
                  capabilities=Capabilities(out=True, alignment=1))  # fmt: skip


def case_of(*faults: Fault, rows: int = 9, experts: int = 64, **config: object) -> Case:
    of_groups = set(GROUPED.faults) - set(SPACE.faults)
    space = GROUPED if "n_group" in config or of_groups & {fault.name for fault in faults} else SPACE
    whole = {**space.simplest, "experts": str(Labels.range(experts)), "top_k": 2} | config
    case = Case(space.op, whole, (Step(Labels.range(rows), Labels(), faults),), 5)
    space.validate(case)
    return case


@pytest.mark.parametrize("space", [SPACE, GROUPED], ids=lambda space: space.op)
@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_what_is_left_keeps_its_bits_when_rows_and_experts_go(space, data):
    case = data.draw(strategies.rounds(space, INFO, "cpu"))[0]
    step = case.steps[0]
    rows = Labels.of(data.draw(st.lists(st.sampled_from(list(step.rows)), max_size=5)) if step.rows else [])
    experts = Labels.of(data.draw(st.lists(st.sampled_from(list(case.experts)), min_size=1, max_size=9)))
    smaller = space.keep(case.with_step(0, step.keep_rows(rows)), "experts", experts)
    whole, part = materialize(case, 0), materialize(smaller, 0)
    at, columns = rows.positions(step.rows), experts.positions(case.experts)
    assert torch.equal(element_bits(part.plain["logits"]), element_bits(whole.plain["logits"][at][:, columns]))
    if case.config["bias"]:
        assert torch.equal(element_bits(part.plain["bias"]), element_bits(whole.plain["bias"][columns]))
    if case.config.get("expert_map"):
        assert torch.equal(part.plain["expert_map"], whole.plain["expert_map"][columns])
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
        ("shifted_rows", lambda x: (x.amin(dim=1) * x.amax(dim=1) > 0).all() and x.abs().amin() >= 2**3),
        ("clustered_top", lambda x: (x > 0).any() and x.isfinite().all() and x.unique().numel() > 9),
        ("huge_rows", lambda x: x.isfinite().all() and (x == torch.finfo(x.dtype).max).any() and (x < -1e4).any()),
        (
            "ladder",
            lambda x: x.isfinite().all() and (x == 0).any() and x.abs().max() >= 2**12 and x.unique().numel() > 9,
        ),
        ("ties", lambda x: all(len(set(row.tolist())) <= 3 for row in x)),
        ("tied_lane", lambda x: all(len(set(row.tolist())) <= 8 for row in x)),
        ("stale_rows", lambda x: x.isfinite().all() and x.unique().numel() > 9),
        ("tied_groups", lambda x: all(len(set(row.tolist())) <= 32 for row in x)),
        ("near_tied_groups", lambda x: x.isfinite().all()),
        ("masked_groups", lambda x: (x == -torch.inf).any(dim=1).all() and x.isfinite().any(dim=1).all()),
    ],
)
def test_a_row_fault_changes_its_rows_and_no_other(name, holds, dtype):
    rows = Labels.parse("2,5-6")
    clean = materialize(case_of(dtype=dtype), 0).plain["logits"]
    laid = materialize(case_of(Fault(name, "logits", rows), dtype=dtype), 0).plain["logits"]
    assert holds(laid[list(rows)])
    changed = (element_bits(clean) != element_bits(laid)).any(dim=1)
    assert changed.nonzero().flatten().tolist() == list(rows)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_of_shifted_rows_some_have_sigmoids_beside_which_an_epsilon_is_seen(dtype):
    """Sums of a few of them from 2^-40, below which a target's own epsilon may decide, to 2^-13: there 1e-10 is more
    than the bound of the weights."""
    rows = Labels.range(64)
    logits = materialize(case_of(Fault("shifted_rows", "logits", rows), rows=64, dtype=dtype), 0).plain["logits"]
    sums = logits.double().sigmoid().topk(4, dim=1).values.sum(dim=1)
    seen = (sums > 2.0**-40) & (sums < 2.0**-13)
    assert 8 < seen.sum() < 32
    assert (sums < 2.0**-100).any()
    assert (sums == 4).any()


def test_tied_groups_tie_and_near_ties_are_a_bit_away():
    rows = Labels.range(40)
    tied, near = (materialize(case_of(Fault(name, "logits", rows), rows=40, dtype="bfloat16"), 0).plain["logits"]
                  for name in ("tied_groups", "near_tied_groups"))  # fmt: skip
    groups = tied.view(40, 2, 32)
    assert (groups[:, 0] == groups[:, 1]).all(dim=1).sum() >= 10  # where the period divides 32
    steps = element_bits(near.view(40, 2, 32)).diff(dim=1).abs()
    assert ((steps > 0) & (steps <= 2)).any()


def test_masked_groups_are_masked_whole_or_but_for_one():
    rows = Labels.range(60)
    masked = materialize(case_of(Fault("masked_groups", "logits", rows), rows=60), 0).plain["logits"] == -torch.inf
    of_eight = masked.view(60, 8, 8).sum(dim=2)
    assert (of_eight == 8).any()
    assert (of_eight == 7).any()
    assert (of_eight == 0).any()


@pytest.mark.parametrize("experts", [1, 8, 257, 1024])
def test_the_map_is_injective_and_past_the_logical_ids(experts):
    plain = materialize(case_of(n_group=1, expert_map=True, experts=experts, top_k=1), 0).plain["expert_map"]
    assert plain.dtype == torch.int32
    assert len(set(plain.tolist())) == experts
    assert plain.min() >= experts + 8  # and past the ids of shared experts
    overlapping = Fault("overlapping_map", "expert_map")
    plain = materialize(case_of(overlapping, expert_map=True, experts=experts, top_k=1), 0).plain["expert_map"]
    assert plain.tolist() == list(range(1, experts + 1))


def test_large_labels_leave_the_map_injective():
    case = case_of(n_group=1, expert_map=True, experts=3, top_k=1).with_config(experts="0,1024,1048575")
    GROUPED.validate(case)
    assert len(set(materialize(case, 0).plain["expert_map"].tolist())) == 3
    with pytest.raises(CaseError, match="expert_map"):
        GROUPED.validate(case.with_config(experts="0,1024,1048576"))


def test_rows_of_nan_are_of_one_pattern_or_of_several():
    laid = materialize(case_of(Fault("nan_rows", "logits", Labels.range(64)), rows=64), 0).plain["logits"]
    bits = element_bits(laid)
    one = (bits == bits[:, :1]).all(dim=1)
    assert 16 <= one.sum() <= 48
    assert bits[one, 0].unique().numel() == 4


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


def test_far_columns_begin_past_2_to_the_31_where_they_are_few():
    for experts, far in ((6, True), (64, True), (65, False), (1, False)):
        inputs = materialize(case_of(Fault("far_columns", "logits"), rows=5, experts=experts, top_k=1), 0)
        with open_arena("cpu") as arena:
            logits = inputs.place(arena, Capabilities())["logits"]
            assert (logits.stride(1) * (experts - 1) >= 1 << 31) == far
            assert torch.equal(logits, inputs.plain["logits"])


@pytest.mark.parametrize("name", ["bias", "is_padding"])
def test_the_elements_of_a_vector_stand_apart(name):
    inputs = materialize(case_of(Fault("noncontiguous", name), **{name: True}), 0)
    with open_arena("cpu") as arena:
        vector = inputs.place(arena, Capabilities())[name]
        assert vector.stride(0) > 1
        assert torch.equal(vector, inputs.plain[name])


def test_a_broken_bias_has_nan_or_an_infinity_in_one_place_or_in_many():
    seen, defined, untouched = set(), 0, 0
    for seed in range(120):
        case = replace(case_of(Fault("broken_bias", "bias"), bias=True, experts=30), seed=seed)
        inputs = materialize(case, 0)
        bias, broken = inputs.plain["bias"], ~inputs.plain["bias"].isfinite()
        values = set(map(str, bias[broken].tolist()))
        assert len(values) <= 1
        untouched += not values  # whether an expert is hit is told by its label alone
        seen |= {(value, min(int(broken.sum()), 2) if not broken.all() else 30) for value in values}
        defined += bool(defined_rows(inputs.plain["logits"], bias, 2).all())
    assert seen == {(value, spread) for value in ("nan", "inf", "-inf") for spread in (1, 2, 30)}
    assert untouched < 6
    assert 10 < defined < 60, "experts masked by their bias leave rows defined"


def test_a_bias_masks_all_experts_or_all_but_a_few():
    """Who marks with -Inf what is taken goes wrong there alone: of 30 experts, half of the biases with -Inf leave
    none, and a fifth a few."""
    left = []
    for seed in range(200):
        case = replace(case_of(Fault("broken_bias", "bias"), bias=True, experts=30), seed=seed)
        bias = materialize(case, 0).plain["bias"]
        left += [int(bias.isfinite().sum())] if (bias < torch.inf).all() else []
    few, none = sum(1 <= count <= 6 for count in left), sum(count == 0 for count in left)
    assert none > 0.4 * len(left)
    assert few > 0.15 * len(left)


def test_masked_experts_come_in_runs_too():
    case = case_of(Fault("masked_experts", "logits", Labels.range(200)), rows=200, experts=96)
    masked = materialize(case, 0).plain["logits"] == -torch.inf
    runs = {tuple(row.nonzero().flatten().tolist()) for row in masked}
    assert {tuple(range(32)), tuple(range(64)), tuple(range(32, 96)), tuple(range(32, 64))} <= runs


@pytest.mark.parametrize("experts", [128, 256])
def test_the_best_experts_are_those_of_one_lane(experts):
    rows = Labels.range(300)
    plain = materialize(case_of(rows=300, experts=experts), 0).plain["logits"]
    laid = materialize(case_of(Fault("clustered_top", "logits", rows), rows=300, experts=experts), 0).plain["logits"]
    assert torch.equal(laid.abs(), plain.abs())
    found = [(row > 0).nonzero().flatten() for row in laid]
    apart = [set(at.diff().tolist()) for at in found]
    for stride in (2, 8, 32, experts // 8):
        assert {stride} in apart, stride
    assert {1} in [gaps for gaps, at in zip(apart, found, strict=True) if len(at) in (8, 16, 32)]  # a run
    assert sum(len(at) > 0 for at in found) > 250
    assert any(at.tolist() == list(range(half, half + experts // 2)) for at in found for half in (0, experts // 2))
    assert {int(at[0]) % 32 for at, gaps in zip(found, apart, strict=True) if gaps == {32}} > {0}  # not the first alone


def test_experts_of_one_lane_tie():
    """Often more of them than are taken, and not all of them alike: then a list of that lane decides which."""
    rows = Labels.range(300)
    laid = materialize(case_of(Fault("tied_lane", "logits", rows), rows=300, experts=160), 0).plain["logits"]
    lanes = [(row > 0).nonzero().flatten() for row in laid]
    decided = [row for row, lane in zip(laid, lanes, strict=True)
               if len(lane) == 5 and len(set((lane % 32).tolist())) == 1 and 1 < len(set(row[lane].tolist())) < 5]
    assert len(decided) > 10  # about 300 x 7 / 30 x 8 / 17 x 3 / 4


def test_the_best_of_a_lane_leave_nan_and_infinities_as_they_are():
    nan, faults = Fault("partial_nan", "logits", Labels.range(9)), Fault("partial_inf", "logits", Labels.range(9))
    before = materialize(case_of(nan, faults), 0).plain["logits"]
    laid = materialize(case_of(nan, faults, Fault("clustered_top", "logits", Labels.range(9))), 0).plain["logits"]
    kept = ~before.isfinite()
    assert torch.equal(element_bits(laid)[kept], element_bits(before)[kept])


@pytest.mark.parametrize("rows", [0, 1])
def test_a_transposed_view_may_be_small(rows):
    inputs = materialize(case_of(Fault("transposed", "logits"), rows=rows, experts=1, top_k=1), 0)
    with open_arena("cpu") as arena:
        assert inputs.place(arena, Capabilities())["logits"].shape == (rows, 1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_masked_experts_leave_logits_below_what_stands_for_minus_infinity(dtype):
    logits = materialize(case_of(Fault("masked_experts", "logits", Labels.range(9)), dtype=dtype), 0).plain["logits"]
    best = logits.amax(dim=1)
    assert best.isfinite().all()
    assert (best < -1e4).any()
    assert (best > 0).any()
    if dtype != "float16":
        assert (best < -1e9).any()


@pytest.mark.parametrize("name", sorted(name for name, fault in FAULTS.items() if fault.replaces))
@pytest.mark.parametrize("positions", [range(2, 7), [0, 3, 8]])
def test_a_fault_that_replaces_its_rows_sees_nothing_of_them(name, positions):
    found = []
    for before in (0.25, torch.nan):
        values = torch.full((9, 33), before, dtype=torch.bfloat16)
        FAULTS[name].lay(Canvas("logits", values, range(9), range(33), 5), positions)
        found.append(element_bits(values)[positions])
    assert torch.equal(*found)


def test_rows_that_faults_write_over_are_the_same_as_if_they_had_been_made():
    """Step by step over logits of which none was left out."""
    seen = 0
    for case in islice(strategies.grid(SPACE, INFO, "cpu", 3), 60):
        for at, step in enumerate(case.steps):
            rows, experts = tuple(step.rows), tuple(case.experts)
            logits = Canvas("logits", _fresh(case, rows, experts, case.stream(at), "cpu"), rows, experts, case.seed)
            for fault in step.faults:
                positions = fault.rows.positions(step.rows) if fault.rows else list(range(len(rows)))
                if fault.tensor != "logits" or not logits.values.numel():
                    continue
                seen += FAULTS[fault.name].replaces or fault.stream is not None
                if fault.stream is not None:
                    labels = [rows[p] for p in positions]
                    logits.values[positions] = _fresh(case, labels, experts, fault.stream, "cpu")
                else:
                    FAULTS[fault.name].lay(logits, positions)
            assert torch.equal(element_bits(materialize(case, at).plain["logits"]), element_bits(logits.values))
    assert seen > 10


def test_a_scale_of_zero_is_drawn_where_the_target_takes_it():
    scales = {axis.name: axis.values for axis in SPACE.axes(INFO)}["scale"]
    assert 0.0 in scales
    case = case_of(scale=0.0)
    assert not SPACE.refusal(case, INFO)
    declines = replace(INFO, capabilities=replace(INFO.capabilities, zero_scale=False))
    assert "a scale of 0" in SPACE.refusal(case, declines)
    assert {axis.name: axis.values for axis in SPACE.axes(declines)}["scale"] == [s for s in scales if s]
    assert "scale=0" in SPACE.features(case)


def test_as_many_shared_experts_are_drawn_as_the_target_takes():
    for most in (0, 2, 8):
        info = replace(INFO, op="grouped_topk", capabilities=replace(INFO.capabilities, n_shared=most))
        drawn = next(axis for axis in GROUPED.axes(info) if axis.name == "n_shared")
        assert set(drawn.values) | set(drawn.often) == {n for n in (0, 1, 2, 3, 4, 5, 8) if n <= most}
    many = case_of(n_group=2, topk_group=1, n_shared=8)
    assert materialize(many, 0).width == 10
    assert "n_shared>2" in GROUPED.features(many)


def test_weights_are_the_same_tensors_in_every_step():
    case = case_of(Fault("extreme_bias", "bias"), bias=True)
    case = Case(case.op, case.config, (case.steps[0], replace(case.steps[0], rows=Labels.range(3))), case.seed)
    one, other = (materialize(case, at).plain["bias"] for at in range(2))
    assert one is other


def test_the_best_of_a_row_are_few_and_tie():
    """Often about as many as win: of many more, the first ones win, and a list of a kernel has but one of them."""
    counts = []
    for seed in range(60):
        case = replace(case_of(Fault("tied_best", "logits", Labels.range(9)), experts=160), seed=seed)
        logits = materialize(case, 0).plain["logits"]
        assert set(logits.unique().tolist()) <= {1.0, 0.5, -0.25, -0.5, -0.75}
        counts += (logits == logits.amax(dim=1, keepdim=True)).sum(dim=1).tolist()
    assert sum(4 <= count <= 24 for count in counts) > 0.4 * len(counts)


def test_a_tied_bias_leaves_ties():
    few = set()
    for seed in range(60):
        case = replace(case_of(Fault("tied_bias", "bias"), bias=True, experts=30), seed=seed)
        few.add(len(materialize(case, 0).plain["bias"].unique()))
    assert few == {1, 2, 3}
