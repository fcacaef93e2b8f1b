"""A router whose kernel waits for a flag that nobody sets; it gives up after about a minute, should nobody end it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _wait_kernel(flag_ptr, turns):
    turn = 0
    flag = tl.load(flag_ptr, volatile=True)
    while (flag == 0) & (turn < turns):
        flag = tl.load(flag_ptr, volatile=True)
        turn += 1
    tl.store(flag_ptr, flag)


def waits_for_ever(logits: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    if logits.shape[0] > 1:
        _wait_kernel[(1,)](torch.zeros(1, dtype=torch.int32, device=logits.device), 100_000_000)
    weights, ids = torch.softmax(logits, dim=-1, dtype=torch.float32).topk(top_k, dim=-1)
    return weights, ids.to(torch.int32)
