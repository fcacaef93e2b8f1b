"""What is drawn is valid, inside the capabilities, reaches the dictionary, and is a function of the seed."""

from __future__ import annotations

from itertools import combinations, islice

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_fuzz import faults, strategies
from moe_fuzz.contract import PADDING_DIALECTS, Capabilities, Contract, TargetInfo
from moe_fuzz.ops import get_space
from moe_fuzz.ops.routing.space import CPU_BUDGET
from moe_fuzz.ops.space import Axis

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
relaxed = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("info", [EVERYTHING, LITTLE], ids=lambda info: info.provider)
@relaxed
@given(data=st.data())
def test_rounds_are_valid_affordable_and_inside_the_capabilities(info, data):
    cases = data.draw(strategies.rounds(SPACE, info, "cpu"))
    assert 1 <= len(cases) <= strategies.MAX_ROUND
    assert len({tuple(case.config.items()) for case in cases}) == 1
    for case in cases:
        SPACE.validate(case)
        assert SPACE.refusal(case, info) == ""
        assert SPACE.cost(case, "cpu") <= CPU_BUDGET


@pytest.mark.parametrize("info", [EVERYTHING, LITTLE], ids=lambda info: info.provider)
def test_the_grid_is_valid_and_the_same_each_time(info):
    cases = list(strategies.grid(SPACE, info, "cpu", 3))
    for case in cases:
        SPACE.validate(case)
        assert SPACE.refusal(case, info) == ""
    assert cases == list(strategies.grid(SPACE, info, "cpu", 3))
    assert cases[:20] != list(islice(strategies.grid(SPACE, info, "cpu", 4), 20))


def test_pairwise_covers_every_pair():
    import random

    axes = [Axis("a", range(5)), Axis("b", range(3)), Axis("c", range(4)), Axis("d", range(2))]
    rows = list(strategies.pairwise(axes, random.Random(0)))
    for one, other in combinations(axes, 2):
        pairs = {(row[one.name], row[other.name]) for row in rows}
        assert len(pairs) == len(one.values) * len(other.values)
    assert len(rows) < 5 * 3 * 4 * 2 / 2


def test_every_fault_of_a_space_exists_and_is_described():
    named = {place.fault for place in SPACE.places}
    assert named == set(faults.FAULTS) == set(SPACE.faults)


@relaxed
@given(data=st.data())
def test_simplify_gives_valid_simpler_cases(data):
    case = data.draw(strategies.rounds(SPACE, EVERYTHING, "cpu"))[0]
    for simpler in SPACE.simplify(case):
        SPACE.validate(simpler)
        assert simpler != case
        assert len(simpler.experts) <= len(case.experts)
        assert SPACE.features(simpler) is not None


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
