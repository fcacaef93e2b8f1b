"""y of a layer in float64 for a given decision, with a bound on what rounding may change: docs/numerics.md.

A shard is a call of the experts, and is bounded like one; here their results are added up. R rows are judged.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_fuzz.checks.experts.bounds import Numbers, evaluate
from moe_fuzz.checks.experts.rounding import LARGEST, TINY, floor, gamma, unit
from moe_fuzz.contract import Contract
from moe_fuzz.ops.experts.inputs import ExpertsInputs
from moe_fuzz.ops.layer.inputs import LayerInputs
from moe_fuzz.reference.moe_layer import shard_bounds


@dataclass(frozen=True)
class Bounded:
    """float64 [R, H]: `y`, and `bound`, infinite where an overflow on the way leaves nothing to say."""

    y: Tensor
    bound: Tensor


def bounded(inputs: LayerInputs, rows: Tensor, weights: Tensor, ids: Tensor, contract: Contract) -> Bounded:
    """rows: int64 [R]; weights, ids: of all rows [T, k]. The ids of `rows` are in [0, E), their weights finite."""
    experts, chosen = experts_of(inputs, rows, weights, ids)
    parts: list[Numbers] = [evaluate(experts, own, contract) for own in of_shards(inputs, chosen)]
    dtype = inputs.plain["hidden"].dtype
    most = torch.finfo(dtype).max
    if len(parts) == 1:
        y, error = parts[0].value, parts[0].bound
        return Bounded(y, error.masked_fill(~(y.abs() + error < most), torch.inf))
    y, error = (torch.stack([getattr(part, name) for part in parts]).sum(dim=0) for name in ("value", "bound"))
    size = torch.stack([part.value.abs() for part in parts]).sum(dim=0) + error
    narrow = contract.combine == "dtype"
    store, least = unit(dtype, contract.truncates), floor(dtype, contract.truncates)
    error = error + (gamma(len(parts) + 1, store) if narrow else gamma(len(parts) + 1)) * size
    error = error + store * (y.abs() + error) + least + TINY
    lost = ~(size < (most if narrow else LARGEST)) | ~(y.abs() + error < most)
    return Bounded(y, error.masked_fill(lost, torch.inf))


def experts_of(inputs: LayerInputs, rows: Tensor, weights: Tensor, ids: Tensor) -> tuple[ExpertsInputs, Tensor]:
    """The experts' half of these rows as a call of all experts, and the expert of each slot, int64 [R, k]."""
    names = ("w13", "w2", "b13", "b2")
    plain = {"x": inputs.plain["hidden"][rows], "weights": weights[rows], "ids": ids[rows]}
    plain |= {name: inputs.plain[name] for name in names if name in inputs.plain}
    options = {name: inputs.options[name] for name in ("activation", "gate_layout")} | {"apply_weight_on_input": False}
    return ExpertsInputs(options, plain), ids[rows].long()


def of_shards(inputs: LayerInputs, chosen: Tensor) -> list[Tensor]:
    """The experts of the slots of each shard, -1 for those of the others."""
    bounds = shard_bounds(inputs.plain["gate"].shape[0], int(inputs.options["shards"]))
    return [torch.where((chosen >= first) & (chosen < last), chosen, -1) for first, last in bounds]
