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


def takes_too_much_shared_memory(logits: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    if logits.shape[0] > 1:
        square = torch.zeros((512, 512), device=logits.device)
        _square_kernel[(1,)](square, N=512)
    return _route(logits, top_k)


def _route(logits: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    weights, ids = torch.softmax(logits, dim=-1, dtype=torch.float32).topk(top_k, dim=-1)
    return weights, ids.to(torch.int32)


@triton.jit
def _square_kernel(ptr, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    x = tl.load(ptr + at)
    tl.store(ptr + at, tl.dot(x, x))
