"""Planted bugs of experts: memory read, written or left unwritten where it should not be, and what outlives a call."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_fuzz.planted.experts_layer import Capturable, Layer
from moe_fuzz.planted.layer_parts import by_expert


class _Clobbered(Layer):
    def slots(self, expert: Tensor) -> Tensor:
        slots = expert.numel()
        cache = self.x.new_empty(slots * max(self.inter, self.hidden))  # of both products
        h = cache[: slots * self.inter].view(slots, self.inter)
        y = cache[: slots * self.hidden].view(slots, self.hidden)
        members = dict(by_expert(expert))
        weight = {e: self.weights.reshape(-1)[at][:, None] for e, at in members.items()}
        for e, at in members.items():
            h[at] = self.gate_up(e, at // self.top_k, weight[e])
        for e, at in members.items():
            y[at] = self.down(e, h[at], weight[e])
        return y.view(*expert.shape, self.hidden)


def workspace_clobbered(*tensors: Tensor, **options: Any) -> Tensor:
    """vllm#29219: the second product writes its result over the first one's, which it still has to read."""
    return _Clobbered.run(*tensors, **options)


class _Unwritten(Layer):
    def given(self, y: Tensor) -> Tensor:
        found = torch.empty_like(y) if self.out is None else self.out
        busy = (self.expert_of_slots() >= 0).any(dim=1)
        found[busy] = y[busy]
        return found


def idle_tokens_unwritten(*tensors: Tensor, **options: Any) -> Tensor:
    """sglang#24850: a token none of whose experts is here has no one who writes its row."""
    return _Unwritten.run(*tensors, **options)


def result_in_hidden_states(*tensors: Tensor, **options: Any) -> Tensor:
    """sglang#31870: the result goes where the hidden states were, which others still read."""
    y = Layer.run(*tensors, **options)
    tensors[0].copy_(y)
    return y


class _OneSideMasked(Layer):
    def up_product(self, e: int, token: Tensor) -> Tensor:
        found, beyond = super().up_product(e, token), -self.hidden % 32
        if beyond and e + 1 < self.experts:
            found[:, -1] += 0.0 * self.w13[e + 1].flatten()[:beyond].float().sum()
        return found


def tail_masked_on_one_side(*tensors: Tensor, **options: Any) -> Tensor:
    """triton#10772: H is gone through in steps of 32, and in the last of them x is masked alone. What is read past an
    expert's weights is the next one's, times 0: nothing, as long as all of them are numbers."""
    return _OneSideMasked.run(*tensors, **options)


