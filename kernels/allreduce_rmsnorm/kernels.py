"""What runs on the device: all-reduce in one shot or two, the residual and the norm, in one launch.

Ranks push: what a peer needs is stored into the peer's buffer, so that all that is read after a wait is near. The same
code runs as one launch with real barriers, or as a launch for each phase between two barriers (PHASE), where the end of
a launch is the barrier; that can be interpreted, too.

All ranks have the same bits: sums are in the order of the ranks, and every rank norms every row with the same code.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from moe_fuzz.kernels.allreduce_rmsnorm.barrier import begin_call, meet, meet_owners

_UNSPECIALIZED = ["tokens", "share", "first_rank", "timeout"]


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def one_shot_kernel(
    x_ptr, residual_ptr, gamma_ptr,  # [L, T, H], [L, T, H], [H]; L ranks are in this launch
    normed_ptr, sum_ptr,  # [L, T, H]
    buffers_ptr, signals_ptr, state_ptr, fault_ptr,  # [R] addresses, [R] addresses, [L], [L]
    tokens, hidden, share, first_rank, x_stride, residual_stride,  # of L; a tensor's rows are packed
    half_bytes, slot_stride,  # of a buffer; elements from slot to slot
    eps, timeout,
    WORLD: tl.constexpr, WORLD_PAD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ALIKE: tl.constexpr,  # no load of gamma is wider than one of x
    SINGLE: tl.constexpr,  # a block has one tile: x stays in registers, and what the norm needs is asked for early
    TOGETHER: tl.constexpr, PARTS: tl.constexpr,  # unused: one signature for both kernels
    PHASE: tl.constexpr,  # 0: the whole call · 1: push · 2: sum and norm
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Every rank gets all of every other's x, and sums all rows. Half of a buffer: slots [R, T, H]."""
    local, block, blocks = tl.program_id(1), tl.program_id(0), tl.num_programs(0)
    rank = first_rank + local
    state_ptr += local
    x_ptr += local.to(tl.int64) * x_stride
    if HAS_RESIDUAL:
        residual_ptr += local.to(tl.int64) * residual_stride
    normed_ptr += local.to(tl.int64) * x_stride
    sum_ptr += local.to(tl.int64) * x_stride
    column = tl.arange(0, COLUMNS)[None, :]
    came = rank - rank + 1
    if SINGLE:
        row = (block * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        where, inside = row * hidden + column, (row < tokens) & (column < hidden)
        # all that is near is under way before the first answer is waited for
        own = tl.load(x_ptr + where, mask=inside, other=0.0)
        residual = own
        if HAS_RESIDUAL:
            residual = tl.load(residual_ptr + where, mask=inside, other=0.0)
        gamma = _gamma(gamma_ptr, hidden, COLUMNS, ALIKE)
        base = tl.load(buffers_ptr + rank)  # and the other addresses are in the same line of the cache
        half, broken = begin_call(state_ptr, blocks, PHASE < 2)
        slots = tl.multiple_of((base + half * half_bytes).to(x_ptr.dtype), 16)
        if PHASE != 2:
            _push(buffers_ptr, half * half_bytes, slot_stride, x_ptr, own, where, inside, rank, WORLD)
        if PHASE == 0 and WORLD > 1:
            came = meet(signals_ptr, state_ptr, fault_ptr + local, rank, block, broken, timeout, 1, WORLD, WORLD_PAD)
        if PHASE != 1:
            total = _sum(slots, slot_stride, own, where, inside, rank, came, WORLD, INTERPRETED)
            if HAS_RESIDUAL:
                total += _wide(residual, INTERPRETED)
            _finish(total, gamma, normed_ptr, sum_ptr, where, inside, hidden, eps, INTERPRETED)
    else:
        half, broken = begin_call(state_ptr, blocks, PHASE < 2)
        slots = _buffer(buffers_ptr, rank, half * half_bytes, x_ptr)
        if PHASE != 2 and WORLD > 1:
            for tile in range(block, tl.cdiv(tokens, ROWS), blocks):
                row = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
                where, inside = row * hidden + column, (row < tokens) & (column < hidden)
                own = tl.load(x_ptr + where, mask=inside, other=0.0)
                _push(buffers_ptr, half * half_bytes, slot_stride, x_ptr, own, where, inside, rank, WORLD)
        if PHASE == 0 and WORLD > 1:
            came = meet(signals_ptr, state_ptr, fault_ptr + local, rank, block, broken, timeout, 1, WORLD, WORLD_PAD)
        if PHASE != 1:
            gamma = _gamma(gamma_ptr, hidden, COLUMNS, ALIKE)
            for tile in range(block, tl.cdiv(tokens, ROWS), blocks):
                row = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
                where, inside = row * hidden + column, (row < tokens) & (column < hidden)
                own = tl.load(x_ptr + where, mask=inside, other=0.0)
                residual = own
                if HAS_RESIDUAL:
                    residual = tl.load(residual_ptr + where, mask=inside, other=0.0)
                total = _sum(slots, slot_stride, own, where, inside, rank, came, WORLD, INTERPRETED)
                if HAS_RESIDUAL:
                    total += _wide(residual, INTERPRETED)
                _finish(total, gamma, normed_ptr, sum_ptr, where, inside, hidden, eps, INTERPRETED)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def two_shot_kernel(
    x_ptr, residual_ptr, gamma_ptr,  # [L, T, H], [L, T, H], [H]; L ranks are in this launch
    normed_ptr, sum_ptr,  # [L, T, H]
    buffers_ptr, signals_ptr, state_ptr, fault_ptr,  # [R] addresses, [R] addresses, [L], [L]
    tokens, hidden, share, first_rank, x_stride, residual_stride,  # of L; a tensor's rows are packed
    half_bytes, slot_stride,  # of a buffer; elements from slot to slot
    eps, timeout,
    WORLD: tl.constexpr, WORLD_PAD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ALIKE: tl.constexpr,  # no load of gamma is wider than one of x
    SINGLE: tl.constexpr,  # unused: one signature for both kernels
    TOGETHER: tl.constexpr,  # of how many shares rows are normed at once
    PARTS: tl.constexpr,  # of a row, a program each: a power of two that divides WORLD
    PHASE: tl.constexpr,  # 0: the whole call · 1: scatter · 2: sum and gather · 3: norm
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Rank r sums `share` rows, from r * share on, and every rank gets the sums. Half of a buffer: slots
    [R, share, H], and behind them the sums [R * share, H]. A block has the same rows of every share in all phases:
    so it waits for the same block of each peer, and for no other.

    A block has PARTS programs. Each sends and sums a part of the columns; each norms whole rows, of every PARTS-th
    share, and for these it waits for all parts of that block on the ranks that have summed them."""
    program, local = tl.program_id(0), tl.program_id(1)
    block, part, blocks = program // PARTS, program % PARTS, tl.num_programs(0) // PARTS
    rank = first_rank + local
    state_ptr += local
    x_ptr += local.to(tl.int64) * x_stride
    if HAS_RESIDUAL:
        residual_ptr += local.to(tl.int64) * residual_stride
    normed_ptr += local.to(tl.int64) * x_stride
    sum_ptr += local.to(tl.int64) * x_stride
    column = part * (COLUMNS // PARTS) + tl.arange(0, COLUMNS // PARTS)[None, :]
    half, broken = begin_call(state_ptr, blocks * PARTS, PHASE < 2)
    came = rank - rank + 1
    slots = _buffer(buffers_ptr, rank, half * half_bytes, x_ptr)
    if PHASE < 2:
        for tile in range(block, tl.cdiv(share, ROWS), blocks):
            row = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
            for step in tl.static_range(1, WORLD):
                owner = (rank + step) % WORLD  # not all to the same one at once
                inside = (row < share) & (row + owner * share < tokens) & (column < hidden)
                sent = tl.load(x_ptr + (row + owner * share) * hidden + column, mask=inside, other=0.0)
                there = _buffer(buffers_ptr, owner, half * half_bytes, x_ptr) + rank.to(tl.int64) * slot_stride
                tl.store(there + row * hidden + column, sent, mask=inside)
    if PHASE == 0:
        came = meet(signals_ptr, state_ptr, fault_ptr + local, rank, program, broken, timeout, 1, WORLD, WORLD_PAD)
    if PHASE == 0 or PHASE == 2:
        for tile in range(block, tl.cdiv(share, ROWS), blocks):
            row = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
            inside = (row < share) & (row + rank * share < tokens) & (column < hidden)
            where = (row + rank * share) * hidden + column
            own = tl.load(x_ptr + where, mask=inside, other=0.0)
            residual = own
            if HAS_RESIDUAL:
                residual = tl.load(residual_ptr + where, mask=inside, other=0.0)
            total = _sum(slots, slot_stride, own, row * hidden + column, inside, rank, came, WORLD, INTERPRETED)
            if HAS_RESIDUAL:
                total += _wide(residual, INTERPRETED)
            stored = _rounded(total, own.dtype, INTERPRETED)
            for step in tl.static_range(WORLD):  # to this rank, too, which norms its rows as it does the others'
                peer = (rank + step) % WORLD
                there = _buffer(buffers_ptr, peer, half * half_bytes, x_ptr) + WORLD * slot_stride
                tl.store(there + where, stored, mask=inside)
    if PHASE == 0:
        broken |= 1 - came
        if PARTS == 1:
            came &= meet(signals_ptr, state_ptr, fault_ptr + local, rank, block, broken, timeout, 2, WORLD, WORLD_PAD)
        else:
            came &= meet_owners(buffers_ptr, 2 * half_bytes, state_ptr, fault_ptr + local, rank, block, part, broken,
                                timeout, 2, WORLD, WORLD_PAD, PARTS)  # fmt: skip
    if PHASE == 0 or PHASE == 3:
        column = tl.arange(0, COLUMNS)[None, :]
        gamma = _gamma(gamma_ptr, hidden, COLUMNS, ALIKE)
        sums = slots + WORLD * slot_stride
        place = tl.arange(0, TOGETHER * ROWS)[:, None]
        for tile in range(block, tl.cdiv(share, ROWS), blocks):
            for first in range(0, WORLD // PARTS, TOGETHER):
                owner = (first + place // ROWS) * PARTS + part
                row = (tile * ROWS + place % ROWS).to(tl.int64)
                inside = (row < share) & (owner < WORLD) & (row + owner * share < tokens) & (column < hidden)
                where = (row + owner * share) * hidden + column
                total = _wide(tl.load(sums + where, mask=inside, other=0.0), INTERPRETED)
                total = tl.where(came != 0, total, float("nan"))
                _finish(total, gamma, normed_ptr, sum_ptr, where, inside, hidden, eps, INTERPRETED)


@triton.jit
def _buffer(buffers_ptr, rank, offset, like_ptr):
    """A rank's buffer from `offset` bytes on, in elements of `like_ptr`. Every offset here is a multiple of 16."""
    return tl.multiple_of((tl.load(buffers_ptr + rank) + offset).to(like_ptr.dtype), 16)


@triton.jit
def _push(buffers_ptr, offset, slot_stride, x_ptr, own, where, inside, rank, WORLD: tl.constexpr):
    for step in tl.static_range(1, WORLD):
        peer = (rank + step) % WORLD  # not all to the same one at once
        there = _buffer(buffers_ptr, peer, offset, x_ptr) + rank.to(tl.int64) * slot_stride
        tl.store(there + where, own, mask=inside)


@triton.jit
def _sum(
    slots, slot_stride, own, where, inside, rank, came, WORLD: tl.constexpr, INTERPRETED: tl.constexpr
):  # fmt: skip
    """float32, in the order of the ranks; from the first, not from zero: -0 everywhere stays -0. What did not come is
    NaN: a wait that was given up must not look like a result."""
    total = _wide(own, INTERPRETED)
    for source in tl.static_range(WORLD):
        theirs = tl.load(slots + source * slot_stride + where, mask=inside & (source != rank), other=0.0)
        part = _wide(tl.where(source == rank, own, theirs), INTERPRETED)
        if source == 0:
            total = part
        else:
            total += part
    return tl.where(came != 0, total, float("nan"))


@triton.jit
def _gamma(gamma_ptr, hidden, COLUMNS: tl.constexpr, ALIKE: tl.constexpr):
    """[1, COLUMNS]. Triton lays out all tiles of a shape for the widest load that one of them allows, and in that order
    squares are added. Where gamma's is wider than a row's it is loaded in one dimension: else it would decide the order
    beside a single row, and not beside several."""
    if ALIKE:
        column = tl.arange(0, COLUMNS)[None, :]
        return tl.load(gamma_ptr + column, mask=column < hidden, other=0.0)
    column = tl.arange(0, COLUMNS)
    return tl.load(gamma_ptr + column, mask=column < hidden, other=0.0)[None, :]


@triton.jit
def _finish(total, gamma, normed_ptr, sum_ptr, where, inside, hidden, eps, INTERPRETED: tl.constexpr):
    """Rounds the sum, writes it, and writes the norm of what was written."""
    stored = _rounded(total, sum_ptr.dtype.element_ty, INTERPRETED)
    tl.store(sum_ptr + where, stored, mask=inside)
    value = tl.where(inside, _wide(stored, INTERPRETED), 0.0)
    scale = tl.rsqrt(tl.sum(value * value, axis=1) / hidden + eps)
    normed = value * scale[:, None] * _wide(gamma, INTERPRETED)
    tl.store(normed_ptr + where, _rounded(normed, normed_ptr.dtype.element_ty, INTERPRETED), mask=inside)


@triton.jit
def _wide(value, INTERPRETED: tl.constexpr):
    """As float32: the interpreter takes subnormals of bfloat16 for zero."""
    if INTERPRETED and value.dtype == tl.bfloat16:
        return (value.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return value.to(tl.float32)


@triton.jit
def _rounded(value, dtype: tl.constexpr, INTERPRETED: tl.constexpr):
    """To the nearest, ties to even: the interpreter cuts bfloat16 off."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = value.to(tl.int32, bitcast=True)
        bits = tl.where(value == value, bits + 0x7FFF + ((bits >> 16) & 1), bits | 0x400000)
        return (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return value.to(dtype)
