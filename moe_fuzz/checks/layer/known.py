"""y of a layer where its bits are known: docs/numerics.md."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_fuzz.checks.experts.known import exact_answer
from moe_fuzz.checks.experts.rounding import PRECISION, store, unit_of
from moe_fuzz.checks.layer.bound import experts_of, of_shards
from moe_fuzz.contract import TargetInfo
from moe_fuzz.ops.layer.inputs import LayerInputs

_STORES = ("intermediate", "slot")


def known(inputs: LayerInputs, rows: Tensor, weights: Tensor, ids: Tensor, info: TargetInfo) -> tuple[Tensor, Tensor]:
    """float64 [R, H] and bool [R, H]. rows, weights and ids as in `bounded`.

    A shard's result is known as that of experts is. The sum of all is where float32 holds it in any order, and where it
    is the same as of shards that are not rounded before: nobody has to round them.
    """
    contract, dtype = info.contract, inputs.plain["hidden"].dtype
    experts, chosen = experts_of(inputs, rows, weights, ids)
    contracts, shards = info.choices(*_STORES), of_shards(inputs, chosen)
    y, sure = exact_answer(experts, chosen, contracts)
    if len(shards) == 1:
        return y, sure
    total, size = torch.zeros_like(y), torch.zeros_like(y)
    unit = torch.full_like(y, torch.inf)
    for own in shards:
        part, certain = exact_answer(experts, own, contracts)
        idle = (own < 0).all(dim=1, keepdim=True)
        part = part.masked_fill(idle, 0.0)
        total, size, unit = total + part, size + part.abs(), torch.minimum(unit, unit_of(part))
        sure = sure & (certain | idle)
    stored, whole = store(total, dtype)
    room = 2.0 ** PRECISION[dtype if contract.combine == "dtype" else torch.float32]
    return y, sure & (size < room * unit) & (stored == y) & (whole | (not contract.truncates))
