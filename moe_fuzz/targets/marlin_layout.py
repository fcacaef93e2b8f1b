"""Weights in NVFP4 as vLLM's Marlin kernels read them: codes in the order of the tensor cores' fragments, scales in
another format. In plain torch, on whatever device the weights are. Worker side.

What the kernels read was taken from vLLM's public sources (csrc/libtorch_stable/moe/marlin_moe_wna16/, dequant.h).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

#: Bytes that stand for scales that are not negative, less that of NaN.
_LAST = 0x7E
#: E2M1 times 2^-14 or 2^-126 is what the kernels multiply, by a scale times 2^7: the rest is the global scale's.
_BIAS = {torch.float16: 14 - 7, torch.bfloat16: 126 - 7}
#: The least exponent of S0E5M3 that the kernels read rightly in this dtype: bfloat16's top bit is the format's.
_LEAST = {torch.float16: 0, torch.bfloat16: 16}


@dataclass(frozen=True)
class MarlinWeights:
    """One projection of all experts."""

    codes: Tensor  # [E, C/16, 2 R] int32
    scales: Tensor  # [E, C/16, R] float8_e4m3fn by name: bytes of five bits of exponent and three of mantissa
    globals: Tensor  # [E] float32
    problem: Tensor  # bool: whether an expert has scales that the format does not hold beside each other


def marlin_weights(codes: Tensor, scales: Tensor, alpha: Tensor, dtype: torch.dtype) -> MarlinWeights:
    """codes uint8 [E, R, C/2], scales uint8 [E, R, C/16], alpha float32 [E], for activations of this dtype.

    R must be a multiple of 64. Nothing waits for the device.
    """
    bytes_, shift, problem = _scale_bytes(scales.view(torch.uint8), dtype)
    return MarlinWeights(_ordered(codes), _ordered_scales(bytes_).view(torch.float8_e4m3fn),
                         alpha * torch.exp2(_BIAS[dtype] - shift.float()), problem)  # fmt: skip


def _ordered(codes: Tensor) -> Tensor:
    """A tile is 16 columns by 64 rows, 128 words. Word 4 * lane + j is of the lane's fragment of the rows from 16 j on:
    its low half holds even columns, its high half odd ones; in each, nibble 2 b + c is of row 8 b + lane / 4 and of
    column 8 c + 2 (lane % 4)."""
    experts, rows, half = codes.shape
    # The bytes of four lanes are one word here, so that a word is what is moved: [E, tile, j, b, lane / 4, tile, c].
    words = codes.view(torch.int32).view(experts, rows // 64, 4, 2, 8, half // 8, 2)
    first, second = words.unbind(-1)
    low, high = _paired(first, second, 4, 0x0F0F0F0F)  # even columns, odd ones
    even = _paired(low.select(3, 0), low.select(3, 1), 8, 0x00FF00FF)  # of lanes 0 and 2; 1 and 3
    odd = _paired(high.select(3, 0), high.select(3, 1), 8, 0x00FF00FF)
    lanes = [_paired(one, other, 16, 0x0000FFFF) for one, other in zip(even, odd, strict=True)]
    found = torch.stack([lanes[lane % 2][lane // 2] for lane in range(4)])  # [lane % 4, E, tile, j, lane / 4, tile]
    return found.permute(1, 5, 2, 4, 0, 3).reshape(experts, half // 8, 2 * rows)


def _paired(one: Tensor, other: Tensor, bits: int, lower: int) -> tuple[Tensor, Tensor]:
    """The lower halves of the groups of 2 * `bits` of both words beside each other, and the upper ones. `lower`: a mask
    of the lower halves."""
    return (one & lower) | (other & lower) << bits, (one >> bits & lower) | (other & ~lower)


def _ordered_scales(bytes_: Tensor) -> Tensor:
    """A lane's eight rows of 64 stand together, 8 apart; of every four the middle two change places."""
    experts, rows, columns = bytes_.shape
    tiles = bytes_.view(experts, rows // 64, 2, 2, 2, 8, columns)  # [E, tile, bits of row / 8, row % 8, C/16]
    return tiles.permute(0, 6, 1, 5, 2, 4, 3).reshape(experts, columns, rows).contiguous()


@cache
def _tables(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """int16 [256] each: of a scale byte its value times 2^7 with five bits of exponent, bias 15, or 0 of 0 and of what
    is no scale; and the powers of two by which an expert is moved whose least scale above 0 this is."""
    found = [0] * 256
    for byte in range(1, _LAST + 1):
        exponent, mantissa = byte >> 3, byte & 7
        if exponent:
            found[byte] = (exponent + 15) << 3 | mantissa
        else:  # a subnormal of E4M3 is none there
            up = 4 - mantissa.bit_length()
            found[byte] = (16 - up) << 3 | (mantissa << up & 7)
    shifts = [max(_LEAST[dtype] - (wide >> 3), 0) if wide else 0 for wide in found]
    return (torch.tensor(found, dtype=torch.int16, device=device),
            torch.tensor(shifts, dtype=torch.int16, device=device))  # fmt: skip


def _scale_bytes(scales: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The bytes [E, R, C/16], the power of two by which each expert's scales were multiplied, and `problem`.

    vLLM multiplies by one power for all experts (none before 0.20); one for each holds more, and is as well read.
    """
    wide, shifts = _tables(scales.device, dtype)
    flat = scales.flatten(1)
    least = (flat - 1).amin(dim=1) + 1  # of those above 0, which stand in the order of their bytes: 0 comes last here
    most = flat.amax(dim=1)
    shift = shifts[least.int()]  # [E]
    moved = torch.where(wide > 0, wide + 8 * shift[:, None], 0)  # [E, 256]
    base = torch.arange(0, moved.numel(), 256, dtype=torch.int32, device=scales.device)
    bytes_ = moved.to(torch.uint8).flatten()[scales.int() + base[:, None, None]]
    return bytes_, shift, ((most > _LAST) | (wide[most.int()] + 8 * shift > 255)).any()
