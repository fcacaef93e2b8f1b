"""Reference of `align`. The docstring is the contract of the op."""

from __future__ import annotations

import torch
from torch import Tensor


def align(
    ids: Tensor,  # [T, k] int32 | int64, any strides; T >= 0, k >= 1
    block_size: int,  # B >= 1
    num_experts: int,  # E >= 1: the experts that blocks are made for
    *,
    expert_map: Tensor | None = None,  # [G] int32, G >= 1: id -> expert in [0, E), or -1
    out: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,  # the four results, contiguous int32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # sorted_token_ids [M], expert_ids [M/B], num_tokens_post_padded, inverse
    """Sorts the slots of a routing decision by expert, each expert padded to whole blocks: the plan of a grouped GEMM.

    A slot is a place in `ids`, numbered token * k + j; there are N = T * k.
    Expert of a slot: its id, or what `expert_map` says of it. A slot is dropped when its id is not in [0, E), or, with
        a map, not in [0, G) or mapped to -1. So every padding sentinel is dropped, whatever its value, and so are the
        experts of other ranks. No id is used as an index before it is known to be in range. Several ids may have the
        same expert, as its replicas have; a row that names two of them has two slots of it. A map is made once, by the
        server: it names one expert at least, for a rank without any runs none of this; what an entry outside [-1, E)
        does is nobody's promise; this reference drops it.
    sorted_token_ids: the kept slots of expert 0 in ascending order, then N until a whole number of blocks is filled,
        then those of expert 1, and so on; from `num_tokens_post_padded` on, all N. An expert without slots takes no
        block. An id that stands twice in a row is two slots.
    expert_ids: the expert of each block; from `num_tokens_post_padded` / B on, -1.
    num_tokens_post_padded: the entries in use, a multiple of B.
    inverse [T, k]: where each slot stands in `sorted_token_ids`, or -1 where it was dropped.
    Sizes depend on shapes alone, so that nothing waits for the device and a CUDA graph can be captured:
        M = B * (m + (N - m) // B) with m = min(N, E), the most that any ids can need. Every element is written.

    A target may order the slots inside an expert otherwise, unless it declares itself deterministic.

    Raises ValueError for anything outside these shapes, dtypes and ranges.
    """
    experts, shapes = expert_of_slot(ids, num_experts, expert_map), align_shapes(ids.shape, block_size, num_experts)
    if out is None:
        out = tuple(ids.new_empty(shape, dtype=torch.int32) for shape in shapes)  # type: ignore[assignment]
    assert out is not None
    for tensor, shape in zip(out, shapes, strict=True):
        if tensor.shape != shape or tensor.dtype != torch.int32 or not tensor.is_contiguous():
            raise ValueError(f"out must be contiguous int32 of shapes {shapes}, not {[list(t.shape) for t in out]}")
    sorted_token_ids, expert_ids, num_tokens_post_padded, inverse = out
    slots = ids.numel()
    sorted_token_ids.fill_(slots)
    expert_ids.fill_(-1)
    inverse.fill_(-1)
    used = 0  # entries of sorted_token_ids
    for expert in range(num_experts):
        members = (experts.flatten() == expert).nonzero().flatten()  # ascending
        blocks = -(-len(members) // block_size)
        where = used + torch.arange(len(members), device=ids.device)
        sorted_token_ids[where] = members.int()
        inverse.view(-1)[members] = where.int()
        expert_ids[used // block_size : used // block_size + blocks] = expert
        used += blocks * block_size
    num_tokens_post_padded.fill_(used)
    return out


def expert_of_slot(ids: Tensor, num_experts: int, expert_map: Tensor | None) -> Tensor:
    """The expert of each slot, or -1 where the slot is dropped: int64 of the shape of `ids`."""
    if ids.dim() != 2 or ids.shape[1] < 1 or ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"ids must be [T, k] in int32 or int64 with k >= 1, not {list(ids.shape)} {ids.dtype}")
    if num_experts < 1:
        raise ValueError(f"num_experts must be at least 1, not {num_experts}")
    expert = ids.long()
    if expert_map is not None:
        if expert_map.dim() != 1 or not len(expert_map) or expert_map.dtype != torch.int32:
            raise ValueError("expert_map must be [G] int32 with G >= 1, "
                             f"not {list(expert_map.shape)} {expert_map.dtype}")
        known = (expert >= 0) & (expert < len(expert_map))
        expert = torch.where(known, expert_map.long()[expert.where(known, torch.zeros_like(expert))], -1)
    return expert.where((expert >= 0) & (expert < num_experts), torch.full_like(expert, -1))


def align_shapes(ids_shape: torch.Size, block_size: int, num_experts: int) -> list[tuple[int, ...]]:
    """The shapes of the four results: they depend on shapes alone."""
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, not {block_size}")
    slots = ids_shape.numel()
    alone = min(slots, num_experts)  # worst case: each of these experts has one slot, and one of them all the rest
    blocks = alone + (slots - alone) // block_size
    return [(blocks * block_size,), (blocks,), (1,), tuple(ids_shape)]
