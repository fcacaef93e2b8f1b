"""Routers in Triton. Their contracts are the docstrings of `reference/routing.py`.

A row belongs to one warp (small E: to a part of one). Lane l holds the experts l, l + LANES, l + 2 LANES, …, each as an
integer key that orders like its value and then prefers the lower id, sorted once within the lane. A slot is then one
maximum over the lanes' first keys, which is one instruction where a key has 32 bits, and the lane that won moves its
list up. The winners stay in the lanes, slot j in lane j, so nothing crosses warps and no memory is read twice.
"""

from __future__ import annotations

from functools import cache

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
    return _topk(False, logits, top_k, renormalize, bias, scale, is_padding, padding, out)


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

    The contract is that of `reference/routing.py::topk_sigmoid`. Beyond it: computes in float32, is deterministic, a
    row's bits depend on that row alone, and ties fall to the lowest id.

    Raises ValueError for anything outside these shapes, dtypes and ranges.
    """
    return _topk(True, logits, top_k, renormalize, bias, scale, is_padding, padding, out)


def _topk(
    sigmoid: bool,
    logits: Tensor,
    top_k: int,
    renormalize: bool,
    bias: Tensor | None,
    scale: float,
    is_padding: Tensor | None,
    padding: str,
    out: tuple[Tensor, Tensor] | None,
    nan_safe: bool = True,  # False leaves out what it costs that NaN and +inf are safe, for the benchmark that says so
) -> tuple[Tensor, Tensor]:
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

    lanes, each, rows, warps = _block(tokens, experts)
    if is_padding is None or padding == "distinct":
        is_padding, flagged = None, 0
    else:
        flagged = 2 if padding == "garbage" else 1
    _topk_kernel[(triton.cdiv(tokens, rows),)](
        logits, bias, is_padding,  # inputs
        weights, ids,  # outputs
        tokens, experts, top_k,  # sizes
        # A row alone has stride E whatever the view says: another stride would compile another kernel.
        logits.stride(0) if tokens > 1 else experts, logits.stride(1),  # strides, in elements
        bias.stride(0) if bias is not None else 0,
        is_padding.stride(0) if is_padding is not None else 0,
        float(scale), {"minus_one": -1, "num_experts": experts}.get(padding, 0),  # values
        SIGMOID=sigmoid, HAS_BIAS=bias is not None, RENORMALIZE=bool(renormalize), FLAGGED=flagged,  # constants
        NAN_SAFE=nan_safe, LARGEST=torch.finfo(logits.dtype).max,
        WIDE=bias is not None or logits.dtype == torch.float32,
        ROWS=rows, LANES=lanes, EACH=each, NETWORK=_network(each),
        num_warps=warps,
    )  # fmt: skip
    return weights, ids


def _expect(name: str, tensor: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    if tensor is not None and (tensor.shape != shape or tensor.dtype != dtype or tensor.device != device):
        raise ValueError(f"{name} must be {list(shape)} {dtype} on {device}, "
                         f"not {list(tensor.shape)} {tensor.dtype} on {tensor.device}")


def _block(tokens: int, experts: int) -> tuple[int, int, int, int]:
    """Lanes a row, experts a lane, rows a program, and its warps.

    All reductions stay within the lanes of a row, so rows and warps are free to choose: a row's bits depend on lanes
    and experts a lane alone, and those on E alone. In the interpreter a program costs the same whatever its block, and
    so does each step in it: there all of a row is one step, longer than a warp, and there are at most 2 programs.
    """
    if _INTERPRETED:
        padded = max(64, triton.next_power_of_2(experts))
        return padded, 1, min(triton.next_power_of_2(triton.cdiv(tokens, 2)), (1 << 20) // padded), 4
    lanes = min(32, triton.next_power_of_2(experts))
    return lanes, _padded(triton.cdiv(experts, lanes)), 4 * (32 // lanes), 4


def _padded(each: int) -> int:
    """The next of 1, 2, 3, 4, 6, 8, 12, 16, 24, 32: few binaries, and at most a third of the work for nothing."""
    power = triton.next_power_of_2(each)
    return power * 3 // 4 if power >= 4 and each <= power * 3 // 4 else power


@cache
def _network(n: int) -> tuple[tuple[int, int], ...]:
    """Batcher's odd-even merge sort of n elements: pairs to compare and exchange, the larger first."""
    pairs = []
    half = 1
    while half < n:
        reach = half
        while reach >= 1:
            for start in range(reach % half, n - reach, 2 * reach):
                for i in range(start, start + min(reach, n - start - reach)):
                    if i // (2 * half) == (i + reach) // (2 * half):
                        pairs.append((i, i + reach))
            reach //= 2
        half *= 2
    return tuple(pairs)


