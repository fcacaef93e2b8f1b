"""NVFP4, plainly: E2M1 codes in blocks of 16 under E4M3 scales, and one float32 global scale. The contract of
`nvfp4_quantize` is the docstring below.

    value = E2M1[code] * E4M3[scale byte] / global_scale

Two codes a byte along K, the first in the low nibble. E4M3 is the finite variant: bias 7, largest 448 = 0x7E, NaN 0x7F.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

BLOCK = 16
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])  # codes 0 to 7; 8 to 15 are their negatives
E4M3 = torch.tensor([(byte % 8 / 8 + (byte >= 8)) * 2.0 ** (max(byte // 8, 1) - 7) for byte in range(127)])  # 0 to 448
_E4M3_NAN = torch.cat([E4M3, torch.tensor([torch.nan])])
FLT_MAX = torch.finfo(torch.float32).max


def nvfp4_quantize(
    x: Tensor, global_scale: Tensor, layout: str = "linear", *, expert_ids: Tensor | None = None,
    activation: str | None = None, out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Quantizes rows to NVFP4: codes uint8 [M, K/2], and scales float8_e4m3fn, [M, K/16] or swizzled.

    x: [M, K] float32, bfloat16 or float16, any strides; M >= 0, K >= 16 a multiple of 16. With activation="silu" it is
        [M, 2K], the gate first, and what is quantized is silu(gate) * up, computed in float32 and rounded to the dtype
        of x.
    global_scale: [1] float32 or bfloat16, most often 448 * 6 / (largest |x|); with `expert_ids` [E], one an expert.
    expert_ids: [M] int32 or int64, the expert of each row. A row whose id is not in [0, E) has codes 0 and scales 0.
    layout: "linear" or "swizzled", see `swizzle`: there, scales are [M to whole 128, K/16 to whole 4], padding zero.

    Of a block of 16, all in float32, each operation rounded to nearest even:
        scale = e4m3(min(amax * (global_scale / 6), 448))
        code  = e2m1(clamp(v * min(1 / (scale * (1 / global_scale)), FLT_MAX), -6, 6)), which keeps the sign of v
    Where that has no sense:
        a block whose scale rounds to 0 (a zero block, a tiny one)      codes 0, not the sign either
        a block too large for its global scale                          scale 448, codes saturate at 6
        NaN in v                                                        has no part in amax, its code is 0
        +-Inf in v                                                      scale 448, its code +-6
        a global scale that is no normal number above 0 (or inf, NaN)   codes 0, scales 0
    No block changes another, and no scale is NaN or negative. Every byte is written.

    Raises ValueError for anything outside these shapes, dtypes and names.
    """
    if activation is not None:
        x = silu_and_mul(x, activation)
    blocks, scale = _blocks(x), row_scale(global_scale, x.shape[0], expert_ids)  # [M, K/16, 16], [M, 1]
    scales = scale_bytes(blocks, scale)  # [M, K/16]
    codes = pack(codes_of(blocks, scales, scale).view(x.shape))
    if layout not in ("linear", "swizzled"):
        raise ValueError(f"layout must be linear or swizzled, not {layout!r}")
    found = codes, (swizzle(scales) if layout == "swizzled" else scales).view(torch.float8_e4m3fn)
    for made, given in zip(found, out or (), strict=out is not None):
        if given.shape != made.shape or given.dtype != made.dtype or not given.is_contiguous():
            raise ValueError(f"out must be contiguous {made.dtype} {list(made.shape)}")
        given.copy_(made)
    return out or found


def scale_bytes(blocks: Tensor, scale: Tensor) -> Tensor:
    """The scale byte of each block, uint8 [M, K/16]. blocks: float32 [M, K/16, 16]; scale: [M, 1], 0 for none."""
    amax = blocks.abs().nan_to_num(nan=0.0, posinf=torch.inf).amax(dim=2) if blocks.numel() else blocks[..., 0]
    six = torch.full_like(scale, 6.0)  # by a number a GPU would multiply with its reciprocal: another rounding
    ideal = torch.where(scale > 0, amax * (scale / six), 0.0)
    return nearest(ideal.clamp(max=448.0), _there(E4M3, ideal.device))


def codes_of(blocks: Tensor, scales: Tensor, scale: Tensor) -> Tensor:
    """The codes of each block under these scale bytes, uint8 [M, K/16, 16]."""
    decode = _there(E4M3, blocks.device)[scales.clamp(max=126).long()] * (1 / scale)  # [M, K/16]
    scaled = (blocks * (1 / decode).clamp(max=FLT_MAX)[..., None]).abs().nan_to_num(nan=0.0, posinf=6.0)
    size = nearest(torch.where(blocks.isinf(), 6.0, scaled.clamp(max=6.0)), _there(E2M1, blocks.device))
    code = size + 8 * blocks.signbit()
    return code.to(torch.uint8).masked_fill(blocks.isnan() | (scales == 0)[..., None], 0)


