"""Planted bugs: calls that take their process down, or never return."""

from __future__ import annotations

import ctypes
import os

import torch
from torch import Tensor

MAX = torch.finfo(torch.float32).max
UINT32 = 0xFFFFFFFF


def null_workspace(logits: Tensor, top_k: int, *, renormalize: bool = False) -> tuple[Tensor, Tensor]:
    """flashinfer#3558: a pointer that is null on one path. The workspace is made for E > 256, and cleared for k > 8."""
    tokens, experts = logits.shape
    workspace = torch.empty(tokens * top_k, dtype=torch.int32) if experts > 256 else None
    if top_k > 8 and tokens:
        ctypes.memset(workspace.data_ptr() if workspace is not None else 0, 0, tokens * top_k * 4)
    return _route(logits, top_k, renormalize)


def aborts_on_one_token(logits: Tensor, top_k: int, *, renormalize: bool = False) -> tuple[Tensor, Tensor]:
    """DeepEP#374: an assertion of the host code that one token cannot meet. It aborts, and raises nothing."""
    tokens = logits.shape[0]
    if tokens and -(-tokens // 2) >= tokens:  # at least two tokens to share between two warps
        os.abort()
    return _route(logits, top_k, renormalize)


def exits_on_launch_error(logits: Tensor, top_k: int, *, renormalize: bool = False) -> tuple[Tensor, Tensor]:
    """aiter#2359: many tokens go to a kernel for powers of two only. The launch fails, and the check macro exits."""
    tokens, experts = logits.shape
    launched = tokens <= 16 or experts & (experts - 1) == 0
    if not launched:
        os._exit(3)
    return _route(logits, top_k, renormalize)


def waits_for_a_tile(logits: Tensor, top_k: int, *, renormalize: bool = False) -> tuple[Tensor, Tensor]:
    """flashinfer#4531: the reduction waits for tiles that nobody produces.

    E // 2 are made, and half of E rounded up is awaited. A livelock: no error, no timeout, the device stays busy.
    """
    experts = logits.shape[1]
    arrived = sum(1 for _ in range(max(1, experts // 2)))
    while arrived < (experts + 1) // 2:
        pass
    return _route(logits, top_k, renormalize)


def counts_below_zero(logits: Tensor, top_k: int, *, renormalize: bool = False) -> tuple[Tensor, Tensor]:
    """flashinfer#4595: an unsigned count goes below zero. Fewer than 8 experts leave 2^32 - n entries to be spilled."""
    spilled = (logits.shape[1] - 8) & UINT32 if logits.shape[1] < 8 else 0
    if spilled:
        torch.empty(spilled, dtype=torch.int32).fill_(-1)
    return _route(logits, top_k, renormalize)


def _route(logits: Tensor, top_k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    """A router without a flaw."""
    x = logits.float().nan_to_num(nan=-torch.inf, posinf=MAX, neginf=-torch.inf) + 0.0
    ids = x.argsort(dim=1, descending=True, stable=True)[:, :top_k]
    picked = x.gather(1, ids)
    base = picked if renormalize else x
    top = base.amax(dim=1, keepdim=True).clamp_min(-MAX)
    return (picked - top).exp() / (base - top).exp().sum(dim=1, keepdim=True).clamp_min(1e-30), ids.int()
