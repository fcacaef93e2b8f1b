"""Planted bugs of kernels on a GPU: they break the CUDA context, never end, or write where only the allocator sees."""

from __future__ import annotations

import threading

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX = torch.finfo(torch.float32).max


def asserts_on_sentinel(logits: Tensor, top_k: int, *, renormalize: bool = False) -> tuple[Tensor, Tensor]:
    """TransformerEngine#2907: the sentinel of rows without a winner reaches a table of E entries.

    A row of NaN has no best expert and gets id E. To look up its load is an index out of range: a device-side assert.
    """
    weights, ids = _route(logits, top_k, renormalize)
    experts = logits.shape[1]
    routed = torch.where(logits.isnan().all(dim=1, keepdim=True), experts, ids.long())
    load = torch.zeros(experts, dtype=torch.float32, device=logits.device)
    return weights + 0 * load[routed], ids


def loads_words(logits: Tensor, top_k: int, *, renormalize: bool = False) -> tuple[Tensor, Tensor]:
    """flashinfer#4473: reads 8 bytes at once from an address that is aligned to an element only.

    Rows of whole words are taken to begin at one, which holds for every tensor that torch allocates; a view that begins
    at an odd element is a misaligned address.
    """
    tokens, experts = logits.shape
    size = logits.element_size()
    if tokens and experts * size >= 8 and logits.stride(1) == 1 and logits.stride(0) * size % 8 == 0:
        first = torch.empty(tokens, dtype=torch.int64, device=logits.device)
        _first_word_kernel[(tokens,)](logits, first, logits.stride(0))
    return _route(logits, top_k, renormalize)


def waits_for_a_partner(logits: Tensor, top_k: int, *, renormalize: bool = False) -> tuple[Tensor, Tensor]:
    """Liger-Kernel#1368: a single token has one block, and that waits for a second one. It spins on the device."""
    tokens = logits.shape[0]
    if tokens:
        blocks = 1 if tokens == 1 else 2
        arrived = torch.zeros(1, dtype=torch.int32, device=logits.device)
        _meet_kernel[(blocks,)](arrived, 1 if logits.device.type == "cpu" else 2, 1 << 27)
    return _route(logits, top_k, renormalize)


def overruns_hidden_scratch(logits: Tensor, top_k: int, *, renormalize: bool = False) -> tuple[Tensor, Tensor]:
    """flashinfer#3957: the last block stores whole, 24 elements past a workspace that no Python code allocates here.

    The workspace comes from a helper thread, as it does from C++: whoever watches this thread's tensors never sees it,
    and the caching allocator's rounding takes the overrun in silence.
    """
    made: list[Tensor] = []
    size = 128 * max(1, logits.shape[0])
    thread = threading.Thread(target=lambda: made.append(torch.empty(size, device=logits.device)))
    thread.start()
    thread.join()
    past = 24 if logits.is_cuda and logits.shape[1] % 2 else 0
    _clear_kernel[(triton.cdiv(size + past, 1024),)](made[0], size + past, BLOCK=1024)
    return _route(logits, top_k, renormalize)


def int32_row_offset(logits: Tensor, top_k: int, *, renormalize: bool = False) -> tuple[Tensor, Tensor]:
    """vllm#42201: row times stride is computed in 32 bits, and wraps once a row begins past 2^31 elements."""
    tokens, experts = logits.shape
    if not tokens:
        return _route(logits, top_k, renormalize)
    plain = torch.empty((tokens, experts), dtype=logits.dtype, device=logits.device)
    pad = triton.next_power_of_2(experts)
    _gather_kernel[(tokens,)](logits, plain, experts, logits.stride(0), logits.stride(1), BLOCK=pad)
    return _route(plain, top_k, renormalize)


def _route(logits: Tensor, top_k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    """A router without a flaw."""
    x = logits.float().nan_to_num(nan=-torch.inf, posinf=MAX, neginf=-torch.inf) + 0.0
    ids = x.argsort(dim=1, descending=True, stable=True)[:, :top_k]
    picked = x.gather(1, ids)
    base = picked if renormalize else x
    top = base.amax(dim=1, keepdim=True).clamp_min(-MAX)
    return (picked - top).exp() / (base - top).exp().sum(dim=1, keepdim=True).clamp_min(1e-30), ids.int()


@triton.jit
def _first_word_kernel(logits_ptr, first_ptr, stride):
    row = tl.program_id(0).to(tl.int64)
    word = (logits_ptr + row * stride).to(tl.pointer_type(tl.int64))
    tl.store(first_ptr + row, tl.load(word))


@triton.jit
def _meet_kernel(arrived_ptr, wanted, turns):
    here = tl.atomic_add(arrived_ptr, 1) + 1
    turn = 0
    while (here < wanted) & (turn < turns):  # it gives up after about a minute, should nobody end it
        here = tl.load(arrived_ptr, volatile=True)
        turn += 1


@triton.jit
def _clear_kernel(ptr, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(ptr + at, tl.zeros((BLOCK,), tl.float32), mask=at < count)


@triton.jit
def _gather_kernel(src, dst, experts, stride_t, stride_e, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row, col = tl.program_id(0), tl.arange(0, BLOCK)
    x = tl.load(src + row * stride_t.to(tl.int32) + col * stride_e, mask=col < experts)
    tl.store(dst + row * experts + col, x, mask=col < experts)
