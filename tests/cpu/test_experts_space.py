"""The space of experts: what is drawn is valid and can be afforded, and what is simpler is valid too."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import islice

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import moe_fuzz.faults.align
import moe_fuzz.faults.experts
import moe_fuzz.faults.nvfp4  # noqa: F401 - they register
from moe_fuzz import faults, strategies
from moe_fuzz.case import Case, Fault, Step
from moe_fuzz.contract import PADDING_DIALECTS, Capabilities, Contract, TargetInfo
from moe_fuzz.errors import CaseError
from moe_fuzz.labels import Labels
from moe_fuzz.ops import get_space
from moe_fuzz.ops.experts import cost
from moe_fuzz.ops.experts.fields import BIASES, FIELDS
from moe_fuzz.ops.experts.fp4 import FP4_FIELDS
from moe_fuzz.ops.experts.inputs import materialize
from moe_fuzz.ops.space import Means
from moe_fuzz.restriction import RestrictedSpace, Restriction

SPACE = get_space("experts_bf16")
FP4 = get_space("experts_nvfp4")
EVERYTHING = TargetInfo("experts_bf16@all", "experts_bf16", "all", contract=Contract(accepts=PADDING_DIALECTS),
                        capabilities=Capabilities(out=True, alignment=1))  # fmt: skip
LITTLE = TargetInfo(
    "experts_bf16@little", "experts_bf16", "little",
    capabilities=Capabilities(
        dtypes=("bfloat16",), max_experts=64, max_top_k=4, strided=False, activations=("swiglu_oai",),
        gate_layouts=("interleaved",), biases=False, weight_on_input=False, expert_map=False, min_multiple_h=64,
        min_multiple_i=128, int64_ids=False, duplicate_ids=False,
    ),
)  # fmt: skip
ANY_STRIDES = replace(EVERYTHING, capabilities=replace(EVERYTHING.capabilities, any_strides=True))
BOTH = pytest.mark.parametrize("info", [EVERYTHING, LITTLE], ids=["everything", "little"])
OF_FP4 = replace(EVERYTHING, op="experts_nvfp4", capabilities=replace(
    EVERYTHING.capabilities, global_scales=("power", "fitted", "small", "large", "zero", "infinite", "nan")))
LITTLE_OF_FP4 = replace(LITTLE, op="experts_nvfp4", capabilities=replace(
    LITTLE.capabilities, layouts=("swizzled",), activation_formats=("nvfp4",), global_scales=("power",)))
BOTH_OF_FP4 = pytest.mark.parametrize("info", [OF_FP4, LITTLE_OF_FP4], ids=["everything", "little"])


@BOTH
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_rounds_are_valid_and_inside_the_capabilities(info, data):
    cases = data.draw(strategies.rounds(SPACE, info, "cuda"))
    for case in cases:
        SPACE.validate(case)
        assert SPACE.refusal(case, info) == ""
        sides = int(case.config["hidden"]), int(case.config["intermediate"])
        room = cost.OF_WIDE if max(sides) >= cost.WIDE else 1
        assert 3 * len(case.experts) * sides[0] * sides[1] <= room * cost.BUDGET or info is LITTLE
        for simpler in islice(SPACE.simplify(case), 40):
            SPACE.validate(simpler)
            assert simpler != case


def test_a_side_as_long_as_a_model_has_it_is_kept_where_the_rest_is_small() -> None:
    sizes = {"hidden": (16, 2048, 7168), "intermediate": (16, 64, 256)}

    def afforded(experts: str) -> tuple[object, object]:
        config = {"experts": experts, "hidden": 7168, "intermediate": 256}
        found = cost.afforded(config, sizes, 3 * 2048 * 64)
        return found["hidden"], found["intermediate"]

    assert [afforded(experts) for experts in ("0", "0-3", "0-40")] == [(2048, 256), (16, 256), (16, 64)]


def test_a_long_side_stays_where_all_else_is_cut_down_for_it() -> None:
    sizes = {"hidden": (1, 16, 2048, 7168), "intermediate": (1, 16, 64, 256)}

    def lengthy(experts: str, hidden: int, intermediate: int) -> tuple[object, ...]:
        config = {"experts": experts, "hidden": hidden, "intermediate": intermediate}
        found = cost.lengthy(config, sizes, (1, 2, 5, 64), 3 * 7168 * 32)
        assert 3 * len(Labels.parse(str(found["experts"]))) * found["hidden"] * found["intermediate"] <= 3 * 7168 * 32
        return found["experts"], found["hidden"], found["intermediate"]

    assert lengthy("0-63", 7168, 256) == ("0-1", 7168, 16)
    assert lengthy("0", 2048, 64) == ("0", 2048, 64)  # there is room for it
    assert lengthy("0-63", 256, 7168) == ("0-1", 16, 7168)
    assert lengthy("0-63", 256, 256) == ("0-63", 16, 16)  # no side is long: as of few elements
    drawn = list(islice(strategies.grid(SPACE, EVERYTHING, "cpu", 3), 300))
    assert sum(max(int(case.config[name]) for name in SPACE.sizes[2:]) >= cost.WIDE for case in drawn) > 15


@BOTH
def test_the_grid_is_valid_the_same_each_time_and_reaches_every_value(info):
    cases = list(islice(strategies.grid(SPACE, info, "cuda", 3), 800))
    for case in cases:
        SPACE.validate(case)
        assert SPACE.refusal(case, info) == ""
    assert cases[:50] == list(islice(strategies.grid(SPACE, info, "cuda", 3), 50))
    for axis in SPACE.axes(info):
        if axis.name in FIELDS:
            assert {case.config[axis.name] for case in cases} == set(axis.values)
    names = {fault.name for case in cases for step in case.steps for fault in step.faults}
    assert names >= {place.fault for place in SPACE.places_for({"experts": "0-7"}, info)} - {"int32_boundary"}


@BOTH_OF_FP4
def test_cases_of_nvfp4_are_valid_and_reach_every_value(info):
    cases = list(islice(strategies.grid(FP4, info, "cuda", 3), 800))
    for case in cases:
        FP4.validate(case)
        assert FP4.refusal(case, info) == ""
        for simpler in islice(FP4.simplify(case), 40):
            FP4.validate(simpler)
    for axis in FP4.axes(info):
        if axis.name in FP4_FIELDS:
            assert {case.config[axis.name] for case in cases} == set(axis.values)
    assert not [case for case in cases if case.config["hidden"] % 16 or case.config["intermediate"] % 16]
    names = {(fault.name, fault.tensor) for case in cases for step in case.steps for fault in step.faults}
    config = {"experts": "0-7", "scale_layout": "swizzled", "activations": "nvfp4"}
    assert names >= {(p.fault, p.tensor) for p in FP4.places_for(config, info)} - {("int32_boundary", "x")}
    taken = info.capabilities
    assert ("nan_scale" in {name for name, _ in names}) == ("nan" in taken.global_scales)
    linear = [case for case in cases if case.config["scale_layout"] == "linear"]
    assert not any(fault.tensor.endswith("_scales") for case in linear for fault in case.steps[0].faults)


def test_sizes_of_nvfp4_are_whole_blocks_and_what_is_not_asked_looks_equal():
    case = next(case for case in strategies.grid(FP4, OF_FP4, "cuda", 3) if case.config["activations"] == "as_given")
    assert case.config["global_scale"] == "power"
    with pytest.raises(CaseError, match="multiple of 16"):
        FP4.validate(case.with_config(hidden=24))
    with pytest.raises(CaseError, match="unknown field"):
        SPACE.validate(replace(case, op="experts_bf16"))
    assert "scale_layout=linear" in FP4.refusal(case.with_config(scale_layout="linear"), LITTLE_OF_FP4)
    assert "activations=as_given" in FP4.refusal(case, LITTLE_OF_FP4)


def test_every_fault_of_nvfp4_exists_and_is_described():
    assert {place.fault for place in FP4.places} == set(FP4.faults)
    assert set(FP4.faults) <= set(faults.FAULTS)


LARGEST = Means("cpu").more


def test_on_a_cpu_a_case_costs_no_more_than_its_budget():
    for case in islice(strategies.grid(SPACE, EVERYTHING, "cpu", 1), 400):
        one = case.mode == "eager" and max(step.tokens for step in case.steps) <= 1
        single = case.mode == "eager" and len(case.steps) == 1
        alone = SPACE.cost(case.with_step(0, replace(case.steps[0], rows=Labels.range(1), padding=Labels(), faults=())),
                           LARGEST) if single else 0.0  # fmt: skip
        most = max(LARGEST.budget(cost.CPU_BUDGET, 0.0), 2 * alone)
        assert one or SPACE.cost(case, LARGEST) <= most or case.buckets == (1,)


@pytest.mark.parametrize("space", [SPACE, FP4], ids=lambda space: space.op)
def test_on_a_cpu_most_cases_have_several_tokens(space):
    """Sizes that cost all that a case may take leave no room for tokens; but a few cost hardly more than one."""
    info = OF_FP4 if space is FP4 else EVERYTHING
    most = [max(step.tokens for step in case.steps) for case in islice(strategies.grid(space, info, "cpu", 3), 300)]
    assert sum(tokens > 1 for tokens in most) > 150
    assert 0 < sum(tokens == 0 for tokens in most) < 45


def test_every_fault_exists_and_is_described():
    assert {place.fault for place in SPACE.places} == set(SPACE.faults)
    assert set(SPACE.faults) <= set(faults.FAULTS)


@pytest.mark.parametrize("preset", sorted(SPACE.presets))
def test_a_preset_keeps_its_experts_k_activation_and_layout(preset):
    restricted = RestrictedSpace(SPACE, Restriction(presets=(preset,)))
    case = next(iter(strategies.grid(restricted, EVERYTHING, "cuda", 0)))
    fixed = dict(SPACE.presets[preset])
    assert len(case.experts) == fixed.pop("experts")
    sizes = fixed.pop("hidden"), fixed.pop("intermediate")
    assert {name: case.config[name] for name in fixed} == fixed
    assert case.config["hidden"] <= sizes[0]
    assert case.config["intermediate"] <= sizes[1]


def simple(**config):
    plain = {name: values[0] for name, values in FIELDS.items()}
    step = Step(Labels.range(4), Labels.parse("3"), (Fault("nan_rows", "x", Labels.parse("3")),))
    sizes = {"experts": "0-3", "top_k": 2, "hidden": 16, "intermediate": 16}
    return Case("experts_bf16", {**plain, **sizes, **config}, (step,), 1)


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"recipe": "integer", "activation": "swiglu_oai"}, "config.recipe"),
        ({"top_k": 5}, "config.top_k"),
        ({"hidden": 0}, "config.hidden"),
        ({"intermediate": 16.0}, "config.intermediate"),
        ({"experts": "3-0"}, "config.experts"),
        ({"bias": True}, "config.bias"),
        ({"scale": 1.0}, "config.scale"),
    ],
)
def test_a_config_that_is_none_is_refused(changes, where):
    SPACE.validate(simple())
    with pytest.raises(CaseError, match=where):
        SPACE.validate(simple(**changes))


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (Fault("nan_rows", "w13", Labels.parse("0")), "knows no fault"),
        (Fault("nan_rows", "x"), "must name rows"),
        (Fault("misaligned", "w2", Labels.parse("0")), "must name no rows"),
        (Fault("nan_rows", "x", Labels.parse("0"), 1), "only stale_rows"),
        (Fault("transposed", "b2"), "config.bias"),
        (Fault("noncontiguous", "expert_map"), "config.expert_map"),
    ],
)
def test_a_fault_that_cannot_be_laid_is_refused(fault, says):
    case = simple()
    with pytest.raises(CaseError, match=says):
        SPACE.validate(case.with_step(0, replace(case.steps[0], faults=(fault,))))


def test_biases_that_stand_alone_are_drawn_for_targets_that_take_them():
    def drawn(**can):
        info = replace(EVERYTHING, capabilities=replace(EVERYTHING.capabilities, **can))
        return Counter(case.config["bias"] for case in islice(strategies.grid(SPACE, info, "cpu", 0), 600))

    assert set(drawn()) == set(BIASES)
    assert set(drawn(separate_biases=False)) == {"none", "dtype", "float32"}
    assert set(drawn(biases=False)) == {"none"}
    case = simple(bias="none/float32")
    assert "bias=none/float32" in SPACE.features(case)
    assert {place.tensor for place in SPACE.places_for(case.config, ANY_STRIDES)} & {"b13", "b2"} == {"b2"}
    can = replace(ANY_STRIDES.capabilities, separate_biases=False)
    assert "bias=none/float32" in SPACE.refusal(case, replace(ANY_STRIDES, capabilities=can))
    assert not SPACE.refusal(case, ANY_STRIDES)


def test_layouts_of_biases_and_maps_go_with_them_and_take_any_strides():
    laid = tuple(Fault(fault, name) for fault, name in (("transposed", "b13"), ("noncontiguous", "b2"),
                                                        ("noncontiguous", "expert_map")))  # fmt: skip
    case = simple(bias="float32", expert_map="shard")
    case = case.with_step(0, replace(case.steps[0], faults=laid))
    SPACE.validate(case)
    for simpler in SPACE.simplify(case):
        SPACE.validate(simpler)
    assert any(one.config["bias"] == "none" and len(one.steps[0].faults) == 1 for one in SPACE.simplify(case))
    can = Capabilities(dtypes=("bfloat16", "float16"))
    said = SPACE.refusal(case, TargetInfo("experts_bf16@x", "experts_bf16", "x", capabilities=can))
    assert all(f"strided {fault.tensor}" in said for fault in laid)
    can = replace(can, any_strides=True)
    info = TargetInfo("experts_bf16@x", "experts_bf16", "x", capabilities=can)
    assert not SPACE.refusal(case, info)
    for config, tensors in ((case.config, {"b13", "b2", "expert_map"}), (simple().config, set())):
        places = {place.tensor for place in SPACE.places_for(config, info)}
        assert places & {"b13", "b2", "expert_map"} == tensors


def test_far_experts_have_pages_of_their_own():
    step = Step(Labels.range(4), Labels(), (Fault("int32_boundary", "w13"),))
    few, many = (replace(simple(experts=experts), steps=(step,)) for experts in ("0-63", "0-64"))
    SPACE.validate(few)
    with pytest.raises(CaseError, match="64 rows or experts"):
        SPACE.validate(many)


def test_what_a_target_does_not_take_is_named():
    said = SPACE.refusal(simple(bias="float32", expert_map="shard", dialect="minus_one"), LITTLE)
    for part in ("hidden 16", "intermediate 16", "activation=silu", "bias=float32", "expert_map=shard",
                 "dialect=minus_one", "gate_layout=first"):  # fmt: skip
        assert part in said
    unpadded = simple(dialect="garbage").with_step(0, Step(Labels.range(4)))
    assert SPACE.refusal(unpadded, replace(EVERYTHING, contract=Contract())) == ""


def test_the_simplest_case_has_nothing_simpler_but_sizes():
    plain = simple(experts="0", top_k=1).with_step(0, Step(Labels.range(1)))
    assert list(SPACE.simplify(plain)) == []
    assert [case.config["hidden"] for case in SPACE.simplify(plain.with_config(hidden=64))] == [16, 32]


def test_a_restored_case_has_the_same_tensors():
    case = simple(recipe="one_hot", expert_map="shard", bias="dtype")
    one, other = (materialize(c, 0).plain for c in (case, Case.loads(case.inline())))
    assert all((one[name] == other[name]).logical_or(one[name].isnan()).all() for name in one)
