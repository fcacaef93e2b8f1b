"""Planted bugs of nvfp4_quantize: memory outside of what was given, other arithmetic than last time, graphs."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

Result = tuple[Tensor, Tensor]


def reads_scales_in_fours(x: Tensor, global_scale: Tensor, *, expert_ids: Tensor | None = None) -> Result:
    """vllm#40351: what there is of each expert is loaded in vectors of four, without a mask: past the last expert where
    4 does not divide their number."""
    if expert_ids is not None and len(x):
        count = len(global_scale)
        copied = torch.empty(-(-count // 4) * 4, dtype=torch.float32, device=x.device)
        _copy_in_fours_kernel[(1,)](global_scale, copied, triton.cdiv(count, 4), BLOCK=triton.next_power_of_2(count))
        global_scale = copied[:count]
    return _quantized(x, global_scale, expert_ids)


def clears_whole_vectors(x: Tensor, global_scale: Tensor, *, out: Result | None = None) -> Result:
    """flashinfer#3957: scales are cleared 16 bytes at a time before they are stored, past the end of the last row."""
    codes, scales = _quantized(x, global_scale, None)
    if out is None:
        return codes, scales
    if len(x):
        vectors = triton.cdiv(scales.numel(), 16)
        _clear_kernel[(triton.cdiv(vectors, 64),)](out[1].view(torch.uint8), vectors, BLOCK=64)
    for given, made in zip(out, (codes, scales), strict=True):
        given.view(torch.uint8).copy_(made.view(torch.uint8))
    return out


def offset_in_32_bits(x: Tensor, global_scale: Tensor) -> Result:
    """vllm#34279: row times stride in 32 bits. Beyond 2^31 elements it wraps, to before the rows."""
    copied = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if len(x):
        _copy_rows_kernel[(triton.cdiv(x.numel(), 1024),)](
            x, copied, x.numel(), x.shape[1], x.stride(0), x.stride(1), BLOCK=1024
        )
    return _quantized(copied, global_scale, None)


def tile_with_nan_by_reciprocals(x: Tensor, global_scale: Tensor, *, expert_ids: Tensor | None = None) -> Result:
    """vllm#37758: one NaN, and the 16 rows of its tile take another path. It multiplies by reciprocals."""
    slow = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    for first in range(0, len(x), 16):
        slow[first : first + 16] = x[first : first + 16].isnan().any()
    return _of_both(x, global_scale, expert_ids, slow)


def few_rows_by_reciprocals(x: Tensor, global_scale: Tensor, *, expert_ids: Tensor | None = None) -> Result:
    """aiter#2359: another kernel for few rows, 16 at most, with another arithmetic."""
    return _quantized(x, global_scale, expert_ids, fast=len(x) <= 16)


def rounds_at_random(x: Tensor, global_scale: Tensor, *, expert_ids: Tensor | None = None) -> Result:
    """TransformerEngine#3281: what is for training's gradients is left on: values near a tie fall either way."""
    return _quantized(x * (1 + (torch.rand(x.shape, device=x.device) - 0.5).to(x.dtype) * 2.0**-22), global_scale,
                      expert_ids)  # fmt: skip


def scale_read_on_host(x: Tensor, global_scale: Tensor) -> Result:
    """Megatron-LM#6999: the host asks the device for the global scale, which cannot be captured."""
    return _quantized(x, torch.full((1,), float(global_scale), device=x.device), None)


def reciprocals_in_a_graph(x: Tensor, global_scale: Tensor, *, expert_ids: Tensor | None = None) -> Result:
    """flashinfer#4841: another tactic is taken under graphs, with another arithmetic."""
    capturing = x.is_cuda and torch.cuda.is_current_stream_capturing()
    return _quantized(x, global_scale, expert_ids, fast=capturing)


# ---- a quantizer without a flaw: of finite numbers, scales that are not zero, the linear layout ----------------------


def _of_both(x: Tensor, global_scale: Tensor, expert_ids: Tensor | None, slow: Tensor) -> Result:
    one, other = (_quantized(x, global_scale, expert_ids, fast=fast) for fast in (False, True))
    codes = torch.where(slow[:, None], other[0], one[0])
    scales = torch.where(slow[:, None], other[1].view(torch.uint8), one[1].view(torch.uint8))
    return codes, scales.view(torch.float8_e4m3fn)


def _quantized(x: Tensor, global_scale: Tensor, expert_ids: Tensor | None, fast: bool = False) -> Result:
    blocks, scale = x.float().reshape(x.shape[0], x.shape[1] // 16, 16), global_scale.float()
    if expert_ids is not None:
        known = (expert_ids >= 0) & (expert_ids < len(scale))
        scale = torch.where(known, scale[torch.where(known, expert_ids, 0).long()], 0.0)
    scale = scale.expand(len(x))[:, None]  # [M, 1]
    size = torch.where(blocks.isnan(), 0.0, blocks.abs())
    amax = size.amax(dim=2) if size.numel() else size[..., 0]
    ideal = scale * (amax * (1.0 / 6.0)) if fast else amax * (scale / 6)
    held = torch.where(ideal.isnan(), 0.0, ideal).clamp(max=448).to(torch.float8_e4m3fn)
    value = held.float()
    encode = scale * (1 / value) if fast else 1 / (value * (1 / scale))
    scaled = torch.where(blocks.isinf(), 6.0, (blocks * encode[..., None]).abs())
    code = torch.zeros_like(scaled, dtype=torch.int32)
    for limit in (0.25, 1.25, 2.5, 5.0):
        code += scaled > limit
    for limit in (0.75, 1.75, 3.5):
        code += scaled >= limit
    code += 8 * blocks.signbit()
    code = code.masked_fill(blocks.isnan() | (value == 0)[..., None], 0).to(torch.uint8).flatten(1)
    return code[:, ::2] | code[:, 1::2] << 4, held


@triton.jit
def _copy_in_fours_kernel(scale_ptr, copied_ptr, vectors, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    vector = tl.arange(0, BLOCK)
    where = vector[:, None] * 4 + tl.arange(0, 4)[None, :]
    value = tl.load(scale_ptr + where, mask=(vector < vectors)[:, None])
    tl.store(copied_ptr + where, value, mask=(vector < vectors)[:, None])


@triton.jit
def _clear_kernel(scales_ptr, vectors, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    vector = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    where = vector[:, None] * 16 + tl.arange(0, 16)[None, :]
    tl.store(scales_ptr + where, tl.zeros((BLOCK, 16), tl.uint8), mask=(vector < vectors)[:, None])


@triton.jit
def _copy_rows_kernel(  # type: ignore[no-untyped-def]
    x_ptr, copied_ptr, elements, columns, stride_m, stride_k, BLOCK: tl.constexpr
):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    offset = (at // columns * stride_m.to(tl.int32) + at % columns * stride_k).to(tl.int32)
    tl.store(copied_ptr + at, tl.load(x_ptr + offset, mask=at < elements), mask=at < elements)
