"""The result in float64, without any store: what the contract's formula gives."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_fuzz.checks.experts.activations import CURVES, halves
from moe_fuzz.checks.experts.slots import batches
from moe_fuzz.ops.experts.inputs import ExpertsInputs


def values(inputs: ExpertsInputs, x: Tensor, weights: Tensor, expert: Tensor) -> Tensor:
    """y float64 [T, H] of x [T, H], weights [T, k] and the experts of their slots, int64 [T, k] with -1 for none; all
    else is that of the inputs. Of finite numbers."""
    plain, options = inputs.plain, inputs.options
    activation, on_input = str(options["activation"]), bool(options["apply_weight_on_input"])
    y = x.new_zeros(x.shape, dtype=torch.float64)
    for batch in batches(expert, plain["w13"][0].numel(), plain["w13"].shape[1] + x.shape[1]):
        weight = weights[batch.token, batch.slot].double()[..., None]  # [e, n, 1]
        a = x[batch.token].double() @ plain["w13"][batch.experts].double().transpose(1, 2)
        if on_input:
            a = a * weight
        if "b13" in plain:
            a = a + plain["b13"][batch.experts].double()[:, None]
        gate, up = halves(a, activation, str(options["gate_layout"]))
        h = CURVES[activation].of(gate)
        if up is not None:
            h = h * (up if activation != "swiglu_oai" else up.clamp(-7.0, 7.0) + 1.0)
        v = h @ plain["w2"][batch.experts].double().transpose(1, 2)
        if "b2" in plain:
            v = v + plain["b2"][batch.experts].double()[:, None]
        real = batch.real.flatten()
        v = v if on_input else v * weight
        y.index_add_(0, batch.token.flatten()[real], v.flatten(0, 1)[real])
    return y
