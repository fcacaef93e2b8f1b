"""Planted bugs: all-reduces with a norm whose ranks do not agree, or not in time. Right wherever ranks are in step and
shapes are kind. `allreduce_parts.py` holds what has no flaw."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

if __package__:
    from . import allreduce_parts as parts
else:  # loaded by its path, as the script of a finding does: its neighbours are on sys.path
    import allreduce_parts as parts  # type: ignore[import-not-found, no-redef]

_SHARED: dict[object, Any] = {}  # what outlives a group


def no_end_barrier(x: Tensor, residual: Any, gamma: Tensor, eps: float, *, group: Any, out: Any = None) -> Any:
    """vllm#2760: nobody waits until all have read. A rank that is ahead puts its next message where a late one still
    reads this one."""
    found, finish = parts.finisher(x, residual, gamma, eps, group, out)
    parts.one_shot(x, group, finish, end_barrier=False)
    return found


def flag_before_data(x: Tensor, residual: Any, gamma: Tensor, eps: float, *, group: Any, out: Any = None) -> Any:
    """aiter#2890: the signal is given before the message is there, as where a store is not released before its flag:
    who is quick reads what the buffer held before."""
    found, finish = parts.finisher(x, residual, gamma, eps, group, out)
    shown, pads, ranks = parts.buffers(group), parts.signals(group), parts.device(group)

    def program(rank: int, own: Tensor) -> parts.Program:
        half = own.shape[-1] // 2
        there = parts.message(shown[rank], own)
        there[..., :half] = own[..., :half]
        early = parts.barrier(pads, rank, group.world)
        wait = next(early, None)  # the signals are out; the rest of the message is not
        yield None
        there[..., half:] = own[..., half:]
        yield wait
        yield from early
        read = [parts.message(buffer, own).clone() for buffer in shown]
        finish(rank, read)
        yield None
        yield from parts.barrier(pads, rank, group.world)

    for rank, own in parts.parts_of(x, group).items():
        ranks.launch(group, rank, program(rank, own))
    return found


def own_part_first(x: Tensor, residual: Any, gamma: Tensor, eps: float, *, group: Any, out: Any = None) -> Any:
    """ompi#12258: each rank begins with what it has at hand, its own part: three or more parts summed in another order
    are rounded otherwise, and the ranks drift apart."""
    normed, residual_out = found = parts.results(x, out)

    def finish(rank: int, read: list[Tensor]) -> None:
        total = parts.summed([*read[rank:], *read[:rank]], residual).to(x.dtype)
        parts.of_rank(residual_out, rank, group).copy_(total)
        parts.of_rank(normed, rank, group).copy_(parts.norm(total, gamma, eps))

    parts.one_shot(x, group, finish)
    return found


def memory_of_the_world(x: Tensor, residual: Any, gamma: Tensor, eps: float, *, group: Any, out: Any = None) -> Any:
    """vllm#45917: buffers are those of all ranks there are, whichever group calls: two groups that call at the same
    time write into each other's messages."""
    found, finish = parts.finisher(x, residual, gamma, eps, group, out)
    key = (group.world, group.capacity, group.seed, group.rank)
    if len(_SHARED) > 8:
        _SHARED.clear()
    memory = _SHARED.setdefault(key, None) or parts.buffers(group)
    _SHARED[key] = memory
    parts.one_shot(x, group, finish, memory=memory)
    return found


def two_shot_tail(x: Tensor, residual: Any, gamma: Tensor, eps: float, *, group: Any, out: Any = None) -> Any:
    """vllm#21325: the cap on the message is worked out from the number of rows twice, and a few rows are shared out
    among the ranks: T // R each. What is left over belongs to nobody."""
    normed, residual_out = found = parts.results(x, out)
    tokens, world = x.shape[-2], group.world
    share = tokens // world
    few = 0 < tokens * tokens < 1024 and share > 0

    def finish(rank: int, read: list[Tensor]) -> None:
        total = parts.summed(read, residual).to(x.dtype)
        last = share * world if few else tokens
        parts.of_rank(residual_out, rank, group)[:last] = total[:last]
        parts.of_rank(normed, rank, group)[:last] = parts.norm(total, gamma, eps)[:last]

    parts.one_shot(x, group, finish)
    return found


