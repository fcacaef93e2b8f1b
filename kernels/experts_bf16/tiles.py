"""What grouped products share on the device: the order of their tiles, and the slots and weights of one."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from moe_fuzz.kernels.align import local_experts


@triton.jit
def tile_at(tile, blocks, tiles_n, GROUP: tl.constexpr):
    """The block of slots and the tile of rows of w that the n-th tile is: GROUP blocks take the same tile of w one
    after another, so that it is read from memory once and from L2 then."""
    first = tile // (GROUP * tiles_n) * GROUP
    beside = min(blocks - first, GROUP)
    return first + tile % (GROUP * tiles_n) % beside, tile % (GROUP * tiles_n) // beside


@triton.jit
def slots_of(
    block, sorted_ptr, expert_ids_ptr, ids_ptr, map_ptr, slots, top_k, num_ids, num_experts, ids_stride_t, ids_stride_k,
    map_stride, HAS_MAP: tl.constexpr, BLOCK_M: tl.constexpr, GROUPED: tl.constexpr,
):  # fmt: skip
    """The expert of a block, -1 where there is none, and its slots [M]: `slots` or more where there is none."""
    if GROUPED:
        expert = tl.load(expert_ids_ptr + block)
        slot = tl.load(sorted_ptr + block * BLOCK_M + tl.arange(0, BLOCK_M))
    else:
        expert, slot = _group(
            block, ids_ptr, map_ptr, slots, top_k, num_ids, num_experts, ids_stride_t, ids_stride_k, map_stride,
            HAS_MAP, BLOCK_M,
        )  # fmt: skip
    return expert, slot


@triton.jit
def weights_of(weights_ptr, slot, ok, top_k, stride_t, stride_k):
    """The router's weights [M] of slots, 0 where not `ok`."""
    at = (slot // top_k).to(tl.int64) * stride_t + (slot % top_k).to(tl.int64) * stride_k
    return tl.load(weights_ptr + at, mask=ok, other=0.0)


@triton.jit
def _group(
    block, ids_ptr, map_ptr, slots, top_k, num_ids, num_experts, ids_stride_t, ids_stride_k, map_stride,
    HAS_MAP: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """The expert of a block and the slots in it, as `align` would have it but for the order of blocks; (-1, …) past
    the last block.

    For so few slots it costs less than a launch of `align`, and every program can do it alone. They are no more than a
    block holds, so each expert has one, led by its first slot.
    """
    slot = tl.arange(0, 16)
    at = (slot // top_k).to(tl.int64) * ids_stride_t + (slot % top_k).to(tl.int64) * ids_stride_k
    ids = tl.load(ids_ptr + at, mask=slot < slots, other=-1)
    experts = local_experts(ids, map_ptr, map_stride, num_ids, num_experts, slot < slots, HAS_MAP)
    earlier = (experts[:, None] == experts[None, :]) & (slot[:, None] < slot[None, :])
    rank = tl.sum(earlier.to(tl.int32), axis=0)  # among the slots of its expert
    leads = (experts >= 0) & (rank == 0)
    leader = leads & (tl.cumsum(leads.to(tl.int32)) - 1 == block)  # one at most
    expert = tl.sum(tl.where(leader, experts + 1, 0)) - 1
    here = (experts == expert)[None, :] & (rank[None, :] == tl.arange(0, BLOCK_M)[:, None])  # at most one in a row
    return expert, slots - tl.sum(tl.where(here, slots - slot[None, :], 0), axis=1)
