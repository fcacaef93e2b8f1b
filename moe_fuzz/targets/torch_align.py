"""`align` in plain PyTorch, as people write it where there is no kernel."""

from __future__ import annotations

import torch

from moe_fuzz.contract import PADDING_DIALECTS, Capabilities, Contract, declares


@declares(
    contract=Contract(deterministic=True, ordered=True, stable=True, accepts=PADDING_DIALECTS),
    capabilities=Capabilities(compiles=False, max_experts=8192, max_top_k=64, alignment=1, any_strides=True,
                              block_sizes=(), fewer_than_map=False),
)
def align(
    ids: torch.Tensor, block_size: int, num_experts: int, expert_map: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A stable sort by expert, then places from two prefix sums: what serves where no kernel fits.

    ids [T, k] int32 or int64, expert_map [E] int32 or None -> sorted_token_ids [M], expert_ids [M / block_size],
    num_tokens_post_padded [1], inverse [T, k], all int32. Nothing waits for the device.
    """
    slots = ids.numel()
    flat = ids.flatten().long()
    expert = torch.where((flat >= 0) & (flat < num_experts), flat, num_experts)  # [N], of those dropped E
    if expert_map is not None:
        local = torch.cat([expert_map.long(), expert_map.new_full((1,), -1, dtype=torch.int64)])[expert]
        expert = torch.where(local >= 0, local, num_experts)
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=ids.device)
    counts.scatter_add_(0, expert, torch.ones_like(expert))
    blocks = (counts[:-1] + block_size - 1) // block_size  # [E]
    ends = blocks.cumsum(0)
    first = torch.cat([(ends - blocks) * block_size, ends[-1:] * 0])  # [E + 1], in entries
    order = expert.argsort(stable=True)
    rank = torch.arange(slots, device=ids.device) - (counts.cumsum(0) - counts)[expert[order]]
    alone = min(slots, num_experts)
    room = alone + (slots - alone) // block_size
    place = torch.where(expert[order] < num_experts, first[expert[order]] + rank, room * block_size)
    held = torch.full((room * block_size + 1,), slots, dtype=torch.int32, device=ids.device)
    held[place] = torch.where(place < room * block_size, order, slots).int()  # the last entry takes what is dropped
    block = torch.arange(room, device=ids.device)
    owner = torch.searchsorted(ends, block, right=True)
    owner = torch.where(block < ends[-1], owner, -1).int()
    inverse = torch.empty_like(place).index_copy_(0, order, torch.where(place < room * block_size, place, -1))
    return held[:-1], owner, (ends[-1:] * block_size).int(), inverse.int().view(ids.shape)
