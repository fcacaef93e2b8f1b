"""Planted bugs: bytes of NVFP4 that are wrong. Scales, codes, where they lie, what stands in the padding.

Below the bugs stands a quantizer without one, in torch; each of them differs from it where its docstring says.
"""

from __future__ import annotations

import torch
from torch import Tensor

Result = tuple[Tensor, Tensor]


# ---- scales ---------------------------------------------------------------------------------------------------------


def scale_not_clamped(
    x: Tensor, global_scale: Tensor, layout: str = "linear", *, expert_ids: Tensor | None = None
) -> Result:
    """Model-Optimizer#1397: a block beyond its calibration has a scale above 448, whose cast to E4M3 is NaN."""
    blocks, scale = _blocks(x), _row_scale(global_scale, x, expert_ids)
    ideal = _amax(blocks) * (scale / 6)
    held = torch.where(ideal >= 464, 0x7F, _bytes(ideal).int()).to(torch.uint8).masked_fill(scale == 0, 0)
    return _result(_codes(blocks, held.clamp(max=126), scale), held, layout)


def zero_block_is_nan(
    x: Tensor, global_scale: Tensor, layout: str = "linear", *, expert_ids: Tensor | None = None
) -> Result:
    """Model-Optimizer#1633: the scale is a ratio of maxima, and that of a block and a row of zeros is 0 / 0."""
    blocks, scale = _blocks(x), _row_scale(global_scale, x, expert_ids)
    held = _bytes(_amax(blocks) * (scale / 6)).masked_fill(scale == 0, 0)
    nothing = (blocks == 0).all(dim=2).all(dim=1, keepdim=True)
    right = _codes(blocks, held, scale)
    return _result(right, torch.where(nothing, 0x7F, held.int()).to(torch.uint8), layout)


def infinite_scale_times_zero(
    x: Tensor, global_scale: Tensor, layout: str = "linear", *, expert_ids: Tensor | None = None
) -> Result:
    """compressed-tensors#595: an expert that saw zeros has an infinite global scale, and zero times that is NaN."""
    blocks, scale = _blocks(x), _row_scale(global_scale, x, expert_ids)
    held = _bytes(_amax(blocks) * (scale / 6)).masked_fill(scale == 0, 0)
    given = global_scale.float() if expert_ids is None else _of(global_scale.float(), expert_ids)
    infinite = (given == torch.inf).expand(len(x))[:, None] & (_amax(blocks) == 0)
    return _result(_codes(blocks, held, scale), torch.where(infinite, 0x7F, held.int()).to(torch.uint8), layout)


def sixth_by_reciprocal(
    x: Tensor, global_scale: Tensor, layout: str = "linear", *, expert_ids: Tensor | None = None
) -> Result:
    """flashinfer#3656: multiplies by 1/6, rounded, for a division by 6. On a tie of a scale it is a step off."""
    blocks, scale = _blocks(x), _row_scale(global_scale, x, expert_ids)
    held = _bytes(scale * (_amax(blocks) * (1.0 / 6.0))).masked_fill(scale == 0, 0)
    return _result(_codes(blocks, held, scale), held, layout)


def subnormal_scales_flushed(
    x: Tensor, global_scale: Tensor, layout: str = "linear", *, expert_ids: Tensor | None = None
) -> Result:
    """vllm#34577: the format in between has no subnormals. A small block has the scale 0, and all of it is lost."""
    blocks, scale = _blocks(x), _row_scale(global_scale, x, expert_ids)
    held = _bytes(_amax(blocks) * (scale / 6)).masked_fill(scale == 0, 0)
    held = torch.where(held < 8, 0, held.int()).to(torch.uint8)
    return _result(_codes(blocks, held, scale), held, layout)


def maximum_of_the_last_whole_vector(
    x: Tensor, global_scale: Tensor, layout: str = "linear", *, expert_ids: Tensor | None = None
) -> Result:
    """vllm#31097: columns go in vectors of 64, and the last one is moved back to end where the row does. Its maxima
    are those of other blocks where 64 does not divide K."""
    blocks, scale = _blocks(x), _row_scale(global_scale, x, expert_ids)
    amax, count = _amax(blocks), blocks.shape[1]
    if count % 4 and count > 4:
        tail = count - count % 4
        amax = torch.cat([amax[:, :tail], amax[:, count - 4 : count - 4 + count % 4]], dim=1)
    held = _bytes(amax * (scale / 6)).masked_fill(scale == 0, 0)
    return _result(_codes(blocks, held, scale), held, layout)


