"""A row within a warp, where groups are whole lanes: lane l holds the experts l EACH to (l + 1) EACH - 1, sorted.

So the best two of a group are those of its 32 / n_group lanes, all groups at once, and whether a group is kept is how
many are better. The search for experts is that of routing_lanes.py, with empty lists in the lanes of
the other groups.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

if __package__:
    from .routing_keys import (
        biased_score,
        clamped,
        divisor,
        exchanged,
        key_of,
        order_of,
        relative_score,
        row_sum,
        saturated,
        top_of,
        value_of,
        widened,
    )
    from .routing_lanes import flat, row_top, slots_of, total_of
else:  # loaded by its path, as the script of a finding does: its neighbours are on sys.path
    from routing_keys import (
        biased_score,
        clamped,
        divisor,
        exchanged,
        key_of,
        order_of,
        relative_score,
        row_sum,
        saturated,
        top_of,
        value_of,
        widened,
    )
    from routing_lanes import flat, row_top, slots_of, total_of


@triton.jit(
    do_not_specialize=["tokens", "experts", "topk_group", "top_k", "n_shared", "padding_id", "logits_stride_t",
                       "is_padding_stride", "expert_map_stride"],
    do_not_specialize_on_alignment=["logits_ptr", "bias_ptr", "is_padding_ptr", "expert_map_ptr", "weights_ptr",
                                    "ids_ptr", "logits_stride_e", "bias_stride"],
)  # fmt: skip
def grouped_by_lanes(
    logits_ptr, bias_ptr, is_padding_ptr, expert_map_ptr,  # [T, E], [E] f32, [T] bool, [E] i32
    weights_ptr, ids_ptr,  # [T, k + n_shared] f32 and i32
    tokens, experts, topk_group, top_k, n_shared,
    logits_stride_t, logits_stride_e, bias_stride, is_padding_stride, expert_map_stride,
    scale, padding_id,
    SIGMOID: tl.constexpr,  # else softmax
    TOP2_SUM: tl.constexpr,  # else max
    HAS_BIAS: tl.constexpr, HAS_MAP: tl.constexpr, RENORMALIZE: tl.constexpr,
    FLAGGED: tl.constexpr,  # flagged rows: 0 are routed, 1 get (padding_id, 0), 2 stay unwritten
    NAN_SAFE: tl.constexpr,
    LARGEST: tl.constexpr,  # of the logits' dtype
    WIDE: tl.constexpr,  # keys of 64 bits; else of 32, which hold a 16-bit float and an id
    TOP_K: tl.constexpr,  # top_k; 0: as the argument says
    PDL: tl.constexpr,
    ROWS: tl.constexpr, LANES: tl.constexpr, EACH: tl.constexpr,  # E == LANES * EACH
    GROUPS: tl.constexpr,  # divides LANES
    LIST: tl.constexpr, NETWORK: tl.constexpr,  # of EACH experts, and how it is sorted
):  # fmt: skip
    if PDL:
        gdc_wait()
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [R], 64 bits: T * stride may pass 2^31
    lane = tl.arange(0, LANES)
    row_ok = (row < tokens)[:, None]  # [R, 1]
    all_ok = tl.broadcast_to(row_ok, (ROWS, LANES))
    first_of_lane = (lane * EACH).to(tl.int64)[None, :]  # columns may lie as far apart as rows
    base = logits_ptr + row[:, None] * logits_stride_t + first_of_lane * logits_stride_e  # [R, L]
    xs = ()  # EACH of [R, L]: experts lane * EACH + v
    for v in tl.static_range(EACH):
        at = base + tl.full([], v, tl.int64) * logits_stride_e
        x = tl.load(flat(at), mask=flat(all_ok), other=float("-inf"))
        x = widened(tl.reshape(x, (ROWS, LANES)))
        if HAS_BIAS and not SIGMOID:
            x = clamped(x, LARGEST, NAN_SAFE)  # every score depends on the sum
        xs = xs + (x,)

    if not SIGMOID and (HAS_BIAS or TOP2_SUM or not RENORMALIZE):
        peak = xs[0]
        for v in tl.static_range(1, EACH):
            peak = tl.maximum(peak, xs[v])
        # The sum over all of a row with NaN or +inf is neither: its divisor is inf, whatever the peak is.
        row_peak = row_top(peak, LARGEST, NAN_SAFE and (HAS_BIAS or TOP2_SUM))  # [R, 1]
    if not SIGMOID and (HAS_BIAS or not RENORMALIZE):
        total = total_of(xs, row_peak, EACH)

    # Integer keys, so that each search has one winner whatever the values are (routing_keys.py).
    lowest = tl.full((ROWS, LANES), -0x8000000000000000 if WIDE else -0x80000000, tl.int64 if WIDE else tl.int32)
    keys = ()
    for v in tl.static_range(EACH):
        rank = xs[v]  # without a bias: both scores are monotone, and the logits are exact
        if HAS_BIAS:
            at = tl.broadcast_to(bias_ptr + (first_of_lane + v) * bias_stride, (ROWS, LANES))
            bias = tl.reshape(tl.load(flat(at), mask=flat(all_ok), other=0.0), (ROWS, LANES))
            rank = biased_score(xs[v], 0.0 if SIGMOID else row_peak, 1.0 if SIGMOID else total, bias, SIGMOID)
        low = ((LANES - 1 - lane) * EACH + (EACH - 1 - v))[None, :]  # the lower the expert, the higher
        keys = keys + (key_of(rank, low, True, True, WIDE, LIST == 16),)
    for _ in tl.static_range(LIST - EACH):
        keys = keys + (lowest,)
    for n in tl.static_range(len(NETWORK)):
        keys = exchanged(keys, NETWORK[n][0], NETWORK[n][1], LIST, WIDE)

    if GROUPS > 1:
        best = _group_max(keys[0], GROUPS)  # [R, L]: of the lane's group
        if TOP2_SUM:
            if HAS_BIAS:
                score, after = value_of(keys[0], WIDE), value_of(keys[1] if LIST > 1 else lowest, WIDE)
            else:  # of the softmax the numerators: what they are all divided by changes no order
                top = 0.0 if SIGMOID else row_peak
                score = relative_score(value_of(keys[0], WIDE), top, SIGMOID, False)
                after = relative_score(value_of(keys[1] if LIST > 1 else keys[0], WIDE), top, SIGMOID, False)
            if LIST == 1:
                after = tl.full((ROWS, LANES), float("-inf"), tl.float32)
            second = tl.where(keys[0] == best, after, score)
            score = _group_max(score, GROUPS) + _group_max(second, GROUPS)
        else:
            score = value_of(best, WIDE)
        order = order_of(score, 0x7FFFFF, False)
        # How many groups are better, of equal ones those before it. No comparison waits for another.
        group = (lane // (LANES // GROUPS))[None, :]
        better = tl.zeros((ROWS, LANES), tl.int32)
        for g in tl.static_range(GROUPS):
            of_g = tl.max(tl.where(group == g, order, -0x80000000), axis=1)[:, None]
            better += ((of_g > order) | ((of_g == order) & (group > g))).to(tl.int32)
        kept = better < topk_group
        # Their experts are topk_group * E / n_group >= k, so that none of another group is ever reached.
        rest = ()
        for v in tl.static_range(LIST):
            rest = rest + (tl.where(kept, keys[v], lowest),)
        keys = rest

    found, first = slots_of(keys, lowest, lane, top_k, TOP_K, LIST, True, WIDE)
    routed = lane[None, :] < top_k  # [1, L]
    ids = LANES * EACH - 1 - (found & 0x1FFF).to(tl.int32)
    if HAS_BIAS:
        at = logits_ptr + row[:, None] * logits_stride_t + ids.to(tl.int64) * logits_stride_e
        mask = tl.broadcast_to(row_ok & routed, (ROWS, LANES))
        picked = tl.reshape(tl.load(flat(at), mask=flat(mask), other=float("-inf")), (ROWS, LANES))
        picked = widened(picked)
        top = row_top(picked, LARGEST, NAN_SAFE) if RENORMALIZE else 0.0
    else:
        picked = tl.where(routed, value_of(found, WIDE), float("-inf"))
        top = top_of(value_of(first, WIDE), LARGEST, NAN_SAFE)
    if not SIGMOID and not RENORMALIZE:
        top = row_peak
    score = relative_score(picked, top, SIGMOID, RENORMALIZE)
    if RENORMALIZE:
        score = saturated(score, NAN_SAFE)
        weights = score / divisor(row_sum(score)) * scale
    elif SIGMOID:
        weights = saturated(score, NAN_SAFE) * scale
    else:
        weights = saturated(score / total, NAN_SAFE) * scale

    if HAS_MAP:
        mask = tl.broadcast_to(row_ok & routed, (ROWS, LANES))
        at = expert_map_ptr + ids.to(tl.int64) * expert_map_stride
        ids = tl.reshape(tl.load(flat(at), mask=flat(mask), other=0), (ROWS, LANES))
    ids = tl.where(routed, ids, experts + lane[None, :] - top_k)  # the shared experts follow, past every logical id
    weights = tl.where(routed, weights, 1.0)
    where = row[:, None] * (top_k + n_shared) + lane[None, :]
    mask = row_ok & (lane[None, :] < top_k + n_shared)
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
def _group_max(key, GROUPS: tl.constexpr):
    """[R, L]: in each lane the largest of its group's."""
    shape: tl.constexpr = (key.shape[0], GROUPS, key.shape[1] // GROUPS)
    largest = tl.max(tl.reshape(key, shape), axis=2)
    return tl.reshape(tl.broadcast_to(largest[:, :, None], shape), (key.shape[0], key.shape[1]))
