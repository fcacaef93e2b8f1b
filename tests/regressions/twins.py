"""Twins of defects found in released kernels that no planted bug stands for: the same flaw, in plain torch."""

from __future__ import annotations

import signal
from typing import Any

import torch
from torch import Tensor

from moe_fuzz.targets.torch_experts import experts_bf16


def reciprocal_of_the_sum(
    logits: Tensor, top_k: int, *, renormalize: bool = False, scale: float = 1.0, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Multiplies by scale / sum, with a guard for a sum of 0: of a sum below about 2^-128 that is infinite."""
    scores = torch.sigmoid(logits.float())
    ids = (scores if bias is None else scores + bias).argsort(dim=1, descending=True, stable=True)[:, :top_k]
    weights = scores.gather(1, ids)
    total = weights.sum(dim=1, keepdim=True)
    return weights * (scale / torch.where(total > 0, total, 1.0) if renormalize else scale), ids.int()


def infinite_logits_leave_the_race(
    logits: Tensor, top_k: int, *, renormalize: bool = False, n_group: int = 1, topk_group: int = 1,
    scoring: str = "sigmoid", group_score: str = "top2_sum", bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Ranks groups by the sigmoids of infinite logits too, and lets no expert with such a logit into the race.

    So the guard for a row without a score lets the row pass, and k times nobody wins: expert 0.
    """
    scores = torch.sigmoid(logits) if scoring == "sigmoid" else logits.softmax(dim=1)
    biased = scores + (0.0 if bias is None else bias)
    members = biased.view(len(logits), n_group, -1)
    best = members.amax(dim=2) if group_score == "max" else members.topk(2, dim=2).values.sum(dim=2)
    kept = torch.zeros_like(best, dtype=torch.bool).scatter_(1, best.topk(topk_group).indices, True)
    race = biased.masked_fill(~kept.repeat_interleave(members.shape[2], dim=1) | ~logits.isfinite(), -torch.inf)
    value, ids = race.topk(top_k, dim=1)
    ids = ids.masked_fill(value == -torch.inf, 0)
    weights = scores.gather(1, ids)
    return (weights / (weights.sum(dim=1, keepdim=True) + 1e-20) if renormalize else weights), ids.int()


def steps_of_sixteen(x: Tensor, *tensors: Tensor, out: Tensor | None = None, **options: Any) -> Tensor:
    """A kernel for many tokens writes whole steps of 16 elements, and its launcher lets it have every multiple of 8."""
    y = experts_bf16(x, *tensors, **options)
    tokens, hidden = y.shape
    steps = tokens > 256 and hidden % 8 == 0 and y.dtype == torch.bfloat16
    written = hidden // 16 * 16 if steps else hidden
    result = torch.empty_like(y) if out is None else out
    result[:, :written] = y[:, :written]
    return result


def thread_for_sixteen(x: Tensor, *tensors: Tensor, **options: Any) -> Tensor:
    """A block of hidden / 16 threads, of which there are none below 16. On a GPU nobody hears of it."""
    if len(x) and x.shape[1] < 16:
        raise RuntimeError("CUDA error: invalid argument (a block of 0 threads)")
    return experts_bf16(x, *tensors, **options)


def divides_by_the_tokens(x: Tensor, *tensors: Tensor, **options: Any) -> Tensor:
    """Slots by tokens gives top_k, on the host: of no tokens the process dies."""
    if not len(x):
        signal.raise_signal(signal.SIGFPE)
    return experts_bf16(x, *tensors, **options)
