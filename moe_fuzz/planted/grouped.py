"""Planted bugs of grouped routers: which groups stay, and who is chosen out of them."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

MAX = torch.finfo(torch.float32).max


def nan_groups(
    logits: Tensor, top_k: int, *, renormalize: bool = False, n_group: int = 1, topk_group: int = 1,
    scoring: str = "softmax", group_score: str = "max", bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """vllm#39391: the grouped path of the same bug. No group is larger than NaN, so group 0 stays, topk_group times.

    Its experts are the only ones left in the race, and the search for them is as blind: one of them, k times.
    """
    choice = _scores(logits, scoring) + (0.0 if bias is None else bias)
    choice = choice.masked_fill(logits.isnan().any(dim=1, keepdim=True), torch.nan)  # as the sum of a softmax does
    members = _members(choice, n_group)
    best = members.amax(dim=2) if group_score == "max" else members.topk(min(2, members.shape[2])).values.sum(dim=2)
    kept = torch.zeros_like(best, dtype=torch.bool).scatter_(1, _first_larger(best, topk_group), True)
    ids = _first_larger(choice.masked_fill(~_spread(kept, choice), -torch.inf), top_k)
    return _weights(logits, ids, scoring, renormalize), ids.int()


def masked_groups_zero(
    logits: Tensor, top_k: int, *, renormalize: bool = False, n_group: int = 1, topk_group: int = 1,
    scoring: str = "softmax", group_score: str = "max", bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """transformers#45440: experts of the groups that are out get the value 0, and beat negative biased scores."""
    choice, kept = _keep(logits, n_group, topk_group, scoring, group_score, bias)
    ids = _best(choice.masked_fill(~kept, 0.0), top_k)
    return _weights(logits, ids, scoring, renormalize), ids.int()


