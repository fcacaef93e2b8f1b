"""Twins of defects found in released routers that no planted bug stands for: the same flaw, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


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
