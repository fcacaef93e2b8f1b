"""Planted bugs: memory read, written or left unwritten where it should not be. The selection itself is right."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX = torch.finfo(torch.float32).max
Out = tuple[Tensor, Tensor] | None


def reads_past_logits(logits: Tensor, top_k: int, *, renormalize: bool = False) -> tuple[Tensor, Tensor]:
    """vllm#40351: rows are read in vectors of four columns without a mask, as if E were a multiple of 4.

    What is read too much is thrown away, so every result is right; on the last row it lies past the tensor.
    """
    return _route(_select_kernel, logits, top_k, renormalize, VECTOR=4)


def writes_past_ids(logits: Tensor, top_k: int, *, renormalize: bool = False, out: Out = None) -> tuple[Tensor, Tensor]:
    """flashinfer#3957: the last block stores whole, past the end of the output; the victim is whoever lives behind it.

    All of FlashInfer's numeric oracles passed while this one wrote out of bounds.
    """
    return _route(_select_kernel, logits, top_k, renormalize, out, MASK_ID_ROWS=False)


def scratch_in_input(logits: Tensor, top_k: int, *, renormalize: bool = False) -> tuple[Tensor, Tensor]:
    """sglang#31870: an input serves as scratch. Taken experts are masked in the logits themselves.

    The result is right; whoever reads the logits afterwards (an auxiliary loss, a retry, a replay) finds -inf in them.
    """
    return _route(_scratch_kernel, logits, top_k, renormalize)


def memset_rounded_up(
    logits: Tensor, top_k: int, *, renormalize: bool = False, out: Out = None
) -> tuple[Tensor, Tensor]:
    """flashinfer#3957: a bulk store runs past the tail of the output. Here `out` is cleared in 16-byte steps.

    Up to 15 bytes behind a tensor whose size is not a multiple of 16 become zero: inside the allocator's rounding, so
    that no guard page notices.
    """
    for buffer in out or ():
        size = buffer.numel() * buffer.element_size()
        steps = triton.cdiv(size, 16)
        if steps:
            _clear_kernel[(triton.cdiv(steps, 4096),)](buffer.view(-1).view(torch.uint8), steps, BLOCK=4096)
    return _route(_select_kernel, logits, top_k, renormalize, out)


def id_left_unwritten(
    logits: Tensor, top_k: int, *, renormalize: bool = False, out: Out = None
) -> tuple[Tensor, Tensor]:
    """flashinfer#3011: a slot that nobody writes. Ids are stored in pairs, and the last one of an odd k has no pair.

    A fresh allocation often holds zeros, and 0 is a valid id: the test that ran first passes.
    """
    return _route(_select_kernel, logits, top_k, renormalize, out, STORE_PAIRS=True)


def padding_weight_not_zeroed(
    logits: Tensor,
    top_k: int,
    *,
    renormalize: bool = False,
    is_padding: Tensor | None = None,
    padding: str = "minus_one",
) -> tuple[Tensor, Tensor]:
    """vllm#46408: the id of a padding row is -1, but its weight keeps the value of the softmax.

    The experts skip the slot, and its stale output row is summed into the result times that weight.
    """
    weights, ids = _route(_select_kernel, logits, top_k, renormalize)
    if is_padding is not None:
        ids.masked_fill_(is_padding[:, None], -1)
    return weights, ids


def _empty(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    shape = (logits.shape[0], top_k)
    weights = torch.empty(shape, dtype=torch.float32, device=logits.device)
    return weights, torch.empty(shape, dtype=torch.int32, device=logits.device)


def _route(
    kernel: Any, logits: Tensor, top_k: int, renormalize: bool, out: Out = None, **flaw: Any
) -> tuple[Tensor, Tensor]:
    """Ids by the kernel, weights by torch."""
    weights, ids = out or _empty(logits, top_k)
    x = logits.float().nan_to_num(nan=-torch.inf, posinf=MAX, neginf=-torch.inf)  # [T, E]
    tokens, experts = logits.shape
    picked = torch.empty((tokens, top_k), dtype=torch.float32, device=logits.device)  # [T, k]
    if tokens:
        expert_pad = max(4, triton.next_power_of_2(experts))
        rows = max(4, triton.next_power_of_2(triton.cdiv(tokens, 4)))  # the interpreter wants few programs
        if logits.is_cuda:
            rows = min(rows, max(4, 1024 // expert_pad))
        kernel[(triton.cdiv(tokens, rows),)](
            logits, picked, ids, tokens, experts, top_k, logits.stride(0), logits.stride(1),
            ROWS=rows, EXPERT_PAD=expert_pad, K_PAD=triton.next_power_of_2(top_k), **flaw,
        )  # fmt: skip
    base = picked if renormalize else x
    top = base.amax(dim=1, keepdim=True).clamp_min(-MAX)
    weights.copy_((picked - top).exp() / (base - top).exp().sum(dim=1, keepdim=True).clamp_min(1e-30))
    return weights, ids


@triton.jit
def _select_kernel(  # type: ignore[no-untyped-def]
    logits_ptr, picked_ptr, ids_ptr, tokens, experts, top_k, stride_t, stride_e,
    ROWS: tl.constexpr, EXPERT_PAD: tl.constexpr, K_PAD: tl.constexpr,
    VECTOR: tl.constexpr = 1,  # columns read at once
    MASK_ID_ROWS: tl.constexpr = True,
    STORE_PAIRS: tl.constexpr = False,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col, slot = tl.arange(0, EXPERT_PAD)[None, :], tl.arange(0, K_PAD)[None, :]
    row_ok = (row < tokens)[:, None]
    read = row_ok & (col < (experts + VECTOR - 1) // VECTOR * VECTOR)
    x = tl.load(logits_ptr + row[:, None] * stride_t + col * stride_e, mask=read, other=float("-inf")).to(tl.float32)
    x = tl.where(x != x, float("-inf"), x)
    free = (col < experts) & (row >= 0)[:, None]
    picked = tl.full((ROWS, K_PAD), 0.0, tl.float32)
    ids = tl.full((ROWS, K_PAD), 0, tl.int32)
    for j in range(top_k):
        best = tl.max(tl.where(free, x, float("-inf")), axis=1)[:, None]
        index = tl.min(tl.where(free & (x == best), col, EXPERT_PAD), axis=1)[:, None]
        picked = tl.where(slot == j, best, picked)
        ids = tl.where(slot == j, index, ids)
        free = free & (col != index)
    where = row[:, None] * top_k + slot
    used = slot < top_k
    tl.store(picked_ptr + where, tl.where(picked == float("inf"), 3.4028234663852886e38, picked), mask=row_ok & used)
    stored = used & (slot < top_k // 2 * 2) if STORE_PAIRS else used
    tl.store(ids_ptr + where, ids, mask=row_ok & stored if MASK_ID_ROWS else stored & (row >= 0)[:, None])


@triton.jit
def _scratch_kernel(  # type: ignore[no-untyped-def]
    logits_ptr, picked_ptr, ids_ptr, tokens, experts, top_k, stride_t, stride_e,
    ROWS: tl.constexpr, EXPERT_PAD: tl.constexpr, K_PAD: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col, row_ok = tl.arange(0, EXPERT_PAD)[None, :], row < tokens
    base = logits_ptr + row[:, None] * stride_t
    for j in range(top_k):
        x = tl.load(base + col * stride_e, mask=row_ok[:, None] & (col < experts), other=float("-inf")).to(tl.float32)
        x = tl.where(x != x, float("-inf"), x)
        best = tl.max(x, axis=1)
        index = tl.min(tl.where(x == best[:, None], col, EXPERT_PAD), axis=1)
        tl.store(picked_ptr + row * top_k + j, tl.where(best == float("inf"), 3.4028234663852886e38, best), mask=row_ok)
        tl.store(ids_ptr + row * top_k + j, index, mask=row_ok)
        tl.store(logits_ptr + row * stride_t + index * stride_e, float("-inf"), mask=row_ok)


@triton.jit
def _clear_kernel(buffer_ptr, steps, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    step = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    where = step[:, None] * 16 + tl.arange(0, 16)[None, :]
    tl.store(buffer_ptr + where, tl.zeros((BLOCK, 16), tl.uint8), mask=(step < steps)[:, None])
