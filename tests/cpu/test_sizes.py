"""Sizes between those of a dictionary."""

from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings

from moe_fuzz import strategies
from moe_fuzz.case import Case
from moe_fuzz.contract import Capabilities, TargetInfo
from moe_fuzz.errors import UsageError
from moe_fuzz.labels import Labels
from moe_fuzz.ops import get_space
from moe_fuzz.ops.routing.space import EXPERTS
from moe_fuzz.sizes import SHARE, loosened


def test_a_size_stays_above_the_next_smaller_one_of_the_dictionary() -> None:
    chosen = random.Random(1)
    for size in EXPERTS:
        below = max((other for other in EXPERTS if other < size), default=0)
        found = {loosened(size, EXPERTS, chosen) for _ in range(400)}
        assert size in found
        assert all(below < other <= size for other in found)
        assert (len(found) > 1) == (size - below > 1)
    assert {loosened(0, (0, 1, 2), chosen) for _ in range(40)} == {0}


def test_most_sizes_are_those_of_the_dictionary() -> None:
    chosen = random.Random(2)
    drawn = [loosened(1023, EXPERTS, chosen) for _ in range(4000)]
    assert drawn.count(1023) / len(drawn) == pytest.approx(1 - 1 / SHARE, abs=0.03)
    multiples = {size for size in drawn if size % 32 == 16}
    assert len(multiples) == len(range(592, 1023, 32)), "each of them, though there are few"


def test_what_a_target_does_not_take_is_not_drawn() -> None:
    chosen = random.Random(3)
    found = {loosened(576, EXPERTS, chosen, lambda size: size % 8 == 0) for _ in range(400)}
    assert len(found) > 2
    assert all(size % 8 == 0 for size in found)
    assert {loosened(576, EXPERTS, chosen, lambda size: False) for _ in range(40)} == {576}


@pytest.mark.parametrize("op", ["topk_softmax", "grouped_topk", "align", "experts_bf16", "experts_nvfp4", "moe_layer"])
def test_configs_have_numbers_of_experts_that_no_list_names(op: str) -> None:
    space, counts = get_space(op), set()
    info = TargetInfo(f"{op}@x", op, "x", capabilities=Capabilities(max_experts=300, min_multiple_h=16))
    listed = {int(count) for count in space.axes(info)[0].values}

    @seed(5)
    @settings(max_examples=150, database=None, deadline=None, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(strategies.configs(space, info))
    def draw(config: dict) -> None:
        counts.add(len(Labels.parse(str(config["experts"]))))
        assert op == "moe_layer" or int(config.get("hidden", 16)) % 16 == 0

    draw()
    assert len(counts - listed) > 3
    assert max(counts) <= 300


@pytest.mark.parametrize("multiple", [32, 11], ids=["of_lanes", "prime"])
@pytest.mark.parametrize("op", ["topk_softmax", "grouped_topk", "align", "experts_bf16", "experts_nvfp4", "moe_layer"])
def test_a_target_is_given_the_numbers_of_experts_that_it_takes(op: str, multiple: int) -> None:
    space, counts = get_space(op), set()
    info = TargetInfo(f"{op}@x", op, "x", capabilities=Capabilities(max_experts=300, experts_multiple=multiple))

    @seed(6)
    @settings(max_examples=12, database=None, deadline=None, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(strategies.rounds(space, info, "cpu"))
    def draw(cases: tuple[Case, ...]) -> None:
        for case in cases:
            counts.add(len(case.experts))
            assert not space.refusal(case, info)

    draw()
    assert {count % multiple for count in counts} == {0}
    odd = Case(op, {**case_of(op, multiple).config, "experts": "0-9"}, case_of(op, multiple).steps, 1)
    assert "10 experts" in space.refusal(odd, info)


def case_of(op: str, multiple: int) -> Case:
    info = TargetInfo(f"{op}@x", op, "x", capabilities=Capabilities(experts_multiple=multiple))
    return next(iter(strategies.grid(get_space(op), info, "cpu", seed=1)))


@pytest.mark.parametrize(("op", "field"), [("allreduce_rmsnorm", "hidden"), ("nvfp4_quantize", "blocks")])
def test_rows_have_widths_that_no_list_names(op: str, field: str) -> None:
    space, widths = get_space(op), set()
    info = TargetInfo(f"{op}@x", op, "x", capabilities=Capabilities(min_multiple_h=8, max_blocks=900))
    listed = {int(width) for axis in space.axes(info) if axis.name == field for width in axis.values}

    @seed(5)
    @settings(max_examples=150, database=None, deadline=None, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(strategies.configs(space, info))
    def draw(config: dict) -> None:
        width = config[field]
        widths.add(len(Labels.parse(width)) if isinstance(width, str) else width)

    draw()
    assert len(widths - listed) > 3
    assert max(widths) <= 8192
    assert field == "blocks" or all(width % 8 == 0 for width in widths)


@pytest.mark.parametrize("name", ["experts_multiple", "min_multiple_h", "min_multiple_i", "alignment"])
def test_no_number_is_a_multiple_of_none(name: str) -> None:
    with pytest.raises(UsageError, match=f"Capabilities.{name} must be 1 or more, not 0"):
        Capabilities(**{name: 0})
