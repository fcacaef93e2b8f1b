"""Which bits `exact` knows: those that every right order of operations gives, wherever it weighs a slot."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moe_fuzz.checks.experts.known import exact_answer
from moe_fuzz.contract import Contract
from moe_fuzz.ops.experts.inputs import ExpertsInputs
from tests.cpu.experts_seen import FAMILY, case_of

pytestmark = pytest.mark.usefixtures("one_thread")


def cancelling(weight: float, root: float, bias: float | None = None) -> ExpertsInputs:
    """One slot, one column: w * (root^2 + 1 - root^2), or with a bias instead of the one."""
    inputs = FAMILY.materialize(
        case_of(rows=1, experts=1, top_k=1, hidden=1, intermediate=3, activation="relu2",
                bias="none" if bias is None else "none/float32"), 0, "cpu")  # fmt: skip
    assert isinstance(inputs, ExpertsInputs)
    b2 = {} if bias is None else {"b2": torch.tensor([[bias]])}
    return inputs.replace(
        x=inputs.plain["x"].new_ones(1, 1), weights=torch.tensor([[weight]]),
        w13=inputs.plain["w13"].new_tensor([root, 0.0 if bias else 1.0, root])[None, :, None],
        w2=inputs.plain["w2"].new_tensor([[[1.0, 1.0, -1.0]]]), **b2,
    )  # fmt: skip


def weighed_first(inputs: ExpertsInputs) -> Tensor:
    """Each term is weighed in float32, and then they are added up; the bias with the first of them."""
    h = (inputs.plain["w13"].float() @ inputs.plain["x"][0].float()).square()[0]  # [I]
    terms = (h * inputs.plain["weights"][0]) * inputs.plain["w2"][0, 0].float()
    total = terms[0]
    if "b2" in inputs.plain:
        total = total + inputs.plain["weights"][0, 0] * inputs.plain["b2"][0, 0]
    for term in terms[1:]:
        total = total + term
    return total.to(inputs.plain["x"].dtype)


@pytest.mark.parametrize("slot", ["none", "float32", "dtype"])
@pytest.mark.parametrize("bias", [None, 1.0])
@pytest.mark.parametrize("weight", [1 + 2.0**-8 + 2.0**-12, 1 + 2.0**-8 + 2.0**-20])
def test_bits_are_not_known_where_weighed_terms_are_rounded_on_the_way(weight, bias, slot):
    """The sum of the products is exact, and so is its own product with the weight; what is between 1 and its neighbour
    is lost beside 2^22 all the same, if terms are weighed before they are added up: of a weight with few bits, too."""
    inputs = cancelling(weight, 2.0**11, bias)
    y, known = exact_answer(inputs, torch.zeros(1, 1, dtype=torch.int64), [Contract(slot=slot)])
    assert y.item() == 1 + 2.0**-7
    assert weighed_first(inputs).item() == 1
    assert not known.item()


@pytest.mark.parametrize(("weight", "root"), [(2.0, 2.0**11), (1 + 2.0**-8 + 2.0**-12, 2.0**5)])
def test_bits_are_known_where_nothing_is_rounded(weight, root):
    """A power of two rounds no term, nor does a weight of 13 bits where the terms have few."""
    inputs = cancelling(weight, root)
    y, known = exact_answer(inputs, torch.zeros(1, 1, dtype=torch.int64), [Contract(slot="none")])
    assert known.item()
    assert weighed_first(inputs).item() == y.item()


@pytest.mark.parametrize("accumulate", ["bfloat16", "float16"])
def test_narrow_sums_of_weighed_terms_are_not_known(accumulate):
    """What they lose is not what float32 loses: 3 * 43 has 8 bits, and times 1.25 it has 10."""
    inputs = cancelling(1.25, 1.0).replace(w2=torch.tensor([[[43.0, 43.0, 43.0]]], dtype=torch.bfloat16))
    expert = torch.zeros(1, 1, dtype=torch.int64)
    known = [exact_answer(inputs, expert, [Contract(accumulate=kind)])[1].item() for kind in ("float32", accumulate)]
    assert known == [True, accumulate == "float16"]