@triton.jit(do_not_specialize=["tokens", "top_k", "padding_id"])
def _topk_kernel(
    logits_ptr, bias_ptr, is_padding_ptr,  # [T, E], [E] f32, [T] bool
    weights_ptr, ids_ptr,  # [T, k] f32, [T, k] i32
    tokens, experts, top_k,
    logits_stride_t, logits_stride_e, bias_stride, is_padding_stride,
    scale, padding_id,
    SIGMOID: tl.constexpr,  # the score: sigmoid, else softmax
    HAS_BIAS: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    FLAGGED: tl.constexpr,  # flagged rows: 0 are routed, 1 get (padding_id, 0), 2 stay unwritten
    NAN_SAFE: tl.constexpr,
    LARGEST: tl.constexpr,  # of the logits' dtype
    WIDE: tl.constexpr,  # keys of 64 bits; else of 32, which hold a 16-bit float and an id
    ROWS: tl.constexpr, LANES: tl.constexpr, EACH: tl.constexpr, NETWORK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [R], 64 bits: T * stride may pass 2^31
    lane = tl.arange(0, LANES)
    row_ok = (row < tokens)[:, None]  # [R, 1]
    base = logits_ptr + row[:, None] * logits_stride_t + lane.to(tl.int64)[None, :] * logits_stride_e  # [R, L]
    xs = ()  # EACH of [R, L]: experts lane + v * LANES; -inf past E
    for v in tl.static_range(EACH):
        real = (lane + v * LANES < experts)[None, :]
        x = tl.load(base + v * LANES * logits_stride_e, mask=row_ok & real, other=float("-inf"))
        xs = xs + (_clamp(x.to(tl.float32), LARGEST, NAN_SAFE),)

    if HAS_BIAS and not SIGMOID:
        peak = xs[0]
        for v in tl.static_range(1, EACH):
            peak = tl.maximum(peak, xs[v])
        # With nothing but -inf there is nothing to subtract it from. The maximum of integers is one instruction.
        top = tl.maximum(_value(tl.max(_order(peak), axis=1))[:, None], -3.4028234663852886e38)  # [R, 1]
        total = _total(xs, top, EACH)

    # Ids stay distinct whatever the values are, since no two keys are equal: above the id, reversed, stands an integer
    # that orders like the float (and -0 like +0). A comparison of floats would pick expert 0 again and again on a row
    # of NaN (vllm#39391), or none at all (sglang#30079).
    keys = ()
    for v in tl.static_range(EACH):
        column = (lane + v * LANES)[None, :]  # [1, L]
        rank = xs[v]  # without a bias: both scores are monotone, and the logits are exact
        if HAS_BIAS:
            # Each row loads it for itself: what lies in this warp's registers need not come from another's.
            at = tl.broadcast_to(bias_ptr + column * bias_stride, (ROWS, LANES))
            bias = tl.load(at, mask=tl.broadcast_to(column < experts, (ROWS, LANES)), other=float("-inf"))
            rank = (1.0 / (1.0 + tl.exp(-xs[v])) if SIGMOID else tl.exp(xs[v] - top) * (1.0 / total)) + bias
            if NAN_SAFE:
                rank = tl.where(rank > float("-inf"), rank, float("-inf"))
        # Past E the value is -inf and the id higher than any real one, so a real expert always comes first.
        keys = keys + (_key(_order(rank), LANES * EACH - 1 - column, WIDE),)
    for n in tl.static_range(len(NETWORK)):
        keys = _exchange(keys, NETWORK[n][0], NETWORK[n][1], EACH, WIDE)

    # A list that runs out holds what is below the key of -inf: an expert taken already never wins again.
    lowest = tl.full((ROWS, LANES), -0x8000000000000000 if WIDE else -0x80000000, tl.int64 if WIDE else tl.int32)
    best = lowest  # [R, L]: slot j in lane j
    first = _row_max(keys[0], WIDE)  # [R, 1]
    winner = first
    for j in range(top_k):
        best = tl.where(lane[None, :] == j, winner, best)
        won = keys[0] == winner  # in one lane: its list moves up
        rest = ()
        for v in tl.static_range(EACH):
            rest = rest + (tl.where(won, keys[v + 1] if v + 1 < EACH else lowest, keys[v]),)
        keys = rest
        winner = _row_max(keys[0], WIDE)

    used = lane[None, :] < top_k  # [1, L]
    ids = LANES * EACH - 1 - (best & 0x1FFF).to(tl.int32)
    if HAS_BIAS:
        picked = tl.full((ROWS, LANES), float("-inf"), tl.float32)
        for v in tl.static_range(EACH):
            picked = tl.where(used & (ids // LANES == v), tl.gather(xs[v], ids % LANES, axis=1), picked)
        if RENORMALIZE:
            top = _value(tl.max(_order(picked), axis=1))[:, None]
    else:
        picked = tl.where(used, _value(_order_of(best, WIDE)), float("-inf"))
        top = _value(_order_of(first, WIDE))
    if RENORMALIZE or not HAS_BIAS:
        top = tl.maximum(top, -3.4028234663852886e38)

    # Renormalized weights are relative to the largest selected score, so that the sum is at least 1/2 even where a bias
    # has selected experts whose scores underflow: no 0/0 (sglang#31017, flashinfer#3803).
    if SIGMOID:
        if RENORMALIZE:
            score = tl.exp(tl.minimum(picked, 0.0) - tl.minimum(top, 0.0)) / (1.0 + tl.exp(-tl.abs(picked)))
        else:
            score = 1.0 / (1.0 + tl.exp(-picked))
    else:
        score = tl.exp(picked - top)
    if RENORMALIZE:
        total = tl.maximum(tl.sum(score, axis=1)[:, None], 1e-30)
    elif not SIGMOID and not HAS_BIAS:
        total = _total(xs, top, EACH)
    weights = score * scale if SIGMOID and not RENORMALIZE else score / total * scale

    where = row[:, None] * top_k + lane[None, :]
    mask = row_ok & used
    if FLAGGED > 0:
        at = tl.broadcast_to(is_padding_ptr + row[:, None] * is_padding_stride, (ROWS, LANES))
        flagged = tl.load(at, mask=mask, other=0).to(tl.int1)
        if FLAGGED == 1:
            weights = tl.where(flagged, 0.0, weights)
            ids = tl.where(flagged, padding_id, ids)
        else:
            mask = mask & (flagged == 0)
    tl.store(weights_ptr + where, weights, mask=mask)
    tl.store(ids_ptr + where, ids, mask=mask)


@triton.jit
def _clamp(x, LARGEST: tl.constexpr, NAN_SAFE: tl.constexpr):
    """NaN becomes -inf and +inf the dtype's largest number, so that no difference of two logits is NaN."""
    if NAN_SAFE:
        x = tl.minimum(tl.where(x > float("-inf"), x, float("-inf")), LARGEST)
    return x


@triton.jit
def _total(xs, top, EACH: tl.constexpr):
    """Sum of exp(x - top) over a row: at least 1, but on a row of -inf, where every term is 0."""
    total = tl.exp(xs[0] - top)
    for v in tl.static_range(1, EACH):
        total += tl.exp(xs[v] - top)
    return tl.maximum(tl.sum(total, axis=1)[:, None], 1e-30)


@triton.jit
def _order(x):
    """An int32 that orders like the float32; -0 becomes +0."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _value(order):
    return (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _key(order, low, WIDE: tl.constexpr):
    """`low` is below 2^10. The last 13 bits of a bfloat16 or float16 widened to float32 are 0, so it fits in there."""
    if WIDE:
        key = (order.to(tl.int64) << 32) | low.to(tl.int64)
    else:
        key = (order & -0x2000) | low
    return key


@triton.jit
def _order_of(key, WIDE: tl.constexpr):
    """What `_key` was given as `order`."""
    if WIDE:
        order = (key >> 32).to(tl.int32)
    else:
        order = (key & -0x2000) | ((key >> 31) & 0x1FFF)
    return order


@triton.jit
def _exchange(keys, A: tl.constexpr, B: tl.constexpr, EACH: tl.constexpr, WIDE: tl.constexpr):
    a, b = keys[A], keys[B]
    if WIDE:
        swap = a < b  # one comparison of 64 bits, where a maximum and a minimum would take two
        high, low = tl.where(swap, b, a), tl.where(swap, a, b)
    else:
        high, low = tl.maximum(a, b), tl.minimum(a, b)
    return keys[0:A] + (high,) + keys[A + 1 : B] + (low,) + keys[B + 1 : EACH]


@triton.jit
def _row_max(key, WIDE: tl.constexpr):
    """[R, L] -> [R, 1]. Over a warp, twice 32 bits are faster than once 64: that is one instruction each."""
    if WIDE and key.shape[1] <= 32:
        high = (key >> 32).to(tl.int32)
        top = tl.max(high, axis=1)[:, None]
        low = tl.max(tl.where(high == top, key.to(tl.int32), -1), axis=1)[:, None]
        largest = (top.to(tl.int64) << 32) | low.to(tl.int64)
    else:
        largest = tl.max(key, axis=1)[:, None]
    return largest
