"""Grouped routing in Triton. Its contract is the docstring of `reference/grouped_topk.py`.

Where all groups stay there is nothing to choose among them: that is one group. And one group of all experts is no
group: such a call is the plain router's (routing.py), which is faster.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

if __package__:
    from .grouped_lanes import grouped_by_lanes
    from .routing import (
        KNOWN_K,
        LARGEST,
        _topk,
        interpreted_rows,
        launches_early,
        processors,
        warps_for,
    )
    from .routing_lanes import list_length, network
else:  # loaded by its path, as the script of a finding does: its neighbours are on sys.path
    from grouped_lanes import grouped_by_lanes
    from routing import (
        KNOWN_K,
        LARGEST,
        _topk,
        interpreted_rows,
        launches_early,
        processors,
        warps_for,
    )
    from routing_lanes import list_length, network

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DIALECTS = ("distinct", "minus_one", "num_experts", "zero_weight", "garbage")
SCORINGS = ("softmax", "sigmoid")
GROUP_SCORES = ("max", "top2_sum")
_INTERPRETED = triton.knobs.runtime.interpret


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
    """The `top_k` experts of each token out of its `topk_group` best groups, and their weights, in one launch.

    The contract is that of `reference/grouped_topk.py::grouped_topk`. Beyond it: computes in float32, is deterministic,
    a row's bits depend on that row alone, and ties fall to the lowest group and the lowest id. On rows that are not
    defined the experts are still those of the groups kept.

    Raises ValueError for anything outside these shapes, dtypes and ranges.
    """
    return _grouped_topk(logits, top_k, n_group, topk_group, scoring, group_score, renormalize, bias, scale, is_padding,
                         padding, n_shared, expert_map, out)  # fmt: skip


def _grouped_topk(
    logits: Tensor, top_k: int, n_group: int, topk_group: int, scoring: str, group_score: str, renormalize: bool,
    bias: Tensor | None, scale: float, is_padding: Tensor | None, padding: str, n_shared: int,
    expert_map: Tensor | None, out: tuple[Tensor, Tensor] | None,
    nan_safe: bool = True,  # False leaves out what it costs that NaN and +inf are safe, for the benchmark that says so
) -> tuple[Tensor, Tensor]:  # fmt: skip
    _check(logits, top_k, n_group, topk_group, scoring, group_score, scale, padding, n_shared)
    tokens, experts = logits.shape
    if topk_group == n_group:
        n_group, topk_group, group_score = 1, 1, "max"
    if n_group == 1 and n_shared == 0 and expert_map is None:
        sigmoid = scoring == "sigmoid"
        return _topk(sigmoid, logits, top_k, renormalize, bias, scale, is_padding, padding, out, nan_safe)
    slots = top_k + n_shared
    _expect("bias", bias, (experts,), torch.float32, logits.device)
    _expect("is_padding", is_padding, (tokens,), torch.bool, logits.device)
    _expect("expert_map", expert_map, (experts,), torch.int32, logits.device)
    if out is None:
        weights = torch.empty((tokens, slots), dtype=torch.float32, device=logits.device)  # [T, k + n_shared]
        ids = torch.empty((tokens, slots), dtype=torch.int32, device=logits.device)  # [T, k + n_shared]
    else:
        weights, ids = out
        _expect("out[0]", weights, (tokens, slots), torch.float32, logits.device)
        _expect("out[1]", ids, (tokens, slots), torch.int32, logits.device)
        if not (weights.is_contiguous() and ids.is_contiguous()):
            raise ValueError("out must be contiguous; route into contiguous buffers and copy")
    if tokens == 0:
        return weights, ids

    if is_padding is None or padding == "distinct":
        is_padding, flagged = None, 0
    else:
        flagged = 2 if padding == "garbage" else 1
    values = float(scale), {"minus_one": -1, "num_experts": experts}.get(padding, 0)
    strides = (
        logits.stride(0), logits.stride(1), bias.stride(0) if bias is not None else 0,
        is_padding.stride(0) if is_padding is not None else 0, expert_map.stride(0) if expert_map is not None else 0,
    )  # fmt: skip
    constants = {
        "SIGMOID": scoring == "sigmoid", "TOP2_SUM": group_score == "top2_sum" and experts > n_group,
        "HAS_BIAS": bias is not None, "HAS_MAP": expert_map is not None, "RENORMALIZE": bool(renormalize),
        "FLAGGED": flagged,
    }  # fmt: skip
    wide = bias is not None or logits.dtype == torch.float32
    if _by_lanes(experts, n_group, slots, wide):
        block = _lanes(tokens, experts, n_group, top_k, processors(logits.device))
        pdl = launches_early(logits.device)
        grouped_by_lanes[(triton.cdiv(tokens, block["ROWS"]),)](
            logits, bias, is_padding, expert_map,  # inputs
            weights, ids,  # outputs
            tokens, experts, topk_group, top_k, n_shared,  # sizes
            *strides, *values,
            NAN_SAFE=nan_safe, LARGEST=LARGEST[logits.dtype], WIDE=wide, PDL=pdl, **constants, **block,
            **({"launch_pdl": True} if pdl else {}),
        )  # fmt: skip
        return weights, ids
    group_pad, size_pad = triton.next_power_of_2(n_group), triton.next_power_of_2(experts // n_group)
    rows, warps = _block(tokens, group_pad * size_pad)
    _grouped_topk_kernel[(triton.cdiv(tokens, rows),)](
        logits, bias, is_padding, expert_map,  # inputs
        weights, ids,  # outputs
        tokens, experts, n_group, topk_group, top_k, n_shared,  # sizes
        *strides, *values,
        ROWS=rows, GROUP_PAD=group_pad, SIZE_PAD=size_pad, SLOT_PAD=triton.next_power_of_2(slots), num_warps=warps,
        **constants,
    )  # fmt: skip
    return weights, ids


def _check(
    logits: Tensor, top_k: int, n_group: int, topk_group: int, scoring: str, group_score: str, scale: float,
    padding: str, n_shared: int,
) -> None:  # fmt: skip
    """ValueError for sizes and words outside the contract."""
    if logits.dim() != 2 or logits.dtype not in DTYPES or not 1 <= logits.shape[1] <= 1024:
        raise ValueError("logits must be [T, E] in float32, bfloat16 or float16 with 1 <= E <= 1024, "
                         f"not {list(logits.shape)} {logits.dtype}")
    experts = logits.shape[1]
    if n_group < 1 or experts % n_group:
        raise ValueError(f"n_group must divide the number of experts {experts}, not {n_group}")
    if not 1 <= topk_group <= n_group:
        raise ValueError(f"topk_group must be from 1 to n_group = {n_group}, not {topk_group}")
    most = min(topk_group * (experts // n_group), 32)
    if not 1 <= top_k <= most:
        raise ValueError(f"top_k must be from 1 to min(topk_group * E / n_group, 32) = {most}, not {top_k}")
    if not 0.0 <= scale <= torch.finfo(torch.float32).max:
        raise ValueError(f"scale must be a finite float32 >= 0, not {scale}")
    if not 0 <= n_shared <= 8:
        raise ValueError(f"n_shared must be from 0 to 8, not {n_shared}")
    words = (("scoring", scoring, SCORINGS), ("group_score", group_score, GROUP_SCORES), ("padding", padding, DIALECTS))
    for name, word, known in words:
        if word not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, not {word!r}")


def _expect(name: str, tensor: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    if tensor is not None and (tensor.shape != shape or tensor.dtype != dtype or tensor.device != device):
        raise ValueError(f"{name} must be {list(shape)} {dtype} on {device}, "
                         f"not {list(tensor.shape)} {tensor.dtype} on {tensor.device}")


def _by_lanes(experts: int, n_group: int, slots: int, wide: bool) -> bool:
    """Whether groups are whole lanes of a warp (grouped_lanes.py), as all models have them that are served. Nothing of
    it is the batch's, so that a row's bits are not."""
    return experts % 32 == 0 and 32 % n_group == 0 and slots <= 32 and experts <= 32 * (12 if wide else 16)


@lru_cache(maxsize=1024)
def _lanes(tokens: int, experts: int, n_group: int, top_k: int, processors: int) -> dict[str, Any]:
    """How rows lie in `grouped_by_lanes`."""
    each = experts // 32
    warps = 4 if _INTERPRETED else warps_for(tokens, processors)
    rows = interpreted_rows(tokens, 32) if _INTERPRETED else warps
    return {"ROWS": rows, "LANES": 32, "EACH": each, "GROUPS": n_group, "LIST": list_length(each),
            "NETWORK": network(list_length(each)), "TOP_K": top_k if top_k in KNOWN_K else 0,
            "num_warps": warps}  # fmt: skip


def _block(tokens: int, lanes: int) -> tuple[int, int]:
    """Rows of a program, and its warps; `lanes` are the padded experts of a row.

    On a device they depend on the lanes alone: with T in it, a row's bits could depend on T. Few warps, so that the
    many small reductions seldom cross them.
    In the interpreter a program costs the same whatever its block, so there are at most 2 of them for usual sizes.
    """
    if _INTERPRETED:
        return min(triton.next_power_of_2(triton.cdiv(tokens, 2)), max(1, (1 << 20) // lanes)), 4
    return (512 // lanes, 4) if lanes <= 128 else (1, max(1, lanes // 512))


# Nothing is assumed about where rows lie: a slice of a batch, or a row alone, may be aligned and strided otherwise, and
# a kernel with another layout could sum in another order.
@triton.jit(
    do_not_specialize=["tokens", "experts", "n_group", "topk_group", "top_k", "n_shared", "padding_id",
                       "logits_stride_t", "logits_stride_e", "is_padding_stride", "expert_map_stride"],
    do_not_specialize_on_alignment=["logits_ptr", "bias_ptr", "is_padding_ptr", "expert_map_ptr", "weights_ptr",
                                    "ids_ptr", "bias_stride"],
)
def _grouped_topk_kernel(
    logits_ptr, bias_ptr, is_padding_ptr, expert_map_ptr,  # [T, E], [E] f32, [T] bool, [E] i32
    weights_ptr, ids_ptr,  # [T, k + n_shared] f32 and i32
    tokens, experts, n_group, topk_group, top_k, n_shared,
    logits_stride_t, logits_stride_e, bias_stride, is_padding_stride, expert_map_stride,
    scale, padding_id,
    SIGMOID: tl.constexpr,  # else softmax
    TOP2_SUM: tl.constexpr,  # else max
    HAS_BIAS: tl.constexpr, HAS_MAP: tl.constexpr, RENORMALIZE: tl.constexpr,
    FLAGGED: tl.constexpr,  # flagged rows: 0 are routed, 1 get (padding_id, 0), 2 stay unwritten
    ROWS: tl.constexpr, GROUP_PAD: tl.constexpr, SIZE_PAD: tl.constexpr, SLOT_PAD: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [R], 64 bits: T * stride may pass 2^31
    row_ok = row < tokens
    size = experts // n_group
    group = tl.arange(0, GROUP_PAD)[None, :, None]  # [1, G', 1]
    member = tl.arange(0, SIZE_PAD)[None, None, :]  # [1, 1, S']
    col = group * size + member  # [1, G', S']
    real = (group < n_group) & (member < size)
    base = logits_ptr + row * logits_stride_t  # [R]
    far = col.to(tl.int64)  # columns may lie as far apart as rows

    x = tl.load(base[:, None, None] + far * logits_stride_e, mask=row_ok[:, None, None] & real, other=float("-inf"))
    x = _finite_above(x.to(tl.float32))  # [R, G', S']
    if SIGMOID:
        top = tl.full((ROWS,), 0.0, tl.float32)
        total = tl.full((ROWS,), 1.0, tl.float32)
        score = _sigmoid(x, 0.0)
    else:
        # The largest logit is subtracted; with nothing but -inf there is nothing to subtract it from.
        top = tl.maximum(tl.max(tl.max(x, axis=2), axis=1), -3.4028234663852886e38)  # [R]
        e = tl.exp(x - top[:, None, None])  # 0 past E
        total = tl.maximum(tl.sum(tl.sum(e, axis=2), axis=1), 1e-30)  # [R], >= 1 but on a row of -inf
        score = e / total[:, None, None]
    rank = x  # either score is monotone, and the logits are exact
    if HAS_BIAS:
        rank = score + tl.load(bias_ptr + far * bias_stride, mask=real, other=0.0)
        score = rank

    # Integer keys, so that each search has one winner whatever the values are: the upper half orders like the float
    # (and -0 like +0), the lower half prefers the lower index. A comparison of floats would pick expert 0 again and
    # again on a row of NaN (vllm#39391).
    lowest = -0x8000000000000000  # below the key of -inf: what is padding, out of the race, or taken already
    # ---- the groups
    key = _key(score if TOP2_SUM else rank, SIZE_PAD - 1 - member)  # [R, G', S']
    key = tl.where(real, key, lowest)
    best = tl.max(key, axis=2)  # [R, G']
    if TOP2_SUM:
        second = tl.max(tl.where(key == best[:, :, None], lowest, key), axis=2)
        group_key = _key(_value(best) + _value(second), GROUP_PAD - 1 - tl.arange(0, GROUP_PAD)[None, :])
    else:
        group_key = _key(_value(best), GROUP_PAD - 1 - tl.arange(0, GROUP_PAD)[None, :])
    group_key = tl.where((tl.arange(0, GROUP_PAD) < n_group)[None, :], group_key, lowest)
    kept = group_key != group_key  # [R, G'], none
    for _ in range(topk_group):
        winner = tl.max(group_key, axis=1)[:, None]
        kept = kept | (group_key == winner)
        group_key = tl.where(kept, lowest, group_key)

    # ---- their experts: topk_group * E / n_group >= k of them, so that no other one is ever reached
    lanes: tl.constexpr = GROUP_PAD * SIZE_PAD
    key = _key(rank, lanes - 1 - col)
    key = tl.where(real & kept[:, :, None], key, lowest)
    slot = tl.arange(0, SLOT_PAD)[None, :]  # [1, slots']
    taken = tl.full((ROWS, SLOT_PAD), 0, tl.int64)
    for j in range(top_k):
        winner = tl.max(tl.max(key, axis=2), axis=1)  # [R]
        taken = tl.where(slot == j, winner[:, None], taken)
        key = tl.where(key == winner[:, None, None], lowest, key)

    # ---- their weights
    routed = slot < top_k
    ids = lanes - 1 - (taken & 0xFFFFFFFF).to(tl.int32)  # [R, slots']
    load = row_ok[:, None] & routed
    picked = tl.load(base[:, None] + ids.to(tl.int64) * logits_stride_e, mask=load, other=float("-inf"))
    picked = _finite_above(picked.to(tl.float32))  # [R, slots']
    if RENORMALIZE:
        # Relative to the largest of them, so that the sum is no smaller than 1 (sigmoid: 1/2) even where a bias has
        # selected experts whose scores underflow: no 0/0 (sglang#31017, flashinfer#3946).
        if SIGMOID:
            shift = tl.max(tl.minimum(picked, 0.0), axis=1)
            part = _sigmoid(picked, tl.maximum(shift, -3.4028234663852886e38)[:, None])
        else:
            shift = tl.max(picked, axis=1)
            part = tl.exp(picked - tl.maximum(shift, -3.4028234663852886e38)[:, None])
        weights = part / tl.maximum(tl.sum(tl.where(routed, part, 0.0), axis=1), 1e-30)[:, None] * scale
    elif SIGMOID:
        weights = _sigmoid(picked, 0.0) * scale
    else:
        weights = tl.exp(picked - top[:, None]) / total[:, None] * scale
    if HAS_MAP:
        ids = tl.load(expert_map_ptr + ids.to(tl.int64) * expert_map_stride, mask=load, other=0)
    ids = tl.where(routed, ids, experts + slot - top_k)  # the shared experts follow, past every logical id
    weights = tl.where(routed, weights, 1.0)

    where = row[:, None] * (top_k + n_shared) + slot
    mask = row_ok[:, None] & (slot < top_k + n_shared)
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
def _key(value, index):
    """Orders like the value, NaN below all, then like the index, which is >= 0 and below 2^31."""
    value = tl.where(value != value, float("-inf"), value)
    bits = value.to(tl.int32, bitcast=True)
    bits = tl.where(bits == -2147483648, 0, bits)
    order = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (order.to(tl.int64) << 32) | index.to(tl.int64)


@triton.jit
def _value(key):
    """The value of a key."""
    order = (key >> 32).to(tl.int32)
    return (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _finite_above(x):
    """NaN becomes -inf and +inf the largest float32, so that no difference of two logits is NaN."""
    x = tl.where(x != x, float("-inf"), x)
    return tl.where(x == float("inf"), 3.4028234663852886e38, x)


@triton.jit
def _sigmoid(x, shift):
    """sigmoid(x) / exp(shift), for shift in [min(x, 0), 0]: no exponential overflows, and 0 for -inf."""
    return tl.exp(tl.minimum(x, 0.0) - shift) / (1.0 + tl.exp(-tl.abs(x)))
