"""Makes a library's operator that plans blocks into an `align` with the op's own arguments. Worker side.

These operators write into buffers that their callers size and allocate. So does the adapter, by the caller's own rules,
and through torch: what is allocated inside a call is fenced and poisoned, and a store past a buffer is found.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from moe_fuzz.targets.adapter import surface_launch_error
from moe_fuzz.targets.schema import BoundCall, Names

Plan = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

#: Arguments of the operators moe_align_block_size, as vLLM and SGLang spell them.
OPERATOR: Names = {
    "topk_ids": "ids",
    "num_experts": "num_experts",
    "block_size": "block_size",
    "sorted_token_ids": "sorted_token_ids",
    "experts_ids": "expert_ids",
    "expert_ids": "expert_ids",
    "num_tokens_post_pad": "num_tokens_post_padded",
}
REQUIRED = ("ids", "num_experts", "block_size", "sorted_token_ids", "expert_ids", "num_tokens_post_padded")


@dataclass(frozen=True)
class Room:
    """What a caller allocates for one call, in elements of int32, and the number of experts that it says."""

    sorted_token_ids: int
    expert_ids: int
    num_experts: int
    scratch: Mapping[str, int]  # of the call's other buffers


def planned(call: BoundCall, room: Callable[[int, int, int], Room]) -> Callable[..., Plan]:
    """An `align` of (ids, block_size, num_experts), and of expert_map where the operator takes one.

    room: (slots, num_experts, block_size) -> what its caller would allocate.
    """

    def plan(
        ids: torch.Tensor, block_size: int, num_experts: int, expert_map: torch.Tensor | None = None
    ) -> Plan:  # fmt: skip
        needs = room(ids.numel(), num_experts, block_size)

        def made(count: int) -> torch.Tensor:
            return torch.empty((count,), dtype=torch.int32, device=ids.device)

        found = made(needs.sorted_token_ids), made(needs.expert_ids), made(1)
        values: dict[str, Any] = dict(zip(REQUIRED[3:], found, strict=True))
        values |= {name: made(count) for name, count in needs.scratch.items()}
        call(values | {"ids": ids, "num_experts": needs.num_experts, "block_size": block_size,
                       "expert_map": expert_map})  # fmt: skip
        surface_launch_error(ids)
        return found

    def without_map(ids: torch.Tensor, block_size: int, num_experts: int) -> Plan:
        return plan(ids, block_size, num_experts)

    return plan if call.takes("expert_map") else without_map