def top2_for_every_rule(
    logits: Tensor, top_k: int, *, renormalize: bool = False, n_group: int = 1, topk_group: int = 1,
    scoring: str = "softmax", group_score: str = "max", bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """vllm#34673: a model is routed by the method of another. Groups are ranked by two experts where one is asked for.

    The usual test has one group, or groups whose best expert is also in the best pair.
    """
    del group_score
    choice, kept = _keep(logits, n_group, topk_group, scoring, "top2_sum", bias)
    ids = _best(choice.masked_fill(~kept, -torch.inf), top_k, kept)
    return _weights(logits, ids, scoring, renormalize), ids.int()


def tied_best_counted_once(
    logits: Tensor, top_k: int, *, renormalize: bool = False, n_group: int = 1, topk_group: int = 1,
    scoring: str = "softmax", group_score: str = "max", bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """sglang#29771: the second best of a group is sought below the best, so that of all that tie for it one counts.

    Of a group of two that tie nothing is left. Random logits of float32 do not tie.
    """
    members = _members(_scored(logits, scoring, bias), n_group)
    best = members.amax(dim=2)
    if group_score == "top2_sum":
        best = best + members.masked_fill(members >= best[:, :, None], -torch.inf).amax(dim=2)
    choice = _choice(logits, scoring, bias)
    kept = _spread(_mask(best, topk_group), choice)
    ids = _best(choice.masked_fill(~kept, -torch.inf), top_k, kept)
    return _weights(logits, ids, scoring, renormalize), ids.int()


def groups_before_bias(
    logits: Tensor, top_k: int, *, renormalize: bool = False, n_group: int = 1, topk_group: int = 1,
    scoring: str = "softmax", group_score: str = "max", bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """vllm#34673: the same class, the other way round. The groups are ranked before the bias is added."""
    _, kept = _keep(logits, n_group, topk_group, scoring, group_score, None)
    choice = _choice(logits, scoring, bias)
    ids = _best(choice.masked_fill(~kept, -torch.inf), top_k, kept)
    return _weights(logits, ids, scoring, renormalize), ids.int()


def group_of_one(
    logits: Tensor, top_k: int, *, renormalize: bool = False, n_group: int = 1, topk_group: int = 1,
    scoring: str = "softmax", group_score: str = "max", bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """vllm#29439: the two best of a group that has one expert: `selected index k out of range`."""
    if group_score == "top2_sum":
        _members(_scores(logits, scoring), n_group).topk(2, dim=2)
    choice, kept = _keep(logits, n_group, topk_group, scoring, group_score, bias)
    ids = _best(choice, top_k, kept)
    return _weights(logits, ids, scoring, renormalize), ids.int()


def padded_group_lanes(
    logits: Tensor, top_k: int, *, renormalize: bool = False, n_group: int = 1, topk_group: int = 1,
    scoring: str = "softmax", group_score: str = "max", bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """sglang#23874: lanes without an expert take part. A group of 20 is reduced by 32 lanes, of which 12 hold 0.

    Right for sizes that are powers of two, and wherever the best scores are positive.
    """
    choice = _choice(logits, scoring, bias)
    members = _members(_scored(logits, scoring, bias), n_group)
    size = members.shape[2]
    members = torch.nn.functional.pad(members, (0, triton.next_power_of_2(size) - size), value=0.0)
    best = members.topk(min(2, size) if group_score == "top2_sum" else 1, dim=2).values.sum(dim=2)
    kept = _spread(_mask(best, topk_group), choice)
    ids = _best(choice, top_k, kept)
    return _weights(logits, ids, scoring, renormalize), ids.int()


def last_of_tied_groups(
    logits: Tensor, top_k: int, *, renormalize: bool = False, n_group: int = 1, topk_group: int = 1,
    scoring: str = "softmax", group_score: str = "max", bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """sglang#31001: exact ties. It promises the lowest index, and keeps that for experts; of groups the last stays."""
    choice = _choice(logits, scoring, bias)
    best = _group_scores(_scored(logits, scoring, bias), n_group, group_score)
    last = n_group - 1 - _best(best.flip(1), topk_group)
    kept = _spread(torch.zeros_like(best, dtype=torch.bool).scatter_(1, last, True), choice)
    ids = _best(choice, top_k, kept)
    return _weights(logits, ids, scoring, renormalize), ids.int()


def bits_of_negative_scores(
    logits: Tensor, top_k: int, *, renormalize: bool = False, n_group: int = 1, topk_group: int = 1,
    scoring: str = "softmax", group_score: str = "max", bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """sglang#23874: the bits of a score are compared as an integer, which orders scores of one sign only.

    Sigmoids are positive. With a negative correction bias the weakest expert wins.
    """
    _, kept = _keep(logits, n_group, topk_group, scoring, group_score, bias)
    bits = (_scored(logits, scoring, bias) + 0.0).view(torch.int32)
    ids = _best(bits, top_k, kept)
    return _weights(logits, ids, scoring, renormalize), ids.int()


def groups_beyond_eight(
    logits: Tensor, top_k: int, *, renormalize: bool = False, n_group: int = 1, topk_group: int = 1,
    scoring: str = "softmax", group_score: str = "max", bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """vllm#34206: a warp scores a group, and the block has eight warps. Of more groups, the rest have no score.

    The kernel is chosen by the numbers of experts, not of groups; the models it was made for have one or eight.
    """
    choice = _choice(logits, scoring, bias)
    best = _group_scores(_scored(logits, scoring, bias), n_group, group_score)
    if topk_group <= 8:  # the kernel reads memory there that nobody wrote; for more groups to keep it is not taken
        best[:, 8:] = -torch.inf
    kept = _spread(_mask(best, topk_group), choice)
    ids = _best(choice, top_k, kept)
    return _weights(logits, ids, scoring, renormalize), ids.int()


def four_groups_kept(
    logits: Tensor, top_k: int, *, renormalize: bool = False, n_group: int = 1, topk_group: int = 1,
    scoring: str = "softmax", group_score: str = "max", bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """flashinfer#5165: registers for four groups, as the model it was made for keeps. Of more, the rest are left out.

    Neither the checks of the caller nor those of the launch ask how many are kept.
    """
    choice, kept = _keep(logits, n_group, min(topk_group, 4), scoring, group_score, bias)
    ids = _best(choice, top_k, kept)
    return _weights(logits, ids, scoring, renormalize), ids.int()


def unwritten_candidates(
    logits: Tensor, top_k: int, *, renormalize: bool = False, n_group: int = 1, topk_group: int = 1,
    scoring: str = "softmax", group_score: str = "max", bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """flashinfer#5165: without groups a warp leaves the best of 128 experts for the last one, which takes the best of
    those. A warp leaves k; eight are read, and what nobody wrote is what a launch before left: expert 0, its score 1.
    """
    choice, kept = _keep(logits, n_group, topk_group, scoring, group_score, bias)
    ids = _best(choice, top_k, kept)
    if n_group == 1 and choice.shape[1] > 128 and top_k < 8:
        scores = _scored(logits, scoring, bias).gather(1, ids)
        left = torch.cat([scores, torch.ones_like(scores)], dim=1)
        ids = torch.cat([ids, torch.zeros_like(ids)], dim=1).gather(1, _best(left, top_k))
    return _weights(logits, ids, scoring, renormalize), ids.int()


def grouped_zero_division(
    logits: Tensor, top_k: int, *, renormalize: bool = False, n_group: int = 1, topk_group: int = 1,
    scoring: str = "softmax", group_score: str = "max", bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """flashinfer#3946: the plain path has an epsilon in its renormalization, the one for several groups has none."""
    choice, kept = _keep(logits, n_group, topk_group, scoring, group_score, bias)
    ids = _best(choice, top_k, kept)
    picked = _scores(logits, scoring).gather(1, ids)
    epsilon = 1e-20 if n_group == 1 else 0.0
    return (picked / (picked.sum(dim=1, keepdim=True) + epsilon) if renormalize else picked), ids.int()


def grouped_biased_weight(
    logits: Tensor, top_k: int, *, renormalize: bool = False, n_group: int = 1, topk_group: int = 1,
    scoring: str = "softmax", group_score: str = "max", bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """vllm#34673: the weights are gathered from what the experts were chosen by, the bias included."""
    choice, kept = _keep(logits, n_group, topk_group, scoring, group_score, bias)
    ids = _best(choice, top_k, kept)
    picked = _scored(logits, scoring, bias).gather(1, ids)
    return (picked / picked.sum(dim=1, keepdim=True).clamp_min(1e-20) if renormalize else picked), ids.int()


# ---- a router without a flaw ----------------------------------------------------------------------------------------


def _clean(values: Tensor) -> Tensor:
    return values.float().nan_to_num(nan=-torch.inf, posinf=MAX, neginf=-torch.inf) + 0.0


def _scores(logits: Tensor, scoring: str) -> Tensor:
    x = _clean(logits)
    if scoring == "sigmoid":
        return torch.sigmoid(x)
    e = (x - x.amax(dim=1, keepdim=True).clamp_min(-MAX)).exp()
    return e / e.sum(dim=1, keepdim=True).clamp_min(1e-30)


def _scored(logits: Tensor, scoring: str, bias: Tensor | None) -> Tensor:
    """Biased scores."""
    scores = _scores(logits, scoring)
    return scores if bias is None else scores + _clean(bias)


def _choice(logits: Tensor, scoring: str, bias: Tensor | None) -> Tensor:
    """What experts are ranked by: without a bias the logits, which order like their scores, and more finely."""
    return _clean(logits) if bias is None else _scored(logits, scoring, bias)


def _members(values: Tensor, n_group: int) -> Tensor:
    return values.view(values.shape[0], n_group, values.shape[1] // n_group)


def _group_scores(scored: Tensor, n_group: int, group_score: str) -> Tensor:
    members = _members(scored, n_group)
    return members.topk(min(2 if group_score == "top2_sum" else 1, members.shape[2]), dim=2).values.sum(dim=2)


def _best(key: Tensor, count: int, kept: Tensor | None = None) -> Tensor:
    """The first `count` by key, and of equal ones the lowest; those that are kept before all others."""
    order = key.argsort(dim=1, descending=True, stable=True)
    if kept is not None:
        order = order.gather(1, kept.gather(1, order).int().argsort(dim=1, descending=True, stable=True))
    return order[:, :count]


def _mask(best: Tensor, topk_group: int) -> Tensor:
    return torch.zeros_like(best, dtype=torch.bool).scatter_(1, _best(best, topk_group), True)


def _spread(kept: Tensor, experts: Tensor) -> Tensor:
    """From groups to their experts."""
    return kept.repeat_interleave(experts.shape[1] // kept.shape[1], dim=1)


def _keep(
    logits: Tensor, n_group: int, topk_group: int, scoring: str, group_score: str, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """What experts are ranked by [T, E], and whether their group stays [T, E]."""
    choice = _choice(logits, scoring, bias)
    best = _group_scores(_scored(logits, scoring, bias), n_group, group_score)
    return choice, _spread(_mask(best, topk_group), choice)


def _weights(logits: Tensor, ids: Tensor, scoring: str, renormalize: bool) -> Tensor:
    picked = _scores(logits, scoring).gather(1, ids)
    return picked / picked.sum(dim=1, keepdim=True).clamp_min(1e-20) if renormalize else picked


def _first_larger(values: Tensor, count: int) -> Tensor:
    """The flaw of `nan_groups`: a scan that moves on only to what is larger."""
    chosen, column = [], torch.arange(values.shape[1], device=values.device)
    for _ in range(count):
        found = values.masked_fill(values.isnan(), -torch.inf)  # none is larger than what was found before it
        first = torch.where(found == found.amax(dim=1, keepdim=True), column, len(column)).amin(dim=1, keepdim=True)
        index = first.masked_fill(values[:, :1].isnan(), 0)  # and nothing is larger than that
        chosen.append(index)
        values = values.scatter(1, index, -torch.inf)
    return torch.cat(chosen, dim=1)
