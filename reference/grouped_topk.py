"""The reference of grouped routing, in float64. The docstring of `grouped_topk` is the contract of the op."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moe_fuzz.reference.routing import SCORES, deliver, finite_above, renormalized, validate

GROUP_SCORES = ("max", "top2_sum")


def grouped_topk(
    logits: Tensor,  # [T, E] float32 | bfloat16 | float16, any strides; T >= 0, 1 <= E <= 1024
    top_k: int,  # 1 <= top_k <= min(topk_group * E / n_group, 32)
    *,
    n_group: int,  # divides E
    topk_group: int,  # 1 <= topk_group <= n_group
    scoring: str = "softmax",  # "softmax" | "sigmoid"
    group_score: str = "max",  # "max" (DeepSeek-V2) | "top2_sum" (DeepSeek-V3)
    renormalize: bool = False,
    bias: Tensor | None = None,  # [E] float32
    scale: float = 1.0,  # finite, >= 0
    is_padding: Tensor | None = None,  # [T] bool
    padding: str = "distinct",
    n_shared: int = 0,  # fused shared experts, at most 8
    expert_map: Tensor | None = None,  # [E] int32, from logical to physical ids
    out: tuple[Tensor, Tensor] | None = None,  # (weights, ids) as below, both contiguous
) -> tuple[Tensor, Tensor]:  # (weights [T, k + n_shared] float32, ids [T, k + n_shared] int32): `out` where given
    """The `top_k` experts of each token out of its `topk_group` best groups. No row changes another.

    Groups: group g holds the experts g * E / n_group to (g + 1) * E / n_group - 1. Its score is that of its best expert
        (`max`), or the sum of its two best (`top2_sum`), both by biased score: score + bias, where score is
        softmax(logits) over all experts, or sigmoid(logits). A group of one expert has that expert's score under either
        rule (vllm#29439). The `topk_group` best groups stay. The experts of the others are out, and nothing stands for
        them that could win: not 0, to which negative biased scores lose (sglang#3705, transformers#45440).
    Selection: of the experts that stay, the `top_k` best by biased score. Slots descend by it.
    Ties: of groups with equal scores the lowest stays, of experts with equal logits and equal biases the lowest id is
        first; a target may break ties either way unless it declares `lowest_index_first`. Groups that hold the same
        logits with the same biases, in any order, have equal scores in any arithmetic. Scores that a float32 cannot
        tell apart may fall either way, of groups as of experts (docs/numerics.md).
    Weight: the score without the bias, times `scale`; with `renormalize`, divided by the sum of the selected scores, so
        that the routed slots sum to `scale`. Where that sum is below 2^-40 a target's own epsilon may decide: weights
        are then only finite and >= 0. (Here they are the exact ratio even there.)
    Shared experts: `n_shared` slots follow the routed ones on every row: id E + j, weight 1, whatever `scale` and
        `renormalize` are. They take no part in any sum.
    expert_map: the ids of routed slots are looked up in it, as where experts are replicated or moved between devices.
        It is injective, and its values may lie beyond E. Shared slots are not looked up (sglang#22525).
    Masked experts: a logit of -inf has score 0. With a bias it can still be selected, with weight 0. A target may leave
        such experts out of the race instead; both readings are right.
    Defined rows: no logit and no bias is NaN or +inf, and -inf leaves enough to choose from under either reading
        (`defined_rows`): at least `topk_group` groups have 2 experts (1 under `max`, or in groups of one) whose logit
        and bias are finite, and any `topk_group` of the groups that can be kept have `top_k` such experts.
        On any other row that is not flagged: `top_k` distinct logical experts, from any group, the shared slots, finite
        weights >= 0, nothing else. Here NaN counts as -inf and +inf as the largest number of the dtype.
    Padding: a row flagged in `is_padding` obeys the dialect and no other rule, in all its k + n_shared slots.
        `distinct`: k distinct experts, finite weights >= 0, and the shared slots. `minus_one`: id -1, weight 0.
        `num_experts`: id E, weight 0. `zero_weight`: id 0, weight 0; none of these is looked up in `expert_map`.
        `garbage`: anything, even nothing (here the row of `out` stays as it is).

    Raises ValueError for anything outside these shapes, dtypes and ranges.
    Source: DeepSeek-V2 (arXiv 2405.04434), device-limited routing; DeepSeek-V3 (arXiv 2412.19437), its bias and rule.
    """
    validate(logits, top_k, bias, scale, is_padding, padding, out, n_shared)
    _validate_groups(logits, top_k, n_group, topk_group, scoring, group_score, n_shared, expert_map)
    tokens, experts = logits.shape
    scores, biased = SCORES[scoring](logits, bias)  # [T, E]
    key = finite_above(logits) if bias is None else biased  # the logits order like their scores, and more finely
    kept = best_groups(key if group_score == "max" else biased, n_group, topk_group, group_score)  # [T, E]
    order = key.sort(dim=1, descending=True, stable=True).indices
    first = kept.gather(1, order).int().sort(dim=1, descending=True, stable=True).indices[:, :top_k]
    ids = order.gather(1, first)  # [T, k]: kept ones before all others, whatever their keys
    weights = renormalized(finite_above(logits).gather(1, ids), scoring) if renormalize else scores.gather(1, ids)
    shared = torch.arange(experts, experts + n_shared, device=logits.device).expand(tokens, n_shared)
    ids = torch.cat([ids if expert_map is None else expert_map.long()[ids], shared], dim=1)
    weights = torch.cat([weights * scale, torch.ones_like(shared, dtype=weights.dtype)], dim=1)
    return deliver(logits, weights, ids, is_padding, padding, out)


def best_groups(biased: Tensor, n_group: int, topk_group: int, group_score: str) -> Tensor:
    """Whether an expert's group is among the best: bool [T, E], from biased scores [T, E]."""
    tokens, experts = biased.shape
    members = biased.view(tokens, n_group, experts // n_group)
    best = members.topk(min(1 if group_score == "max" else 2, members.shape[2]), dim=2).values
    order = best.sum(dim=2).sort(dim=1, descending=True, stable=True).indices[:, :topk_group]
    kept = torch.zeros(tokens, n_group, dtype=torch.bool, device=biased.device).scatter_(1, order, True)
    return kept.repeat_interleave(experts // n_group, dim=1)


def defined_rows(
    logits: Tensor, bias: Tensor | None, top_k: int, n_group: int, topk_group: int, group_score: str
) -> Tensor:
    """Whether selection and weights of a row are determined by the contract: bool [T].

    A masked expert with a finite bias is in the race for some targets and out of it for others, so the counts must do
    for both: `usable` for the one, `alive` for the other.
    """
    tokens, experts = logits.shape
    needed = 2 if group_score == "top2_sum" and experts > n_group else 1
    usable = logits.isfinite()  # [T, E]
    alive = torch.ones_like(usable)
    bad = logits.isnan() | (logits == math.inf)
    if bias is not None:
        usable, alive = usable & bias.isfinite(), alive & bias.isfinite()
        bad = bad | bias.isnan() | (bias == math.inf)
    determined = ~bad.any(dim=1)
    for eligible in (usable, alive):
        count = eligible.view(tokens, n_group, experts // n_group).sum(dim=2)  # [T, n_group]
        candidates = count.masked_fill(count < needed, experts + 1).sort(dim=1).values[:, :topk_group]
        determined &= (candidates <= experts).all(dim=1) & (candidates.sum(dim=1) >= top_k)
    return determined


def _validate_groups(
    logits: Tensor, top_k: int, n_group: int, topk_group: int, scoring: str, group_score: str, n_shared: int,
    expert_map: Tensor | None,
) -> None:  # fmt: skip
    """ValueError for what lies outside the contract, beyond what all routers have in common."""
    experts = logits.shape[1]
    if n_group < 1 or experts % n_group:
        raise ValueError(f"n_group must divide the number of experts {experts}, not {n_group}")
    if not 1 <= topk_group <= n_group:
        raise ValueError(f"topk_group must be from 1 to n_group = {n_group}, not {topk_group}")
    left = topk_group * (experts // n_group)
    if top_k > left:
        raise ValueError(f"top_k must be at most the {left} experts of {topk_group} groups, not {top_k}")
    if scoring not in SCORES:
        raise ValueError(f"scoring must be one of {', '.join(SCORES)}, not {scoring!r}")
    if group_score not in GROUP_SCORES:
        raise ValueError(f"group_score must be one of {', '.join(GROUP_SCORES)}, not {group_score!r}")
    if not 0 <= n_shared <= 8:
        raise ValueError(f"n_shared must be from 0 to 8, not {n_shared}")
    if expert_map is not None and (
        expert_map.shape != (experts,) or expert_map.dtype != torch.int32 or expert_map.device != logits.device
    ):
        raise ValueError(f"expert_map must be [{experts}] torch.int32 on {logits.device}, "
                         f"not {list(expert_map.shape)} {expert_map.dtype} on {expert_map.device}")
