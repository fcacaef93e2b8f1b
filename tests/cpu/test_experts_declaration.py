"""Which word of its contract a target forgot, a finding says."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch

from moe_fuzz.checks.experts.values import rounded
from moe_fuzz.contract import Contract
from moe_fuzz.ops.experts.inputs import ExpertsInputs
from moe_fuzz.reference.align import expert_of_slot

from .experts_seen import FP4_STRICT, STEADY, Target, case_of, fp4_case_of, judge, observe


def storing(**stores: str) -> Target:
    """Experts that keep this contract."""

    def target(inputs: ExpertsInputs) -> torch.Tensor:
        expert = expert_of_slot(inputs.plain["ids"], len(inputs.plain["w13"]), inputs.plain.get("expert_map"))
        return rounded(inputs, expert, replace(Contract(), **stores)).to(inputs.plain["x"].dtype)

    return target


@pytest.mark.parametrize(
    ("stores", "recipe", "said"),
    [
        ({"gate_up": "dtype"}, "ladder", 'Contract(gate_up="dtype")'),
        ({"down": "dtype"}, "fine", 'Contract(down="dtype")'),
        ({"weight_dtype": "dtype"}, "fine", 'Contract(weight_dtype="dtype")'),
        ({"slot": "none"}, "fine", 'Contract(slot="none")'),
        ({"gate_up": "dtype", "down": "dtype"}, "ladder", 'Contract(gate_up="dtype", down="dtype")'),
    ],
)
def test_a_store_that_nobody_declared_is_named(stores: dict[str, str], recipe: str, said: str) -> None:
    told = []
    for hidden, activation, bias in product((32, 256), ("silu", "relu2"), ("none", "float32")):
        case = case_of(rows=12, seed=1, recipe=recipe, hidden=hidden, activation=activation, bias=bias, magnitude=4)
        found = judge(observe(case, storing(**stores), STEADY))
        told += [one.message for one in found.values() if "may answer so" in one.message]
        keeps = replace(STEADY, **stores)
        assert not {"bound", "exact", "statistical"} & set(judge(observe(case, storing(**stores), keeps)))
    assert told
    assert all(said in text for text in told), told


@pytest.mark.parametrize("stores", [{"weighted_x": "dtype"}, {"weight_dtype": "dtype", "weighted_x": "dtype"}],
                         ids=["x", "both"])  # fmt: skip
def test_an_x_that_was_weighed_and_stored_is_named(stores: dict[str, str]) -> None:
    """As layers do that scale what they dispatch: no bound of the op's contract holds for two roundings more."""
    told, declared, keeps = [], 0, replace(STEADY, **stores)
    for hidden, recipe, activation in product((32, 256), ("dense", "ladder", "fine"), ("silu", "relu2", "swiglu_oai")):
        for dtype, bias in (("bfloat16", "float32"), ("float16", "none")):
            case = case_of(rows=12, seed=3, recipe=recipe, hidden=hidden, activation=activation, bias=bias, dtype=dtype,
                           weight_on_input=True)  # fmt: skip
            found = judge(observe(case, storing(**stores), STEADY))
            told += [one.message for one in found.values() if "may answer so" in one.message]
            assert not {"bound", "exact", "statistical"} & set(judge(observe(case, storing(**stores), keeps)))
            declared += "exact" in judge(observe(case, lambda inputs: storing()(inputs) * 1.0078125, keeps))
    said = ", ".join(f'{name}="{value}"' for name, value in stores.items())
    assert any(f"Contract({said})" in text for text in told), told
    assert declared, "the bits of powers of two are known all the same"


_MODEL_FILE = {"gate_up": "dtype", "activation": "dtype", "down": "dtype", "weight_dtype": "dtype", "reduce": "dtype"}


@pytest.mark.parametrize("stores", [{"reduce": "dtype"}, _MODEL_FILE], ids=["reduce", "all"])
@pytest.mark.parametrize("ascending", [False, True], ids=["slots", "experts"])
def test_a_sum_of_slots_in_few_bits_is_named(stores: dict[str, str], ascending: bool) -> None:
    """In the order of the slots, or of their experts, as a loop over these adds them."""

    def target(inputs: ExpertsInputs) -> torch.Tensor:
        if not ascending:
            return storing(**stores)(inputs)
        ids, order = inputs.plain["ids"].sort(dim=1)
        return storing(**stores)(inputs.replace(ids=ids, weights=inputs.plain["weights"].gather(1, order)))

    told = []
    for seed, hidden in product(range(4), (32, 256)):
        case = case_of(rows=12, seed=seed, top_k=6, experts=8, recipe="fine", hidden=hidden)
        found = judge(observe(case, target, STEADY))
        told += [one.message for one in found.values() if "may answer so" in one.message]
        assert not {"bound", "exact"} & set(judge(observe(case, target, replace(STEADY, **stores))))
    said = ", ".join(f'{name}="{value}"' for name, value in stores.items())
    assert told
    assert all(f"Contract({said})" in text for text in told), told


def test_codes_that_are_made_of_what_nobody_stored_are_named() -> None:
    """A code falls the other way where h is not rounded before: no store of something else says so."""
    told = []
    for seed in range(8):
        case = fp4_case_of(rows=4, seed=seed, experts=2, activations="nvfp4", hidden=64, intermediate=32)
        found = judge(observe(case, storing(intermediate="float32"), FP4_STRICT))
        told += [one.message for one in found.values() if "may answer so" in one.message]
    assert told
    assert all('Contract(intermediate="float32")' in text for text in told), told


def test_a_wrong_answer_is_no_matter_of_declarations() -> None:
    def halved(inputs: ExpertsInputs) -> torch.Tensor:
        return storing()(inputs) * 0.5

    found = judge(observe(case_of(rows=24), halved, STEADY))
    assert "bound" in found
    assert not any("may answer so" in one.message for one in found.values())