def bfloat16_scale_read_as_float32(x: Tensor, global_scale: Tensor, layout: str = "linear") -> Result:
    """flashinfer#3398: the pointer is taken for one to float32. Two bytes of a bfloat16 are then the low half of it."""
    if global_scale.dtype == torch.bfloat16:
        global_scale = (global_scale.view(torch.int16).int() & 0xFFFF).view(torch.float32)
    blocks, scale = _blocks(x), _row_scale(global_scale, x, None)
    held = _bytes(_amax(blocks) * (scale / 6)).masked_fill(scale == 0, 0)
    return _result(_codes(blocks, held, scale), held, layout)


def room_for_128_scales(
    x: Tensor, global_scale: Tensor, layout: str = "linear", *, expert_ids: Tensor | None = None
) -> Result:
    """aiter#1869: more than 128 experts, and room for the numbers of 128. Those beyond have the last one's scale."""
    if expert_ids is not None:
        here = expert_ids < len(global_scale)
        expert_ids = torch.where(here, expert_ids.clamp(max=127), expert_ids)
    return _right(x, global_scale, layout, expert_ids)


def minus_one_is_the_last_expert(
    x: Tensor, global_scale: Tensor, layout: str = "linear", *, expert_ids: Tensor | None = None
) -> Result:
    """vllm#42034: an id is an index before anybody looked at it. A row of none, -1, takes the last expert's scale."""
    if expert_ids is not None:
        expert_ids = torch.where(expert_ids == -1, len(global_scale) - 1, expert_ids)
    return _right(x, global_scale, layout, expert_ids)


def ids_cut_to_32_bits(
    x: Tensor, global_scale: Tensor, layout: str = "linear", *, expert_ids: Tensor | None = None
) -> Result:
    """sglang#29929: the callee's ids are int32. An int64 id of no expert, cut to them, may pass for one."""
    return _right(x, global_scale, layout, None if expert_ids is None else expert_ids.int())


def infinity_zeroes_the_batch(
    x: Tensor, global_scale: Tensor, layout: str = "linear", *, expert_ids: Tensor | None = None
) -> Result:
    """aiter#6275: the maximum of the batch says whether it can be scaled at all. One infinite row, and no row is."""
    codes, scales = _right(x, global_scale, layout, expert_ids)
    if x.numel() and bool(x.abs().amax().isinf()):
        return torch.zeros_like(codes), torch.zeros_like(scales.view(torch.uint8)).view(scales.dtype)
    return codes, scales


# ---- codes ----------------------------------------------------------------------------------------------------------


def high_nibble_first(
    x: Tensor, global_scale: Tensor, layout: str = "linear", *, expert_ids: Tensor | None = None
) -> Result:
    """openvino#32144: one packs the first of two codes into the low nibble, the other reads it from the high one."""
    codes, scales = _right(x, global_scale, layout, expert_ids)
    return codes >> 4 | codes << 4, scales


def codes_under_the_unrounded_scale(
    x: Tensor, global_scale: Tensor, layout: str = "linear", *, expert_ids: Tensor | None = None
) -> Result:
    """Model-Optimizer#2243: codes are computed under the scale as it was before it was rounded to E4M3."""
    blocks, scale = _blocks(x), _row_scale(global_scale, x, expert_ids)
    ideal = (_amax(blocks) * (scale / 6)).clamp(max=448)
    held = _bytes(ideal).masked_fill(scale == 0, 0)
    decode = torch.where(held > 7, ideal, _values(held))  # of subnormals the rounded one
    return _result(_codes(blocks, held, scale, decode), held, layout)


