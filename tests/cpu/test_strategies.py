"""What is drawn is valid, inside the capabilities, reaches the dictionary, and is a function of the seed."""

from __future__ import annotations

import gc
import re
from collections import Counter
from dataclasses import replace
from itertools import combinations, islice
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import moe_fuzz.faults.align
import moe_fuzz.faults.allreduce
import moe_fuzz.faults.experts
import moe_fuzz.faults.groups
import moe_fuzz.faults.nvfp4  # noqa: F401 - they register
from moe_fuzz import faults, strategies
from moe_fuzz.campaign.drive import drive
from moe_fuzz.case import Case, Scalar, Step
from moe_fuzz.contract import PADDING_DIALECTS, Capabilities, Contract, TargetInfo
from moe_fuzz.labels import Labels
from moe_fuzz.ops import OPS, get_space
from moe_fuzz.ops.nvfp4.space import NARROW
from moe_fuzz.ops.routing.space import CPU_BUDGET, CUDA_ELEMENTS
from moe_fuzz.ops.space import Axis, Means
from moe_fuzz.restriction import RestrictedSpace, Restriction
from moe_fuzz.sequences import MODEST

REFERENCE = Path(__file__).resolve().parents[2] / "reference"
SPACE = get_space("topk_softmax")
EVERYTHING = TargetInfo(
    "topk_softmax@all",
    "topk_softmax",
    "all",
    contract=Contract(padding=PADDING_DIALECTS),
    capabilities=Capabilities(out=True, alignment=1),
)
LITTLE = TargetInfo(
    "topk_softmax@little",
    "topk_softmax",
    "little",
    capabilities=Capabilities(
        dtypes=("bfloat16",),
        min_experts=8,
        max_experts=64,
        max_top_k=4,
        renormalize=(True,),
        bias=False,
        scale=False,
        is_padding=False,
        strided=False,
        out=False,
    ),
)
GROUPED = get_space("grouped_topk")
BY_BIAS = TargetInfo(
    "grouped_topk@by_bias",
    "grouped_topk",
    "by_bias",
    capabilities=Capabilities(
        min_experts=8, min_n_group=2, max_n_group=16, min_group_size=2, group_score_by_bias=True, n_shared=1,
        expert_map=False, scorings=("sigmoid",),
    ),
)  # fmt: skip
ALL_OPS = pytest.mark.parametrize(
    ("space", "info"),
    [
        (SPACE, EVERYTHING),
        (SPACE, LITTLE),
        (get_space("topk_sigmoid"), replace(EVERYTHING, op="topk_sigmoid")),
        (GROUPED, replace(EVERYTHING, op="grouped_topk")),
        (GROUPED, BY_BIAS),
        (GROUPED, replace(BY_BIAS, capabilities=Capabilities(bias_required=True, max_top_k=8))),
    ],
    ids=["softmax", "softmax-little", "sigmoid", "grouped", "grouped-by-bias", "grouped-needs-bias"],
)
LARGEST = Means("cpu").more
relaxed = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


@ALL_OPS
@relaxed
@given(data=st.data())
def test_rounds_are_valid_affordable_and_inside_the_capabilities(space, info, data):
    cases = data.draw(strategies.rounds(space, info, "cpu"))
    assert 1 <= len(cases) <= strategies.MAX_ROUND
    assert len({tuple(case.config.items()) for case in cases}) == 1
    for case in cases:
        space.validate(case)
        assert space.refusal(case, info) == ""
        assert space.cost(case, LARGEST) <= LARGEST.budget(CPU_BUDGET, 0.0)


@ALL_OPS
def test_a_grid_of_a_graph_mode_is_affordable_or_as_small_as_can_be(space, info):
    """Where a config is too costly for a single replay, the grid has it eager; asked for replays alone, has one."""
    for modes in (None, ("graph",)):
        only = RestrictedSpace(space, Restriction(modes=modes))
        cases = list(islice(strategies.grid(only, info, "cpu", 3), 300))
        assert any(case.mode == "graph" for case in cases)
        dear = [case for case in cases if not space.affordable(case, LARGEST)]
        assert all(case.mode == "graph" and case.buckets == (1,) for case in dear) if modes else not dear


