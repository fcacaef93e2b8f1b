"""Planted bugs of sigmoid routers, and one of the output's index."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX = torch.finfo(torch.float32).max


def sigmoid_nan_fallback(
    logits: Tensor, top_k: int, *, renormalize: bool = False, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """vllm#39391: the fused path is safe from NaN, the fallback for expert counts that are no power of two is not.

    Its scan keeps the first expert unless a later one is larger, which none is beside a NaN: expert 0, k times.
    """
    experts = logits.shape[1]
    if triton.next_power_of_2(experts) == experts:
        return _route(logits, top_k, renormalize, bias)
    left = torch.sigmoid(logits.float()) + (0.0 if bias is None else bias)
    chosen = []
    for _ in range(top_k):
        # What the scan ends at, without a launch an expert: beside a NaN nothing is larger, and a NaN never is.
        index = left.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf).argmax(dim=1, keepdim=True)
        index = index.masked_fill(left[:, :1].isnan(), 0)
        chosen.append(index)
        left = left.scatter(1, index, -torch.inf)
    ids = torch.cat(chosen, dim=1)
    return _weights(logits, ids, renormalize), ids.int()


def saturated_ties(
    logits: Tensor, top_k: int, *, renormalize: bool = False, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """sglang#30645: more experts tie than the algorithm has room for. Here the winner leaves the race by its value.

    Whoever holds the same value leaves with it. Distinct logits seldom do, but sigmoid(18) is sigmoid(30) in float32.
    """
    scores = torch.sigmoid(_clean(logits))
    left = scores if bias is None else scores + _clean(bias)
    chosen = []
    for _ in range(top_k):
        best, index = left.max(dim=1, keepdim=True)
        chosen.append(index)
        left = left.masked_fill(left == best, -torch.inf)
    ids = torch.cat(chosen, dim=1)
    return _weights(logits, ids, renormalize), ids.int()


def sigmoid_zero_division(
    logits: Tensor, top_k: int, *, renormalize: bool = False, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """flashinfer#3803: the epsilon of the renormalization defaults to 0, and the selected sigmoids underflow to 0."""
    ids = _select(logits, top_k, bias)
    picked = torch.sigmoid(_clean(logits)).gather(1, ids)
    return (picked / (picked.sum(dim=1, keepdim=True) + 0.0) if renormalize else picked), ids.int()


def sigmoid_in_input_dtype(
    logits: Tensor, top_k: int, *, renormalize: bool = False, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """flashinfer#3595: the scores are computed in the dtype of the logits, and widened only afterwards."""
    ids = _select(logits, top_k, bias)
    scores = torch.sigmoid(_clean(logits).to(logits.dtype)).float()
    picked = scores.gather(1, ids)
    return (picked / picked.sum(dim=1, keepdim=True).clamp_min(1e-30) if renormalize else picked), ids.int()


def floor_of_minus_one(
    logits: Tensor, top_k: int, *, renormalize: bool = False, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """vllm#31478: a search for a maximum that starts at -1 and expert 0, for scores that are probabilities.

    With a correction bias they are not: where all that is left lies below -1, expert 0 wins, whether taken or not. The
    fused path for powers of two has no such start.
    """
    experts = logits.shape[1]
    if triton.next_power_of_2(experts) == experts:
        return _route(logits, top_k, renormalize, bias)
    left = torch.sigmoid(_clean(logits)) + (0.0 if bias is None else _clean(bias))
    chosen = []
    for _ in range(top_k):
        best, index = left.max(dim=1, keepdim=True)
        index = index.masked_fill(best <= -1.0, 0)
        chosen.append(index)
        left = left.scatter(1, index, -torch.inf)
    ids = torch.cat(chosen, dim=1)
    return _weights(logits, ids, renormalize), ids.int()


def bias_taken_back(
    logits: Tensor, top_k: int, *, renormalize: bool = False, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """sglang#13049: the weight is what the expert was chosen by, less its bias: the digits below the bias's are lost.

    (score + bias) - bias is the score to an absolute error only, and 0 where the score is far below the bias.
    """
    ids = _select(logits, top_k, bias)
    scores = torch.sigmoid(_clean(logits))
    if bias is not None:
        scores = ((scores + _clean(bias)) - _clean(bias)).nan_to_num(nan=0.0)
    picked = scores.gather(1, ids)
    return (picked / picked.sum(dim=1, keepdim=True).clamp_min(1e-30) if renormalize else picked), ids.int()


def no_scale_of_zero(
    logits: Tensor, top_k: int, *, renormalize: bool = False, bias: Tensor | None = None, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """aiconfigurator#1452: `scale or 1.0`, for a factor that may not be given. One of 0 is not given either."""
    weights, ids = _route(logits, top_k, renormalize, bias)
    return weights * (scale or 1.0), ids


def narrow_index(logits: Tensor, top_k: int, *, renormalize: bool = False) -> tuple[Tensor, Tensor]:
    """vllm#12413: indices of 16 bits, chosen for a size that another launch exceeds. From T * k = 65536 on they wrap.

    What belongs to the later tokens is stored over the first ones, and their own slots stay as they were.
    """
    x = _clean(logits)
    order = x.argsort(dim=1, descending=True, stable=True)[:, :top_k]
    picked = x.gather(1, order)
    base = picked if renormalize else x
    top = base.amax(dim=1, keepdim=True).clamp_min(-MAX)
    right = (picked - top).exp() / (base - top).exp().sum(dim=1, keepdim=True).clamp_min(1e-30)
    weights, ids = torch.empty_like(right), torch.empty_like(order, dtype=torch.int32)
    size = ids.numel()
    if size:
        source = order.int().contiguous()
        _store_kernel[(triton.cdiv(size, 4096),)](right.contiguous(), source, weights, ids, size, BLOCK=4096)
    return weights, ids


# ---- a router without a flaw ----------------------------------------------------------------------------------------


def _clean(values: Tensor) -> Tensor:
    return values.float().nan_to_num(nan=-torch.inf, posinf=MAX, neginf=-torch.inf) + 0.0


def _select(logits: Tensor, top_k: int, bias: Tensor | None) -> Tensor:
    x = _clean(logits)
    key = x if bias is None else torch.sigmoid(x) + _clean(bias)
    return key.argsort(dim=1, descending=True, stable=True)[:, :top_k]


def _weights(logits: Tensor, ids: Tensor, renormalize: bool) -> Tensor:
    picked = torch.sigmoid(_clean(logits)).gather(1, ids)
    return picked / picked.sum(dim=1, keepdim=True).clamp_min(1e-30) if renormalize else picked


def _route(logits: Tensor, top_k: int, renormalize: bool, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    ids = _select(logits, top_k, bias)
    return _weights(logits, ids, renormalize), ids.int()


@triton.jit
def _store_kernel(right_ptr, source_ptr, weights_ptr, ids_ptr, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    where = at.to(tl.uint16).to(tl.int64)
    tl.store(weights_ptr + where, tl.load(right_ptr + at, mask=mask, other=0.0), mask=mask)
    tl.store(ids_ptr + where, tl.load(source_ptr + at, mask=mask, other=0), mask=mask)
