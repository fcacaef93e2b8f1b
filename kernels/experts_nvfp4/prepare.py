"""What runs before the products: activations are quantized, if asked for, and reordered, and the first programs may
count slots for `align`; or all weights are decoded."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from moe_fuzz.kernels.align import _NUMBERS, _SCALARS, count_slots
from moe_fuzz.kernels.experts_bf16.epilogue import rounded
from moe_fuzz.kernels.experts_nvfp4.decode import decode_in_order, in_place, plain_code
from moe_fuzz.kernels.nvfp4 import _e2m1_codes, _e4m3_bytes, _e4m3_values


@triton.jit(do_not_specialize=["rows", *_NUMBERS], do_not_specialize_on_alignment=_SCALARS)
def reorder_kernel(
    x_ptr, global_ptr, out_ptr,  # [T, D], [1], [T, pitch]
    ids_ptr, map_ptr, counts_ptr, sorted_ptr, expert_ids_ptr, padded_ptr, inverse_ptr,  # of the sorting
    rows, columns, pitch, x_stride_r, x_stride_c,
    slots, top_k, num_experts, num_ids, block_size, blocks, chunks, stride_t, stride_k, map_stride,
    QUANTIZE: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr, OVERLAPS: tl.constexpr,
    INTERPRETED: tl.constexpr,
    COUNTS: tl.constexpr, HAS_MAP: tl.constexpr, CHUNK: tl.constexpr, PART: tl.constexpr, EXPERT_PAD: tl.constexpr,
    ONE: tl.constexpr,
):  # fmt: skip
    """out[t, place(d)] = x[t, d], and 0 beyond D; with `QUANTIZE` what NVFP4 leaves of it, times the global scale."""
    if OVERLAPS:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    nth = tl.program_id(0)
    if COUNTS:
        if nth < chunks:
            count_slots(
                ids_ptr, map_ptr, counts_ptr, sorted_ptr, expert_ids_ptr, padded_ptr, inverse_ptr,
                slots, top_k, num_experts, num_ids, block_size, blocks, chunks, stride_t, stride_k, map_stride,
                HAS_MAP, CHUNK, PART, EXPERT_PAD, ONE,
            )  # fmt: skip
        nth -= chunks
    if nth >= 0:
        _reorder_tile(nth, x_ptr, global_ptr, out_ptr, rows, columns, pitch, x_stride_r, x_stride_c,
                      QUANTIZE, TILE_ROWS, TILE_COLUMNS, INTERPRETED)  # fmt: skip


@triton.jit
def _reorder_tile(
    nth, x_ptr, global_ptr, out_ptr, rows, columns, pitch, x_stride_r, x_stride_c,
    QUANTIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    tiles_c = tl.cdiv(pitch, COLUMNS)
    row = (nth // tiles_c).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = nth % tiles_c * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    x = tl.load(x_ptr + row[:, None] * x_stride_r + column.to(tl.int64)[None, :] * x_stride_c, mask=inside, other=0.0)
    x = x.to(tl.float32)
    if QUANTIZE:
        blocks = tl.reshape(x, (ROWS, COLUMNS // 16, 16))
        x = tl.reshape(_quantized(blocks, tl.load(global_ptr)), (ROWS, COLUMNS))
    tl.store(
        out_ptr + row[:, None] * pitch + column[None, :],
        rounded(in_place(x), out_ptr.dtype.element_ty, INTERPRETED),
        mask=(row < rows)[:, None] & (column < pitch)[None, :],
    )  # fmt: skip


@triton.jit
def usable(global_scale):
    """The global scale, or 0 where it is no normal number above 0: then every code and every scale is 0."""
    global_scale = global_scale.to(tl.float32)
    return tl.where((global_scale >= 1.1754943508222875e-38) & (global_scale < float("inf")), global_scale, 0.0)


@triton.jit
def _quantized(blocks, global_scale):
    """code * scale of each number of [R, B, 16], as `nvfp4_quantize` makes them."""
    scale = usable(global_scale)
    real = scale > 0.0
    scale = tl.where(real, scale, 1.0)
    size = tl.where(blocks == blocks, tl.abs(blocks), 0.0)  # a NaN has no part
    byte = _e4m3_bytes(tl.minimum(tl.max(size, axis=2) * tl.div_rn(scale, 6.0), 448.0))  # [R, B]
    byte = tl.where(real, byte, 0)
    of_block = _e4m3_values(byte)
    decode = tl.where(byte == 0, 1.0, of_block * tl.div_rn(1.0, scale))
    encode = tl.minimum(tl.div_rn(tl.full(decode.shape, 1.0, tl.float32), decode), 3.4028234663852886e38)
    code = _e2m1_codes(blocks, size, encode[:, :, None])
    return plain_code(code) * of_block[:, :, None]


@triton.jit(do_not_specialize=["rows_13", "rows_2", "tiles_13", "experts"])
def decode_weights_kernel(
    w13_ptr, scales13_ptr, out13_ptr, w2_ptr, scales2_ptr, out2_ptr,  # [E, R, D/16] int64, scales, [E, R, D]
    rows_13, blocks_13, rows_2, blocks_2, tiles_13, experts,  # rows of an expert, blocks of a row, programs of w13
    SWIZZLED: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Both weights over `shift_back`, in the dtype of the outputs, their columns in order."""
    nth = tl.program_id(0)
    if nth < tiles_13:
        _decode_tile(nth, w13_ptr, scales13_ptr, out13_ptr, rows_13, blocks_13, experts,
                     SWIZZLED, ROWS, BLOCKS, INTERPRETED)  # fmt: skip
    else:
        _decode_tile(nth - tiles_13, w2_ptr, scales2_ptr, out2_ptr, rows_2, blocks_2, experts,
                     SWIZZLED, ROWS, BLOCKS, INTERPRETED)  # fmt: skip


