"""The routers of vLLM 0.33.0 and sglang-kernel 0.4.2 with their flaws, a row at a time, in float32.

Written from the causes A to H of docs/targets.md. Where such a router gives what a campaign saw on a GPU, and no longer
gives it where the reducer saw it go, the cause explains the finding. What no finding tells of a kernel is not here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from moe_fuzz.contract import Capabilities, Contract, declares

#: E with a kernel of their own, of those that campaigns end at; any other E is the block kernel's.
_OWN = (1, 2, 4, 8)
_TAKEN = -10000.0  # cause A: how their kernels mark an expert that was taken
_FLOOR = -1.0  # cause A: what the block kernel's search starts from, beside expert 0
_WRITTEN = 8  # cause C: groups whose scores somebody writes

Row = Callable[[Tensor], tuple[Tensor, list[int]]]


def _rows(logits: Tensor, top_k: int, row: Row) -> tuple[Tensor, Tensor]:
    if not len(logits):  # cause H
        raise RuntimeError("an empty grid is an invalid launch")
    weights, ids = zip(*map(row, logits.float()), strict=True)
    return torch.stack(weights), torch.tensor(ids, dtype=torch.int32)


def _best(values: Sequence[float], start: float) -> tuple[float, int]:
    """The argmax from `start` and expert 0 on, by a comparison that NaN never wins (cause G)."""
    best, at = start, 0
    for i, value in enumerate(values):
        if value > best:
            best, at = value, i
    return best, at


def _best_of_threads(values: Sequence[float], start: float) -> tuple[float, int]:
    """The same with a thread for each expert, which keeps what it has unless the other is greater: also NaN."""
    threads = [(start, 0) if start > value else (value, i) for i, value in enumerate(values)]
    best, at = threads[0]
    for value, i in threads[1:]:
        if value > best or (value == best and i < at):
            best, at = value, i
    return best, at


_Search = Callable[[Sequence[float], float], tuple[float, int]]


def _search(choice: Tensor, top_k: int, best_of: _Search = _best) -> tuple[list[float], list[int]]:
    values, won, ids = choice.tolist(), [], []
    for _ in range(top_k):
        if len(values) in _OWN:
            best, at = _best(values, values[0])
            values[at] = _TAKEN
        else:
            best, at = best_of([_FLOOR if i in ids else value for i, value in enumerate(values)], _FLOOR)
        won.append(best)
        ids.append(at)
    return won, ids


def _scores(row: Tensor, scoring: str) -> Tensor:
    return row.softmax(0) if scoring == "softmax" else row.sigmoid()


def _vllm(scoring: str) -> Callable[..., tuple[Tensor, Tensor]]:
    def route(
        logits: Tensor, top_k: int, *, renormalize: bool = False, scale: float = 1.0, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        def row(values: Tensor) -> tuple[Tensor, list[int]]:
            scores = _scores(values, scoring).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
            _, ids = _search(scores if bias is None else scores + bias, top_k)
            weights = scores[ids]
            total = weights.sum()
            divisor = torch.where(total > 0, total, 1.0) if renormalize else torch.tensor(1.0)
            return weights * (scale / divisor), ids  # cause B

        return _rows(logits, top_k, row)

    return route


def _sglang(scoring: str) -> Callable[..., tuple[Tensor, Tensor]]:
    def route(
        logits: Tensor, top_k: int, *, renormalize: bool = False, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        def row(values: Tensor) -> tuple[Tensor, list[int]]:
            scores = _scores(values, scoring)
            # Two at a time are found by other comparisons than one.
            best_of = _best if scoring == "softmax" and top_k > 1 else _best_of_threads
            won, ids = _search(scores if bias is None else scores + bias, top_k, best_of)
            weights = torch.tensor(won) - (0.0 if bias is None else bias[ids])  # causes A and E
            return (weights / weights.sum() if renormalize else weights), ids  # cause F

        return _rows(logits, top_k, row)

    return route


vllm_topk_softmax, vllm_topk_sigmoid = _vllm("softmax"), _vllm("sigmoid")
sglang_topk_softmax, sglang_topk_sigmoid = _sglang("softmax"), _sglang("sigmoid")


@declares(capabilities=Capabilities(bias_required=True), contract=Contract(sigmoid="tanh", ordered=True))
def vllm_grouped_topk(
    logits: Tensor, top_k: int, *, renormalize: bool = False, scale: float = 1.0, n_group: int = 1,
    topk_group: int = 1, scoring: str = "sigmoid", group_score: str = "top2_sum", bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What nobody writes (cause C) is taken to be 0, as in memory that nobody has used."""
    if bias is None:
        raise NotImplementedError("the operator takes a bias")
    experts = logits.shape[1]
    size = experts // n_group

    def of_one_group(values: Tensor) -> tuple[Tensor, list[int]]:
        if not values.isfinite().all():
            raise NotImplementedError("no finding tells what one group does with such a row")
        scores = _grouped_scores(values, scoring)
        ids = (scores + bias).argsort(descending=True, stable=True)[:top_k].tolist()
        return (scores + bias)[ids] - bias[ids], ids  # cause E

    def of_few_experts(values: Tensor) -> tuple[Tensor, list[int]]:
        written = torch.arange(experts) < _WRITTEN * size
        scores = _grouped_scores(values, scoring).where(written, 0.0)
        choice = (scores + bias).where(written, 0.0)
        ids = _in_groups(choice, _best_groups(choice, n_group)[1][:topk_group], size, top_k)
        return scores[ids], ids

    def of_many_experts(values: Tensor) -> tuple[Tensor, list[int]]:
        scores = _grouped_scores(values, scoring)
        best, groups = _best_groups(scores + bias, n_group)
        if best[topk_group - 1] == -math.inf:  # the guard for a row without a score
            return torch.full((top_k,), 1 / top_k), list(range(top_k))
        candidates = (scores + bias).where(values.isfinite(), -math.inf)  # cause D: and yet they counted for the group
        ids = _in_groups(candidates, groups[:topk_group], size, top_k)
        return scores[ids], ids

    few = experts <= 256 and size <= 32 and size * topk_group <= 128 and top_k <= 8 and topk_group <= 4
    kernel = of_one_group if n_group == 1 else of_few_experts if few else of_many_experts

    def row(values: Tensor) -> tuple[Tensor, list[int]]:
        weights, ids = kernel(values)
        return (weights / (weights.sum() + 1e-20) if renormalize else weights) * scale, ids

    return _rows(logits, top_k, row)


