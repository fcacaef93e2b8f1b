"""Routers in Triton. Their contracts are the docstrings of `reference/routing.py`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DIALECTS = ("distinct", "minus_one", "num_experts", "zero_weight", "garbage")
_INTERPRETED = triton.knobs.runtime.interpret


def topk_softmax(
    logits: Tensor,  # [T, E] float32 | bfloat16 | float16, any strides; T >= 0, 1 <= E <= 1024
    top_k: int,  # 1 <= top_k <= min(E, 32)
    *,
    renormalize: bool = False,
    bias: Tensor | None = None,  # [E] float32
    scale: float = 1.0,  # finite, >= 0
    is_padding: Tensor | None = None,  # [T] bool
    padding: str = "distinct",
    out: tuple[Tensor, Tensor] | None = None,  # (weights [T, k] float32, ids [T, k] int32), both contiguous
) -> tuple[Tensor, Tensor]:  # (weights [T, k] float32, ids [T, k] int32): `out` where it was given
    """The `top_k` experts of each token by softmax score (+ bias), and their weights, in one launch.

    The contract is that of `reference/routing.py::topk_softmax`. Beyond it: computes in float32, is deterministic, a
    row's bits depend on that row alone, and ties fall to the lowest id.

    Raises ValueError for anything outside these shapes, dtypes and ranges.
    """
    return _route("softmax", logits, top_k, renormalize, bias, scale, is_padding, padding, out)


def topk_sigmoid(
    logits: Tensor,  # [T, E] float32 | bfloat16 | float16, any strides; T >= 0, 1 <= E <= 1024
    top_k: int,  # 1 <= top_k <= min(E, 32)
    *,
    renormalize: bool = False,
    bias: Tensor | None = None,  # [E] float32
    scale: float = 1.0,  # finite, >= 0
    is_padding: Tensor | None = None,  # [T] bool
    padding: str = "distinct",
    out: tuple[Tensor, Tensor] | None = None,  # (weights [T, k] float32, ids [T, k] int32), both contiguous
) -> tuple[Tensor, Tensor]:  # (weights [T, k] float32, ids [T, k] int32): `out` where it was given
    """The `top_k` experts of each token by sigmoid score (+ bias), and their weights, in one launch.

    The contract is that of `reference/routing.py::topk_sigmoid`. Beyond it: as `topk_softmax`.

    Raises ValueError for anything outside these shapes, dtypes and ranges.
    """
    return _route("sigmoid", logits, top_k, renormalize, bias, scale, is_padding, padding, out)


def _route(
    scoring: str, logits: Tensor, top_k: int, renormalize: bool, bias: Tensor | None, scale: float,
    is_padding: Tensor | None, padding: str, out: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if logits.dim() != 2 or logits.dtype not in DTYPES or not 1 <= logits.shape[1] <= 1024:
        raise ValueError("logits must be [T, E] in float32, bfloat16 or float16 with 1 <= E <= 1024, "
                         f"not {list(logits.shape)} {logits.dtype}")
    tokens, experts = logits.shape
    if not 1 <= top_k <= min(experts, 32):
        raise ValueError(f"top_k must be from 1 to min(E, 32) = {min(experts, 32)}, not {top_k}")
    if not 0.0 <= scale <= torch.finfo(torch.float32).max:
        raise ValueError(f"scale must be a finite float32 >= 0, not {scale}")
    if padding not in DIALECTS:
        raise ValueError(f"padding must be one of {', '.join(DIALECTS)}, not {padding!r}")
    _expect("bias", bias, (experts,), torch.float32, logits.device)
    _expect("is_padding", is_padding, (tokens,), torch.bool, logits.device)
    if out is None:
        weights = torch.empty((tokens, top_k), dtype=torch.float32, device=logits.device)  # [T, k]
        ids = torch.empty((tokens, top_k), dtype=torch.int32, device=logits.device)  # [T, k]
    else:
        weights, ids = out
        _expect("out[0]", weights, (tokens, top_k), torch.float32, logits.device)
        _expect("out[1]", ids, (tokens, top_k), torch.int32, logits.device)
        if not (weights.is_contiguous() and ids.is_contiguous()):
            raise ValueError("out must be contiguous; route into contiguous buffers and copy")
    if tokens == 0:
        return weights, ids

    expert_pad = triton.next_power_of_2(experts)
    rows, warps = _block(tokens, expert_pad)
    if is_padding is None or padding == "distinct":
        is_padding, flagged = None, 0
    else:
        flagged = 2 if padding == "garbage" else 1
    _topk_kernel[(triton.cdiv(tokens, rows),)](
        logits, bias, is_padding,  # inputs
        weights, ids,  # outputs
        tokens, experts, top_k,  # sizes
        # A row alone has stride E whatever the view says: another stride would compile another kernel, and its sums
        # could round differently from the same row's in a batch.
        logits.stride(0) if tokens > 1 else experts, logits.stride(1),  # strides, in elements
        bias.stride(0) if bias is not None else 0,
        is_padding.stride(0) if is_padding is not None else 0,
        float(scale), {"minus_one": -1, "num_experts": experts}.get(padding, 0),  # values
        SIGMOID=scoring == "sigmoid", HAS_BIAS=bias is not None,  # constants
        RENORMALIZE=bool(renormalize), FLAGGED=flagged,
        ROWS=rows, EXPERT_PAD=expert_pad, K_PAD=triton.next_power_of_2(top_k),
        num_warps=warps,
    )  # fmt: skip
    return weights, ids


def _expect(name: str, tensor: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    if tensor is not None and (tensor.shape != shape or tensor.dtype != dtype or tensor.device != device):
        raise ValueError(f"{name} must be {list(shape)} {dtype} on {device}, "
                         f"not {list(tensor.shape)} {tensor.dtype} on {tensor.device}")


def _block(tokens: int, expert_pad: int) -> tuple[int, int]:
    """Rows of a program, and its warps.

    On a device they depend on E alone: with T in it, a row's bits could depend on T. Up to 128 experts a warp covers
    whole rows; beyond, one warp takes one row, so that the k reductions never cross warps.
    In the interpreter a program costs the same whatever its block, so there are at most 2 of them.
    """
    if _INTERPRETED:
        return min(triton.next_power_of_2(triton.cdiv(tokens, 2)), (1 << 20) // expert_pad), 4
    return (512 // expert_pad, 4) if expert_pad <= 128 else (1, 1)


@triton.jit(do_not_specialize=["tokens", "top_k", "padding_id"])
def _topk_kernel(  # type: ignore[no-untyped-def]
    logits_ptr, bias_ptr, is_padding_ptr,  # [T, E], [E] f32, [T] bool
    weights_ptr, ids_ptr,  # [T, k] f32, [T, k] i32
    tokens, experts, top_k,
    logits_stride_t, logits_stride_e, bias_stride, is_padding_stride,
    scale, padding_id,
    SIGMOID: tl.constexpr,  # else softmax
    HAS_BIAS: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    FLAGGED: tl.constexpr,  # flagged rows: 0 are routed, 1 get (padding_id, 0), 2 stay unwritten
    ROWS: tl.constexpr, EXPERT_PAD: tl.constexpr, K_PAD: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [R], 64 bits: T * stride may pass 2^31
    col = tl.arange(0, EXPERT_PAD)  # [E']
    slot = tl.arange(0, K_PAD)  # [k']
    row_ok = row < tokens
    real = (col < experts)[None, :]  # [1, E']
    base = logits_ptr + row[:, None] * logits_stride_t  # [R, 1]

    x = tl.load(base + col[None, :] * logits_stride_e, mask=row_ok[:, None] & real, other=float("-inf"))
    x = _finite_above(x.to(tl.float32))  # [R, E']
    if not SIGMOID and (HAS_BIAS or not RENORMALIZE):
        # The largest logit is subtracted; with nothing but -inf there is nothing to subtract it from.
        top = tl.maximum(tl.max(x, axis=1), -3.4028234663852886e38)  # [R]
        e = tl.exp(x - top[:, None])  # [R, E'], 0 past E
        total = tl.maximum(tl.sum(e, axis=1), 1e-30)  # [R], >= 1 but on a row of -inf, where every e is 0
    if HAS_BIAS:
        bias = tl.load(bias_ptr + col * bias_stride, mask=col < experts, other=0.0)  # [E']
        score = _sigmoid(x, 0.0) if SIGMOID else e / total[:, None]
        rank = score + bias[None, :]
        rank = tl.where(rank != rank, float("-inf"), rank)
    else:
        rank = x  # either score is monotone, and the logits are exact

    # One max gives value and lowest index at once, and ids stay distinct whatever the values are: the upper half of a
    # key orders like the float (and -0 like +0), the lower half prefers the lower column. A comparison of floats would
    # pick expert 0 again and again on a row of NaN (vllm#39391), or none at all (sglang#30079).
    bits = rank.to(tl.int32, bitcast=True)
    bits = tl.where(bits == -2147483648, 0, bits)
    order = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    key = (order.to(tl.int64) << 32) | (EXPERT_PAD - 1 - col).to(tl.int64)[None, :]
    lowest = -0x8000000000000000  # below the key of -inf: a column past E, or one taken already, never wins
    key = tl.where(real, key, lowest)
    best = tl.full((ROWS, K_PAD), 0, tl.int64)
    for j in range(top_k):
        winner = tl.max(key, axis=1)[:, None]  # [R, 1]
        best = tl.where(slot[None, :] == j, winner, best)
        key = tl.where(key == winner, lowest, key)

    used = slot[None, :] < top_k  # [1, k']
    ids = EXPERT_PAD - 1 - (best & 0xFFFFFFFF).to(tl.int32)  # [R, k']
    picked = tl.load(base + ids * logits_stride_e, mask=row_ok[:, None] & used, other=float("-inf"))
    picked = _finite_above(picked.to(tl.float32))  # [R, k']
    # Renormalized: relative to the largest selected one, so that the sum is no smaller than 1 (sigmoid: 1/2) even where
    # a bias has selected experts whose scores underflow: no 0/0 (sglang#31017, flashinfer#3803).
    if SIGMOID:
        if RENORMALIZE:
            shift = tl.maximum(tl.max(tl.minimum(picked, 0.0), axis=1), -3.4028234663852886e38)[:, None]
            score = _sigmoid(picked, shift)
            weights = score / tl.maximum(tl.sum(score, axis=1), 1e-30)[:, None] * scale
        else:
            weights = _sigmoid(picked, 0.0) * scale
    else:
        if RENORMALIZE:
            top = tl.maximum(tl.max(picked, axis=1), -3.4028234663852886e38)
            total = tl.maximum(tl.sum(tl.exp(picked - top[:, None]), axis=1), 1e-30)
        weights = tl.exp(picked - top[:, None]) / total[:, None] * scale

    where = row[:, None] * top_k + slot[None, :]
    mask = row_ok[:, None] & used
    if FLAGGED > 0:
        flagged = tl.load(is_padding_ptr + row * is_padding_stride, mask=row_ok, other=0).to(tl.int1)[:, None]
        if FLAGGED == 1:
            weights = tl.where(flagged, 0.0, weights)
            ids = tl.where(flagged, padding_id, ids)
        else:
            mask = mask & (flagged == 0)
    tl.store(weights_ptr + where, weights, mask=mask)
    tl.store(ids_ptr + where, ids, mask=mask)


@triton.jit
def _finite_above(x):
    """NaN becomes -inf and +inf the largest float32, so that no difference of two logits is NaN."""
    x = tl.where(x != x, float("-inf"), x)
    return tl.where(x == float("inf"), 3.4028234663852886e38, x)


@triton.jit
def _sigmoid(x, shift):
    """sigmoid(x) / exp(shift), for shift in [min(x, 0), 0]: no exponential overflows, and 0 for -inf."""
    return tl.exp(tl.minimum(x, 0.0) - shift) / (1.0 + tl.exp(-tl.abs(x)))