@triton.jit
def _decode_tile(
    nth, w_ptr, scale_ptr, out_ptr, rows, blocks, experts,
    SWIZZLED: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    tiles_k = tl.cdiv(blocks, BLOCKS)
    line = (nth // tiles_k).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [R], of all experts' rows
    b = nth % tiles_k * BLOCKS + tl.arange(0, BLOCKS)
    inside = (line < rows.to(tl.int64) * experts)[:, None] & (b < blocks)[None, :]
    codes = tl.load(w_ptr + line[:, None] * blocks + b[None, :], mask=inside, other=0)
    at = scale_offset(line // rows, line % rows, b, rows, blocks, SWIZZLED)
    scales = tl.load(scale_ptr + at, mask=inside, other=0)
    values = decode_in_order(codes, scales, out_ptr.dtype.element_ty, INTERPRETED)  # [R, 16 B]
    column = nth % tiles_k * BLOCKS * 16 + tl.arange(0, 16 * BLOCKS)
    tl.store(
        out_ptr + line[:, None] * blocks * 16 + column[None, :], values.to(out_ptr.dtype.element_ty),
        mask=(line < rows.to(tl.int64) * experts)[:, None] & (column < blocks * 16)[None, :],
    )  # fmt: skip


@triton.jit
def scale_offset(expert, row, b, rows, blocks, SWIZZLED: tl.constexpr):
    """Where the scale of block b [B] of a row [R] of an expert lies: [R, B], 64 bits."""
    if SWIZZLED:  # tiles of 128 rows and 4 columns: 32 x 4 x 4 bytes
        tile = (expert.to(tl.int64) * tl.cdiv(rows, 128) + row // 128) * tl.cdiv(blocks, 4) * 512  # [R]
        return (tile + row % 32 * 16 + row // 32 % 4 * 4)[:, None] + (b // 4 * 512 + b % 4)[None, :]
    else:
        return (expert.to(tl.int64) * rows * blocks + row.to(tl.int64) * blocks)[:, None] + b[None, :]
