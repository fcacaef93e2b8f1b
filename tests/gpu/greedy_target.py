"""Routers that ask for more of the GPU than a worker may have, or than a launch can get."""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl


def takes_all(logits: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One GiB more than the worker's share, where T > 1; the GPU itself may well have it."""
    if logits.shape[0] > 1:
        torch.empty(int(os.environ["MOE_FUZZ_GPU_MEMORY"]) + (1 << 30), dtype=torch.uint8, device=logits.device)
    return _route(logits, top_k)


def takes_too_large_a_grid(logits: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    if logits.shape[0] > 1:
        _touch_kernel[(1, 1 << 16)](torch.zeros(1, device=logits.device))  # one more than there can be
    return _route(logits, top_k)


def _route(logits: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    weights, ids = torch.softmax(logits, dim=-1, dtype=torch.float32).topk(top_k, dim=-1)
    return weights, ids.to(torch.int32)


@triton.jit
def _touch_kernel(ptr):
    tl.store(ptr, 1.0)
