"""The routers of vLLM 0.33.0 and sglang-kernel 0.4.2 with their flaws, a row at a time, in float32.

Written from what docs/targets.md says of the causes A to H, and of nothing else: where such a router gives an answer
that a campaign found on a GPU, to the bit, the cause explains the finding.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from moe_fuzz.contract import Capabilities, Contract, declares

#: E with a kernel of their own, of those that campaigns end at; any other E is the block kernel's.
_OWN = (1, 2, 4, 8)
_TAKEN = -10000.0  # cause A: the mark of an expert that was taken
_FLOOR = -1.0  # cause A: what the block kernel's search starts from, beside expert 0
_WRITTEN = 8  # cause C: groups whose scores somebody writes

Row = Callable[[Tensor], tuple[Tensor, list[int]]]


def _rows(logits: Tensor, top_k: int, row: Row) -> tuple[Tensor, Tensor]:
    if not len(logits):  # cause H
        raise RuntimeError("an empty grid is an invalid launch")
    weights, ids = zip(*map(row, logits.float()), strict=True)
    return torch.stack(weights), torch.tensor(ids, dtype=torch.int32)


def _best(values: list[float], start: float) -> tuple[float, int]:
    """The argmax as kernels look for it: from `start` and expert 0 on, by a comparison that NaN never wins (G)."""
    best, at = start, 0
    for i, value in enumerate(values):
        if value > best:
            best, at = value, i
    return best, at


def _search(choice: Tensor, top_k: int) -> tuple[list[float], list[int]]:
    values, won, ids = choice.tolist(), [], []
    for _ in range(top_k):
        if len(values) in _OWN:
            best, at = _best(values, values[0])
            values[at] = _TAKEN
        else:
            best, at = _best([-math.inf if i in ids else value for i, value in enumerate(values)], _FLOOR)
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
            won, ids = _search(scores if bias is None else scores + bias, top_k)
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
    few = experts <= 256 and size <= 32 and top_k <= 8 and topk_group <= 4  # the kernel for few experts

    def row(values: Tensor) -> tuple[Tensor, list[int]]:
        scores = values.softmax(0) if scoring == "softmax" else 0.5 * torch.tanh(0.5 * values) + 0.5
        choice, less = scores + bias, bias
        if few:
            written = torch.arange(experts) < _WRITTEN * size
            choice, less = choice.where(written, 0.0), bias.where(written, 0.0)
        groups = choice.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf).view(n_group, size)
        ranks = groups.topk(2, dim=1).values.sum(1).argsort(descending=True, stable=True)
        kept = ranks[:topk_group].tolist()
        runs = [  # cause D: in the kernel for many, no expert with an infinite logit
            i // size in kept and (few or math.isfinite(values[i])) for i in range(experts)
        ]
        candidates, ids = choice.where(torch.tensor(runs), -math.inf).tolist(), []
        for _ in range(top_k):
            _, at = _best([-math.inf if i in ids else value for i, value in enumerate(candidates)], -math.inf)
            ids.append(at)
        weights = choice[ids] - less[ids]  # cause E
        return (weights / (weights.sum() + 1e-20) if renormalize else weights) * scale, ids

    return _rows(logits, top_k, row)


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