def codes_by_two_reciprocals(
    x: Tensor, global_scale: Tensor, layout: str = "linear", *, expert_ids: Tensor | None = None
) -> Result:
    """flashinfer#3656: global_scale * (1 / scale) instead of 1 / (scale / global_scale). On a tie a code is off."""
    blocks, scale = _blocks(x), _row_scale(global_scale, x, expert_ids)
    held = _bytes(_amax(blocks) * (scale / 6)).masked_fill(scale == 0, 0)
    encode = (scale * (1 / _values(held))).clamp(max=torch.finfo(torch.float32).max)
    return _result(_codes(blocks, held, scale, encode=encode), held, layout)


# ---- where scales lie -----------------------------------------------------------------------------------------------


def swizzled_by_real_columns(
    x: Tensor, global_scale: Tensor, layout: str = "linear", *, expert_ids: Tensor | None = None
) -> Result:
    """vllm#35497: the next tile of 128 rows begins where the real columns end, while the table has padded ones."""
    codes, linear = _right(x, global_scale, "linear", expert_ids)
    if layout == "linear":
        return codes, linear
    rows, columns = linear.shape
    held = torch.zeros((-(-rows // 128) * 128, -(-columns // 4) * 4), dtype=torch.uint8, device=x.device)
    for tile in range(0, rows, 128):
        part = _swizzled(linear[tile : tile + 128].view(torch.uint8)).flatten()
        first = tile * columns  # not of the padded ones
        end = min(first + part.numel(), held.numel())
        held.view(-1)[first:end] = part[: end - first]
    return codes, held.view(torch.float8_e4m3fn)


def padding_of_the_last_column(
    x: Tensor, global_scale: Tensor, layout: str = "linear", *, expert_ids: Tensor | None = None
) -> Result:
    """vllm#31097: padded rows are cleared, and padded columns are not: the last block's scale is stored there again."""
    codes, linear = _right(x, global_scale, "linear", expert_ids)
    if layout == "linear":
        return codes, linear
    held = linear.view(torch.uint8)
    return codes, _swizzled(torch.cat([held, held[:, -1:].expand(-1, -held.shape[1] % 4)], dim=1)).view(linear.dtype)


def padding_left_as_it_was(
    x: Tensor, global_scale: Tensor, layout: str = "linear", *, expert_ids: Tensor | None = None
) -> Result:
    """vllm#42988: the table of scales is allocated empty, and only the scales of real blocks are stored."""
    codes, scales = _right(x, global_scale, layout, expert_ids)
    if layout == "linear":
        return codes, scales
    ones = torch.ones((x.shape[0], x.shape[1] // 16), dtype=torch.uint8, device=x.device)
    made = torch.empty(scales.shape, dtype=torch.uint8, device=x.device).view(scales.dtype)
    made.view(torch.uint8).copy_(torch.where(_swizzled(ones) > 0, scales.view(torch.uint8), made.view(torch.uint8)))
    return codes, made


def tiles_of_eight_rows(
    x: Tensor, global_scale: Tensor, layout: str = "linear", *, expert_ids: Tensor | None = None
) -> Result:
    """flashinfer#1611: up to 32 rows another layout is taken, of tiles of 8 by 4, which the caller knows nothing of."""
    codes, scales = _right(x, global_scale, layout, expert_ids)
    if layout == "linear" or not 0 < len(x) <= 32:
        return codes, scales
    held = torch.zeros(scales.shape, dtype=torch.uint8, device=x.device)
    held[: len(x), : x.shape[1] // 16] = _right(x, global_scale, "linear", expert_ids)[1].view(torch.uint8)
    tiles = held.view(held.shape[0] // 8, 8, held.shape[1] // 4, 4).transpose(1, 2)
    return codes, tiles.reshape(held.shape).view(scales.dtype)


# ---- the call -------------------------------------------------------------------------------------------------------


def scales_as_integers(
    x: Tensor, global_scale: Tensor, layout: str = "linear", *, expert_ids: Tensor | None = None
) -> Result:
    """flashinfer#3644: the buffer is of another dtype than what its reader takes it for: uint8 where E4M3 is meant."""
    codes, scales = _right(x, global_scale, layout, expert_ids)
    return codes, scales.view(torch.uint8)


def fused_halves_exchanged(
    x: Tensor, global_scale: Tensor, layout: str = "linear", *, expert_ids: Tensor | None = None,
    activation: str | None = None,
) -> Result:  # fmt: skip
    """vllm#34673: what fuses the activation takes the up-projection for the gate."""
    if activation:
        up, gate = x.float().chunk(2, dim=1)
        x = (gate / (1 + (-gate).exp()) * up).to(x.dtype)
    return _right(x, global_scale, layout, expert_ids)


def no_rows_raise(
    x: Tensor, global_scale: Tensor, layout: str = "linear", *, expert_ids: Tensor | None = None
) -> Result:
    """sglang#23636: T = 0 launches a grid of no blocks, an invalid configuration."""
    if not len(x):
        raise RuntimeError("invalid configuration argument")
    return _right(x, global_scale, layout, expert_ids)


# ---- a quantizer without a flaw -------------------------------------------------------------------------------------


def _right(x: Tensor, global_scale: Tensor, layout: str, expert_ids: Tensor | None) -> Result:
    blocks, scale = _blocks(x), _row_scale(global_scale, x, expert_ids)
    held = _bytes(_amax(blocks) * (scale / 6)).masked_fill(scale == 0, 0)
    return _result(_codes(blocks, held, scale), held, layout)


def _blocks(x: Tensor) -> Tensor:
    """float32 [M, B, 16]"""
    return x.float().reshape(x.shape[0], x.shape[1] // 16, 16)


def _of(global_scale: Tensor, expert_ids: Tensor) -> Tensor:
    known = (expert_ids >= 0) & (expert_ids < len(global_scale))
    return torch.where(known, global_scale[torch.where(known, expert_ids, 0).long()], 0.0)


def _row_scale(global_scale: Tensor, x: Tensor, expert_ids: Tensor | None) -> Tensor:
    """float32 [M, 1]: 0 where there is none that makes sense."""
    scale = global_scale.float()
    scale = torch.where((scale >= 2.0**-126) & (scale < torch.inf), scale, 0.0)
    return (scale.expand(len(x)) if expert_ids is None else _of(scale, expert_ids))[:, None]


def _amax(blocks: Tensor) -> Tensor:
    size = torch.where(blocks.isnan(), 0.0, blocks.abs())
    return size.amax(dim=2) if size.numel() else size[..., 0]


def _bytes(ideal: Tensor) -> Tensor:
    """uint8 of E4M3, of finite numbers and +inf; NaN is 0."""
    return torch.where(ideal.isnan(), 0.0, ideal).clamp(max=448).to(torch.float8_e4m3fn).view(torch.uint8)


def _values(held: Tensor) -> Tensor:
    return held.view(torch.float8_e4m3fn).float()


def _codes(
    blocks: Tensor, held: Tensor, scale: Tensor, decode: Tensor | None = None, encode: Tensor | None = None
) -> Tensor:
    """uint8 [M, B, 16]"""
    if encode is None:
        encode = (1 / ((_values(held) if decode is None else decode) * (1 / scale))).clamp(max=3.4028234663852886e38)
    size = torch.where(blocks.isinf(), 6.0, (blocks * encode[..., None]).abs())
    code = torch.zeros_like(size, dtype=torch.int32)
    for limit in (0.25, 1.25, 2.5, 5.0):
        code += size > limit
    for limit in (0.75, 1.75, 3.5):
        code += size >= limit
    code += 8 * blocks.signbit()
    return code.masked_fill(blocks.isnan() | (held == 0)[..., None] | (scale == 0)[..., None], 0).to(torch.uint8)


def _result(codes: Tensor, held: Tensor, layout: str) -> Result:
    flat = codes.flatten(1)
    packed = flat[:, ::2] | flat[:, 1::2] << 4
    return packed, (_swizzled(held) if layout == "swizzled" else held).view(torch.float8_e4m3fn)


def _swizzled(held: Tensor) -> Tensor:
    padded = torch.nn.functional.pad(held, (0, -held.shape[1] % 4, 0, -held.shape[0] % 128))
    tiles = padded.view(padded.shape[0] // 128, 4, 32, padded.shape[1] // 4, 4).transpose(1, 3)
    return tiles.reshape(padded.shape)
