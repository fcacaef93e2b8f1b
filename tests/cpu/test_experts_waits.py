"""What spares a judge of experts its questions to the device says what the questions would have said."""

from __future__ import annotations

import pytest
import torch

from moe_fuzz.case import Fault
from moe_fuzz.checks.experts.flags import first_look, look_together, wrong
from moe_fuzz.checks.experts.slots import batches
from moe_fuzz.labels import Labels
from moe_fuzz.mirror import answers, on_host, rows_of, uploaded
from moe_fuzz.ops.experts import recipes
from moe_fuzz.ops.experts.inputs import materialize
from tests.cpu.experts_seen import case_of, observe


@pytest.mark.parametrize("each", [1, 1 << 12, 1 << 19])
def test_a_batch_lists_what_its_mask_marks(each: int) -> None:
    expert = torch.randint(-1, 5, (40, 3), generator=torch.Generator().manual_seed(1))
    seen = []
    for batch in batches(expert, each, 1 << 14):
        assert torch.equal(batch.at, batch.real.flatten().nonzero().flatten())
        assert torch.equal(batch.tokens, batch.token[batch.real])
        assert torch.equal(batch.places, (batch.token * 3 + batch.slot)[batch.real])
        values = torch.rand(*batch.token.shape, 2)
        assert torch.equal(batch.of_real(values), values[batch.real])
        named = batch.experts[:, None].expand_as(batch.real)[batch.real]
        assert torch.equal(named, expert.flatten()[batch.places])
        seen += batch.places.tolist()
    assert sorted(seen) == (expert.flatten() >= 0).nonzero().flatten().tolist()


@pytest.mark.parametrize("column", [0, 7])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 3e5, 0.0])
def test_the_first_look_tells_what_is_wrong(value: float, column: int) -> None:
    seen = observe(case_of(recipe="integer", hidden=8, intermediate=8))
    right = first_look(seen)
    assert not any(told for name, told in right.items() if name != "bound_used")
    y = seen.outputs.y.clone()
    y[3, column] = value
    other = seen.with_outputs(y)
    told = first_look(other)
    assert {name for name in wrong(other) if told[name]} == {name for name, mask in wrong(other).items() if mask.any()}
    assert any(told[name] for name in wrong(other)) or bool((seen.outputs.y[3, column] == value).all())
    both = seen.with_outputs(y), seen.with_outputs(seen.outputs.y)
    look_together(both)
    assert [one.flags for one in both] == [told, right]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("recipe", ["dense", "ladder", "integer", "one_hot", "fine"])
def test_no_recipe_has_rows_that_are_not_finite(recipe: str, dtype: str) -> None:
    """So that nobody looks where no fault was laid."""
    largest = {"bfloat16": 14, "float16": 2}[dtype]
    case = case_of(rows=64, recipe=recipe, dtype=dtype, magnitude=largest if recipe == "dense" else 0, hidden=128)
    assert bool(recipes.tokens_of(case, list(range(64)), 0, "cpu").isfinite().all())


def test_rows_with_a_fault_are_looked_at() -> None:
    inputs = materialize(case_of(faults=(Fault("nan_rows", "x", Labels.parse("2-3")),)), 0)
    assert inputs.finite_rows.tolist() == [True, True, False, False, True, True, True, True]
    assert bool(inputs.replace(x=torch.zeros_like(inputs.plain["x"])).finite_rows.all())


def test_on_the_host_nothing_is_copied() -> None:
    one = torch.arange(4)
    assert uploaded(one, "cpu") is one
    assert on_host(one) is one
    assert rows_of(one, torch.tensor([2, 0])).tolist() == [2, 0]
    assert answers([one.max(), (one > 5).any()]) == [3.0, 0.0]
    assert answers([]) == []
