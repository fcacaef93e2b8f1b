"""Planted bugs of align: memory outside of what was given, and what is kept from call to call by a buffer's address."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

Plan = tuple[Tensor, Tensor, Tensor, Tensor]
Out = tuple[Tensor, Tensor, Tensor, Tensor] | None
_KEPT: dict[object, Tensor] = {}  # buffers that live as long as the process, by what they belong to


def fills_whole_vectors(ids: Tensor, block_size: int, num_experts: int, *, out: Out = None) -> Plan:
    """flashinfer#3957: stores past the tail. The padding is filled four entries at a time, the last vector whole."""
    plan = out or _empty(ids, block_size, num_experts)
    slots, room = ids.numel(), len(plan[0])
    if room:
        vectors = triton.cdiv(room, 4)
        _fill_kernel[(triton.cdiv(vectors, 1024),)](plan[0], slots, vectors, BLOCK=1024)
    return _sort_into(plan, ids, block_size, num_experts)


def counts_before_the_table(
    ids: Tensor, block_size: int, num_experts: int, *, out: Out = None
) -> Plan:  # fmt: skip
    """vllm#57036: `if (id < num_experts)` lets -1 through, and its count lies before the table of counts.

    Nobody reads it there. In a server it is another tensor's last element.
    """
    plan = out or _empty(ids, block_size, num_experts)
    counts = torch.zeros(num_experts, dtype=torch.int32, device=ids.device)
    if ids.numel():
        flat = ids.contiguous().view(-1)
        _count_kernel[(triton.cdiv(ids.numel(), 256),)](flat, counts, ids.numel(), num_experts, BLOCK=256)
    plan[0].fill_(ids.numel())
    return _sort_into(plan, ids, block_size, num_experts)


def row_offset_of_32_bits(ids: Tensor, block_size: int, num_experts: int) -> Plan:
    """vllm#34279: token times stride in 32 bits. Beyond 2^31 elements it wraps, to before the ids."""
    plan = _empty(ids, block_size, num_experts)
    copied = torch.empty(ids.shape, dtype=ids.dtype, device=ids.device)
    if ids.numel():
        _copy_kernel[(triton.cdiv(ids.numel(), 256),)](
            ids, copied, ids.numel(), ids.shape[1], ids.stride(0), ids.stride(1), BLOCK=256
        )
    plan[0].fill_(ids.numel())
    return _sort_into(plan, copied, block_size, num_experts)


def counts_cleared_once(ids: Tensor, block_size: int, num_experts: int) -> Plan:
    """vllm#41444: the counts lie in a workspace that is zero when it is made, and that nobody clears again.

    It belongs to the buffer of the ids: all replays of a graph have the same one.
    """
    plan = _empty(ids, block_size, num_experts)
    plan[0].fill_(ids.numel())
    expert = torch.where((ids >= 0) & (ids < num_experts), ids, num_experts).flatten().long()
    found = _KEPT.setdefault(_place("counts", ids, num_experts), _zeros(num_experts + 1, ids))
    found.scatter_add_(0, expert, torch.ones_like(expert))
    return _sort_into(plan, ids, block_size, num_experts, found[:-1])


def filled_once(ids: Tensor, block_size: int, num_experts: int) -> Plan:
    """vllm#52308: what is done once, before the capture, is not done again. The plan's buffer is filled once.

    Every replay leaves its slots behind where the next one has none.
    """
    made = _empty(ids, block_size, num_experts)
    made[0].fill_(ids.numel())
    key = _place("plan", ids, num_experts, block_size)
    made = (_KEPT.setdefault(key, made[0]), *made[1:])
    return _sort_into(made, ids, block_size, num_experts)


def total_kept_by_address(ids: Tensor, block_size: int, num_experts: int) -> Plan:
    """flashinfer#3516: a number that was read of a tensor is kept by the tensor's address and size. Here it is how many
    entries are in use: a buffer that a server has filled anew has the number of what it held before."""
    plan = _empty(ids, block_size, num_experts)
    plan[0].fill_(ids.numel())
    plan = _sort_into(plan, ids, block_size, num_experts)
    plan[2].copy_(_KEPT.setdefault(_place("total", ids, num_experts, block_size), plan[2].clone()))
    return plan


