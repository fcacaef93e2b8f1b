"""Planted bugs: bits that depend on other rows, on T, on chance or on the call before. Every value is right."""

from __future__ import annotations

import random

import torch
from torch import Tensor

MAX = torch.finfo(torch.float32).max
TILE = 16
_CHANCE = random.SystemRandom()  # stands for the order in which thread blocks arrive; no seed reaches it
_ROW_MAX = {torch.device("cpu"): torch.full((8192, 1), -torch.inf)}  # workspaces that live as long as the process


def nan_tile_slow_path(logits: Tensor, top_k: int, *, renormalize: bool = False) -> tuple[Tensor, Tensor]:
    """vllm#37758: NaN in padding rows, and real rows answer differently. One NaN sends its whole tile down a slow path.

    The slow path multiplies by the reciprocal instead of dividing: both are right to the last bit but one, so real
    tokens change with what the padding behind them happens to hold.
    """
    ids, e, total = _parts(logits, top_k, renormalize)
    tainted = logits.isnan().any(dim=1)  # [T]
    tiles = torch.nn.functional.pad(tainted, (0, -len(tainted) % TILE)).view(-1, TILE).any(dim=1)
    slow = tiles.repeat_interleave(TILE)[: len(tainted), None]  # [T, 1]
    return torch.where(slow, e * (1.0 / total), e / total), ids


def small_batch_path(logits: Tensor, top_k: int, *, renormalize: bool = False) -> tuple[Tensor, Tensor]:
    """aiter#2359: which kernel runs is decided by the token count. Up to 16 tokens take one that rounds differently.

    It promises batch invariance: a token's answer in a full batch and alone should agree to the bit.
    """
    ids, e, total = _parts(logits, top_k, renormalize)
    return (e * (1.0 / total) if len(logits) <= TILE else e / total), ids


def arrival_order(logits: Tensor, top_k: int, *, renormalize: bool = False) -> tuple[Tensor, Tensor]:
    """vllm#56887: partial sums are added atomically, in the order in which their blocks arrive.

    The last bits of the weights change from run to run, inside every error bound.
    """
    ids, e, total = _parts(logits, top_k, renormalize)
    if not renormalize:
        x = _clean(logits)
        parts = _exp(x, _top(x)).split(4, dim=1)
        total = torch.zeros_like(total)
        for part in _CHANCE.sample(parts, len(parts)):
            total = total + part.sum(dim=1, keepdim=True)
        total = total.clamp_min(1e-30)
    return e / total, ids


def arrival_fill(logits: Tensor, top_k: int, *, renormalize: bool = False) -> tuple[Tensor, Tensor]:
    """sglang#30645: slots that no finite score claims are filled through an atomic counter, by whoever arrives first.

    Distinct ids, finite weights, and two runs of the same padding row reach different experts.
    """
    x = _clean(logits)
    arrival = torch.tensor(_CHANCE.sample(range(x.shape[1]), x.shape[1]), device=x.device)
    waiting = torch.where(x == -torch.inf, arrival, torch.arange(x.shape[1], device=x.device))  # [T, E]
    queue = waiting.argsort(dim=1, stable=True)
    ids = queue.gather(1, x.gather(1, queue).argsort(dim=1, descending=True, stable=True)[:, :top_k])
    _, e, total = _parts(logits, top_k, renormalize)
    return e / total, ids.int()


def stale_row_max(logits: Tensor, top_k: int, *, renormalize: bool = False) -> tuple[Tensor, Tensor]:
    """vllm#49139: global state of the last call is used again. The row maxima accumulate in a workspace never cleared.

    A row that was huge once leaves its maximum behind, and every later softmax of that row underflows to 0.
    """
    x = _clean(logits)
    if x.device not in _ROW_MAX:
        _ROW_MAX[x.device] = torch.full((8192, 1), -torch.inf, device=x.device)
    if len(x) <= 8192:
        top = _ROW_MAX[x.device][: len(x)]
        torch.maximum(top, _top(x), out=top)
    else:
        top = _top(x)
    e = _exp(x, top)
    ids = _ids(x, top_k)
    picked = e.gather(1, ids.long())
    return picked / (picked if renormalize else e).sum(dim=1, keepdim=True).clamp_min(1e-30), ids


# ---- a router without a flaw: exp in float64, so that no bit depends on how torch splits a tensor into vectors -------


def _clean(values: Tensor) -> Tensor:
    return values.float().nan_to_num(nan=-torch.inf, posinf=MAX, neginf=-torch.inf) + 0.0


def _top(x: Tensor) -> Tensor:
    return x.amax(dim=1, keepdim=True).clamp_min(-MAX)


def _exp(x: Tensor, top: Tensor) -> Tensor:
    return (x - top).double().exp().float()


def _ids(x: Tensor, top_k: int) -> Tensor:
    return x.argsort(dim=1, descending=True, stable=True)[:, :top_k].int()


def _parts(logits: Tensor, top_k: int, renormalize: bool) -> tuple[Tensor, Tensor, Tensor]:
    """ids [T, k], and weights [T, k] as exp / total; total is 1e-30 where every exp is 0."""
    x = _clean(logits)
    ids = _ids(x, top_k)
    picked = x.gather(1, ids.long())
    top = _top(x)
    total = _exp(picked if renormalize else x, top).double().sum(dim=1, keepdim=True).float()
    return ids, _exp(picked, top), total.clamp_min(1e-30)