def done_before_committed(x: Tensor, residual: Any, gamma: Tensor, eps: float, *, group: Any, out: Any = None) -> Any:
    """vllm#45448: up to two tokens the call is said to be done before its output is committed: what the last rank has
    to store is on its way, and nobody waits for it."""
    normed, residual_out = found = parts.results(x, out)

    def finish(rank: int, read: list[Tensor]) -> None:
        total = parts.summed(read, residual).to(x.dtype)
        parts.of_rank(residual_out, rank, group).copy_(total)
        columns = x.shape[-1] // 2 if x.shape[-2] <= 2 and rank == group.world - 1 and group.world > 1 else x.shape[-1]
        parts.of_rank(normed, rank, group)[..., :columns] = parts.norm(total, gamma, eps)[..., :columns]

    parts.one_shot(x, group, finish)
    return found


def zero_is_not_there_yet(x: Tensor, residual: Any, gamma: Tensor, eps: float, *, group: Any, out: Any = None) -> Any:
    """flashinfer#3304: a buffer full of -0 is one in which nothing has arrived; a message with -0 in it, or with a
    negative number that is flushed to it, never does."""
    found, finish = parts.finisher(x, residual, gamma, eps, group, out)
    least = torch.finfo(x.dtype).smallest_normal

    def arrived(part: Tensor) -> bool:
        return not bool(((part.float().abs() < least) & part.signbit()).any())

    def patient(rank: int, read: list[Tensor]) -> None:
        while not all(arrived(part) for part in read):
            time.sleep(0.001)
        finish(rank, read)

    parts.one_shot(x, group, patient)
    return found


