"""The result in float64, without any store: what the contract's formula gives."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_fuzz.checks.experts.activations import CURVES, halves
from moe_fuzz.checks.experts.requantized import quantized
from moe_fuzz.checks.experts.slots import Batch, batches
from moe_fuzz.ops.experts.inputs import ExpertsInputs


def values(inputs: ExpertsInputs, x: Tensor, weights: Tensor, expert: Tensor) -> Tensor:
    """y float64 [T, H] of x [T, H], weights [T, k] and the experts of their slots, int64 [T, k] with -1 for none; all
    else is that of the inputs. Of finite numbers."""
    plain, options = inputs.plain, inputs.options
    activation, on_input = str(options["activation"]), bool(options["apply_weight_on_input"])
    y = x.new_zeros(x.shape, dtype=torch.float64)
    rows = plain["w13"].shape[1]
    if inputs.quantizes:
        dtype, x = x.dtype, quantized(x.double(), plain["x_global"], x.dtype)
    for batch in batches(expert, rows * x.shape[1], rows + x.shape[1]):
        weight = weights[batch.token, batch.slot].double()[..., None]  # [e, n, 1]
        a = _product(inputs, "w13", x[batch.token].double(), batch)
        if on_input:
            a = a * weight
        if "b13" in plain:
            a = a + plain["b13"][batch.experts].double()[:, None]
        gate, up = halves(a, activation, str(options["gate_layout"]))
        h = CURVES[activation].of(gate)
        if up is not None:
            h = h * (up if activation != "swiglu_oai" else up.clamp(-7.0, 7.0) + 1.0)
        if inputs.quantizes:
            h = quantized(h, plain["h_global"], dtype)
        v = _product(inputs, "w2", h, batch)
        if "b2" in plain:
            v = v + plain["b2"][batch.experts].double()[:, None]
        real = batch.real.flatten()
        v = v if on_input else v * weight
        y.index_add_(0, batch.token.flatten()[real], v.flatten(0, 1)[real])
    return y


def _product(inputs: ExpertsInputs, name: str, a: Tensor, batch: Batch) -> Tensor:
    v = a @ inputs.matrix(name, batch.experts).transpose(1, 2)
    factor = inputs.factor(name, batch.experts)
    return v if factor is None else v * factor