@ALL_OPS
def test_the_grid_is_valid_and_the_same_each_time(space, info):
    cases = list(islice(strategies.grid(space, info, "cpu", 3), 500))
    for case in cases:
        space.validate(case)
        assert space.refusal(case, info) == ""
    assert cases == list(islice(strategies.grid(space, info, "cpu", 3), 500))
    assert cases[:20] != list(islice(strategies.grid(space, info, "cpu", 4), 20))


@pytest.mark.parametrize("op", ["experts_bf16", "experts_nvfp4", "align", "nvfp4_quantize", "allreduce_rmsnorm"])
def test_a_target_that_takes_no_batch_of_none_is_given_none(op):
    """A tenth of the cases of vLLM's Marlin were drawn without tokens, and refused."""
    can = Capabilities(zero_tokens=False, out=True, alignment=1)
    space, drawn = get_space(op), []
    info = TargetInfo(f"{op}@served", op, "served", contract=Contract(), capabilities=can)

    @settings(max_examples=15, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(strategies.rounds(space, info, "cuda", 2))
    def draw(cases):
        drawn.extend(cases)

    draw()
    drawn.extend(islice(strategies.grid(space, info, "cuda", 0), 60))
    assert all(step.tokens for case in drawn for step in case.steps)
    other = replace(info, capabilities=replace(can, zero_tokens=True))
    assert any(not step.tokens for case in islice(strategies.grid(space, other, "cuda", 0), 300) for step in case.steps)


def test_pairwise_covers_every_pair():
    import random

    axes = [Axis("a", range(5)), Axis("b", range(3)), Axis("c", range(4)), Axis("d", range(2))]
    rows = list(strategies.pairwise(axes, random.Random(0)))
    for one, other in combinations(axes, 2):
        pairs = {(row[one.name], row[other.name]) for row in rows}
        assert len(pairs) == len(one.values) * len(other.values)
    assert len(rows) < 5 * 3 * 4 * 2 / 2


def test_pairwise_brings_every_value_early():
    import random

    axes = [Axis("big", range(40)), Axis("other", range(38)), Axis("fault", range(30)), Axis("flag", range(2))]
    for seed in range(5):
        rows = list(islice(strategies.pairwise(axes, random.Random(seed)), 45))
        assert {row["fault"] for row in rows} == set(range(30))


def _grid_of(op, count, *faults):
    """The first cases on a GPU for a target that takes whatever there is, and what is laid in each."""
    accepts = ("distinct", "minus_one", "num_experts", "garbage")
    can = replace(EVERYTHING.capabilities, any_strides=True, nan_weights=True, nan_biases=True)
    info = replace(EVERYTHING, op=op, contract=Contract(accepts=accepts, padding=PADDING_DIALECTS), capabilities=can)
    space = RestrictedSpace(get_space(op), Restriction(faults=faults or None))
    cases = list(islice(strategies.grid(space, info, "cuda", 1), count))
    return cases, [{(fault.name, fault.tensor) for step in case.steps for fault in step.faults} for case in cases]


@pytest.mark.parametrize("op", ["topk_softmax", "grouped_topk", "align", "experts_bf16", "nvfp4_quantize"])
def test_the_grid_lays_every_fault_early(op):
    places = get_space(op).places
    _, laid = _grid_of(op, 6 * len(places))
    assert {(place.fault, place.tensor) for place in places} <= set().union(*laid)


@pytest.mark.parametrize(("op", "fault"), [("align", "int32_boundary"), ("topk_softmax", "int32_boundary"),
                                           ("experts_bf16", "wide_ids"),
                                           ("grouped_topk", "negative_bias")])  # fmt: skip
def test_what_the_grid_asks_for_is_laid(op, fault):
    """Every second row asks for the only fault there is. It needs few rows, or a mode, or a bias: where a row
    has them not it was dropped, and its pairs met by no case."""
    _, laid = _grid_of(op, 200, fault)
    assert sum(any(name == fault for name, _ in found) for found in laid) > 75


def test_the_grid_has_large_numbers_of_tokens_with_nearly_every_fault_of_rows():
    """All but those whose one pair with a large number fell to a graph, which holds no such number."""
    cases, laid = _grid_of("align", 900)
    large = set().union(*(found for case, found in zip(cases, laid, strict=True) if max(case.buckets) > MODEST))
    on_rows = {(place.fault, place.tensor) for place in get_space("align").places if place.on_rows}
    assert len(on_rows - large) <= 2 < len(on_rows)


def test_every_fault_of_a_space_exists_and_is_described():
    for op in OPS:
        assert {place.fault for place in get_space(op).places} == set(get_space(op).faults)
    described = {fault for op in OPS for fault in get_space(op).faults}
    assert set(faults.FAULTS) == described > set(GROUPED.faults) > set(SPACE.faults)


def test_every_preset_of_a_space_is_valid():
    for space, info in ((SPACE, EVERYTHING), (GROUPED, replace(EVERYTHING, op="grouped_topk"))):
        allowed = {axis.name: axis.values for axis in space.axes(info)}
        for name, preset in space.presets.items():
            assert all(value in allowed[key] for key, value in preset.items()), name
            config = space.complete({axis: values[0] for axis, values in allowed.items()} | dict(preset), info)
            assert {key: config[key] for key in preset if key != "experts"} == {
                key: value for key, value in preset.items() if key != "experts"}, name  # fmt: skip
            space.validate(strategies.make_case(space, config, 3, 1, (), 1, info.name))


def test_cases_choose_among_groups():
    info = replace(EVERYTHING, op="grouped_topk")
    cases = list(islice(strategies.grid(GROUPED, info, "cpu", 0), 300))
    assert sum(int(case.config["topk_group"]) < int(case.config["n_group"]) for case in cases) > 100
    assert any(case.config["n_group"] == len(case.experts) > 1 for case in cases)
    assert any((len(case.experts) // int(case.config["n_group"])) % 2 for case in cases)


def test_groups_are_of_any_number_and_any_number_of_them_stays():
    drawn: list[tuple[int, int, int, int]] = []
    info = TargetInfo("grouped_topk@x", "grouped_topk", "x")

    def note(cases: tuple[Case, ...]) -> None:
        n_group, kept, top_k = (int(cases[0].config[name]) for name in ("n_group", "topk_group", "top_k"))
        drawn.append((n_group, kept, len(cases[0].experts) // n_group, top_k))

    drive(strategies.rounds(GROUPED, info, "cpu", most=1), 7, 600, note)
    numbers = {n_group for n_group, *_ in drawn}
    assert len(numbers) > 25
    assert max(numbers) > 64
    assert numbers & {7, 9, 11, 13, 14, 15, 18, 20}, "no list has all of them"
    for what, least, met in (
        ("all groups stay, and their number is no power of two", 0.03,
         lambda n, kept, size, k: n == kept and n & (n - 1)),
        ("all that stay are taken", 0.08, lambda n, kept, size, k: kept < n and k == kept * size),
        ("an expert a group", 0.08, lambda n, kept, size, k: n > size == 1),
        ("more than 16 groups stay", 0.01, lambda n, kept, size, k: kept > 16),
    ):  # fmt: skip
        assert sum(bool(met(*one)) for one in drawn) > least * len(drawn), what


@pytest.mark.parametrize(("device", "most"), [("cpu", 1), ("cuda", 24)])
def test_a_fault_of_many_forms_is_drawn_often(device: str, most: int):
    """The best experts of a row in one lane: of few lanes a kernel has, and of few rows a case."""
    laid: list[tuple[str, ...]] = []
    info = replace(EVERYTHING, name="topk_softmax@x")
    drive(strategies.rounds(SPACE, info, device, most), 11, 100,
          lambda cases: laid.extend(case.fault_names for case in cases))  # fmt: skip
    lanes, others = (sum(name in names for names in laid) / len(laid) for name in ("clustered_top", "shifted_rows"))
    assert lanes > 0.06
    assert lanes > 2 * others
    assert all(len(set(names)) == len(names) for names in laid)


def _any_strides(op: str) -> TargetInfo:
    return TargetInfo(f"{op}@x", op, "x", capabilities=Capabilities(out=True, alignment=1, any_strides=True))


def _drawn(op: str, rounds: int) -> list[Case]:
    drawn: list[Case] = []
    drive(strategies.rounds(get_space(op), _any_strides(op), "cpu", 1), 5, rounds,
          lambda cases: drawn.extend(cases[:2]))  # fmt: skip
    return drawn


@pytest.mark.parametrize("op", ["grouped_topk", "experts_bf16", "experts_nvfp4", "allreduce_rmsnorm", "moe_layer"])
def test_every_tensor_has_a_layout_of_its_own_often_enough(op: str):
    """A stride is forgotten of one tensor: of ten, each must not be strided in one case of a hundred alone."""
    space, info, drawn = get_space(op), _any_strides(op), _drawn(op, 400)
    single = [case for case in drawn if len(case.steps) == 1]
    laid = [Counter(fault.tensor for fault in case.steps[0].faults if fault.name in strategies.LAYOUTS)
            for case in single]  # fmt: skip
    for place in space.places:
        if place.fault == "noncontiguous":
            there = [of for case, of in zip(single, laid, strict=True) if place in space.places_for(case.config, info)]
            assert sum(of[place.tensor] > 0 for of in there) > 0.1 * len(there), place.tensor
    assert sum(not of for of in laid) > 0.45 * len(laid), "what is packed and aligned has paths of its own"


@pytest.mark.parametrize("op", OPS)
def test_strides_that_nobody_declared_are_in_the_contract(op: str):
    """Who declares nothing has the docstring alone: where that says [T, k] and no more, packed is a fair reading."""
    space, drawn = get_space(op), []
    info = TargetInfo(f"{op}@user", op, "user", contract=Contract(graph=False), declared=False)
    drive(strategies.rounds(space, info, "cpu", 1), 5, 300, lambda cases: drawn.extend(cases[:2]))
    strided = {re.sub(r"\d$", "", fault.tensor) if op == "allreduce_rmsnorm" else fault.tensor
               for case in drawn for step in case.steps for fault in step.faults
               if fault.name in ("noncontiguous", "transposed", "int32_boundary", "far_columns")}  # fmt: skip
    module = {"nvfp4_quantize": "nvfp4", "topk_softmax": "routing", "topk_sigmoid": "routing"}.get(op, op)
    told = (REFERENCE / f"{module}.py").read_text()
    assert strided or op == "moe_layer"  # which gives them to who declares any strides alone
    for tensor in strided:
        assert re.search(rf"^    {tensor}: .*any strides", told, re.M), tensor


def test_no_rows_are_few_cases():
    """They show whether a call of none runs. Of wide rows of swizzled scales hardly anything else was affordable."""
    for op in ("topk_softmax", "allreduce_rmsnorm", "experts_bf16", "nvfp4_quantize"):
        single = [case for case in _drawn(op, 300) if len(case.steps) == 1]
        assert 0 < sum(not case.steps[0].tokens for case in single) < 0.07 * len(single), op


def test_swizzled_scales_are_often_more_than_a_tile_of_128_rows():
    """And most often of narrow rows, so that a kernel with a program for each block affords them: but half of them have
    a tile beside the first one as well."""
    drawn = _drawn("nvfp4_quantize", 300)
    swizzled = [case for case in drawn if len(case.steps) == 1 and case.config["layout"] == "swizzled"]
    beyond = [len(Labels.parse(str(case.config["blocks"]))) for case in swizzled if case.steps[0].tokens > 128]
    assert len(beyond) > 0.08 * len(swizzled)
    assert sum(blocks <= max(NARROW) for blocks in beyond) > 0.5 * len(beyond)
    assert sum(blocks > 4 for blocks in beyond) > 0.05 * len(swizzled)


@pytest.mark.parametrize("op", ["topk_sigmoid", "grouped_topk"])
def test_rows_tie_often_and_a_bias_leaves_them_tied(op: str):
    """A bias of many values has no two experts tie, and a sort that loses the order of ties is not seen beside it."""
    drawn = [case for case in _drawn(op, 1500) if len(case.steps) == 1]  # of 300, the share is 2 % off either way
    tied = [case for case in drawn if {"tied_best", "tied_lane"} & set(case.fault_names)]
    assert len(tied) > {"topk_sigmoid": 0.2, "grouped_topk": 0.13}[op] * len(drawn)  # without `sometimes` 0.12, 0.05
    biased = [case for case in tied if case.config["bias"]]
    assert sum("tied_bias" in case.fault_names for case in biased) > 0.4 * len(biased)


def test_an_activation_that_clamps_often_meets_a_nan_in_a_bias():
    """In a gate alone: a NaN of x is in both halves, and shows whatever becomes of either."""
    space, drawn = get_space("experts_bf16"), []
    info = TargetInfo("experts_bf16@all", "experts_bf16", "all", capabilities=Capabilities(nan_biases=True))
    drive(strategies.rounds(space, info, "cpu", 1), 5, 400, lambda cases: drawn.extend(cases[:2]))
    oai = [case for case in drawn if len(case.steps) == 1 and case.steps[0].tokens
           and case.config["activation"] == "swiglu_oai" and case.config["bias"] != "none"]  # fmt: skip
    assert sum("broken_biases" in case.fault_names for case in oai) > 0.25 * len(oai)
    careless = replace(info, capabilities=Capabilities())
    assert "broken_biases" not in {place.fault for place in space.places_for(oai[0].config, careless)}


def test_what_kernels_have_a_path_for_is_drawn_often():
    """One group, as half of the models with such routers have it, and one expert a token."""
    configs: list[dict[str, Scalar]] = []
    space = get_space("grouped_topk")
    info = TargetInfo("grouped_topk@builtin", "grouped_topk", "builtin")
    drive(strategies.rounds(space, info, "cuda", most=1), 7, 400, lambda cases: configs.append(cases[0].config))
    for field, least in (("n_group", 0.2), ("top_k", 0.1)):
        assert sum(config[field] == 1 for config in configs) > least * len(configs), field


def test_one_group_and_nothing_else_is_drawn_with_each_dialect():
    """A path of its own, to another kernel: what it says of the flags is told again there."""
    drawn: list[Case] = []
    info = replace(EVERYTHING, name="grouped_topk@all", op="grouped_topk")
    drive(strategies.rounds(GROUPED, info, "cpu", 1), 5, 1000, lambda cases: drawn.extend(cases[:2]))
    plain = Counter(case.config["padding"] for case in drawn
                    if case.config["n_group"] == case.config["topk_group"] and case.config["is_padding"]
                    and not case.config["n_shared"] and not case.config["expert_map"])  # fmt: skip
    for dialect in PADDING_DIALECTS:
        assert plain[dialect] > 0.006 * len(drawn), dialect


def test_a_device_sees_sizes_that_narrow_indices_do_not_hold():
    for space in (SPACE, GROUPED):
        cases = list(islice(strategies.grid(space, replace(EVERYTHING, op=space.op), "cuda", 0), 800))
        assert sum(max(case.buckets) * int(case.config["top_k"]) > 2**16 for case in cases) >= 6
        assert all(case.steps[0].tokens * len(case.experts) <= CUDA_ELEMENTS for case in cases)


@pytest.mark.parametrize("left", [range(0, 128, 2), range(100), range(7), [5]])
def test_groups_follow_the_experts_that_are_left(left):
    config = {**GROUPED.simplest, "experts": "0-127", "top_k": 8, "n_group": 8, "topk_group": 4}
    case = Case("grouped_topk", config, (Step(Labels.range(2)),), 1)
    kept = GROUPED.keep(case, "experts", Labels.of(left))
    GROUPED.validate(kept)
    assert len(kept.experts) % int(kept.config["n_group"]) == 0
    assert kept.config["n_group"] == {64: 8, 100: 5, 7: 7, 1: 1}[len(left)]

@pytest.mark.parametrize("space", [SPACE, GROUPED], ids=lambda space: space.op)
@relaxed
@given(data=st.data())
def test_simplify_gives_valid_simpler_cases(space, data):
    case = data.draw(strategies.rounds(space, replace(EVERYTHING, op=space.op), "cpu"))[0]
    for simpler in space.simplify(case):
        space.validate(simpler)
        assert simpler != case
        assert len(simpler.experts) <= len(case.experts)
        assert space.features(simpler) is not None


def test_features_of_a_smaller_case_are_features_of_the_larger_one():
    """What explains a violation must still hold in the bigger case it came from (monotone classes)."""
    big = next(
        c for c in strategies.grid(SPACE, EVERYTHING, "cpu", 0) if len(c.experts) > 512 and c.steps[0].tokens > 8
    )
    small = big.with_config(experts="0-15", top_k=1)
    sizes = {feature for feature in SPACE.features(small) if feature[0] in "EkT" and ">" in feature}
    assert sizes
    assert sizes <= SPACE.features(big)


def test_padding_is_a_tail_or_lies_anywhere():
    config = SPACE.complete({axis.name: axis.values[0] for axis in SPACE.axes(EVERYTHING)}, EVERYTHING)

    def padding(count, tokens=16, seed=3):
        step = strategies.make_case(SPACE, config, tokens, count, (), seed, EVERYTHING.name).steps[0]
        return list(step.padding)

    assert [padding(count) for count in (0, 1, 4)] == [[], [12, 13, 14, 15], list(range(16))]
    assert [len(padding(count)) for count in (5, 6)] == [4, 8]
    assert any(15 not in padding(6, seed=seed) for seed in range(9))
    assert padding(6, tokens=0) == []
    assert len(padding(6, tokens=8191)) == 64  # so that a case stays a line


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_a_config_that_is_compiled_is_kept_for_longer_and_one_that_is_not_for_a_round(data):
    info = replace(EVERYTHING, op=GROUPED.op)
    ready = replace(info, capabilities=replace(info.capabilities, compiles=False))
    long, short = (data.draw(strategies.rounds(GROUPED, one, "cuda")) for one in (info, ready))
    assert len(short) <= strategies.MAX_ROUND
    assert len(long) <= strategies.MAX_ROUND * strategies.MAX_PARTS
    for cases in (long, short):
        assert len({repr(sorted(case.config.items())) for case in cases}) == 1
    assert len({case.digest for case in long}) == len(long)


def test_what_is_compiled_once_is_run_in_several_ways_with_several_faults():
    info, drawn = replace(EVERYTHING, op=GROUPED.op), []
    drive(strategies.rounds(GROUPED, info, "cuda"), 3, 30, drawn.append)
    long = max(drawn, key=len)
    assert len(long) > 2 * strategies.MAX_ROUND
    assert len({case.mode for case in long}) > 1
    assert len({fault for case in long for fault in case.fault_names}) > 4


def test_a_round_leaves_hypothesis_no_strategies_to_keep():
    """A list strategy of its own for each round is 20 MiB in all: Hypothesis keeps 1,024 for each thread."""

    def kept() -> int:
        gc.collect()
        return sum(type(one).__name__ == "LazyStrategy" for one in gc.get_objects())

    rounds = strategies.rounds(SPACE, EVERYTHING, "cpu")
    drive(rounds, 1, 50, lambda cases: None)
    before = kept()
    drive(rounds, 2, 200, lambda cases: None)
    assert kept() - before < 40
