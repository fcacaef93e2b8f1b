"""Planted bugs: all-reduces with a norm that hurt memory, other rows, the next call, or their own process."""

from __future__ import annotations

import os
import random
import time
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

if __package__:
    from . import allreduce_parts as parts
else:  # loaded by its path, as the script of a finding does: its neighbours are on sys.path
    import allreduce_parts as parts  # type: ignore[import-not-found, no-redef]


def flags_by_size(x: Tensor, residual: Any, gamma: Tensor, eps: float, *, group: Any, out: Any = None) -> Any:
    """vllm#2760: a call gives one signal a block of rows, and takes back the one of its first block: calls of several
    blocks leave theirs behind, for a later call that waits on the same words."""
    found, finish = parts.finisher(x, residual, gamma, eps, group, out)
    pads = parts.signals(group, slots=2)

    def and_more(rank: int, read: list[Tensor]) -> None:
        finish(rank, read)
        if x.shape[-2] > 8:
            pads[rank][group.world :].fill_(1)

    shown, ranks = parts.buffers(group), parts.device(group)

    def program(rank: int, own: Tensor) -> parts.Program:
        parts.message(shown[rank], own).copy_(own)
        yield from parts.barrier(pads, rank, group.world)
        and_more(rank, [parts.message(buffer, own).clone() for buffer in shown])
        yield from parts.barrier(pads, rank, group.world)

    for rank, own in parts.parts_of(x, group).items():
        ranks.launch(group, rank, program(rank, own))
    return found


def pairs_of_vectors(x: Tensor, residual: Any, gamma: Tensor, eps: float, *, group: Any, out: Any = None) -> Any:
    """flashinfer#4473: buffers are laid out in 16 bytes and stored to in 32. A message of an odd number of 16 bytes
    ends in the middle of the last store."""
    found, finish = parts.finisher(x, residual, gamma, eps, group, out)

    def copy(there: Tensor, own: Tensor) -> parts.Program:
        there.copy_(own)
        size = own.numel() * own.element_size()
        if size and size % 32 == 16:
            there.view(torch.uint8).view(-1).as_strided((16,), (1,), there.storage_offset() * there.element_size()
                                                        + size).fill_(0)  # fmt: skip
        yield None

    parts.one_shot(x, group, finish, copy=copy)
    return found


def workspace_in_whole_blocks(x: Tensor, residual: Any, gamma: Tensor, eps: float, *, group: Any, out: Any = None
                              ) -> Any:  # fmt: skip
    """flashinfer#1223: the workspace is set to its sentinel in whole blocks, past its end where it is no multiple."""
    found, finish = parts.finisher(x, residual, gamma, eps, group, out)
    workspace = torch.empty(max(1, x.numel()), dtype=torch.float32, device=x.device)
    blocks = triton.cdiv(workspace.numel(), 1024)
    _fill_kernel[(triton.cdiv(blocks, 8),)](workspace, blocks * 1024, BLOCK=8192)
    parts.one_shot(x, group, finish)
    return found


