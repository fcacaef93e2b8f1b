"""What runs before the products: activations into their order, quantized first if asked for; weights decoded as a whole."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from moe_fuzz.kernels.experts_bf16.kernels import _rounded
from moe_fuzz.kernels.experts_nvfp4.decode import decode_blocks, place


@triton.jit(do_not_specialize=["rows", "columns"])
def reorder_kernel(
    x_ptr, global_ptr, out_ptr,  # [T, D], [1], [T, pitch]
    rows, columns, pitch, x_stride_r, x_stride_c,
    QUANTIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, OVERLAPS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """out[t, place(d)] = x[t, d], and 0 beyond D; with `QUANTIZE` what NVFP4 leaves of it, times the global scale."""
    if OVERLAPS:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    x = tl.load(x_ptr + row[:, None] * x_stride_r + column.to(tl.int64)[None, :] * x_stride_c, mask=inside, other=0.0)
    if QUANTIZE:
        blocks = tl.reshape(x.to(tl.float32), (ROWS, COLUMNS // 16, 16))
        x = tl.reshape(_quantized(blocks, tl.load(global_ptr)), (ROWS, COLUMNS))
    tl.store(
        out_ptr + row[:, None] * pitch + place(column)[None, :], _rounded(x, out_ptr.dtype.element_ty, INTERPRETED),
        mask=(row < rows)[:, None] & (column < pitch)[None, :],
    )  # fmt: skip


@triton.jit
def usable(global_scale):
    """The global scale, or 0 where it is no normal number above 0: then every code and every scale is 0."""
    global_scale = global_scale.to(tl.float32)
    return tl.where((global_scale >= 1.1754943508222875e-38) & (global_scale < float("inf")), global_scale, 0.0)


@triton.jit
def _quantized(blocks, global_scale):
    """code * scale of each number of [.., 16], by `reference/nvfp4.py::nvfp4_quantize`, operation by operation."""
    given = usable(global_scale)
    safe = tl.where(given > 0.0, given, 1.0)
    nan = blocks != blocks
    size = tl.where(nan, 0.0, tl.abs(blocks))
    amax = tl.max(size, axis=2, keep_dims=True)
    ideal = tl.where(given > 0.0, amax * tl.div_rn(safe, 6.0), 0.0)
    scale = _nearest_e4m3(tl.minimum(ideal, 448.0))
    decode = scale * tl.div_rn(1.0, safe)
    factor = tl.minimum(tl.div_rn(1.0, tl.where(decode > 0.0, decode, 1.0)), 3.4028234663852886e38)
    factor = tl.where(decode > 0.0, factor, 3.4028234663852886e38)  # the scale over the global one underflowed
    code = tl.minimum(size * factor, 6.0)
    code = tl.where(size == float("inf"), 6.0, code)
    code = _nearest_e2m1(code)
    value = tl.where(scale > 0.0, code * scale, 0.0)
    return tl.where(blocks < 0.0, -value, value)


@triton.jit
def _nearest_e4m3(value):
    """0 to 448, ties to even."""
    bits = value.to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000
    tiny = (value + 24576.0) - 24576.0  # to a multiple of 2^-9: float32 has no finer step there
    return tl.where(value < 0.015625, tiny, bits.to(tl.float32, bitcast=True))


@triton.jit
def _nearest_e2m1(value):
    """0 to 6, ties to even: by the step of each range."""
    half = (value + 6291456.0) - 6291456.0
    whole = (value + 12582912.0) - 12582912.0
    two = (value + 25165824.0) - 25165824.0
    return tl.where(value < 2.0, half, tl.where(value < 4.0, whole, two))


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
    values = decode_blocks(codes, scales, out_ptr.dtype.element_ty, INTERPRETED)  # [R, 16 B], in the order of `place`
    p = tl.arange(0, 16 * BLOCKS)
    q = p % 128
    column = p // 128 * 128 + q // 2 % 8 * 16 + q // 16 % 4 + q // 64 * 8 + q % 2 * 4  # `place` undone
    column += nth % tiles_k * BLOCKS * 16
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
