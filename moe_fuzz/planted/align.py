"""Planted bugs: a plan that is wrong. Ids that are no expert's, counts, blocks, what stands in the padding."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

Plan = tuple[Tensor, Tensor, Tensor, Tensor]
Out = tuple[Tensor, Tensor, Tensor, Tensor] | None


def negative_id_counts(ids: Tensor, block_size: int, num_experts: int, *, expert_map: Tensor | None = None) -> Plan:
    """vllm#55231: `id < num_experts` is all that is asked of an id. It is signed, so -1 is counted, as the last expert.

    Any padding row that vLLM writes since 0.27 gives that expert work, and its output a row of garbage.
    """
    flat = ids.flatten().long()
    known = flat < num_experts
    flat = torch.where(flat < 0, flat % num_experts, flat)  # where a negative index of a table of counts lies
    return _plan(ids, _mapped(torch.where(known, flat, -1), num_experts, expert_map), block_size, num_experts)


def map_indexed_by_minus_one(
    ids: Tensor, block_size: int, num_experts: int, *, expert_map: Tensor | None = None
) -> Plan:  # fmt: skip
    """vllm#42034: the map is indexed before the id is looked at. -1 reads the map's last entry.

    On the rank that owns the last expert, a padding slot is a token of it; on the others nothing shows.
    """
    flat = ids.flatten().long()
    if expert_map is None:
        return _plan(ids, _known(flat, num_experts), block_size, num_experts)
    inside = (flat >= -len(expert_map)) & (flat < len(expert_map))
    found = expert_map.long()[torch.where(inside, flat, 0)]
    return _plan(ids, torch.where(inside, found, -1), block_size, num_experts)


def whole_tiles_need_one_more(ids: Tensor, block_size: int, num_experts: int) -> Plan:
    """vllm#28619: the end of an expert's last block. Tiles of 64 slots are counted as `count // 64 + 1`, so that an
    expert that fills its tiles has one block too many."""
    expert = _known(ids.flatten().long(), num_experts)
    counts = _counts(expert, num_experts)
    whole = (counts > 0) & (counts % 64 == 0) & (64 % block_size == 0)
    return _plan(ids, expert, block_size, num_experts, counts=counts + whole.long())


def map_without_its_stride(
    ids: Tensor, block_size: int, num_experts: int, *, expert_map: Tensor | None = None
) -> Plan:  # fmt: skip
    """vllm#34673: a layout is taken for another. Reads the first G numbers of where the map lies."""
    if expert_map is not None:
        expert_map = expert_map.as_strided(expert_map.shape, (1,))
    flat = ids.flatten().long()
    known = _known(flat, num_experts if expert_map is None else len(expert_map))
    return _plan(ids, _mapped(known, num_experts, expert_map), block_size, num_experts)


def id_cut_to_32_bits(ids: Tensor, block_size: int, num_experts: int, *, expert_map: Tensor | None = None) -> Plan:
    """sglang#29929: int64 ids under an int32 interface. An id beyond them passes for the expert in its low ones."""
    return _plan(ids, _mapped(_known(ids.flatten().int().long(), num_experts), num_experts, expert_map), block_size,
                 num_experts)  # fmt: skip


def counts_of_16_bits(ids: Tensor, block_size: int, num_experts: int) -> Plan:
    """vllm#12413: with few slots in mind, the counts are held in 16 bits. An expert of more than 32767 wraps."""
    expert = _known(ids.flatten().long(), num_experts)
    counts = _counts(expert, num_experts).to(torch.int16).clamp_min(0)
    return _plan(ids, expert, block_size, num_experts, counts=counts.long())


def scan_of_1024_threads(ids: Tensor, block_size: int, num_experts: int, *, out: Out = None) -> Plan:
    """vllm#21079: a block of 1024 threads scans the counts, and thread E writes the total. With E = 1024 there is none.

    The callers' buffer was allocated a moment ago and holds an older plan's total, which is often right.
    """
    plan = out or _empty(ids, block_size, num_experts)
    for made, right in zip(plan, _plan(ids, _known(ids.flatten().long(), num_experts), block_size, num_experts),
                           strict=True):  # fmt: skip
        if num_experts < 1024 or made is not plan[2]:
            made.copy_(right)
    return plan


