"""What runs on the device: a grouped product with two epilogues, and the sum over a token's slots."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from moe_fuzz.kernels.align import local_experts
from moe_fuzz.kernels.experts_bf16.epilogue import biases_of, gated, relu2, rounded, scaled_back, weighted
from moe_fuzz.kernels.experts_bf16.tiles import slots_of, tile_at, weights_of


# Triton makes a binary anew for what it might use of an argument: that it is 1, or a multiple of 16. Of these it has no
# use, and each would double the number of binaries, which take seconds to compile.
@triton.jit(
    do_not_specialize=["slots", "most_blocks", "top_k", "per_row", "num_ids", "num_experts", "row_even", "row_odd",
                       "row_step", "bias_stride_e", "bias_stride_r", "weights_stride_t", "weights_stride_k",
                       "ids_stride_t", "ids_stride_k", "map_stride"],
    do_not_specialize_on_alignment=["bias_ptr", "weights_ptr", "alpha_ptr", "ids_ptr", "map_ptr", "sorted_ptr",
                                    "expert_ids_ptr", "padded_ptr"],
)  # fmt: skip
def grouped_product_kernel(
    a_ptr, w_ptr, bias_ptr, weights_ptr, out_ptr,  # [slots / per_row, D], [E, R, D], [E, R], [T, k], [slots, width]
    alpha_ptr,  # [E]: what the product of each expert is multiplied by, at once
    ids_ptr, map_ptr,  # [T, k], [G]: where the program groups the slots itself
    sorted_ptr, expert_ids_ptr, padded_ptr,  # where `align` has done it
    slots, most_blocks, top_k, per_row, num_ids, num_experts, depth, width,
    row_even, row_odd, row_step,  # the row of w of an even and an odd column of a tile: + row_step * output column
    a_stride_r, a_stride_d, w_stride_e, w_stride_r, w_stride_d, bias_stride_e, bias_stride_r,
    weights_stride_t, weights_stride_k, ids_stride_t, ids_stride_k, map_stride,
    ACTIVATION: tl.constexpr,  # of a gate and an up-projection in neighbouring columns; relu2 and none have no gate
    WEIGHT: tl.constexpr,  # "none" | "input": on the product, before the bias | "output": on the result
    HAS_ALPHA: tl.constexpr, ALPHA: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_MAP: tl.constexpr,
    GROUPED: tl.constexpr,  # whether `align` has run
    EVEN: tl.constexpr,  # D is a multiple of BLOCK_D
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr,
    OVERLAPS: tl.constexpr,  # launched while the kernel before it still runs, and lets the next one be
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """out[slot] = epilogue(a[slot // per_row] @ w[expert of slot].T), for the slots that have an expert.

    A tile is BLOCK_M slots of one expert times BLOCK_N rows of w. Rows of `out` of dropped slots stay unwritten.
    """
    GATED: tl.constexpr = ACTIVATION == "silu" or ACTIVATION == "gelu" or ACTIVATION == "swiglu_oai"
    COLUMNS: tl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N  # of the output, in a tile
    tiles_n = tl.cdiv(width, COLUMNS)
    if OVERLAPS:
        tl.extra.cuda.gdc_launch_dependents()  # they start once every program of this launch has
    # Far fewer blocks than the worst case may be in use, above all on a rank with few of the experts. So there are less
    # programs than tiles, and a program without one is not launched in vain again and again.
    blocks = tl.load(padded_ptr) // BLOCK_M if GROUPED else most_blocks
    for tile in range(tl.program_id(0), blocks * tiles_n, tl.num_programs(0)):
        block, tile_n = tile_at(tile, blocks, tiles_n, GROUP)
        expert, slot = slots_of(
            block, sorted_ptr, expert_ids_ptr, ids_ptr, map_ptr, slots, top_k, num_ids, num_experts,
            ids_stride_t, ids_stride_k, map_stride, HAS_MAP, BLOCK_M, GROUPED,
        )  # fmt: skip
        if expert >= 0:
            ok = slot < slots  # [M]
            n = tl.arange(0, BLOCK_N)
            if GATED:
                # Gate and up-projection stand side by side, so a thread has both in its registers at the end.
                column = tl.minimum(tile_n * COLUMNS + n // 2, width - 1)  # [N]; past the end: any row that exists
                row = tl.where(n % 2 == 0, row_even, row_odd) + column * row_step
            else:
                row = row_even + tl.minimum(tile_n * COLUMNS + n, width - 1) * row_step
            d = tl.arange(0, BLOCK_D).to(tl.int64)
            # 64 bits throughout: E * 2I * H and T * H pass 2^31
            a = a_ptr + (slot // per_row).to(tl.int64)[:, None] * a_stride_r + d[None, :] * a_stride_d  # [M, D']
            w = w_ptr + expert.to(tl.int64) * w_stride_e
            w = w + row.to(tl.int64)[None, :] * w_stride_r + d[:, None] * w_stride_d  # [D', N]
            # Of the epilogue, but read here, where nobody waits for it.
            if WEIGHT != "none":
                weight = weights_of(weights_ptr, slot, ok, top_k, weights_stride_t, weights_stride_k)[:, None]  # [M, 1]
            if HAS_BIAS:
                bias = biases_of(bias_ptr, expert, row, bias_stride_e, bias_stride_r)[None, :]  # [1, N]
            if HAS_ALPHA:
                alpha = tl.load(alpha_ptr + expert)
            if OVERLAPS:
                tl.extra.cuda.gdc_wait()  # `a` is what the kernel before writes; all read so far is older
            sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for done in range(0, depth, BLOCK_D):
                if EVEN:
                    left = tl.load(a, mask=ok[:, None], other=0.0)
                    right = tl.load(w)
                else:
                    inside = d < depth - done
                    left = tl.load(a, mask=ok[:, None] & inside[None, :], other=0.0)
                    right = tl.load(w, mask=inside[:, None], other=0.0)
                if INTERPRETED:  # its dot takes the bits of bfloat16 for integers
                    left, right = left.to(tl.float32), right.to(tl.float32)
                sums = tl.dot(left, right, sums)
                a += tl.cast(BLOCK_D, tl.int64) * a_stride_d  # columns may stand 2^31 / BLOCK_D apart, or further
                w += tl.cast(BLOCK_D, tl.int64) * w_stride_d

            if HAS_ALPHA:
                sums = scaled_back(sums, alpha, ALPHA)
            if WEIGHT == "input":
                sums = weighted(sums, weight)
            if HAS_BIAS:
                sums += bias
            if GATED:
                gate, up = tl.split(tl.reshape(sums, (BLOCK_M, COLUMNS, 2)))
                result = gated(gate, up, ACTIVATION)  # [M, COLUMNS]
            elif ACTIVATION == "relu2":
                result = relu2(sums)
            else:
                result = sums
            if WEIGHT == "output":
                result = weighted(result, weight)
            column = tile_n * COLUMNS + tl.arange(0, COLUMNS)
            tl.store(
                out_ptr + slot.to(tl.int64)[:, None] * width + column[None, :],
                rounded(result, out_ptr.dtype.element_ty, INTERPRETED), mask=ok[:, None] & (column < width)[None, :],
            )  # fmt: skip
    if OVERLAPS:
        # Programs without a tile too: whoever waits for this launch takes the one before it for done as well.
        tl.extra.cuda.gdc_wait()


@triton.jit(
    do_not_specialize=["tokens", "top_k", "num_ids", "num_experts", "ids_stride_t", "ids_stride_k", "map_stride"],
    do_not_specialize_on_alignment=["ids_ptr", "map_ptr"],
)
def sum_slots_kernel(
    slots_ptr, ids_ptr, map_ptr, out_ptr,  # [T, k, H], [T, k], [G], [T, H]
    tokens, top_k, hidden, num_ids, num_experts,
    ids_stride_t, ids_stride_k, map_stride,
    HAS_MAP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, UNROLL: tl.constexpr,
    OVERLAPS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """out[t] = the sum of its slots in ascending order. A dropped slot has no row: what stands there is never read."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [R]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < tokens)[:, None] & (column < hidden)[None, :]  # [R, C]
    if OVERLAPS:
        tl.extra.cuda.gdc_wait()
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, top_k, UNROLL):
        for nth in tl.static_range(UNROLL):  # loads that do not wait for each other
            ok = (row < tokens) & (first + nth < top_k)
            place = row * ids_stride_t + tl.cast(first + nth, tl.int64) * ids_stride_k
            ids = tl.load(ids_ptr + place, mask=ok, other=-1)
            kept = local_experts(ids, map_ptr, map_stride, num_ids, num_experts, ok, HAS_MAP) >= 0
            at = (row * top_k + first + nth)[:, None] * hidden + column[None, :]
            total += tl.load(slots_ptr + at, mask=inside & kept[:, None], other=0.0).to(tl.float32)
    tl.store(
        out_ptr + row[:, None] * hidden + column[None, :], rounded(total, out_ptr.dtype.element_ty, INTERPRETED),
        mask=inside,
    )  # fmt: skip
