"""What NVFP4 leaves of numbers that are not known to the last bit: docs/numerics.md."""

from __future__ import annotations

from functools import cache
from itertools import product

import torch
from torch import Tensor

from moe_fuzz.contract import Contract
from moe_fuzz.mirror import on_host
from moe_fuzz.reference.nvfp4 import BLOCK, E2M1, E4M3, codes_of, nearest, scale_bytes

ULPS = 4 * 2.0**-23  # relative: how near a tie float32 arithmetic in another order may take the other side
_SCALES = 16  # scale bytes of a block that are tried one by one
_LEAST = 2.0**-9  # the smallest scale: below it libraries have scales of their own
_SAFE = 2.0**117  # global scales up to that, and down to its inverse, keep every factor of a code a normal float32


def quantized(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """float64 [..., D]: the contract's code * E4M3 / global scale of values, stored in `dtype` before. scale: [1]."""
    flat = values.to(dtype).float().flatten(0, -2)
    given = _usable(scale).expand(len(flat))[:, None]
    blocks = flat.unflatten(1, (-1, BLOCK))
    bytes_ = scale_bytes(blocks, given)
    return _value(codes_of(blocks, bytes_, torch.where(given > 0, given, 1.0)), bytes_, scale).view(values.shape)


def requantized(low: Tensor, high: Tensor, value: Tensor, scale: Tensor, dtype: torch.dtype,
                contract: Contract) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What is left of `value`, and how far what is left of any numbers between low and high may be from it.

    low <= value <= high, float64 [..., D], D whole blocks: what a target may have, as it has stored it. Values are
    stored in `dtype` before, unless it is float32. Infinite numbers are what the contract makes of them.
    """
    left = quantized(value, scale, dtype)
    alone = low is value and high is value  # then a block has one scale byte, or two where it is near a tie
    low, high = (part.nan_to_num(0.0, torch.inf, -torch.inf).flatten(0, -2).unflatten(1, (-1, BLOCK))
                 for part in (low, high))  # [R, B, 16]; the code of a NaN is 0
    flat = left.reshape(low.shape)
    given = _usable(scale).double().view(1, 1)
    if not (known := float(_usable(on_host(scale)))) > 0:
        return left, torch.zeros_like(left)
    exact = contract.rounding == "exact"
    off = 0.0 if exact else ULPS
    ways = [(factor, exact) for factor in {1 - off, 1 + off}]
    if not exact and not 1 / _SAFE <= known <= _SAFE:  # there the contract's own codes may be far from the nearest
        ways.append((1.0, True))
    size = torch.maximum(low.abs(), high.abs())
    least_size = torch.where((low <= 0) & (high >= 0), 0.0, torch.minimum(low.abs(), high.abs()))
    least, most = (_bytes(part.amax(dim=2), given, factor, exact)
                   for part, factor in ((least_size, 1 - off), (size, 1 + off)))  # fmt: skip
    lowest, highest = torch.full_like(low, torch.inf), torch.full_like(low, -torch.inf)
    for step in range(2 - exact if alone else min(_SCALES, 1 + _widest(least, most))):
        there = least + step
        inside = (there <= most)[..., None]
        for part, (factor, ours) in product((low, high), ways):
            end = _rounded(part, there.clamp(max=126), given, factor, ours)
            lowest = torch.where(inside, torch.minimum(lowest, end), lowest)
            highest = torch.where(inside, torch.maximum(highest, end), highest)
    if not exact:  # a library's own way with what is smaller than any scale: as near as 0 is
        tiny = (size.amax(dim=2) * given / 6 < _LEAST)[..., None]
        lowest = torch.where(tiny, torch.minimum(lowest, 2 * low.clamp(max=0.0)), lowest)
        highest = torch.where(tiny, torch.maximum(highest, 2 * high.clamp(min=0.0)), highest)
    limit = (6 * _table("E4M3", low.device)[most.long()] / given)[..., None]  # of all that these scales hold
    wide = (most - least >= _SCALES)[..., None]
    lowest, highest = torch.where(wide, -limit, lowest), torch.where(wide, limit, highest)
    error = torch.maximum(flat - lowest, highest - flat).clamp(min=0.0)
    return left, error.view(left.shape)


def _widest(least: Tensor, most: Tensor) -> int:
    """Over how many steps the scale bytes of a block reach at most; -1 where there is no block."""
    return int((most - least).amax()) if least.numel() else -1


@cache
def _table(name: str, device: torch.device) -> Tensor:
    """float64: what codes, or the bytes of scales, stand for."""
    return {"E2M1": E2M1, "E4M3": E4M3}[name].double().to(device)


def _usable(scale: Tensor) -> Tensor:
    """float32 [1]: 0 where it is no normal number above 0."""
    return torch.where((scale >= 2.0**-126) & (scale < torch.inf), scale, 0.0)


def _value(codes: Tensor, bytes_: Tensor, scale: Tensor) -> Tensor:
    """float64 [R, B, 16]"""
    sign = torch.where(codes < 8, 1.0, -1.0)
    given = _usable(scale).double()
    value = _table("E2M1", codes.device)[codes.long() % 8] * sign
    return value * _table("E4M3", codes.device)[bytes_.long()][..., None] / torch.where(given > 0, given, 1.0)


def _bytes(amax: Tensor, scale: Tensor, factor: float, exact: bool) -> Tensor:
    """int32 [R, B]: the scale byte of blocks with these maxima. Rounding keeps their order."""
    if exact:
        return scale_bytes(amax.float()[..., None], scale.float()).int()
    ideal = (amax * scale / 6 * factor).nan_to_num(0.0, torch.inf)
    return nearest(ideal.clamp(max=448.0), _table("E4M3", ideal.device)).int()


def _rounded(values: Tensor, bytes_: Tensor, scale: Tensor, factor: float, exact: bool) -> Tensor:
    """float64 [R, B, 16]: what is left of values under these scale bytes."""
    if exact:
        return _value(codes_of(values.float(), bytes_, scale.float()), bytes_, scale.float().view(1))
    held = _table("E4M3", values.device)[bytes_.long()][..., None] / scale
    ratio = torch.where(held > 0, values.abs() / torch.where(held > 0, held, 1.0) * factor, 0.0)
    code = nearest(ratio.nan_to_num(0.0, torch.inf).clamp(max=6.0), _table("E2M1", values.device))
    return _table("E2M1", values.device)[code.long()] * held * torch.where(values < 0, -1.0, 1.0)