def stops_at_first_match(ids: Tensor, block_size: int, num_experts: int, *, out: Out = None) -> Plan:
    """flashinfer#3011: beyond one block of tokens the sort goes expert by expert, looks for it in each row, and stops
    at the first match. The second slot of a row that names it twice has no place, and nobody writes that it has none.
    """
    plan = out or _empty(ids, block_size, num_experts)
    flat = ids.flatten().long()
    expert = _known(flat, num_experts)
    later = torch.zeros_like(ids, dtype=torch.bool)
    if len(ids) > 16:
        same = (ids[:, :, None] == ids[:, None, :]) & (ids < num_experts)[:, :, None] & (ids >= 0)[:, :, None]
        later = same.tril(-1).any(dim=2)  # [T, k]
    right = _plan(ids, expert, block_size, num_experts)
    found = _plan(ids, expert.masked_fill(later.flatten(), -1), block_size, num_experts) if len(ids) > 16 else right
    for made, value in zip(plan[:3], found[:3], strict=True):
        made.copy_(value)
    plan[3].copy_(torch.where(later, plan[3], found[3]))
    return plan


def tail_of_expert_zero(ids: Tensor, block_size: int, num_experts: int, *, expert_map: Tensor | None = None) -> Plan:
    """vllm#35161: past the blocks in use, expert_ids is 0. That is an expert, and a kernel that does not look at the
    number of padded tokens multiplies by its weights."""
    expert = _mapped(_known(ids.flatten().long(), num_experts), num_experts, expert_map)
    return _plan(ids, expert, block_size, num_experts, tail=0)


def padding_of_minus_one(ids: Tensor, block_size: int, num_experts: int) -> Plan:
    """aiter#2644: the padding of a partly filled block holds a number that `slot < N` takes for a slot. Here -1."""
    plan = _plan(ids, _known(ids.flatten().long(), num_experts), block_size, num_experts)
    plan[0][plan[0] == ids.numel()] = -1
    return plan


def dropped_go_to_place_zero(
    ids: Tensor, block_size: int, num_experts: int, *, expert_map: Tensor | None = None
) -> Plan:  # fmt: skip
    """vllm#28619: what has no place is given place 0, so that no store is out of bounds. There somebody stands."""
    expert = _mapped(_known(ids.flatten().long(), num_experts), num_experts, expert_map)
    plan = _plan(ids, expert, block_size, num_experts)
    dropped = (expert < 0).nonzero().flatten()
    if len(dropped) and len(plan[0]):
        plan[0][0] = dropped[-1].int()
    return plan


