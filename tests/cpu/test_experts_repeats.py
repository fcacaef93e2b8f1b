"""Tokens whose numbers are another's: their roundings are the same, and tell no more than one token's do."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moe_fuzz.case import Fault
from moe_fuzz.checks import CHECKS
from moe_fuzz.checks.experts.observation import ExpertsObservation, Outputs
from moe_fuzz.contract import Contract
from moe_fuzz.labels import Labels
from moe_fuzz.ops.experts.inputs import ExpertsInputs
from tests.cpu.experts_seen import FP4_STRICT, STEADY, case_of, fp4_case_of, observe, reference

WIDE = {
    "hidden": 64, "intermediate": 192, "experts": 5, "bias": "float32", "weight_on_input": True, "weight_scale": -14,
    "gate_layout": "interleaved", "expert_map": "permuted", "activations": "nvfp4",
}  # fmt: skip
pytestmark = pytest.mark.usefixtures("one_thread")


def said(seen: ExpertsObservation) -> list[str]:
    return [found.symptom for found in CHECKS["experts"]["statistical"](seen)]


def with_inputs(seen: ExpertsObservation, **plain: Tensor) -> ExpertsObservation:
    """What the reference gives for other tensors, of a case that takes them for random numbers."""
    inputs = seen.inputs.replace(**plain)
    return replace(seen, inputs=inputs, outputs=Outputs(reference(inputs)), budget={})


def off_the_stores(seen: ExpertsObservation) -> ExpertsObservation:
    """The same answer, of which nobody knows how it was rounded."""
    seen.__dict__["rounded"] = (torch.full_like(seen.y, torch.nan),)
    return seen


# ---- repeats --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fault", "tensor", "seed", "rows"), [
    ("nan_scale", "h_global", 393234986108929337, 64), ("zero_scale", "x_global", 4277521880910689116, 78),
    *((fault, tensor, seed, 400) for seed, fault in enumerate(["zero_scale", "infinite_scale"])
      for tensor in ("x_global", "h_global")),
])  # fmt: skip
def test_a_product_that_is_zero_leaves_every_token_the_same_row(fault: str, tensor: str, seed: int, rows: int) -> None:
    """And the weight is on the input, so that nothing but the token's experts makes its answer."""
    for at in range(2):
        case = fp4_case_of(**WIDE, seed=seed + at, rows=rows, faults=(Fault(fault, tensor),))
        seen = off_the_stores(observe(case, contract=FP4_STRICT))
        assert said(seen) == [], case.dumps()
        assert seen.budget["statistical"] < 1
        assert float(seen.shared.mean()) > rows / 4


def shared(seen: ExpertsObservation) -> Tensor:
    assert seen.random.all()
    return seen.shared


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("bias", ["none", "float32"])
@pytest.mark.parametrize("recipe", ["experts_bf16", "experts_nvfp4"])
def test_ordinary_tokens_share_nothing(recipe: str, bias: str, dtype: str) -> None:
    """So what the statistics allow on them is what it would be without this."""
    for seed in range(4):
        make = case_of if recipe == "experts_bf16" else fp4_case_of
        case = make(rows=200, experts=4, hidden=64, intermediate=64, seed=seed, bias=bias, dtype=dtype,
                    weight_on_input=seed % 2 == 1)  # fmt: skip
        found = shared(observe(case, contract=STEADY if recipe == "experts_bf16" else FP4_STRICT))
        assert torch.equal(found, torch.ones_like(found))


def test_a_row_that_stands_twice_counts_once() -> None:
    """Also where the others are like no other, and where the weights differ: h has the same roundings."""
    seen = observe(case_of(rows=60, experts=1, top_k=1, hidden=64, intermediate=64))
    x = seen.x.clone()
    x[10:40] = x[10]
    for weights in (seen.weights, torch.full_like(seen.weights, 0.7)):
        found = shared(with_inputs(seen, x=x, weights=weights))
        assert torch.allclose(found[10:40], torch.tensor(30.0).double())
        assert torch.equal(found[:10], torch.ones_like(found[:10]))
        assert torch.equal(found[40:], torch.ones_like(found[40:]))


def test_rows_of_which_nothing_is_left_count_once() -> None:
    """Some tokens' products are 0, and their slots of an expert are its bias."""
    seen = observe(fp4_case_of(rows=40, experts=3, bias="float32", weight_on_input=True, activations="nvfp4"),
                   contract=FP4_STRICT)  # fmt: skip
    x = seen.x.clone()
    x[::2] = 0
    found = shared(with_inputs(seen, x=x))
    of_expert = torch.bincount(seen.expert[::2].flatten(), minlength=3).double()
    expected = 1 + (of_expert[seen.expert] - 1).sum(dim=1, keepdim=True)[::2]
    assert torch.allclose(found[::2], expected.clamp(max=40).expand_as(found[::2]), rtol=0.02)
    assert float(found[1::2].mean()) < 1.2


def test_a_product_lost_beside_its_bias_counts_once() -> None:
    seen = observe(case_of(rows=200, experts=2, top_k=1, hidden=32, bias="float32", weight_on_input=True))
    w2 = (seen.inputs.plain["w2"].float() * 2.0**-12).bfloat16()
    assert float(shared(with_inputs(seen, w2=w2)).mean()) > 50
    columns = seen.inputs.plain["w2"].clone()
    columns[:, 3] = 0
    found = shared(with_inputs(seen, w2=columns))
    assert float(found[:, 3].min()) > 50
    assert torch.equal(found[:, 4:], torch.ones_like(found[:, 4:]))


