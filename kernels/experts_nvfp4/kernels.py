"""The product that decodes its weights as they come, in registers, from which the tensor cores take them."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from moe_fuzz.kernels.experts_bf16.epilogue import biases_of, gated, relu2, rounded, scaled_back, weighted
from moe_fuzz.kernels.experts_bf16.tiles import tile_at, weights_of
from moe_fuzz.kernels.experts_nvfp4.decode import decode_blocks, placed, shift_back
from moe_fuzz.kernels.experts_nvfp4.prepare import scale_offset, usable


@triton.jit(
    do_not_specialize=["slots", "top_k", "per_row", "width", "rows", "row_even", "row_odd", "row_step"]
)  # fmt: skip
def fp4_product_kernel(
    a_ptr, w_ptr, scale_ptr,  # [slots / per_row, pitch] in the order of `place`, [E, R, D/16] int64, scales
    a_scale_ptr,  # [slots / per_row, D/16], where SCALED; then a is [slots / per_row, D/2] codes, w [E, R, D/2] bytes
    alpha_ptr, global_ptr, bias_ptr, weights_ptr, out_ptr,  # [E], [1], [E, R], [T, k], [slots, out_pitch]
    sorted_ptr, expert_ids_ptr, padded_ptr,  # what `align` has made
    slots, top_k, per_row,
    rows, units, pitch, width, out_pitch,  # rows of an expert, D / 16 / UNIT, columns of the output and its rows
    row_even, row_odd, row_step,  # the row of w of a gate and of an up-projection: + row_step * output column
    bias_stride_e, bias_stride_r, weights_stride_t, weights_stride_k,
    ACTIVATION: tl.constexpr,  # of gates and up-projections; relu2 and none have no gate
    WEIGHT: tl.constexpr,  # "none" | "input": on the product, before the bias | "output": on the result
    HAS_BIAS: tl.constexpr, HAS_GLOBAL: tl.constexpr, SWIZZLED: tl.constexpr,
    SCALED: tl.constexpr,  # the tensor cores take codes and scales
    REORDERS: tl.constexpr,  # `out` is the next product's `a`: in its order, and 0 beyond the width
    EVEN: tl.constexpr, UNIT: tl.constexpr,  # D is a multiple of BLOCK_D; its blocks of 16 are multiples of UNIT
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, GROUP_M: tl.constexpr,
    SORTED_LATE: tl.constexpr,  # the kernel before it, or the one before that, did the grouping
    OVERLAPS: tl.constexpr,  # launched while the kernel before it still runs, and lets the next one be
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """out[slot] = epilogue(alpha * w[expert of slot] @ a[slot // per_row]), for the slots that have an expert.

    A tile is BLOCK_N rows of w times BLOCK_M slots of one expert: rows of w are the rows of the product, so that the
    tensor cores take them from registers. Rows of `out` of dropped slots stay unwritten.
    """
    GATED: tl.constexpr = ACTIVATION == "silu" or ACTIVATION == "gelu" or ACTIVATION == "swiglu_oai"
    COLUMNS: tl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N  # of the output, in a tile
    BLOCKS: tl.constexpr = BLOCK_D // 16
    DTYPE: tl.constexpr = a_ptr.dtype.element_ty
    tiles_n = tl.cdiv(out_pitch if REORDERS else width, COLUMNS)
    if OVERLAPS:
        if SORTED_LATE:  # and not before the next launch may start, which takes the grouping for done
            tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()  # they start once every program of this launch has
    blocks = tl.load(padded_ptr) // BLOCK_M
    for tile in range(tl.program_id(0), blocks * tiles_n, tl.num_programs(0)):
        block, tile_n = tile_at(tile, blocks, tiles_n, GROUP_M)
        expert = tl.load(expert_ids_ptr + block)
        slot = tl.load(sorted_ptr + block * BLOCK_M + tl.arange(0, BLOCK_M))
        if expert >= 0:
            ok = slot < slots  # [M]
            n = tl.arange(0, BLOCK_N)
            if GATED:
                # Eight gates, then their up-projections: both lie in the registers of one thread at the end.
                column = tl.minimum(tile_n * COLUMNS + n // 16 * 8 + n % 8, width - 1)  # [N]; past the end: any row
                row = tl.where(n % 16 < 8, row_even, row_odd) + column * row_step
            else:
                row = row_even + tl.minimum(tile_n * COLUMNS + n, width - 1) * row_step
            b = tl.arange(0, BLOCKS)
            p = tl.arange(0, BLOCK_D)
            # 64 bits throughout: E * 2I * H and T * H pass 2^31
            stride = tl.cast(units, tl.int64) * UNIT  # not `units.to`: an argument that is 1 is a number there
            s = scale_ptr + scale_offset(expert, row, b, rows, units * UNIT, SWIZZLED)
            if SCALED:
                byte = tl.arange(0, BLOCK_D // 2)
                line = expert.to(tl.int64) * rows + row.to(tl.int64)
                w = w_ptr + line[:, None] * (stride * 8) + byte[None, :]  # [N, D'/2]
                a = a_ptr + (slot // per_row).to(tl.int64)[None, :] * pitch + byte[:, None]  # [D'/2, M]
                a_scale = a_scale_ptr + (slot // per_row).to(tl.int64)[:, None] * stride + b[None, :]  # [M, B]
            else:
                w = w_ptr + expert.to(tl.int64) * rows * stride + row.to(tl.int64)[:, None] * stride + b[None, :]
                a = a_ptr + (slot // per_row).to(tl.int64)[None, :] * pitch + p[:, None]  # [D', M]
            # Of the epilogue, but read here, where nobody waits for it.
            factor = tl.load(alpha_ptr + expert)
            if HAS_GLOBAL:
                given = usable(tl.load(global_ptr))
                factor = tl.where(given > 0.0, factor / given, factor)
            if WEIGHT != "none":
                weight = weights_of(weights_ptr, slot, ok, top_k, weights_stride_t, weights_stride_k)[None, :]  # [1, M]
            if HAS_BIAS:
                bias = biases_of(bias_ptr, expert, row, bias_stride_e, bias_stride_r)[:, None]  # [N, 1]
            if OVERLAPS:
                tl.extra.cuda.gdc_wait()  # `a` is what the kernel before writes; all read so far is older
            sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            depth = tl.where(tile_n * COLUMNS < width, units * UNIT, 0)  # beyond the width: zeros alone
            for done in range(0, depth, BLOCKS):
                if SCALED:
                    sums = _scaled_step(w, s, a, a_scale, sums, ok, depth - done, BLOCKS)
                    a += BLOCK_D // 2
                    w += BLOCK_D // 2
                    a_scale += BLOCKS
                else:
                    if EVEN:
                        here = ok[None, :]
                        codes = tl.load(w)
                        scales = tl.load(s)
                    else:
                        here = ok[None, :] & (p + done * 16 < pitch)[:, None]
                        inside = (b < depth - done)[None, :]
                        codes = tl.load(w, mask=inside, other=0)
                        scales = tl.load(s, mask=inside, other=0)
                    left = decode_blocks(codes, scales, DTYPE, INTERPRETED)  # [N, D']
                    right = tl.load(a, mask=here, other=0.0)  # [D', M]
                    if INTERPRETED:  # its dot takes the bits of bfloat16 for integers
                        right = right.to(tl.float32)
                    sums = tl.dot(left, right, sums)
                    a += BLOCK_D
                    w += BLOCKS
                s += BLOCKS * 128 if SWIZZLED else BLOCKS

            sums = scaled_back(sums, factor, 1.0 if SCALED else shift_back(DTYPE))
            if WEIGHT == "input":
                sums = weighted(sums, weight)
            if HAS_BIAS:
                sums += bias
            if GATED:
                pairs = tl.permute(tl.reshape(sums, (BLOCK_N // 16, 2, 8, BLOCK_M)), (0, 2, 3, 1))
                gate, up = tl.split(pairs)
                result = tl.reshape(gated(gate, up, ACTIVATION), (COLUMNS, BLOCK_M))
            elif ACTIVATION == "relu2":
                result = relu2(sums)
            else:
                result = sums
            if WEIGHT == "output":
                result = weighted(result, weight)
            column = tile_n * COLUMNS + tl.arange(0, COLUMNS)
            if REORDERS:
                result, column = placed(tl.where((column < width)[:, None], result, 0.0), tile_n * COLUMNS)
            tl.store(  # out_pitch is the width, but the compiler knows what divides it, and so how wide stores may be
                out_ptr + slot.to(tl.int64)[None, :] * out_pitch + column[:, None],
                rounded(result, out_ptr.dtype.element_ty, INTERPRETED),
                mask=ok[None, :] & (column < out_pitch)[:, None],
            )
    if OVERLAPS:
        # Also where no tile did: else this launch might end before the one before it, and with it the whole call.
        tl.extra.cuda.gdc_wait()


@triton.jit
def _scaled_step(w, s, a, a_scale, sums, ok, left, BLOCKS: tl.constexpr):
    """sums [N, M] and the product of codes and scales, as the tensor cores of sm_100 take them. left: blocks to come.

    Their scales have no sign: that of w goes to its codes. Those of a have none, as `nvfp4_quantize` made them.
    """
    b = tl.arange(0, BLOCKS)
    byte = tl.arange(0, BLOCKS * 8)
    codes = tl.load(w, mask=(byte < left * 8)[None, :], other=0)
    scales = tl.load(s, mask=(b < left)[None, :], other=0)
    signs = tl.broadcast_to((scales & 0x80)[:, :, None], (scales.shape[0], BLOCKS, 8))
    signs = tl.reshape(signs, codes.shape)
    codes = codes ^ (signs | signs >> 4)
    right = tl.load(a, mask=ok[None, :] & (byte < left * 8)[:, None], other=0)
    right_scales = tl.load(a_scale, mask=ok[:, None] & (b < left)[None, :], other=0)
    return tl.dot_scaled(
        codes, (scales & 0x7F).to(tl.float8e4nv, bitcast=True), "e2m1",
        right, right_scales.to(tl.float8e4nv, bitcast=True), "e2m1", sums,
    )  # fmt: skip
