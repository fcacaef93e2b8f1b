"""Layers of experts of which one part is a library's: the sum over slots, or the gather before and the sum behind.

The products are ours, so that a library's permutation or sum is judged by all that is known of experts: bit for bit by
the recipes whose sums are exact, by the bound on the rest, in graphs, with padding, with the experts of another rank
left out. What a library must not read holds NaN. Worker side.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_fuzz.reference.align import expert_of_slot
from moe_fuzz.targets import builtin, torch_experts
from moe_fuzz.targets.adapter import surface_launch_error

Experts = Callable[..., Tensor]


@dataclass(frozen=True)
class Gathered:
    """The rows of x that a library laid out by expert."""

    rows: Tensor  # [N, H]
    ends: Tensor  # [E + 1], ascending: the rows of expert e stand from ends[e] to ends[e + 1]
    inverse: Tensor  # int32: the row of each slot


#: (slots [T, k, H] weighted, ids [T, k], expert_map or None, out [T, H]): writes the sum over slots into out.
Sum = Callable[[Tensor, Tensor, Tensor | None, Tensor], object]
#: (x [T, H], ids [T, k], w2 [E, H, I], expert_map or None) -> the gathered rows.
Gather = Callable[[Tensor, Tensor, Tensor, Tensor | None], Gathered]
#: (y [N, H] of the gathered rows, gathered, weights [T, k], out [T, H]): writes the weighted sum over slots into out.
Combine = Callable[[Tensor, Gathered, Tensor, Tensor], object]


def summed(add: Sum, skips: bool) -> Experts:
    """Experts whose slots are summed up by `add`.

    skips: it leaves out the slots that have no expert here, by the ids that it is given. These then hold NaN, and 0
    otherwise, as what fills the buffer of a server's experts does.
    """

    def experts(
        x: Tensor, w13: Tensor, w2: Tensor, weights: Tensor, ids: Tensor, *, expert_map: Tensor | None = None,
        activation: str = "silu", gate_layout: str = "first", b13: Tensor | None = None, b2: Tensor | None = None,
        apply_weight_on_input: bool = False, out: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        (tokens, hidden), top_k = x.shape, ids.shape[1]
        expert = expert_of_slot(ids, w13.shape[0], expert_map).reshape(-1)  # [N]
        rows = x[:, None].expand(tokens, top_k, hidden).reshape(-1, hidden)
        y = _outputs(rows, expert, w13, w2, weights.reshape(-1), torch.nan if skips else 0.0, activation=activation,
                     gate_layout=gate_layout, b13=b13, b2=b2, apply_weight_on_input=apply_weight_on_input)  # fmt: skip
        result = x.new_empty((tokens, hidden)) if out is None else out
        add(y.view(tokens, top_k, hidden), ids, expert_map, result)
        surface_launch_error(x)
        return result

    return experts


def permuted(gather: Gather, combine: Combine) -> Experts:
    """Experts whose rows are laid out by `gather`, and whose outputs go back to their tokens by `combine`. Rows past
    those of the last expert hold NaN."""

    def experts(
        x: Tensor, w13: Tensor, w2: Tensor, weights: Tensor, ids: Tensor, *, expert_map: Tensor | None = None,
        activation: str = "silu", gate_layout: str = "first", b13: Tensor | None = None, b2: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        gathered = gather(x, ids, w2, expert_map)
        place = torch.arange(len(gathered.rows), dtype=gathered.ends.dtype, device=x.device)
        expert = torch.searchsorted(gathered.ends, place, right=True) - 1  # [N]; E past the last
        y = _outputs(gathered.rows, expert, w13, w2, weights.new_ones(len(place)), torch.nan, activation=activation,
                     gate_layout=gate_layout, b13=b13, b2=b2)  # fmt: skip
        result = torch.empty_like(x) if out is None else out
        combine(y, gathered, weights, result)
        surface_launch_error(x)
        return result

    return experts


def _outputs(
    rows: Tensor, expert: Tensor, w13: Tensor, w2: Tensor, weights: Tensor, left: float, **options: Any
) -> Tensor:
    """rows [N, H], each through its own expert int64 [N] and times its weight [N], in the dtype of x; `left` where
    there is no such expert. Each row is a token with one slot."""
    # The interpreter takes a hundred times as long as torch, which in turn waits for the device in each call.
    function = builtin.experts_bf16 if rows.is_cuda else torch_experts.experts_bf16
    y = function(rows, w13, w2, weights[:, None], expert[:, None], **options)
    none = (expert < 0) | (expert >= w13.shape[0])
    return y.masked_fill_(none[:, None], left)