@pytest.mark.parametrize("down", ["float32", "dtype"])
def test_what_is_lost_is_like_nothing(down: str) -> None:
    """Experts with a NaN in their weights or their scale, and rows that are not finite."""
    for seed in range(4):
        faults = (Fault("nan_blocks", "w2_scales"), Fault("nan_scale", "w13_alpha"),
                  Fault("nan_rows", "x", Labels.of([3, 4])))  # fmt: skip
        case = fp4_case_of(rows=100, experts=8, faults=faults, bias="dtype", seed=seed)
        seen = observe(case, contract=replace(FP4_STRICT, down=down))
        assert bool(seen.shared.isfinite().all())
        assert said(seen) == []
        assert "statistical" in seen.budget


def test_an_answer_of_zeros_rounds_nothing() -> None:
    seen = observe(case_of(rows=40, experts=1, top_k=1, activation="relu2"))
    found = shared(with_inputs(seen, w2=torch.zeros_like(seen.inputs.plain["w2"])))
    assert torch.equal(found, torch.ones_like(found))


# ---- declared stores ------------------------------------------------------------------------------------------------


def test_numbers_of_a_lattice_round_as_the_declared_stores_do() -> None:
    """One block of h at the end of its scale leaves few numbers that y can have, and their roundings are not of both
    signs equally often. That is the contract's own answer."""
    config = {"activation": "swiglu_oai", "activations": "nvfp4", "global_scale": "large", "magnitude": -14,
              "experts": 2, "hidden": 32, "intermediate": 16, "weight_on_input": True}  # fmt: skip
    contract = replace(FP4_STRICT, gate_up="dtype", batch_invariant=False)
    blind = 0
    for seed in (301795044348, *range(8)):
        seen = observe(fp4_case_of(rows=1000, seed=seed, **config), contract=contract)
        assert said(seen) == []
        blind += bool(said(off_the_stores(seen)))
    assert blind  # which it would have been told of


def one_column_off(inputs: ExpertsInputs) -> Tensor:
    y = reference(inputs)
    y[:, 5] = (y[:, 5].float() * (1 + 2.0**-7)).to(y.dtype)
    return y


def test_an_answer_that_has_the_bits_but_in_one_column_is_wrong() -> None:
    case = fp4_case_of(rows=200, activations="nvfp4", hidden=64, intermediate=64)
    seen = observe(case, one_column_off, FP4_STRICT)
    assert float((seen.y == seen.rounded[0])[seen.random].double().mean()) > 0.9
    assert [found.where[1] for found in CHECKS["experts"]["statistical"](seen)] == [5]


@pytest.mark.parametrize("seed", range(2, 5))
def test_a_product_that_its_bias_cancels_was_stored_at_its_own_size(seed: int) -> None:
    """`down: dtype` may store before the bias."""
    contract = Contract(down="dtype")

    def stored(inputs: ExpertsInputs) -> Tensor:
        p, dtype = inputs.plain, inputs.plain["x"].dtype
        bare = reference(inputs.replace(b2=torch.zeros_like(p["b2"]), weights=torch.ones_like(p["weights"])))
        bias = p["b2"][p["ids"][:, 0].long()].double()
        return ((bare.double() + bias).to(dtype).double() * p["weights"].double()).to(dtype)

    case = case_of(rows=200, experts=3, top_k=1, bias="float32", hidden=64, intermediate=64, seed=seed, dtype="float16")
    seen = observe(case, contract=contract)
    inputs = seen.inputs.replace(b2=-reference(seen.inputs.replace(
        b2=torch.zeros_like(seen.inputs.plain["b2"]), weights=torch.ones_like(seen.weights)))[:3].float())  # fmt: skip
    ids = torch.arange(200, dtype=torch.int32).remainder(3)[:, None]
    inputs = inputs.replace(ids=ids, x=inputs.plain["x"][:3].repeat(67, 1)[:200] + seen.x / 64)
    seen = off_the_stores(replace(seen, inputs=inputs, outputs=Outputs(stored(inputs))))
    assert CHECKS["experts"]["bound"](seen) == []
    assert said(seen) == []


def test_sums_in_float16_may_lose_half_a_step_of_its_subnormals_each() -> None:
    """Where slots are not stored before."""
    contract = replace(STEADY, slot="float32", reduce="dtype")
    for seed in range(8):
        case = case_of(rows=40, experts=6, top_k=6, dtype="float16", hidden=64, intermediate=64, seed=seed)
        seen = observe(case, contract=contract)
        inputs = seen.inputs.replace(weights=seen.weights * 2.0**-12)
        seen = replace(seen, inputs=inputs)
        seen = replace(seen, outputs=Outputs(seen.rounded[0].half()))
        assert CHECKS["experts"]["bound"](seen) == []


def test_what_is_random_is_told_of_still() -> None:
    """A weight 1.004 times too large, beside tokens that are all alike."""
    seen = observe(case_of(rows=256, hidden=64, intermediate=64))
    x = seen.x.clone()
    x[:64] = x[0]
    inputs = seen.inputs.replace(x=x)
    wrong = reference(inputs.replace(weights=inputs.plain["weights"] * 1.004))
    assert said(replace(seen, inputs=inputs, outputs=Outputs(wrong)))