def _grouped_scores(row: Tensor, scoring: str) -> Tensor:
    return row.softmax(0) if scoring == "softmax" else 0.5 * torch.tanh(0.5 * row) + 0.5


def _best_groups(choice: Tensor, n_group: int) -> tuple[list[float], list[int]]:
    """Groups from the best on, by the sum of their two best, for which NaN does not count; and these sums."""
    two = choice.where(~choice.isnan(), -math.inf).view(n_group, -1).topk(2, dim=1).values.sum(1)
    groups = two.argsort(descending=True, stable=True).tolist()
    return two[groups].tolist(), groups


def _in_groups(choice: Tensor, groups: Sequence[int], size: int, top_k: int) -> list[int]:
    """The best experts of some groups; expert 0 where nothing is above -Inf."""
    ids: list[int] = []
    for _ in range(top_k):
        of_these = [value if i // size in groups and i not in ids else -math.inf
                    for i, value in enumerate(choice.tolist())]  # fmt: skip
        ids.append(_best(of_these, -math.inf)[1])
    return ids


def sglang_grouped_topk(
    logits: Tensor, top_k: int, *, renormalize: bool = True, scale: float = 1.0, n_group: int = 1, topk_group: int = 1,
    scoring: str = "sigmoid", group_score: str = "top2_sum", bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Of one group."""
    if bias is None or n_group != 1 or scoring != "sigmoid" or not renormalize:
        raise NotImplementedError("no finding is of such a config")

    def row(values: Tensor) -> tuple[Tensor, list[int]]:
        scores = values.sigmoid()
        candidates, ids = (scores + bias).tolist(), []
        for _ in range(top_k):
            _, at = _best(candidates, candidates[0])
            candidates[at] = -math.inf
            ids.append(at)
        return scores[ids] / scores[ids].sum() * scale, ids  # cause F

    return _rows(logits, top_k, row)
