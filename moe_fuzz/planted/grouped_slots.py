"""Planted bugs of grouped routers: the slots of fused shared experts, and the map of ids."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX = torch.finfo(torch.float32).max


def shared_id_off_by_one(
    logits: Tensor, top_k: int, *, renormalize: bool = False, n_group: int = 1, topk_group: int = 1,
    scoring: str = "softmax", group_score: str = "max", bias: Tensor | None = None, n_shared: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """sglang#8125: a shared expert stands where another belongs. Its id counts from the last routed one, not behind."""
    weights, ids = _route(logits, top_k, n_group, topk_group, scoring, group_score, bias)
    return _with_shared(_renormalized(weights, renormalize), ids, logits.shape[1] - 1, n_shared)


def two_shared_in_turns(
    logits: Tensor, top_k: int, *, renormalize: bool = False, n_group: int = 1, topk_group: int = 1,
    scoring: str = "softmax", group_score: str = "max", bias: Tensor | None = None, n_shared: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """sglang#6736: the slots of shared experts are fewer than the kernel is told of. It knows two, and the slots of
    more take these in turns."""
    weights, ids = _route(logits, top_k, n_group, topk_group, scoring, group_score, bias)
    weights, ids = _with_shared(_renormalized(weights, renormalize), ids, logits.shape[1], n_shared)
    ids[:, top_k:] = logits.shape[1] + (ids[:, top_k:] - logits.shape[1]) % 2
    return weights, ids


def shared_guard_missing(
    logits: Tensor, top_k: int, *, renormalize: bool = False, n_group: int = 1, topk_group: int = 1,
    scoring: str = "softmax", group_score: str = "max", bias: Tensor | None = None, n_shared: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """sglang#17325: with fused shared experts the dispatch takes a kernel that knows no groups."""
    if n_shared:
        n_group = topk_group = 1
    weights, ids = _route(logits, top_k, n_group, topk_group, scoring, group_score, bias)
    return _with_shared(_renormalized(weights, renormalize), ids, logits.shape[1], n_shared)


def renormalized_with_shared(
    logits: Tensor, top_k: int, *, renormalize: bool = False, n_group: int = 1, topk_group: int = 1,
    scoring: str = "softmax", group_score: str = "max", bias: Tensor | None = None, n_shared: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """sglang#8125: all slots are taken for routed ones. The sum that the weights are divided by has the shared ones in
    it, with a weight of 1 each, which are set again afterwards."""
    weights, ids = _route(logits, top_k, n_group, topk_group, scoring, group_score, bias)
    if renormalize:
        weights = weights / (weights.sum(dim=1, keepdim=True) + n_shared).clamp_min(1e-20)
    return _with_shared(weights, ids, logits.shape[1], n_shared)


def unmapped_on_one_path(
    logits: Tensor, top_k: int, *, renormalize: bool = False, n_group: int = 1, topk_group: int = 1,
    scoring: str = "softmax", group_score: str = "max", bias: Tensor | None = None, expert_map: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """sglang#28378: one path skips what the others do to the ids. Here the shortcut for a
    single group returns before they are looked up."""
    weights, ids = _route(logits, top_k, n_group, topk_group, scoring, group_score, bias)
    if expert_map is not None and n_group > 1:
        ids = expert_map[ids]
    return _renormalized(weights, renormalize), ids.int()


def mapped_in_place(
    logits: Tensor, top_k: int, *, renormalize: bool = False, n_group: int = 1, topk_group: int = 1,
    scoring: str = "softmax", group_score: str = "max", bias: Tensor | None = None, expert_map: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """sglang#22525: remapped ids that are remapped again, here expert by expert in place: right while no physical id
    is also a logical one."""
    weights, ids = _route(logits, top_k, n_group, topk_group, scoring, group_score, bias)
    ids = ids.int()
    if expert_map is not None:
        for expert in range(logits.shape[1]):
            ids = torch.where(ids == expert, expert_map[expert], ids)
    return _renormalized(weights, renormalize), ids


def shared_ids_looked_up(
    logits: Tensor, top_k: int, *, renormalize: bool = False, n_group: int = 1, topk_group: int = 1,
    scoring: str = "softmax", group_score: str = "max", bias: Tensor | None = None, n_shared: int = 0,
    expert_map: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """sglang#22525: the id of a shared expert is looked up too, past the end of the map. Its slot is set afterwards, so
    every result is right."""
    weights, ids = _route(logits, top_k, n_group, topk_group, scoring, group_score, bias)
    weights, ids = _with_shared(_renormalized(weights, renormalize), ids, logits.shape[1], n_shared)
    if expert_map is None or not ids.numel():
        return weights, ids
    physical, size = torch.empty_like(ids), ids.numel()
    _look_up_kernel[(triton.cdiv(size, 4096),)](ids, expert_map, physical, size, BLOCK=4096)
    physical[:, top_k:] = ids[:, top_k:]
    return weights, physical


# ---- a router without a flaw ----------------------------------------------------------------------------------------


def _clean(values: Tensor) -> Tensor:
    return values.float().nan_to_num(nan=-torch.inf, posinf=MAX, neginf=-torch.inf) + 0.0


def _route(
    logits: Tensor, top_k: int, n_group: int, topk_group: int, scoring: str, group_score: str, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Scores [T, k], not renormalized, and logical ids, int64 [T, k]."""
    x = _clean(logits)
    if scoring == "sigmoid":
        scores = torch.sigmoid(x)
    else:
        e = (x - x.amax(dim=1, keepdim=True).clamp_min(-MAX)).exp()
        scores = e / e.sum(dim=1, keepdim=True).clamp_min(1e-30)
    scored = scores if bias is None else scores + _clean(bias)
    members = scored.view(len(x), n_group, x.shape[1] // n_group)
    best = members.topk(min(2 if group_score == "top2_sum" else 1, members.shape[2]), dim=2).values.sum(dim=2)
    groups = best.argsort(dim=1, descending=True, stable=True)[:, :topk_group]
    kept = torch.zeros_like(best, dtype=torch.bool).scatter_(1, groups, True)
    kept = kept.repeat_interleave(members.shape[2], dim=1)  # [T, E]
    order = (x if bias is None else scored).argsort(dim=1, descending=True, stable=True)
    ids = order.gather(1, kept.gather(1, order).int().argsort(dim=1, descending=True, stable=True))[:, :top_k]
    return scores.gather(1, ids), ids


def _renormalized(weights: Tensor, renormalize: bool) -> Tensor:
    return weights / weights.sum(dim=1, keepdim=True).clamp_min(1e-20) if renormalize else weights


def _with_shared(weights: Tensor, ids: Tensor, first: int, n_shared: int) -> tuple[Tensor, Tensor]:
    """The slots of shared experts behind the routed ones: ids from `first` on, weight 1."""
    shared = torch.arange(first, first + n_shared, device=ids.device).expand(len(ids), n_shared)
    return torch.cat([weights, torch.ones_like(shared, dtype=torch.float32)], 1), torch.cat([ids, shared], 1).int()


@triton.jit
def _look_up_kernel(ids_ptr, map_ptr, physical_ptr, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ids = tl.load(ids_ptr + at, mask=at < size, other=0)
    tl.store(physical_ptr + at, tl.load(map_ptr + ids, mask=at < size, other=0), mask=at < size)
