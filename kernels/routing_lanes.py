"""A row within a warp: lane l holds the experts l, l + LANES, l + 2 LANES, … (More experts than 512: four warps.)

Each expert is an integer key (routing_keys.py). A slot is one maximum over the lanes, which is one instruction where a
key has 32 bits, and the winners stay in the lanes, slot j in lane j.
"""

from __future__ import annotations

from functools import cache

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

if __package__:
    from .routing_keys import (
        biased_score,
        clamped,
        divisor,
        exchanged,
        float_of,
        key_of,
        order_of,
        relative_score,
        row_sum,
        saturated,
        top_of,
        value_of,
        widened,
    )
else:  # loaded by its path, as the script of a finding does: its neighbours are on sys.path
    from routing_keys import (
        biased_score,
        clamped,
        divisor,
        exchanged,
        float_of,
        key_of,
        order_of,
        relative_score,
        row_sum,
        saturated,
        top_of,
        value_of,
        widened,
    )


def list_length(each: int) -> int:
    """The next of 1, 2, 3, 4, 6, 8, 12, 16: few binaries, and at most a third of the work for nothing."""
    power = triton.next_power_of_2(each)
    return power * 3 // 4 if power >= 4 and each <= power * 3 // 4 else power


@cache
def network(n: int) -> tuple[tuple[int, int], ...]:
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