@cache
def _there(table: Tensor, device: torch.device) -> Tensor:
    """One of these tables where it is used: it is moved once."""
    return table.to(device)


def nearest(value: Tensor, table: Tensor) -> Tensor:
    """The place, uint8, of what is nearest in an ascending table to each value from 0 to its largest; ties to even."""
    table = table.to(value.device)
    middle = (table[1:] + table[:-1]) / 2  # exact
    at = torch.searchsorted(middle, value.contiguous())  # how many middles lie below
    tie = value == middle[at.clamp(max=len(middle) - 1)]
    return torch.where(tie, at + at % 2, at).to(torch.uint8)


def dequantize(codes: Tensor, scales: Tensor, global_scale: Tensor, expert_ids: Tensor | None = None) -> Tensor:
    """float32 [M, K]. scales: linear, [M, K/16] float8_e4m3fn or uint8. The product is exact, the division rounds."""
    code, bytes_ = unpack(codes).long(), scales.view(torch.uint8).long()
    factor = _there(_E4M3_NAN, codes.device)[bytes_ % 128] * torch.where(bytes_ < 128, 1.0, -1.0)  # [M, K/16]
    value = _there(E2M1, codes.device)[code % 8] * torch.where(code < 8, 1.0, -1.0)
    whole = value.view(*factor.shape, BLOCK) * factor[..., None]
    scale = row_scale(global_scale, len(codes), expert_ids)
    return whole.view(code.shape) / torch.where(scale > 0, scale, 1.0)


def swizzle(scales: Tensor) -> Tensor:
    """[M, K/16] -> [M to whole 128, K/16 to whole 4], padded with zeros: byte (m, k) of the padded table lies at
    ((m // 128 * Kt + k // 4) * 32 + m % 32) * 16 + m // 32 % 4 * 4 + k % 4, with Kt the columns in fours."""
    rows, columns = scales.shape
    padded = torch.nn.functional.pad(scales.view(torch.uint8), (0, -columns % 4, 0, -rows % 128))
    tiles = padded.view(padded.shape[0] // 128, 4, 32, padded.shape[1] // 4, 4).transpose(1, 3)
    return tiles.reshape(padded.shape).view(scales.dtype)


def unswizzle(scales: Tensor, rows: int, columns: int) -> Tensor:
    """[rows, columns] of a swizzled table; all of it, padding too, where they are its own."""
    tiles = scales.view(torch.uint8).view(scales.shape[0] // 128, scales.shape[1] // 4, 32, 4, 4).transpose(1, 3)
    return tiles.reshape(scales.shape)[:rows, :columns].contiguous().view(scales.dtype)


def pack(codes: Tensor) -> Tensor:
    """uint8 [M, K] -> [M, K/2]: the first of two in the low nibble."""
    return codes[:, ::2] | codes[:, 1::2] << 4


def unpack(packed: Tensor) -> Tensor:
    """uint8 [M, K/2] -> [M, K]."""
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1)


def row_scale(global_scale: Tensor, rows: int, expert_ids: Tensor | None) -> Tensor:
    """float32 [M, 1]: the global scale of each row, or 0 where it has none that makes sense."""
    if global_scale.dim() != 1 or global_scale.dtype not in (torch.float32, torch.bfloat16) or not len(global_scale):
        raise ValueError("global_scale must be [1], or [E] with expert_ids, in float32 or bfloat16")
    scale = global_scale.float()
    scale = torch.where((scale >= 2.0**-126) & (scale < torch.inf), scale, 0.0)
    if expert_ids is None:
        if len(scale) != 1:
            raise ValueError(f"{len(scale)} global scales need expert_ids")
        return scale.expand(rows)[:, None].clone()
    if expert_ids.shape != (rows,) or expert_ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"expert_ids must be [{rows}] in int32 or int64")
    known = (expert_ids >= 0) & (expert_ids < len(scale))
    return torch.where(known, scale[expert_ids.where(known, 0).long()], 0.0)[:, None]


def silu_and_mul(x: Tensor, activation: str = "silu") -> Tensor:
    """[M, 2K], the gate first -> [M, K] in the dtype of x."""
    if activation != "silu" or x.dim() != 2 or x.shape[1] % 2:
        raise ValueError(f"activation must be None or silu, and x then [M, 2K], not {activation!r}, {list(x.shape)}")
    gate, up = x.float().chunk(2, dim=1)
    return (gate / (1 + (-gate).exp()) * up).to(x.dtype)


def _blocks(x: Tensor) -> Tensor:
    if x.dim() != 2 or x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"x must be [M, K] in float32, bfloat16 or float16, not {list(x.shape)} {x.dtype}")
    if x.shape[1] % BLOCK or not x.shape[1]:
        raise ValueError(f"K must be a multiple of {BLOCK}, not {x.shape[1]}: pad x with zeros")
    return x.float().reshape(x.shape[0], x.shape[1] // BLOCK, BLOCK)