def gamma_in_whole_vectors(x: Tensor, residual: Any, gamma: Tensor, eps: float, *, group: Any, out: Any = None
                           ) -> Any:  # fmt: skip
    """vllm#38571: a load at the tail that no predicate covers. Gamma is read in vectors of 16, past its end where 16
    does not divide H; what is read there is not used."""
    read = torch.empty(triton.cdiv(gamma.numel(), 16) * 16, dtype=gamma.dtype, device=gamma.device)
    _read_kernel[(triton.cdiv(read.numel(), 16 * 64),)](gamma, read, read.numel() // 16, BLOCK=64)
    found, finish = parts.finisher(x, residual, read[: gamma.numel()], eps, group, out)
    parts.one_shot(x, group, finish)
    return found


def clears_whole_vectors_of_out(x: Tensor, residual: Any, gamma: Tensor, eps: float, *, group: Any, out: Any = None
                                ) -> Any:  # fmt: skip
    """flashinfer#3957: a bulk store runs past the tail. Here a result is cleared 16 bytes at a time: into the slack
    behind it, where no guard page notices."""
    if out is not None and out[0].numel():
        vectors = triton.cdiv(out[0].numel() * out[0].element_size(), 16)
        _clear_kernel[(triton.cdiv(vectors, 256),)](out[0].view(-1).view(torch.uint8), vectors, BLOCK=256)
    found, finish = parts.finisher(x, residual, gamma, eps, group, out)
    parts.one_shot(x, group, finish)
    return found


def residual_read_after_its_store(x: Tensor, residual: Any, gamma: Tensor, eps: float, *, group: Any, out: Any = None
                                  ) -> Any:  # fmt: skip
    """ggml#1491: a second pass reads an input again whose memory the first has written its result to: in place, the
    norm is of a sum that has the residual in it as it was, and as it is."""
    normed, residual_out = found = parts.results(x, out)

    def finish(rank: int, read: list[Tensor]) -> None:
        own = residual if residual is None or residual.dim() == 2 else parts.of_rank(residual, rank, group)
        parts.of_rank(residual_out, rank, group).copy_(parts.summed(read, own).to(x.dtype))
        again = parts.summed(read, own).to(x.dtype)
        parts.of_rank(normed, rank, group).copy_(parts.norm(again, gamma, eps))

    parts.one_shot(x, group, finish)
    return found


def tile_with_nan_in_float64(x: Tensor, residual: Any, gamma: Tensor, eps: float, *, group: Any, out: Any = None
                             ) -> Any:  # fmt: skip
    """vllm#37758: a NaN on one rank, and its neighbours take another path: the 16 rows of its tile are computed by
    other arithmetic, in which they get other bits."""
    normed, residual_out = found = parts.results(x, out)

    def finish(rank: int, read: list[Tensor]) -> None:
        total = parts.summed(read, residual).to(x.dtype)
        made = parts.norm(total, gamma, eps)
        for first in range(0, len(total), 16):
            rows = slice(first, first + 16)
            if not torch.isfinite(total[rows].float()).all():
                made[rows] = _gamma_first(total[rows], gamma, eps)
        parts.of_rank(residual_out, rank, group).copy_(total)
        parts.of_rank(normed, rank, group).copy_(made)

    parts.one_shot(x, group, finish)
    return found


def _gamma_first(stored: Tensor, gamma: Tensor, eps: float) -> Tensor:
    """`parts.norm` in another order of roundings."""
    value = stored.float()
    root = 1 / torch.sqrt(value.square().sum(dim=-1, keepdim=True) / stored.shape[-1] + eps)
    return (value * (root * gamma.float())).to(stored.dtype)


def few_rows_by_other_arithmetic(x: Tensor, residual: Any, gamma: Tensor, eps: float, *, group: Any, out: Any = None
                                 ) -> Any:  # fmt: skip
    """aiter#2359: the number of rows chooses the kernel. That for up to 4 rows multiplies by gamma first."""
    normed, residual_out = found = parts.results(x, out)

    def finish(rank: int, read: list[Tensor]) -> None:
        total = parts.summed(read, residual).to(x.dtype)
        made = _gamma_first(total, gamma, eps) if len(total) <= 4 else parts.norm(total, gamma, eps)
        parts.of_rank(residual_out, rank, group).copy_(total)
        parts.of_rank(normed, rank, group).copy_(made)

    parts.one_shot(x, group, finish)
    return found


# ---- a backend that is not the chosen one ----------------------------------------------------------------------------


def one_stage_adds_before_rounding(
    x: Tensor, residual: Any, gamma: Tensor, eps: float, *, group: Any, backend: str | None = None, out: Any = None
) -> Any:  # fmt: skip
    """aiter#2586: of two ways one rounds the sum before the residual is added, and the other after. It is not the
    chosen one, until a table of sizes is tuned."""
    normed, residual_out = found = parts.results(x, out)

    def finish(rank: int, read: list[Tensor]) -> None:
        total = parts.summed(read, residual if backend == "one_stage" else None)
        if backend != "one_stage":
            total = total.to(x.dtype).float()
            total = total if residual is None else total + residual.float()
        parts.of_rank(residual_out, rank, group).copy_(total.to(x.dtype))
        parts.of_rank(normed, rank, group).copy_(parts.norm(total.to(x.dtype), gamma, eps))

    parts.one_shot(x, group, finish)
    return found


def two_stages_by_other_arithmetic(
    x: Tensor, residual: Any, gamma: Tensor, eps: float, *, group: Any, backend: str | None = None, out: Any = None
) -> Any:  # fmt: skip
    """aiter#2359: another way has another kernel for the norm, which multiplies by gamma first: a row has other bits
    once its message is long enough for that."""
    normed, residual_out = found = parts.results(x, out)

    def finish(rank: int, read: list[Tensor]) -> None:
        total = parts.summed(read, residual).to(x.dtype)
        made = _gamma_first(total, gamma, eps) if backend == "two_stage" else parts.norm(total, gamma, eps)
        parts.of_rank(residual_out, rank, group).copy_(total)
        parts.of_rank(normed, rank, group).copy_(made)

    parts.one_shot(x, group, finish)
    return found


def order_of_arrival(x: Tensor, residual: Any, gamma: Tensor, eps: float, *, group: Any, out: Any = None) -> Any:
    """vllm#51290: parts are added up as they arrive, in another order each time. The ranks agree, as one of them adds
    up for all."""
    normed, residual_out = found = parts.results(x, out)
    order = list(range(group.world))
    random.shuffle(order)

    def finish(rank: int, read: list[Tensor]) -> None:
        total = parts.summed([read[at] for at in order], residual).to(x.dtype)
        parts.of_rank(residual_out, rank, group).copy_(total)
        parts.of_rank(normed, rank, group).copy_(parts.norm(total, gamma, eps))

    parts.one_shot(x, group, finish)
    return found


def empty_batch_raises(x: Tensor, residual: Any, gamma: Tensor, eps: float, *, group: Any, out: Any = None) -> Any:
    """sglang#31794: an idle rank has no tokens, and the launch an empty grid."""
    if not x.shape[-2]:
        raise RuntimeError("invalid configuration argument")
    found, finish = parts.finisher(x, residual, gamma, eps, group, out)
    parts.one_shot(x, group, finish)
    return found


def normed_in_dtype_of_gamma(x: Tensor, residual: Any, gamma: Tensor, eps: float, *, group: Any) -> Any:
    """vllm#35369: what was widened on the way is not cast back: a float32 gamma makes a float32 result."""
    found, finish = parts.finisher(x, residual, gamma, eps, group, None)
    parts.one_shot(x, group, finish)
    group.check()
    return (found[0].float(), found[1]) if gamma.dtype == torch.float32 else found


# ---- graphs ---------------------------------------------------------------------------------------------------------


def _plain(x: Tensor, residual: Any, gamma: Tensor, eps: float, order: list[int]) -> tuple[Tensor, Tensor]:
    """All ranks at once, without a device of ours: what a graph can capture."""
    total = parts.summed([x[at] for at in order], residual).to(x.dtype)
    return parts.norm(total, gamma, eps).repeat(len(x), 1, 1), total.repeat(len(x), 1, 1)


def counts_rows_on_the_host(x: Tensor, residual: Any, gamma: Tensor, eps: float, *, group: Any) -> Any:
    """vllm#28334: something is only known on the host: whether all numbers are finite is read there, and that cannot
    be captured."""
    if bool(torch.isfinite(x.float()).all()):
        return _plain(x, residual, gamma, eps, list(range(len(x))))
    return _plain(x, residual, gamma, eps, list(range(len(x))))


def other_order_in_a_graph(x: Tensor, residual: Any, gamma: Tensor, eps: float, *, group: Any) -> Any:
    """flashinfer#4841: another tactic is taken while a graph is captured: its sums begin with the last rank."""
    order = list(range(len(x)))
    captured = x.is_cuda and torch.cuda.is_current_stream_capturing()
    return _plain(x, residual, gamma, eps, order[::-1] if captured else order)


# ---- processes ------------------------------------------------------------------------------------------------------


def last_rank_aborts(x: Tensor, residual: Any, gamma: Tensor, eps: float, *, group: Any, out: Any = None) -> Any:
    """DeepEP#374: an assertion on a single token, on the last rank. The others would wait for it for ever."""
    if x.shape[-2] == 1 and group.rank == group.world - 1:
        os._exit(3)
    found, finish = parts.finisher(x, residual, gamma, eps, group, out)
    parts.one_shot(x, group, finish)
    return found


def last_rank_waits_elsewhere(x: Tensor, residual: Any, gamma: Tensor, eps: float, *, group: Any, out: Any = None
                              ) -> Any:  # fmt: skip
    """flashinfer#3247: the last rank meets with another group than the others: there is nobody."""
    while group.rank is not None and group.rank == group.world - 1:
        time.sleep(0.01)
    found, finish = parts.finisher(x, residual, gamma, eps, group, out)
    parts.one_shot(x, group, finish)
    return found


# ---- kernels --------------------------------------------------------------------------------------------------------


@triton.jit
def _fill_kernel(buffer_ptr, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(buffer_ptr + at, -0.0, mask=at < count)


@triton.jit
def _read_kernel(gamma_ptr, read_ptr, vectors, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    vector = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    at = vector[:, None] * 16 + tl.arange(0, 16)[None, :]
    there = (vector < vectors)[:, None]
    tl.store(read_ptr + at, tl.load(gamma_ptr + at, mask=there), mask=there)


@triton.jit
def _clear_kernel(buffer_ptr, vectors, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    vector = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    at = vector[:, None] * 16 + tl.arange(0, 16)[None, :]
    tl.store(buffer_ptr + at, tl.zeros((BLOCK, 16), dtype=tl.uint8), mask=(vector < vectors)[:, None])
