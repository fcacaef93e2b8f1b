"""What a wrong row of a layer would be right for: the words after "it looks as if". For a person, as of experts."""

from __future__ import annotations

from dataclasses import replace

import torch

from moe_fuzz.checks.experts.explain import reading
from moe_fuzz.checks.experts.observation import ExpertsObservation, Outputs
from moe_fuzz.checks.layer.bound import experts_of
from moe_fuzz.checks.layer.observation import LayerObservation
from moe_fuzz.ops.experts.inputs import ExpertsInputs


def explain(seen: LayerObservation, at: int) -> str:
    """`; it looks as if slot 1 is missing`, or nothing. at: the place of the row in `seen.rows`."""
    if seen.brief:
        return ""
    outputs, rows = seen.outputs, seen.rows
    inputs, chosen = experts_of(seen.inputs, rows, outputs.weights, outputs.ids)
    none = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
    half = ExpertsObservation(seen.case, seen.step_index, seen.info, replace(inputs, padding=none, ordinary=~none),
                              Outputs(outputs.y[rows]), _no_call, rows=rows.tolist())  # fmt: skip
    bounded = replace(half.numbers, value=seen.expected.y, bound=seen.expected.bound)  # the sum of shards is in it
    half.__dict__.update(expert=chosen, numbers=bounded)
    hint = reading(half, at)
    return f"; it looks as if {hint}" if hint else ""


def _no_call(inputs: ExpertsInputs) -> Outputs:
    raise AssertionError("the experts' half cannot be called alone")