def total_read_on_host(ids: Tensor, block_size: int, num_experts: int) -> Plan:
    """Megatron-LM#6999: the host asks the device how many blocks there are, which cannot be captured."""
    plan = _empty(ids, block_size, num_experts)
    plan[0].fill_(ids.numel())
    plan = _sort_into(plan, ids, block_size, num_experts)
    plan[1][int(plan[2]) // block_size :] = -1
    return plan


def ranked_backwards_in_a_graph(ids: Tensor, block_size: int, num_experts: int) -> Plan:
    """flashinfer#4841: another tactic is taken under graphs. Here it ranks the slots of an expert from the last."""
    plan = _empty(ids, block_size, num_experts)
    plan[0].fill_(ids.numel())
    capturing = ids.is_cuda and torch.cuda.is_current_stream_capturing()
    return _sort_into(plan, ids, block_size, num_experts, backwards=capturing)


# ---- a plan without a flaw ------------------------------------------------------------------------------------------


def _place(use: str, ids: Tensor, *sizes: int) -> tuple[object, ...]:
    """A buffer, as the host knows it, and what is kept for it."""
    return use, ids.device, ids.data_ptr(), tuple(ids.shape), ids.dtype, *sizes


def _zeros(count: int, ids: Tensor) -> Tensor:
    return torch.zeros(count, dtype=torch.int64, device=ids.device)


def _empty(ids: Tensor, block_size: int, num_experts: int) -> Plan:
    alone = min(ids.numel(), num_experts)
    room = alone + (ids.numel() - alone) // block_size
    shapes = ((room * block_size,), (room,), (1,), tuple(ids.shape))
    made = [torch.empty(shape, dtype=torch.int32, device=ids.device) for shape in shapes]
    return made[0], made[1], made[2], made[3]


def _sort_into(
    plan: Plan, ids: Tensor, block_size: int, num_experts: int, counts: Tensor | None = None, backwards: bool = False
) -> Plan:
    """Writes all of the plan but the padding of sorted_token_ids."""
    slots, room = ids.numel(), len(plan[1])
    bucket = torch.where((ids >= 0) & (ids < num_experts), ids, num_experts).flatten().long()
    true = _zeros(num_experts + 1, ids).scatter_add_(0, bucket, torch.ones_like(bucket))
    blocks = ((true[:-1] if counts is None else counts) + block_size - 1) // block_size
    ends = blocks.cumsum(0)
    start = torch.cat([(ends - blocks) * block_size, ends[-1:] * 0])
    order = bucket.flip(0).argsort(stable=True).neg() + slots - 1 if backwards else bucket.argsort(stable=True)
    which = bucket[order]
    place = start[which] + torch.arange(slots, device=ids.device) - (true.cumsum(0) - true)[which]
    fits = (which < num_experts) & (place < room * block_size)
    held = torch.cat([plan[0], plan[0].new_zeros(1)])
    held[torch.where(fits, place, room * block_size)] = order.int()
    plan[0].copy_(held[:-1])
    block = torch.arange(room, device=ids.device)
    plan[1].copy_(torch.where(block < ends[-1], torch.searchsorted(ends, block, right=True), -1))
    plan[2].copy_(ends[-1:] * block_size)
    plan[3].view(-1)[order] = torch.where(fits, place, -1).int()
    return plan


@triton.jit
def _fill_kernel(held_ptr, slots, vectors, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    vector = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    where = vector[:, None] * 4 + tl.arange(0, 4)[None, :]
    tl.store(held_ptr + where, tl.full((BLOCK, 4), slots, tl.int32), mask=(vector < vectors)[:, None])


@triton.jit
def _count_kernel(ids_ptr, counts_ptr, slots, num_experts, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(ids_ptr + slot, mask=slot < slots, other=num_experts)
    tl.atomic_add(counts_ptr + expert, 1, mask=expert < num_experts)


@triton.jit
def _copy_kernel(  # type: ignore[no-untyped-def]
    ids_ptr, copied_ptr, slots, top_k, stride_t, stride_k, BLOCK: tl.constexpr
):
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    offset = (slot // top_k * stride_t.to(tl.int32) + slot % top_k * stride_k).to(tl.int32)
    tl.store(copied_ptr + slot, tl.load(ids_ptr + offset, mask=slot < slots), mask=slot < slots)