@triton.jit(
    do_not_specialize=["tokens", "experts", "top_k", "logits_stride_t", "is_padding_stride", "padding_id"],
    do_not_specialize_on_alignment=["logits_ptr", "bias_ptr", "is_padding_ptr", "weights_ptr", "ids_ptr",
                                    "logits_stride_e", "bias_stride"],
)  # fmt: skip
def topk_by_lanes(
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
    FULL: tl.constexpr,  # E == LANES * EACH
    TOP_K: tl.constexpr,  # top_k; 0: as the argument says
    SORTED: tl.constexpr,  # lists are sorted once, and the one that won moves up; else all of it is searched each time
    PDL: tl.constexpr,
    ROWS: tl.constexpr, LANES: tl.constexpr, EACH: tl.constexpr, NETWORK: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_wait()
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [R], 64 bits: T * stride may pass 2^31
    lane = tl.arange(0, LANES)
    row_ok = (row < tokens)[:, None]  # [R, 1]
    base = logits_ptr + row[:, None] * logits_stride_t + lane.to(tl.int64)[None, :] * logits_stride_e  # [R, L]
    xs = ()  # EACH of [R, L]: experts lane + v * LANES; -inf past E
    for v in tl.static_range(EACH):
        real = row_ok if FULL else row_ok & (lane + v * LANES < experts)[None, :]
        real = tl.broadcast_to(real, (ROWS, LANES))
        at = base + tl.full([], v * LANES, tl.int64) * logits_stride_e
        x = tl.load(flat(at), mask=flat(real), other=float("-inf"))
        x = widened(tl.reshape(x, (ROWS, LANES)))
        if HAS_BIAS and not SIGMOID:
            x = clamped(x, LARGEST, NAN_SAFE)  # every score depends on the sum
        xs = xs + (x,)

    if HAS_BIAS and not SIGMOID:
        peak = xs[0]
        for v in tl.static_range(1, EACH):
            peak = tl.maximum(peak, xs[v])
        top = row_top(peak, LARGEST, NAN_SAFE)  # [R, 1]
        total = total_of(xs, top, EACH)

    if HAS_BIAS:  # each row loads it for itself: what lies in this warp's registers need not come from another's
        bias_base = tl.broadcast_to((bias_ptr + lane.to(tl.int64) * bias_stride)[None, :], (ROWS, LANES))
    keys = ()
    for v in tl.static_range(EACH):
        column = (lane + v * LANES)[None, :]  # [1, L]
        rank = xs[v]  # without a bias: both scores are monotone, and the logits are exact
        if HAS_BIAS:
            at = bias_base + tl.full([], v * LANES, tl.int64) * bias_stride
            bias = tl.load(at, mask=row_ok & (column < experts), other=0.0)
            rank = biased_score(xs[v], 0.0 if SIGMOID else top, 1.0 if SIGMOID else total, bias, SIGMOID)
        low = (LANES - 1 - lane)[None, :] + LANES * (EACH - 1 - v)  # the lower the expert, the higher
        keys = keys + (key_of(rank, low, column < experts, FULL, WIDE, EACH == 16),)
    if SORTED:
        for n in tl.static_range(len(NETWORK)):
            keys = exchanged(keys, NETWORK[n][0], NETWORK[n][1], EACH, WIDE)

    lowest = tl.full((ROWS, LANES), -0x8000000000000000 if WIDE else -0x80000000, tl.int64 if WIDE else tl.int32)
    best, first = slots_of(keys, lowest, lane, top_k, TOP_K, EACH, SORTED, WIDE)

    used = lane[None, :] < top_k  # [1, L]
    ids = LANES * EACH - 1 - (best & 0x1FFF).to(tl.int32)
    if HAS_BIAS:
        # One more read, which the cache answers: to find it among the lists would be EACH shuffles.
        at = logits_ptr + row[:, None] * logits_stride_t + ids.to(tl.int64) * logits_stride_e
        mask = tl.broadcast_to(row_ok & used, (ROWS, LANES))
        picked = tl.reshape(tl.load(flat(at), mask=flat(mask), other=float("-inf")), (ROWS, LANES))
        picked = widened(picked)
        if RENORMALIZE:
            top = row_top(picked, LARGEST, NAN_SAFE)
        elif SIGMOID:
            top = 0.0  # not used
    else:
        picked = value_of(best, WIDE)  # of what no slot holds a NaN's: `lowest`
        if not NAN_SAFE:
            picked = tl.where(used, picked, float("-inf"))
        # The sum over all of a row with NaN or +inf is neither: its divisor is inf, whatever `top` is.
        top = top_of(value_of(first, WIDE), LARGEST, NAN_SAFE and (SIGMOID or RENORMALIZE))
    score = relative_score(picked, top, SIGMOID, RENORMALIZE)
    if not RENORMALIZE and not HAS_BIAS and not SIGMOID:
        # Of that divisor, NaN and +inf have no share either.
        weights = saturated(score / total_of(xs, top, EACH), NAN_SAFE) * scale
    else:
        score = saturated(score, NAN_SAFE)
        if RENORMALIZE:
            total = divisor(row_sum(score))
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
def flat(x):
    """[R, L] -> [R * L]. Where addresses say nothing of their order, Triton 3.6 lays the rows of a block across the
    lanes of a warp, and all that is computed of what was loaded takes the way through shared memory, there and back."""
    return tl.reshape(x, (x.shape[0] * x.shape[1],))


@triton.jit
def slots_of(
    keys, lowest, lane, top_k, TOP_K: tl.constexpr, EACH: tl.constexpr, SORTED: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """The largest top_k keys of a row, the one of slot j in lane j, [R, L]; and the first of them, [R, 1]."""
    best = lowest
    first = next_key(keys, EACH, SORTED, WIDE)
    winner = first
    if TOP_K > 0:  # unrolled: of each list only what can still win is kept
        for j in tl.static_range(TOP_K):
            best = tl.where(lane[None, :] == j, winner, best)
            if j + 1 < TOP_K:
                keys = without(keys, winner, lowest, EACH, SORTED)
                winner = next_key(keys, EACH, SORTED, WIDE)
    else:
        for j in range(top_k):
            best = tl.where(lane[None, :] == j, winner, best)
            keys = without(keys, winner, lowest, EACH, SORTED)
            winner = next_key(keys, EACH, SORTED, WIDE)
    return best, first


@triton.jit
def total_of(xs, top, EACH: tl.constexpr):
    """Sum of exp(x - top) over a row."""
    total = tl.exp(xs[0] - top)
    for v in tl.static_range(1, EACH):
        total += tl.exp(xs[v] - top)
    return divisor(row_sum(total))


@triton.jit
def row_top(x, LARGEST: tl.constexpr, NAN_SAFE: tl.constexpr):
    """[R, L] -> [R, 1], at least the least float32. A maximum of integers over a warp is one instruction."""
    top = float_of(tl.max(order_of(x, 0x7FFFFF, False), axis=1)[:, None], 0x7FFFFF)
    return top_of(top, LARGEST, NAN_SAFE)


@triton.jit
def without(keys, winner, lowest, EACH: tl.constexpr, SORTED: tl.constexpr):
    """The lists without the winner. One that runs out holds what is below every expert that is left."""
    rest = ()
    for v in tl.static_range(EACH):
        if SORTED:  # it is the first of one list, which moves up
            follower = keys[v + 1] if v + 1 < EACH else lowest
            rest = rest + (tl.where(keys[0] == winner, follower, keys[v]),)
        else:
            rest = rest + (tl.where(keys[v] == winner, lowest, keys[v]),)
    return rest


@triton.jit
def next_key(keys, EACH: tl.constexpr, SORTED: tl.constexpr, WIDE: tl.constexpr):
    """The largest key of a row, [R, 1]. Over a warp, twice 32 bits are faster than once 64: one instruction each."""
    key = keys[0]
    if not SORTED:
        for v in tl.static_range(1, EACH):
            key = tl.maximum(key, keys[v])
    if WIDE and key.shape[1] <= 32:
        high = (key >> 32).to(tl.int32)
        top = tl.max(high, axis=1)[:, None]
        low = tl.max(tl.where(high == top, key.to(tl.int32), -1), axis=1)[:, None]
        largest = (top.to(tl.int64) << 32) | low.to(tl.int64)
    else:
        largest = tl.max(key, axis=1)[:, None]
    return largest
