"""The result in float64: what the contract's formula gives, without any store or with each that a target declares."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from moe_fuzz.checks.experts.activations import CURVES, halves
from moe_fuzz.checks.experts.requantized import quantized
from moe_fuzz.checks.experts.rounding import dtype_of, store
from moe_fuzz.checks.experts.slots import Batch, batches
from moe_fuzz.contract import Contract
from moe_fuzz.ops.experts.inputs import ExpertsInputs

_EXACT = Contract(intermediate="float32", slot="none")
_QUANTIZED = Contract(slot="none")  # codes are made of what the op's contract stores


def values(inputs: ExpertsInputs, x: Tensor, weights: Tensor, expert: Tensor) -> Tensor:
    """y float64 [T, H] of x [T, H], weights [T, k] and the experts of their slots, int64 [T, k] with -1 for none; all
    else is that of the inputs. Of finite numbers."""
    y = x.new_zeros(x.shape, dtype=torch.float64)
    for batch, v in _slots(inputs, x, weights, expert, _QUANTIZED if inputs.quantizes else _EXACT):
        y.index_add_(0, batch.tokens, batch.of_real(v))
    return y


def rounded(inputs: ExpertsInputs, expert: Tensor, contract: Contract) -> Tensor:
    """What `values` gives for these inputs where each store that the contract declares rounds to nearest, y's too.

    A sum in float32 may take the other side of a tie, and a store that may stand before a bias or behind it stands
    behind: a right target may have other bits.
    """
    x, top_k = inputs.plain["x"], expert.shape[1]
    slots = x.new_zeros((*expert.shape, x.shape[1]), dtype=torch.float64)  # [T, k, H]
    for batch, v in _slots(inputs, x, inputs.plain["weights"], expert, contract):
        slots.flatten(0, 1)[batch.places] = batch.of_real(v)
    y, narrow = slots[:, 0], dtype_of(contract.reduce, x.dtype)
    for slot in range(1, top_k):
        y = store(y + slots[:, slot], narrow)[0]
    return store(y, x.dtype)[0]


def _slots(
    inputs: ExpertsInputs, x: Tensor, weights: Tensor, expert: Tensor, contract: Contract
) -> Iterator[tuple[Batch, Tensor]]:
    """What each slot contributes, float64 [e, n, H]."""
    plain, options, dtype = inputs.plain, inputs.options, x.dtype
    activation, on_input = str(options["activation"]), bool(options["apply_weight_on_input"])
    weighs_x = on_input and contract.weighted_x == "dtype" and not inputs.quantizes
    rows = plain["w13"].shape[1]

    def stored(number: Tensor, declared: str) -> Tensor:
        return store(number, dtype)[0] if declared == "dtype" else number

    if inputs.quantizes:
        x = quantized(x.double(), plain["x_global"], dtype)
    for batch in batches(expert, rows * x.shape[1], rows + x.shape[1]):
        weight = stored(weights[batch.token, batch.slot].double()[..., None], contract.weight_dtype)  # [e, n, 1]
        given = x[batch.token].double()
        if weighs_x:
            a = _product(inputs, "w13", stored(given * weight, "dtype"), batch)
        else:
            a = _product(inputs, "w13", given, batch) * (weight if on_input else 1.0)
        if "b13" in plain:
            a = a + plain["b13"][batch.experts].double()[:, None]
        gate, up = halves(stored(a, contract.gate_up), activation, str(options["gate_layout"]))
        h = CURVES[activation].of(gate)
        if up is not None:
            h = stored(h, contract.activation) * (up if activation != "swiglu_oai" else up.clamp(-7.0, 7.0) + 1.0)
        if inputs.quantizes:
            h = quantized(h, plain["h_global"], dtype_of(contract.intermediate, dtype))
        else:
            h = stored(h, contract.intermediate)
        v = _product(inputs, "w2", h, batch)
        if "b2" in plain:
            v = v + plain["b2"][batch.experts].double()[:, None]
        v = stored(v, contract.down)
        yield batch, stored(v if on_input else v * weight, contract.slot)


def _product(inputs: ExpertsInputs, name: str, a: Tensor, batch: Batch) -> Tensor:
    v = torch.bmm(a, inputs.matrix(name, batch.experts).transpose(1, 2))
    factor = inputs.factor(name, batch.experts)
    return v if factor is None else v * factor
