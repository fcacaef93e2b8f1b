"""A row within a thread, for few experts: all of it in registers, and no thread waits for another.

The experts' integer keys (routing_keys.py) are sorted, and slot j is the j-th. Every sum has its order written down, so
that a row's bits do not depend on the width of the loads, which the compiler chooses by alignment.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

if __package__:
    from .routing_keys import divisor, exchanged, key_of, relative_score, saturated, top_of, value_of, widened
else:  # loaded by its path, as the script of a finding does: its neighbours are on sys.path
    from routing_keys import divisor, exchanged, key_of, relative_score, saturated, top_of, value_of, widened


@triton.jit(
    do_not_specialize=["tokens", "logits_stride_t", "is_padding_stride", "padding_id"],
    do_not_specialize_on_alignment=["is_padding_ptr", "weights_ptr", "ids_ptr", "logits_stride_e"],
)
def topk_by_threads(
    logits_ptr, is_padding_ptr,  # [T, E] bfloat16 | float16, [T] bool
    weights_ptr, ids_ptr,  # [T, k] f32, [T, k] i32
    tokens,
    logits_stride_t, logits_stride_e, is_padding_stride,
    scale, padding_id,
    # As in routing_lanes.py:
    SIGMOID: tl.constexpr, RENORMALIZE: tl.constexpr, FLAGGED: tl.constexpr,
    NAN_SAFE: tl.constexpr, LARGEST: tl.constexpr, PDL: tl.constexpr, NETWORK: tl.constexpr,
    PACKED: tl.constexpr,  # rows lie one after the other
    ROWS: tl.constexpr, EXPERTS: tl.constexpr, TOP_K: tl.constexpr,
    CHUNK: tl.constexpr, HALVINGS: tl.constexpr,  # one load of a thread: 2^HALVINGS experts
):  # fmt: skip
    if PDL:
        gdc_wait()
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [R], 64 bits: T * stride may pass 2^31
    row_ok = row < tokens
    base = logits_ptr + row * (EXPERTS if PACKED else logits_stride_t)
    xs = ()  # EXPERTS of [R]
    for c in tl.static_range(EXPERTS // CHUNK):
        column = c * CHUNK + tl.arange(0, CHUNK)
        at = base[:, None] + column.to(tl.int64)[None, :] * logits_stride_e
        x = tl.load(at, mask=tl.broadcast_to(row_ok[:, None], (ROWS, CHUNK)), other=float("-inf"))
        xs = xs + _columns(x, ROWS, CHUNK, HALVINGS)

    keys = ()
    for e in tl.static_range(EXPERTS):  # both scores are monotone, and the logits are exact
        keys = keys + (key_of(widened(xs[e]), EXPERTS - 1 - e, True, True, False, False),)
    for n in tl.static_range(len(NETWORK)):  # what no slot needs, the compiler drops
        keys = exchanged(keys, NETWORK[n][0], NETWORK[n][1], EXPERTS, False)

    # The sum over all of a row with NaN or +inf is neither: its divisor is inf, whatever `top` is.
    top = top_of(value_of(keys[0], False), LARGEST, NAN_SAFE and (SIGMOID or RENORMALIZE))
    scores = ()
    for j in tl.static_range(TOP_K):
        score = relative_score(value_of(keys[j], False), top, SIGMOID, RENORMALIZE)
        scores = scores + (saturated(score, NAN_SAFE) if SIGMOID or RENORMALIZE else score,)
    if RENORMALIZE:
        total = scores[0]
        for j in tl.static_range(1, TOP_K):
            total += scores[j]
        total = divisor(total)
    elif not SIGMOID:
        total = tl.exp(widened(xs[0]) - top)
        for e in tl.static_range(1, EXPERTS):
            total += tl.exp(widened(xs[e]) - top)
        total = divisor(total)

    if FLAGGED > 0:
        flagged = tl.load(is_padding_ptr + row * is_padding_stride, mask=row_ok, other=0).to(tl.int1)
    for j in tl.static_range(TOP_K):
        if RENORMALIZE:
            weight = scores[j] / total * scale
        elif SIGMOID:
            weight = scores[j] * scale
        else:  # of that divisor, NaN and +inf have no share either
            weight = saturated(scores[j] / total, NAN_SAFE) * scale
        expert = EXPERTS - 1 - (keys[j] & 0x1FFF)
        mask = row_ok
        if FLAGGED == 1:
            weight = tl.where(flagged, 0.0, weight)
            expert = tl.where(flagged, padding_id, expert)
        elif FLAGGED == 2:
            mask = row_ok & (flagged == 0)
        tl.store(weights_ptr + row * TOP_K + j, weight, mask=mask)
        tl.store(ids_ptr + row * TOP_K + j, expert, mask=mask)


@triton.jit
def _columns(x, ROWS: tl.constexpr, CHUNK: tl.constexpr, HALVINGS: tl.constexpr):
    """[R, C] as a tuple of C columns [R]."""
    parts = (x,)
    for n in tl.static_range(HALVINGS):
        # Column c of the 2^n parts is c, c + 2^n, …: the even ones of each part, then the odd ones.
        even, odd = (), ()
        for p in tl.static_range(2**n):
            a, b = tl.split(tl.reshape(parts[p], (ROWS, CHUNK // 2 ** (n + 1), 2)))
            even = even + (a,)
            odd = odd + (b,)
        parts = even + odd
    columns = ()
    for c in tl.static_range(CHUNK):
        columns = columns + (tl.reshape(parts[c], (ROWS,)),)
    return columns
