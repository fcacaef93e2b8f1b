"""y of a layer in float64 for a given decision, with a bound on what rounding may change: docs/numerics.md.

T tokens, R of them judged, N = R * k slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_fuzz.contract import Contract
from moe_fuzz.ops.layer.inputs import LayerInputs
from moe_fuzz.reference.experts_bf16 import activate

U = 2.0**-24
_UNITS = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
_SMALLEST = {torch.bfloat16: 2.0**-126, torch.float16: 2.0**-14}  # smaller ones may be flushed to 0
_STEEPEST = {"silu": 1.0998, "swiglu_oai": 1.0998, "gelu": 1.13}  # the derivative of the gate's function, at most


@dataclass(frozen=True)
class Bounded:
    """float64 [R, H]: `y`, and `bound`, infinite where an overflow on the way leaves nothing to say."""

    y: Tensor
    bound: Tensor


def gamma(depth: int, unit: float = U) -> float:
    """The relative error of a sum of `depth` products in any order, each partial sum rounded or cut off."""
    n = (depth + depth // 16 + 2) * 2 * unit
    return n / (1 - n) if n < 0.5 else float("inf")


@dataclass(frozen=True)
class _Rounding:
    """What a store into the dtype of hidden may change, and which values it cannot hold."""

    unit: float
    smallest: float
    largest: float

    def stored(self, value: Tensor, error: Tensor) -> Tensor:
        """The error after the store of `value`, which is known within `error`."""
        size = value.abs() + error
        return (error + self.unit * size + self.smallest).masked_fill(~(size < self.largest), torch.inf)


def bounded(inputs: LayerInputs, rows: Tensor, weights: Tensor, ids: Tensor, contract: Contract) -> Bounded:
    """rows: int64 [R]; weights, ids: of all rows [T, k]. The ids of `rows` are in [0, E), their weights finite."""
    plain, options = inputs.plain, inputs.options
    x, dtype = plain["hidden"][rows].double(), plain["hidden"].dtype
    store = _Rounding((2 if contract.truncates else 1) * _UNITS[dtype], _SMALLEST[dtype], torch.finfo(dtype).max)
    unit = U if contract.accumulate == "float32" else _UNITS.get(getattr(torch, contract.accumulate, dtype), U)
    total = x.new_zeros(x.shape)
    size, error = torch.zeros_like(total), torch.zeros_like(total)  # of all slots of a token: Σ|w y|, Σ E
    chosen, weight = ids[rows].long(), weights[rows].double()
    for expert in chosen.unique().tolist():
        row, slot = (chosen == expert).nonzero(as_tuple=True)
        a, e = _product(x[row], None, plain["w13"][expert], plain.get("b13"), expert, unit)
        h, e = _activated(a, e, str(options["activation"]), str(options["gate_layout"]))
        if contract.intermediate == "dtype":
            e = store.stored(h, e)
        y, e = _product(h, e, plain["w2"][expert], plain.get("b2"), expert, unit)
        w = weight[row, slot, None]
        of_weight = store.unit if contract.weight_dtype == "dtype" else 0.0
        e = w.abs() * (e + (of_weight + 2 * U) * (y.abs() + e)) + 2.0**-126
        y = w * y
        if contract.slot == "dtype":
            e = store.stored(y, e)
        total.index_put_((row,), y, accumulate=True)
        size.index_put_((row,), y.abs(), accumulate=True)
        error.index_put_((row,), e, accumulate=True)
    slots, shards = chosen.shape[1], int(options["shards"])
    size = size + error
    each = gamma(slots) if contract.reduce == "float32" else (slots + 1) * store.unit
    error = error + each * size
    if shards > 1:  # each shard's part is stored, and the parts are summed up
        error = error + (1 + each) * store.unit * size + shards * store.smallest
        error = error + (gamma(shards) if contract.combine == "float32" else (shards + 1) * store.unit) * (size + error)
    return Bounded(total, torch.nan_to_num(store.stored(total, error), nan=torch.inf, posinf=torch.inf))


def _product(
    left: Tensor, left_error: Tensor | None, matrix: Tensor, bias: Tensor | None, expert: int, unit: float
) -> tuple[Tensor, Tensor]:
    """left @ matrix.T + bias, and its error: [n, D], [W, D], [E, W] -> [n, W] twice."""
    right = matrix.double()
    value, size = left @ right.t(), left.abs()
    error = torch.zeros_like(value)
    if left_error is not None:
        error = error + left_error @ right.abs().t()
        size = size + left_error
    size = size @ right.abs().t()
    if bias is not None:
        value = value + bias[expert].double()
        size = size + bias[expert].double().abs()
    error = error + gamma(left.shape[1], unit) * size + left.shape[1] * 2.0**-149 + 2.0**-126
    return value, error.masked_fill(~(size < 2.0**126), torch.inf)


def _activated(a: Tensor, error: Tensor, activation: str, gate_layout: str) -> tuple[Tensor, Tensor]:
    h = activate(a, activation, gate_layout)
    if activation == "relu2":
        e = error * (2 * a.clamp(min=0.0) + error)
        return h, e + 4 * U * (h + e) + 2.0**-126
    (gate, up), (gate_error, up_error) = _halves(a, gate_layout), _halves(error, gate_layout)
    if activation == "swiglu_oai":
        gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0) + 1.0
    of_gate = _gated(gate, activation)
    e = _STEEPEST[activation] * gate_error * (up.abs() + up_error) + of_gate.abs() * up_error
    if activation == "gelu":  # 1 + erf loses its digits below 0: its error is absolute
        e = e + 16 * U * gate.abs() * (up.abs() + up_error)
    steep = 2 * 1.702 if activation == "swiglu_oai" else 2.0
    below = (gate_error - gate).clamp(min=0.0)  # exp(-g) in float32 is the less accurate, the further g is below 0
    e = e + (20 + steep * below) * U * (h.abs() + e) + 2.0**-120 * (1.0 + up.abs())
    return h, e


def _gated(gate: Tensor, activation: str) -> Tensor:
    if activation == "gelu":
        return torch.nn.functional.gelu(gate)
    return gate * ((1.702 if activation == "swiglu_oai" else 1.0) * gate).sigmoid()


def _halves(a: Tensor, gate_layout: str) -> tuple[Tensor, Tensor]:
    """(gate, up) of a product with w13."""
    if gate_layout == "interleaved":
        return a[..., ::2], a[..., 1::2]
    first, second = a.chunk(2, dim=-1)
    return (first, second) if gate_layout == "first" else (second, first)
