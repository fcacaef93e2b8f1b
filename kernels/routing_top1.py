"""The best expert of each row, where its weight is a function of its own logit: no sum over a row is needed.

Only the maximum of integer keys (routing_keys.py) goes across threads, which comes out the same in any order. So rows
may lie over threads as the loads like it, and a row's bits still depend on that row alone.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

if __package__:
    from .routing_keys import divisor, order_of, relative_score, saturated, top_of, value_of, widened
else:  # loaded by its path, as the script of a finding does: its neighbours are on sys.path
    from routing_keys import divisor, order_of, relative_score, saturated, top_of, value_of, widened


@triton.jit(
    do_not_specialize=["tokens", "logits_stride_t", "is_padding_stride", "padding_id"],
    do_not_specialize_on_alignment=["is_padding_ptr", "weights_ptr", "ids_ptr", "logits_stride_e"],
)
def top1(
    logits_ptr, is_padding_ptr,  # [T, E] bfloat16 | float16, [T] bool
    weights_ptr, ids_ptr,  # [T] f32, [T] i32
    tokens, logits_stride_t, logits_stride_e, is_padding_stride,
    scale, padding_id,
    # As in routing_lanes.py:
    SIGMOID: tl.constexpr, RENORMALIZE: tl.constexpr, FLAGGED: tl.constexpr,
    NAN_SAFE: tl.constexpr, LARGEST: tl.constexpr, PDL: tl.constexpr,
    PACKED: tl.constexpr,  # rows lie one after the other
    ROWS: tl.constexpr, SPREAD: tl.constexpr, EXPERTS: tl.constexpr,  # powers of two
):  # fmt: skip
    if PDL:
        gdc_wait()
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [R], 64 bits: T * stride may pass 2^31
    column = tl.arange(0, EXPERTS)[None, :]  # [1, E]
    base = logits_ptr + row * (EXPERTS if PACKED else logits_stride_t)
    mask = tl.broadcast_to((row < tokens)[:, None], (ROWS, EXPERTS))
    x = tl.load(base[:, None] + column.to(tl.int64) * logits_stride_e, mask=mask, other=float("-inf"))

    # Of the rows a thread has every SPREAD-th, and of each 8 experts.
    EACH: tl.constexpr = ROWS // SPREAD
    LANES: tl.constexpr = EXPERTS // 8
    order = tl.reshape(order_of(widened(x), 0x7FE000, False), (EACH, SPREAD, LANES, 8))
    # The key of each, as of key_of: what is common to a thread's experts comes in when the best of them is known.
    within = (7 - tl.arange(0, 8))[None, None, None, :]
    best = tl.max(tl.add(order, within, sanitize_overflow=False), axis=3)  # [EACH, SPREAD, LANES]
    lane = tl.arange(0, LANES)[None, None, :]
    best = tl.max(best | (EXPERTS - 8 - 8 * lane), axis=2)[:, :, None]
    # All lanes of a row know it now. Each goes on with another of the thread's rows, and all of them with all at once.
    best = tl.sum(tl.where(lane == tl.arange(0, EACH)[:, None, None], best, 0), axis=0)  # [SPREAD, LANES]
    best = tl.reshape(best, (SPREAD * LANES,))
    at = tl.arange(0, SPREAD * LANES)
    row = tl.program_id(0).to(tl.int64) * ROWS + at % LANES * SPREAD + at // LANES
    row_ok = (row < tokens) & (at % LANES < EACH)

    value = value_of(best, False)
    top = top_of(value, LARGEST, NAN_SAFE)
    score = saturated(relative_score(value, top, SIGMOID, RENORMALIZE), NAN_SAFE)  # as in the others, to the bit
    weight = score / divisor(score) * scale if RENORMALIZE else score * scale
    expert = EXPERTS - 1 - (best & 0x1FFF)
    if FLAGGED > 0:
        flagged = tl.load(is_padding_ptr + row * is_padding_stride, mask=row_ok, other=0).to(tl.int1)
        if FLAGGED == 1:
            weight = tl.where(flagged, 0.0, weight)
            expert = tl.where(flagged, padding_id, expert)
        else:
            row_ok = row_ok & (flagged == 0)
    tl.store(weights_ptr + row, weight, mask=row_ok)
    tl.store(ids_ptr + row, expert, mask=row_ok)
