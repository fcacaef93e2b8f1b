"""`nvfp4_quantize` in Triton. Its contract is the docstring of `reference/nvfp4.py`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_INTERPRETED = triton.knobs.runtime.interpret
_BLOCK = 16
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ACTIVATIONS = (None, "silu")


def nvfp4_quantize(
    x: Tensor,  # [M, K] float32 | bfloat16 | float16, any strides; M >= 0, K a multiple of 16; [M, 2K] with silu
    global_scale: Tensor,  # [1] float32 | bfloat16; [E] with expert_ids
    layout: str = "linear",  # "linear" | "swizzled"
    *,
    expert_ids: Tensor | None = None,  # [M] int32 | int64: the expert of each row
    activation: str | None = None,  # "silu": quantizes silu(x[:, :K]) * x[:, K:]
    out: tuple[Tensor, Tensor] | None = None,  # the two results, contiguous
) -> tuple[Tensor, Tensor]:  # codes [M, K/2] uint8, scales [M, K/16] or swizzled float8_e4m3fn
    """Quantizes rows to NVFP4 in one launch, which also writes the padding of the scales.

    The contract is that of `reference/nvfp4.py::nvfp4_quantize`, to the bit; only `silu` is within the error of the
    exponential. Nothing waits for the device.

    Raises ValueError for anything outside these shapes, dtypes and names.
    """
    rows, columns = _sizes(x, activation)
    _check_scale(x, global_scale, expert_ids)
    codes_shape, scales_shape = nvfp4_shapes(rows, columns, layout)
    if out is None:
        out = (
            x.new_empty(codes_shape, dtype=torch.uint8),
            x.new_empty(scales_shape, dtype=torch.float8_e4m3fn),
        )
    codes, scales = out
    for name, tensor, shape, dtype in (
        ("codes", codes, codes_shape, torch.uint8), ("scales", scales, scales_shape, torch.float8_e4m3fn)
    ):  # fmt: skip
        if tensor.shape != shape or tensor.dtype != dtype or not tensor.is_contiguous():
            raise ValueError(f"out: {name} must be contiguous {dtype} {list(shape)}, "
                             f"not {tensor.dtype} {list(tensor.shape)}")  # fmt: skip
    if rows == 0:
        return out

    tile_rows, tile_blocks = _tile(scales_shape[0], scales_shape[1])
    _quantize_kernel[(triton.cdiv(scales_shape[0], tile_rows), triton.cdiv(scales_shape[1], tile_blocks))](
        x, global_scale, expert_ids,  # inputs
        codes, scales.view(torch.uint8),  # outputs
        rows, columns // _BLOCK, scales_shape[0], scales_shape[1], len(global_scale),  # sizes
        *x.stride(), global_scale.stride(0), expert_ids.stride(0) if expert_ids is not None else 0,  # strides
        SWIZZLED=layout == "swizzled", BY_EXPERT=expert_ids is not None, SILU=activation == "silu",
        ROWS=tile_rows, BLOCKS=tile_blocks, num_warps=4,
    )  # fmt: skip
    return out


def nvfp4_shapes(rows: int, columns: int, layout: str) -> tuple[tuple[int, int], tuple[int, int]]:
    """The shapes of codes and scales for [rows, columns]."""
    if layout not in ("linear", "swizzled"):
        raise ValueError(f"layout must be linear or swizzled, not {layout!r}")
    blocks = columns // _BLOCK
    if layout == "swizzled":
        return (rows, columns // 2), (triton.cdiv(rows, 128) * 128, triton.cdiv(blocks, 4) * 4)
    return (rows, columns // 2), (rows, blocks)


def _sizes(x: Tensor, activation: str | None) -> tuple[int, int]:
    if x.dim() != 2 or x.dtype not in _DTYPES:
        raise ValueError(f"x must be [M, K] in float32, bfloat16 or float16, not {list(x.shape)} {x.dtype}")
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation must be None or silu, not {activation!r}")
    width = 2 * _BLOCK if activation else _BLOCK
    if x.shape[1] % width or not x.shape[1]:
        raise ValueError(f"x must have a multiple of {width} columns, not {x.shape[1]}: pad with zeros")
    return x.shape[0], x.shape[1] // (2 if activation else 1)


def _check_scale(x: Tensor, global_scale: Tensor, expert_ids: Tensor | None) -> None:
    if (
        global_scale.dim() != 1 or not len(global_scale) or global_scale.device != x.device
        or global_scale.dtype not in (torch.float32, torch.bfloat16)  # not anything else: flashinfer#3398
    ):  # fmt: skip
        raise ValueError(f"global_scale must be [1], or [E] with expert_ids, in float32 or bfloat16 on {x.device}, "
                         f"not {list(global_scale.shape)} {global_scale.dtype} on {global_scale.device}")  # fmt: skip
    if expert_ids is None and len(global_scale) != 1:
        raise ValueError(f"{len(global_scale)} global scales need expert_ids")
    if expert_ids is not None and (
        expert_ids.shape != (x.shape[0],) or expert_ids.dtype not in (torch.int32, torch.int64)
        or expert_ids.device != x.device
    ):  # fmt: skip
        raise ValueError(f"expert_ids must be [{x.shape[0]}] int32 or int64 on {x.device}, "
                         f"not {list(expert_ids.shape)} {expert_ids.dtype} on {expert_ids.device}")  # fmt: skip


def _tile(rows: int, blocks: int) -> tuple[int, int]:
    """Rows and blocks of 16 of a program. 4096 elements are 32 a thread; few rows are spread over more programs.

    In the interpreter a program costs the same whatever its tile: at most 8 of them where that is less than 2^17
    elements each.
    """
    if _INTERPRETED:
        tile_blocks = min(triton.next_power_of_2(blocks), 512)
        return min(triton.next_power_of_2(rows), max(1, (1 << 13) // tile_blocks)), tile_blocks
    tile_blocks = min(triton.next_power_of_2(blocks), 32)
    return min(triton.next_power_of_2(rows), 256 // tile_blocks, 16), tile_blocks


@triton.jit(do_not_specialize=["rows", "blocks", "scale_rows", "scale_columns", "num_scales"])
def _quantize_kernel(
    x_ptr, global_ptr, expert_ptr,  # [M, K] or [M, 2K], [1] or [E], [M]
    codes_ptr, scales_ptr,  # [M, K/2], [M', K/16'] bytes
    rows, blocks, scale_rows, scale_columns, num_scales,
    stride_m, stride_k, stride_scale, stride_expert,
    SWIZZLED: tl.constexpr, BY_EXPERT: tl.constexpr, SILU: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """A tile of rows by blocks. Where it hangs over the data, into the padding of the scales, it stores zero there:
    who allocates them does not clear them (vllm#38148, vllm#42988)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # [R]
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)  # [B]
    real = (row < rows)[:, None] & (block < blocks)[None, :]  # [R, B]
    wide = row.to(tl.int64)

    known = row < rows
    which = tl.zeros((ROWS,), tl.int64)
    if BY_EXPERT:
        which = tl.load(expert_ptr + wide * stride_expert, mask=known, other=-1).to(tl.int64)
        known = known & (which >= 0) & (which < num_scales)  # before it is an index
    scale = _widened(tl.load(global_ptr + which * stride_scale, mask=known, other=0.0))  # [R]
    usable = (scale >= 1.1754943508222875e-38) & (scale < float("inf"))  # NaN is neither
    scale = tl.where(usable, scale, 1.0)

    column = (block[:, None] * 16 + tl.arange(0, 16)[None, :]).to(tl.int64)  # [B, 16]
    where = x_ptr + wide[:, None, None] * stride_m + column[None, :, :] * stride_k
    value = _widened(tl.load(where, mask=real[:, :, None], other=0.0))  # [R, B, 16]
    if SILU:
        half = blocks.to(tl.int64) * 16 * stride_k
        up = _widened(tl.load(where + half, mask=real[:, :, None], other=0.0))
        value = _rounded(tl.div_rn(value, 1.0 + tl.exp(-value)) * up, x_ptr.dtype.element_ty)

    size = tl.where(value == value, tl.abs(value), 0.0)  # a NaN has no part
    step = tl.div_rn(scale, tl.full((ROWS,), 6.0, tl.float32))  # exact division: a reciprocal misses ties
    ideal = tl.minimum(tl.max(size, axis=2) * step[:, None], 448.0)  # beyond it the byte is NaN (Model-Optimizer#1397)
    byte = tl.where(real & usable[:, None], _e4m3_bytes(ideal), 0)  # [R, B]

    inverse = tl.div_rn(tl.full((ROWS,), 1.0, tl.float32), scale)
    decode = tl.where(byte == 0, 1.0, _e4m3_values(byte) * inverse[:, None])
    encode = tl.minimum(tl.div_rn(tl.full((ROWS, BLOCKS), 1.0, tl.float32), decode), 3.4028234663852886e38)
    code = _e2m1_codes(value, size, encode[:, :, None])
    code = tl.where((byte == 0)[:, :, None], 0, code)  # [R, B, 16]
    low, high = tl.split(tl.reshape(code, (ROWS, BLOCKS, 8, 2)))
    pair = (block[:, None] * 8 + tl.arange(0, 8)[None, :]).to(tl.int64)  # [B, 8]
    tl.store(
        codes_ptr + wide[:, None, None] * (blocks * 8) + pair[None, :, :],
        (low | (high << 4)).to(tl.uint8), mask=real[:, :, None],
    )  # fmt: skip

    place = wide[:, None] * scale_columns + block[None, :]
    if SWIZZLED:
        tiles = scale_columns // 4  # of the padded columns: from the real ones all rows of the second tile go astray
        tile = (wide // 128)[:, None] * tiles + (block // 4)[None, :]
        place = (tile * 32 + (wide % 32)[:, None]) * 16 + (wide // 32 % 4)[:, None] * 4 + (block % 4)[None, :]
    there = (row < scale_rows)[:, None] & (block < scale_columns)[None, :]
    tl.store(scales_ptr + place, byte.to(tl.uint8), mask=there)


@triton.jit
def _e4m3_bytes(value):
    """The byte of E4M3 nearest to a float32 from 0 to 448, ties to even, as int32.

    In integers: `value + 2^14`, which would round subnormals, may be fused with the product that gave the value.
    """
    bits = value.to(tl.int32, bitcast=True)
    exponent = bits >> 23
    mantissa = (bits & 0x7FFFFF) | 0x800000
    shift = tl.minimum(tl.maximum(141 - exponent, 20), 25)  # 20 leaves four bits; below 2^-6, multiples of 2^-9
    kept = (mantissa + ((1 << (shift - 1)) - 1) + ((mantissa >> shift) & 1)) >> shift
    return tl.maximum(exponent - 121, 0) * 8 + kept


@triton.jit
def _e4m3_values(byte):
    """float32 of bytes 0 to 0x7E, as int32."""
    normal = (((byte >> 3) + 120) << 23 | (byte & 7) << 20).to(tl.float32, bitcast=True)
    return tl.where(byte < 8, byte.to(tl.float32) * 0.001953125, normal)


@triton.jit
def _e2m1_codes(value, size, encode):
    """The codes of values: of the nearest of 0 0.5 1 1.5 2 3 4 6, ties to even. size: |value|, 0 for NaN."""
    scaled = tl.where(size == float("inf"), 6.0, size * encode)
    scaled = tl.where(scaled == scaled, scaled, 0.0)
    code = (scaled > 0.25).to(tl.int32) + (scaled >= 0.75).to(tl.int32) + (scaled > 1.25).to(tl.int32)
    code += (scaled >= 1.75).to(tl.int32) + (scaled > 2.5).to(tl.int32) + (scaled >= 3.5).to(tl.int32)
    code += (scaled > 5.0).to(tl.int32)
    sign = (value.to(tl.int32, bitcast=True) >> 28) & 8
    return tl.where(value == value, code | sign, 0)


@triton.jit
def _widened(value):
    """float32 of any float. bfloat16 by its bits: the interpreter's cast makes other numbers of subnormals."""
    if value.dtype == tl.bfloat16:
        return (value.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return value.to(tl.float32)


@triton.jit
def _rounded(value, DTYPE: tl.constexpr):
    """float32 rounded to the dtype and back. To bfloat16 in integers: the interpreter's cast cuts off."""
    if tl.float32 == DTYPE:
        return value
    if tl.bfloat16 == DTYPE:
        bits = value.to(tl.uint32, bitcast=True)
        even = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        return tl.where(value == value, even.to(tl.float32, bitcast=True), value)
    return value.to(DTYPE).to(tl.float32)