def cluster_of_seven(x: Tensor, residual: Any, gamma: Tensor, eps: float, *, group: Any, out: Any = None) -> Any:
    """vllm#34412: a row is shared by a cluster of blocks, whose sums of squares are added up in pairs: of a number that
    is no power of two, the last ones stay alone."""
    normed, residual_out = found = parts.results(x, out)
    hidden = x.shape[-1]
    blocks = hidden // 128 if hidden % 128 == 0 else 1
    whole = 1 << (blocks.bit_length() - 1)  # as many as pairs can be made of

    def finish(rank: int, read: list[Tensor]) -> None:
        total = parts.summed(read, residual).to(x.dtype)
        value = total.float()
        squares = value.square().view(-1, blocks, max(1, hidden // blocks)).sum(dim=-1)[:, :whole].sum(dim=-1)
        root = torch.rsqrt(squares[:, None] / hidden + eps)
        parts.of_rank(residual_out, rank, group).copy_(total)
        parts.of_rank(normed, rank, group).copy_((value * root * gamma.float()).to(x.dtype))

    parts.one_shot(x, group, finish)
    return found


def sums_before_rounding(x: Tensor, residual: Any, gamma: Tensor, eps: float, *, group: Any, out: Any = None) -> Any:
    """aiter#2586: what is promised is the residual added to a sum that was rounded; up to 16 rows it is added before
    the sum is, and the bits of residual_out change with the number of rows."""
    normed, residual_out = found = parts.results(x, out)

    def finish(rank: int, read: list[Tensor]) -> None:
        total = parts.summed(read, None)
        if x.shape[-2] > 16:
            total = total.to(x.dtype).float()
        if residual is not None:
            total = total + residual.float()
        stored = total.to(x.dtype)
        parts.of_rank(residual_out, rank, group).copy_(stored)
        parts.of_rank(normed, rank, group).copy_(parts.norm(stored, gamma, eps))

    parts.one_shot(x, group, finish)
    return found


def mean_times_ranks(x: Tensor, residual: Any, gamma: Tensor, eps: float, *, group: Any, out: Any = None) -> Any:
    """tt-metal#13621: each part is scaled by the reciprocal of a number that is no power of two. Of a mean over the
    ranks that is multiplied by their number again, float32 shows it: it is not quite the sum."""
    normed, residual_out = found = parts.results(x, out)

    def finish(rank: int, read: list[Tensor]) -> None:
        mean = parts.summed([part.float() * (1.0 / group.world) for part in read], None)
        total = mean * group.world
        stored = (total if residual is None else total + residual.float()).to(x.dtype)
        parts.of_rank(residual_out, rank, group).copy_(stored)
        parts.of_rank(normed, rank, group).copy_(parts.norm(stored, gamma, eps))

    parts.one_shot(x, group, finish)
    return found


def stale_residual(x: Tensor, residual: Any, gamma: Tensor, eps: float, *, group: Any, out: Any = None) -> Any:
    """flashinfer#2385: the residual is not updated: the norm is right, and residual_out is what came in."""
    normed, residual_out = found = parts.results(x, out)

    def finish(rank: int, read: list[Tensor]) -> None:
        total = parts.summed(read, residual).to(x.dtype)
        parts.of_rank(residual_out, rank, group).copy_(total if residual is None else residual)
        parts.of_rank(normed, rank, group).copy_(parts.norm(total, gamma, eps))

    parts.one_shot(x, group, finish)
    return found


def second_pass_is_packed(x: Tensor, residual: Any, gamma: Tensor, eps: float, *, group: Any, out: Any = None) -> Any:
    """LightLLM#1467: strides are heeded where squares are summed, and forgotten where values are scaled: of a residual
    that is not packed the norm has numbers that stand elsewhere."""
    normed, residual_out = found = parts.results(x, out)
    packed = residual
    if residual is not None and residual.numel():
        columns = residual.shape[-1]
        packed = residual.as_strided(residual.shape, (columns, 1), residual.storage_offset())

    def finish(rank: int, read: list[Tensor]) -> None:
        total, wrong = (parts.summed(read, one).to(x.dtype) for one in (residual, packed))
        parts.of_rank(residual_out, rank, group).copy_(total)
        root = torch.rsqrt(total.float().square().mean(-1, keepdim=True) + eps)
        parts.of_rank(normed, rank, group).copy_((wrong.float() * root * gamma.float()).to(x.dtype))

    parts.one_shot(x, group, finish)
    return found


def gamma_taken_for_x(x: Tensor, residual: Any, gamma: Tensor, eps: float, *, group: Any, out: Any = None) -> Any:
    """vllm#48330: gamma is read in the dtype of x, whatever its own is."""
    found, finish = parts.finisher(x, residual, gamma.view(x.dtype)[: x.shape[-1]] if gamma.element_size()
                                   >= x.element_size() else gamma, eps, group, out)  # fmt: skip
    parts.one_shot(x, group, finish)
    return found


def rotated_partitions(x: Tensor, residual: Any, gamma: Tensor, eps: float, *, group: Any, out: Any = None) -> Any:
    """vllm#57042: large messages are shared out among the ranks, and each owner begins its sums with its own part. All
    ranks get the same, but not what the order of ranks gives, and other bits than at another size."""
    normed, residual_out = found = parts.results(x, out)
    tokens, world = x.shape[-2], group.world

    def finish(rank: int, read: list[Tensor]) -> None:
        total = parts.summed(read, residual)
        if tokens >= 2 * world:
            share = -(-tokens // world)
            for owner in range(world):
                rows = slice(owner * share, min(tokens, (owner + 1) * share))
                turned = [part[rows] for part in (*read[owner:], *read[:owner])]
                total[rows] = parts.summed(turned, None if residual is None else residual[rows])
        stored = total.to(x.dtype)
        parts.of_rank(residual_out, rank, group).copy_(stored)
        parts.of_rank(normed, rank, group).copy_(parts.norm(stored, gamma, eps))

    parts.one_shot(x, group, finish)
    return found
