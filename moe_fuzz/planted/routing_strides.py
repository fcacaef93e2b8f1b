"""Planted routers that lose a stride: a column's, a bias's, that of the flags of padding rows."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX = 3.4028234663852886e38


def int32_column_offset(logits: Tensor, top_k: int, *, renormalize: bool = False) -> tuple[Tensor, Tensor]:
    """vllm#42201: column times stride is computed in 32 bits, and wraps once a column begins past 2^31 elements."""
    tokens, experts = logits.shape
    plain = torch.empty((tokens, experts), dtype=logits.dtype, device=logits.device)
    if tokens:
        pad = triton.next_power_of_2(experts)
        _gather_kernel[(tokens,)](logits, plain, experts, logits.stride(0), logits.stride(1), BLOCK=pad)
    return _route(plain, top_k, renormalize)


def bias_without_its_stride(
    logits: Tensor, top_k: int, *, renormalize: bool = False, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """vllm#34673: a layout is taken for another. Reads the first E elements of where the bias lies."""
    if bias is not None:
        bias = bias.as_strided(bias.shape, (1,))
    return _route(logits, top_k, renormalize, bias)


def flags_without_their_stride(
    logits: Tensor, top_k: int, *, renormalize: bool = False, is_padding: Tensor | None = None,
    padding: str = "minus_one",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """vllm#46408: rows are taken for padding that are none. Reads the first T bytes of where the flags lie."""
    weights, ids = _route(logits, top_k, renormalize)
    if is_padding is not None:
        flags = is_padding.as_strided(is_padding.shape, (1,))[:, None]
        weights, ids = weights.masked_fill(flags, 0.0), ids.masked_fill(flags, -1)
    return weights, ids


def _route(logits: Tensor, top_k: int, renormalize: bool, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """A router without a flaw."""
    x = logits.float().nan_to_num(nan=-torch.inf, posinf=MAX, neginf=-torch.inf) + 0.0
    top = x.amax(dim=1, keepdim=True).clamp_min(-MAX)
    score = (x - top).exp()
    score = score / score.sum(dim=1, keepdim=True).clamp_min(1e-30)
    rank = x if bias is None else score + bias
    ids = rank.argsort(dim=1, descending=True, stable=True)[:, :top_k]
    if not renormalize:
        return score.gather(1, ids), ids.int()
    picked = x.gather(1, ids)
    part = (picked - picked.amax(dim=1, keepdim=True).clamp_min(-MAX)).exp()
    return part / part.sum(dim=1, keepdim=True).clamp_min(1e-30), ids.int()


@triton.jit
def _gather_kernel(logits_ptr, plain_ptr, experts, stride_t, stride_e, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < experts
    x = tl.load(logits_ptr + row * stride_t + (column * stride_e).to(tl.int32), mask=inside, other=0.0)
    tl.store(plain_ptr + row * experts + column, x, mask=inside)
