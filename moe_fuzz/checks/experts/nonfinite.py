"""Where no right result is finite: a NaN or an infinity that goes in and reaches it, whatever the order of sums."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_fuzz.checks.experts.activations import CURVES, halves
from moe_fuzz.checks.experts.slots import Batch, batches
from moe_fuzz.mirror import on_host, uploaded
from moe_fuzz.ops.experts.inputs import ExpertsInputs


def never_finite(inputs: ExpertsInputs, expert: Tensor) -> Tensor:
    """bool [T, H]: y that a NaN or an infinity in x, weights, biases or scales reaches through the slots of `expert`,
    int64 [T, k] with -1 for none. In float64 nothing overflows that is finite; what an activation makes of
    -inf is not asked for (0, or 0 * inf); slots with a weight that is 0, or not finite, are left out."""
    x, weights = inputs.plain["x"], inputs.plain["weights"]
    found = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    if inputs.finite:
        return found > 0
    weights = on_host(weights)
    weighty = weights.isfinite() & (weights != 0)
    if inputs.finite_weights:
        weighty &= ~inputs.finite_rows[:, None]
    rows = inputs.plain["w13"].shape[1]
    there = uploaded(torch.where(weighty, on_host(expert), -1), x.device)
    for batch in batches(there, rows * x.shape[1], rows + x.shape[1]):
        # What is quantized has no NaN and no infinity.
        h = x.new_zeros((1, 1, inputs.inter), dtype=torch.float64) if inputs.quantizes else _activated(inputs, batch)
        v = _product(inputs, "w2", h, batch)
        if "b2" in inputs.plain:
            v = v + inputs.plain["b2"][batch.experts].double()[:, None]
        v = v.expand(*batch.token.shape, -1)
        found.index_add_(0, batch.tokens, batch.of_real((~v.isfinite()).double()))
    return found > 0


def _activated(inputs: ExpertsInputs, batch: Batch) -> Tensor:
    plain, options = inputs.plain, inputs.options
    a = _product(inputs, "w13", plain["x"][batch.token].double(), batch)
    if options["apply_weight_on_input"]:
        a = a * plain["weights"][batch.token, batch.slot].double()[..., None]
    if "b13" in plain:
        a = a + plain["b13"][batch.experts].double()[:, None]
    activation = str(options["activation"])
    gate, up = halves(a, activation, str(options["gate_layout"]))
    f = torch.where(gate == -torch.inf, 0.0, CURVES[activation].of(gate))
    if up is None:
        return f
    return f * (up if activation != "swiglu_oai" else up.clamp(-7.0, 7.0) + 1.0)


def _product(inputs: ExpertsInputs, name: str, a: Tensor, batch: Batch) -> Tensor:
    v = a @ inputs.matrix(name, batch.experts).transpose(1, 2)
    factor = inputs.factor(name, batch.experts)
    return v if factor is None else v * factor
