"""Planted bugs: what a NaN does to the search for the largest."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX = torch.finfo(torch.float32).max


def nan_argmax(logits: Tensor, top_k: int, *, renormalize: bool = False) -> tuple[Tensor, Tensor]:
    """vllm#39391: the butterfly keeps its own candidate unless the other lane's is larger; nothing is larger than NaN.

    On a row of NaN, expert 0 wins k times. The duplicate ids made the permutation behind the router read slots that
    were never written: an illegal memory access, under CUDA graphs only, since only their padding rows hold NaN.
    """
    tokens, experts = logits.shape
    lanes = triton.next_power_of_2(experts)
    left = torch.full((tokens, lanes), -torch.inf, device=logits.device)  # [T, lanes]
    left[:, :experts] = logits
    columns = torch.arange(lanes, device=logits.device).expand(tokens, lanes)
    chosen = []
    for _ in range(top_k):
        value, index = left, columns
        while value.shape[1] > 1:
            other = value[:, 1::2] > value[:, 0::2]
            value = torch.where(other, value[:, 1::2], value[:, 0::2])
            index = torch.where(other, index[:, 1::2], index[:, 0::2])
        chosen.append(index)
        left = left.scatter(1, index, -torch.inf)
    ids = torch.cat(chosen, dim=1)  # [T, k]
    return _weigh(logits, logits.gather(1, ids), renormalize), ids.int()


def nan_sentinel(logits: Tensor, top_k: int, *, renormalize: bool = False) -> tuple[Tensor, Tensor]:
    """sglang#30079: the id is the lowest column whose value equals the maximum, and NaN equals nothing.

    The search then returns its own sentinel, E, as an id; the counting sort behind it indexed `cumsum[id + 1]`.
    """
    return _select(_equal_kernel, logits, top_k, renormalize)


def negative_nan_key(logits: Tensor, top_k: int, *, renormalize: bool = False) -> tuple[Tensor, Tensor]:
    """aiter#4530: an id past the last expert on a non-finite row, here from a packed key that orders raw float bits.

    A NaN with its sign bit set orders below -inf, and -inf is what fills the lanes past E: those win over it.
    """
    return _select(_packed_kernel, logits, top_k, renormalize)


def _weigh(logits: Tensor, picked: Tensor, renormalize: bool) -> Tensor:
    """Softmax weights of the picked logits, without a flaw."""
    x, picked = (v.float().nan_to_num(nan=-torch.inf, posinf=MAX, neginf=-torch.inf) for v in (logits, picked))
    base = picked if renormalize else x
    top = base.amax(dim=1, keepdim=True).clamp_min(-MAX)
    return (picked - top).exp() / (base - top).exp().sum(dim=1, keepdim=True).clamp_min(1e-30)


def _select(kernel: Any, logits: Tensor, top_k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    tokens, experts = logits.shape
    picked = torch.empty((tokens, top_k), dtype=torch.float32, device=logits.device)  # [T, k]
    ids = torch.empty((tokens, top_k), dtype=torch.int32, device=logits.device)  # [T, k]
    if tokens:
        expert_pad = triton.next_power_of_2(experts)
        rows = max(4, triton.next_power_of_2(triton.cdiv(tokens, 4)))  # the interpreter wants few programs
        if logits.is_cuda:
            rows = min(rows, max(4, 1024 // expert_pad))
        kernel[(triton.cdiv(tokens, rows),)](
            logits, picked, ids, tokens, experts, top_k, logits.stride(0), logits.stride(1),
            ROWS=rows, EXPERT_PAD=expert_pad, K_PAD=triton.next_power_of_2(top_k),
        )  # fmt: skip
    return _weigh(logits, picked, renormalize), ids


@triton.jit
def _equal_kernel(  # type: ignore[no-untyped-def]
    logits_ptr, picked_ptr, ids_ptr, tokens, experts, top_k, stride_t, stride_e,
    ROWS: tl.constexpr, EXPERT_PAD: tl.constexpr, K_PAD: tl.constexpr,
):  # fmt: skip
    row, x = _load_rows(logits_ptr, tokens, experts, stride_t, stride_e, ROWS, EXPERT_PAD)
    col, slot = tl.arange(0, EXPERT_PAD)[None, :], tl.arange(0, K_PAD)[None, :]
    free = (col < experts) & (row >= 0)[:, None]  # [R, E'], as the loop leaves it
    picked = tl.full((ROWS, K_PAD), 0.0, tl.float32)
    ids = tl.full((ROWS, K_PAD), 0, tl.int32)
    for j in range(top_k):
        best = tl.max(tl.where(free, x, float("-inf")), axis=1)[:, None]
        index = tl.min(tl.where(free & (x == best), col, experts), axis=1)[:, None]
        picked = tl.where(slot == j, best, picked)
        ids = tl.where(slot == j, index, ids)
        free = free & (col != index)
    where, mask = row[:, None] * top_k + slot, (row < tokens)[:, None] & (slot < top_k)
    tl.store(picked_ptr + where, picked, mask=mask)
    tl.store(ids_ptr + where, ids, mask=mask)


@triton.jit
def _packed_kernel(  # type: ignore[no-untyped-def]
    logits_ptr, picked_ptr, ids_ptr, tokens, experts, top_k, stride_t, stride_e,
    ROWS: tl.constexpr, EXPERT_PAD: tl.constexpr, K_PAD: tl.constexpr,
):  # fmt: skip
    row, x = _load_rows(logits_ptr, tokens, experts, stride_t, stride_e, ROWS, EXPERT_PAD)
    col, slot = tl.arange(0, EXPERT_PAD)[None, :], tl.arange(0, K_PAD)[None, :]
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    order = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    key = (order.to(tl.int64) << 32) | (EXPERT_PAD - 1 - col).to(tl.int64)
    best = tl.full((ROWS, K_PAD), 0, tl.int64)
    for j in range(top_k):
        winner = tl.max(key, axis=1)[:, None]
        best = tl.where(slot == j, winner, best)
        key = tl.where(key == winner, -0x8000000000000000, key)
    order = (best >> 32).to(tl.int32)
    picked = (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    ids = EXPERT_PAD - 1 - (best & 0xFFFFFFFF).to(tl.int32)
    where, mask = row[:, None] * top_k + slot, (row < tokens)[:, None] & (slot < top_k)
    tl.store(picked_ptr + where, picked, mask=mask)
    tl.store(ids_ptr + where, ids, mask=mask)


@triton.jit
def _load_rows(  # type: ignore[no-untyped-def]
    logits_ptr, tokens, experts, stride_t, stride_e, ROWS: tl.constexpr, EXPERT_PAD: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, EXPERT_PAD)
    mask = (row < tokens)[:, None] & (col < experts)[None, :]
    x = tl.load(logits_ptr + row[:, None] * stride_t + col[None, :] * stride_e, mask=mask, other=float("-inf"))
    return row, x.to(tl.float32)