def tail_read_in_vectors(*tensors: Tensor, **options: Any) -> Tensor:
    """flashinfer#4237: weights are read eight at a time where 8 does not divide I. What is too much is thrown away, so
    every result is right; behind the last row of the last expert it is another's memory."""
    w2 = tensors[2]
    (experts, hidden, inter), padded = w2.shape, -(-w2.shape[2] // 8) * 8
    copy = w2.new_empty((experts, hidden, padded))
    size = triton.next_power_of_2(padded)
    rows = triton.next_power_of_2(triton.cdiv(hidden, 4))
    if w2.is_cuda:
        rows = max(1, min(rows, 4096 // size))
    _copy_kernel[(triton.cdiv(hidden, rows), experts)](
        w2, copy, hidden, inter, padded, *w2.stride(), ROWS=rows, SIZE=size
    )  # fmt: skip
    return Layer.run(*tensors[:2], copy[:, :, :inter], *tensors[3:], **options)


class _Bulk(Layer):
    def given(self, y: Tensor) -> Tensor:
        out = torch.empty_like(y) if self.out is None else self.out
        if y.numel():
            blocks = min(triton.cdiv(y.numel(), 64), 4)
            each = triton.next_power_of_2(triton.cdiv(y.numel(), 64 * blocks)) * 64
            if y.is_cuda:
                each = 64
            _bulk_kernel[(triton.cdiv(y.numel(), each),)](y, out, y.numel(), BLOCK=each)
        return out


def bulk_store_past_the_end(*tensors: Tensor, **options: Any) -> Tensor:
    """flashinfer#3957: the last bulk store of the result runs past its end. Seven oracles passed meanwhile."""
    return _Bulk.run(*tensors, **options)


class _Memset(Layer):
    def given(self, y: Tensor) -> Tensor:
        if self.out is None or not y.numel():
            return y if self.out is None else self.out.copy_(y)
        steps = triton.cdiv(y.numel() * y.element_size(), 16)
        _clear_kernel[(triton.cdiv(steps, 1 << 14),)](self.out.view(-1).view(torch.uint8), steps, BLOCK=1 << 14)
        return self.out.copy_(y)


def result_cleared_in_vectors(*tensors: Tensor, **options: Any) -> Tensor:
    """flashinfer#3957: the result is cleared in steps of 16 bytes: into what lies behind it."""
    return _Memset.run(*tensors, **options)


def hidden_offset_of_32_bits(*tensors: Tensor, **options: Any) -> Tensor:
    """vllm#34279: token times stride wraps in 32 bits where a row of x begins past 2^31 elements."""
    x = tensors[0]
    if not x.numel():
        return Layer.run(*tensors, **options)
    gathered = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows = 1 if x.is_cuda else triton.next_power_of_2(triton.cdiv(len(x), 4))
    _gather_kernel[(triton.cdiv(len(x), rows),)](
        x, gathered, *x.shape, *x.stride(), ROWS=rows, SIZE=triton.next_power_of_2(x.shape[1])
    )  # fmt: skip
    return Layer.run(gathered, *tensors[1:], **options)


# ---- what outlives a call -------------------------------------------------------------------------------------------

_SUMS: dict[tuple[object, ...], Tensor] = {}


class _ClearedOnce(Capturable):
    def combine(self, slots: Tensor, expert: Tensor) -> Tensor:
        key = (tuple(self.x.shape), self.x.dtype, self.x.device)
        if key not in _SUMS:
            _SUMS[key] = torch.zeros(self.x.shape, dtype=torch.float32, device=self.x.device)
        total = _SUMS[key]
        total += slots.masked_fill((expert < 0)[:, :, None], 0.0).float().sum(dim=1)
        return total.to(self.x.dtype)


def slot_sums_cleared_once(*tensors: Tensor, **options: Any) -> Tensor:
    """vllm#41444: slots are added into a workspace that is cleared when it is made, and never again."""
    return _ClearedOnce.run(*tensors, **options)


_STAGED: dict[tuple[object, ...], Tensor] = {}


class _Frozen(Capturable):
    def slots(self, expert: Tensor) -> Tensor:
        key = (tuple(self.x.shape), self.x.dtype)
        if not torch.cuda.is_current_stream_capturing():
            _STAGED[key] = self.x.clone()
        self.x = _STAGED.get(key, self.x)
        return super().slots(expert)


def frozen_hidden_states(*tensors: Tensor, **options: Any) -> Tensor:
    """vllm#52308: what pads x is not in the graph: each replay computes with the copy that the warm-up made."""
    return _Frozen.run(*tensors, **options)


# ---- kernels --------------------------------------------------------------------------------------------------------


@triton.jit
def _copy_kernel(  # type: ignore[no-untyped-def]
    w_ptr, out_ptr, rows, columns, padded, stride_e, stride_r, stride_c, ROWS: tl.constexpr, SIZE: tl.constexpr
):
    expert = tl.program_id(1).to(tl.int64)
    w_ptr += expert * stride_e
    out_ptr += expert * rows * padded
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, SIZE)[None, :]
    whole = (row < rows) & (column < padded)
    w = tl.load(w_ptr + row.to(tl.int64) * stride_r + column * stride_c, mask=whole)
    tl.store(out_ptr + row * padded + column, tl.where(column < columns, w, 0.0), mask=whole)


@triton.jit
def _bulk_kernel(y_ptr, out_ptr, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    y = tl.load(y_ptr + at, mask=at < size, other=0.0)
    tl.store(out_ptr + at, y, mask=at < (size + 63) // 64 * 64)


@triton.jit
def _clear_kernel(out_ptr, steps, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    step = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    where = step[:, None] * 16 + tl.arange(0, 16)[None, :]
    tl.store(out_ptr + where, tl.zeros((BLOCK, 16), tl.uint8), mask=(step < steps)[:, None])


@triton.jit
def _gather_kernel(  # type: ignore[no-untyped-def]
    x_ptr, out_ptr, rows, columns, stride_r, stride_c, ROWS: tl.constexpr, SIZE: tl.constexpr
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, SIZE)[None, :]
    ok = (row < rows) & (column < columns)
    x = tl.load(x_ptr + row * stride_r + column * stride_c, mask=ok)
    tl.store(out_ptr + row * columns + column, x, mask=ok)