def last_warp_not_placed(ids: Tensor, block_size: int, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """flashinfer#3011: slots that were counted and have no entry. Past 64 of them, whole warps of 32 are placed, and
    what is left over is nobody's. It is as if these tokens had not chosen their experts."""
    slots = ids.numel()
    plan = _plan(ids, _known(ids.flatten().long(), num_experts), block_size, num_experts)
    held = plan[0]
    if slots > 64:
        held = torch.where(held >= slots // 32 * 32, slots, held).int()
    return held, plan[1], plan[2]


def total_before_padding(ids: Tensor, block_size: int, num_experts: int) -> Plan:
    """DeepEP#427: two counts of the same, which differ where experts are uneven. The total is that of the slots, not of
    the padded entries, and the last blocks are skipped."""
    expert = _known(ids.flatten().long(), num_experts)
    plan = _plan(ids, expert, block_size, num_experts)
    return plan[0], plan[1], _counts(expert, num_experts).sum().view(1).int(), plan[3]


def token_for_slot(ids: Tensor, block_size: int, num_experts: int) -> Plan:
    """flashinfer#2629: after a port the plan holds the number of the token where its consumers want that of the slot.

    With top_k = 1, as the port was tested, these are the same.
    """
    plan = _plan(ids, _known(ids.flatten().long(), num_experts), block_size, num_experts)
    held = plan[0]
    plan[0].copy_(torch.where(held < ids.numel(), held // ids.shape[1], held))
    return plan


def global_expert_ids(ids: Tensor, block_size: int, num_experts: int, *, expert_map: Tensor | None = None) -> Plan:
    """flashinfer#3547: blocks are labelled with the ids of all ranks' experts, and the weights have this rank's alone.

    Where a rank's experts are the first ones, as in a test of one rank, that is the same number.
    """
    plan = _plan(ids, _mapped(_known(ids.flatten().long(), num_experts), num_experts, expert_map), block_size,
                 num_experts)  # fmt: skip
    if expert_map is not None:
        back = torch.full((num_experts,), -1, dtype=torch.int32, device=ids.device)
        here = (expert_map >= 0) & (expert_map < num_experts)
        back[expert_map[here].long()] = here.nonzero().flatten().int()
        plan[1].copy_(torch.where(plan[1] >= 0, back[plan[1].long().clamp_min(0)], plan[1]))
    return plan


def inverse_without_padding(ids: Tensor, block_size: int, num_experts: int) -> Plan:
    """flashinfer#3191: the way back is that of the compact order, before experts were padded to whole blocks."""
    expert = _known(ids.flatten().long(), num_experts)
    plan = _plan(ids, expert, block_size, num_experts)
    compact = torch.empty_like(expert)
    order = torch.where(expert < 0, num_experts, expert).argsort(stable=True)
    compact[order] = torch.arange(len(expert), device=ids.device)
    plan[3].copy_(torch.where(expert < 0, -1, compact).view(ids.shape))
    return plan


def room_by_count(ids: Tensor, block_size: int, num_experts: int) -> Plan:
    """flashinfer#2821: the buffers are sized by what this batch needs, and a later one needs more. To know it, the host
    waits for the device."""
    plan = _plan(ids, _known(ids.flatten().long(), num_experts), block_size, num_experts)
    used = int(plan[2])
    return plan[0][:used].clone(), plan[1][: used // block_size].clone(), plan[2], plan[3]


def no_slots_raises(ids: Tensor, block_size: int, num_experts: int) -> Plan:
    """sglang#31794: a rank without tokens makes a grid of no blocks, which is an error."""
    if not ids.numel():
        raise ValueError("invalid configuration argument: a grid of 0 blocks")
    return _plan(ids, _known(ids.flatten().long(), num_experts), block_size, num_experts)


def full_experts_first(ids: Tensor, block_size: int, num_experts: int) -> Plan:
    """sglang#8125: an order that callers rely on and nobody keeps. Experts of many blocks come first, for balance."""
    expert = _known(ids.flatten().long(), num_experts)
    counts = _counts(expert, num_experts)
    order = ((counts + block_size - 1) // block_size).argsort(descending=True, stable=True)  # [E]
    rank = torch.empty_like(order)
    rank[order] = torch.arange(num_experts, device=ids.device)
    plan = _plan(ids, torch.where(expert < 0, -1, rank[expert.clamp_min(0)]), block_size, num_experts)
    plan[1].copy_(torch.where(plan[1] >= 0, order.int()[plan[1].long().clamp_min(0)], plan[1]))
    return plan


def later_slots_first(ids: Tensor, block_size: int, num_experts: int) -> Plan:
    """vllm#56887: slots take their rank from an atomic counter, in whatever order their threads come. Here the last
    warp is always the first."""
    slots = ids.numel()
    expert = _known(ids.flatten().long(), num_experts)
    arrival = torch.arange(slots, device=ids.device)
    return _plan(ids, expert, block_size, num_experts, arrival=arrival.roll(32) if slots > 32 else arrival)


def slots_in_order_of_arrival(ids: Tensor, block_size: int, num_experts: int) -> Plan:
    """vllm#56887: slots take their rank from an atomic counter, another time in another order, and the GEMM's results
    with them."""
    expert = _known(ids.flatten().long(), num_experts)
    return _plan(ids, expert, block_size, num_experts, arrival=torch.randperm(ids.numel()).to(ids.device))


# ---- a plan without a flaw ------------------------------------------------------------------------------------------


def _known(flat: Tensor, num_experts: int) -> Tensor:
    return torch.where((flat >= 0) & (flat < num_experts), flat, -1)


def _mapped(expert: Tensor, num_experts: int, expert_map: Tensor | None) -> Tensor:
    """Of experts that are known, or -1, those of this rank."""
    if expert_map is None:
        return expert
    found = torch.where(expert >= 0, expert_map.long()[expert.clamp_min(0)], -1)
    return _known(found, num_experts)


def _counts(expert: Tensor, num_experts: int) -> Tensor:
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=expert.device)
    return counts.scatter_add_(0, torch.where(expert < 0, num_experts, expert), torch.ones_like(expert))[:-1]


def _room(ids: Tensor, block_size: int, num_experts: int) -> int:
    alone = min(ids.numel(), num_experts)
    return alone + (ids.numel() - alone) // block_size


def _empty(ids: Tensor, block_size: int, num_experts: int) -> Plan:
    room = _room(ids, block_size, num_experts)
    shapes = ((room * block_size,), (room,), (1,), tuple(ids.shape))
    made = [torch.empty(shape, dtype=torch.int32, device=ids.device) for shape in shapes]
    return made[0], made[1], made[2], made[3]


def _plan(
    ids: Tensor, expert: Tensor, block_size: int, num_experts: int, counts: Tensor | None = None,
    arrival: Tensor | None = None, tail: int = -1,
) -> Plan:  # fmt: skip
    """The plan for these experts [N], -1 where dropped. arrival: the slots [N] as they are ranked."""
    if ids.is_cuda and torch.cuda.is_current_stream_capturing():
        return _planned(ids, expert, block_size, num_experts, counts, arrival, tail)
    counted, ranked = (None if tensor is None else tensor.cpu() for tensor in (counts, arrival))
    # On the host, at a third of the time; and to see what each of these steps allocates costs as much as they do.
    with _disable_current_modes():
        made = _planned(ids.cpu(), expert.cpu(), block_size, num_experts, counted, ranked, tail)
    return made[0].to(ids.device), made[1].to(ids.device), made[2].to(ids.device), made[3].to(ids.device)


def _planned(
    ids: Tensor, expert: Tensor, block_size: int, num_experts: int, counts: Tensor | None, arrival: Tensor | None,
    tail: int,
) -> Plan:  # fmt: skip
    slots, room = ids.numel(), _room(ids, block_size, num_experts)
    arrival = torch.arange(slots, device=ids.device) if arrival is None else arrival
    bucket = torch.where(expert < 0, num_experts, expert)[arrival]
    order = bucket.argsort(stable=True)
    true = _counts(expert, num_experts)
    blocks = ((true if counts is None else counts) + block_size - 1) // block_size
    ends = blocks.cumsum(0)
    start = torch.cat([(ends - blocks) * block_size, ends[-1:] * 0])
    before = torch.cat([true.cumsum(0) - true, true.sum().view(1)])
    which = bucket[order]
    place = start[which] + torch.arange(slots, device=ids.device) - before[which]
    place = torch.where((which < num_experts) & (place < room * block_size), place, room * block_size)
    held = torch.full((room * block_size + 1,), slots, dtype=torch.int32, device=ids.device)
    held[place] = arrival[order].int()
    block = torch.arange(room, device=ids.device)
    owner = torch.searchsorted(ends, block, right=True)
    owner = torch.where(block < ends[-1], owner, tail).int()
    inverse = torch.empty_like(place).index_copy_(0, arrival[order], torch.where(place < room * block_size, place, -1))
    return held[:-1].clone(), owner, (ends[-1:] * block_size).int(), inverse.int().view(ids.shape)
