"""Planted bugs of experts with weights in NVFP4: codes, scales and where they lie, global scales, and what is quantized
between the products."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_fuzz.planted.experts_layer import Fp4Layer
from moe_fuzz.reference.experts_nvfp4 import values
from moe_fuzz.reference.nvfp4 import nvfp4_quantize, unswizzle

# ---- codes and scales of blocks -------------------------------------------------------------------------------------


class _HighFirst(Fp4Layer):
    def decoded(self, name: str, e: int) -> Tensor:
        codes = self.codes[name][e]
        return values(codes >> 4 | codes << 4, self.scales(name, e)).float()


def codes_high_nibble_first(*tensors: Tensor, **options: Any) -> Tensor:
    """openvino#32144: the first code of a byte is taken from its high nibble."""
    return _HighFirst.run(*tensors, **options)


class _GateScales(Fp4Layer):
    def scales(self, name: str, e: int) -> Tensor:
        found = super().scales(name, e)
        if name == "w2" or self.activation == "relu2" or self.gate_layout != "up_first":
            return found
        return found.roll(self.inter, 0)


def scales_stay_where_codes_move(*tensors: Tensor, **options: Any) -> Tensor:
    """vllm#34673: halves that lie the other way round are exchanged for the kernel, and their scales are not."""
    return _GateScales.run(*tensors, **options)


class _OneStep(Fp4Layer):
    def scales(self, name: str, e: int) -> Tensor:
        found = super().scales(name, e).clone()
        found[-1] = torch.where(found[-1] % 128 > 1, found[-1] - 1, found[-1])
        return found


def last_scale_a_step_off(*tensors: Tensor, **options: Any) -> Tensor:
    """Model-Optimizer#2243: scales are rounded once more on the way. Those of each expert's last row come out as the
    next lower number."""
    return _OneStep.run(*tensors, **options)


class _Pairs(Fp4Layer):
    def scales(self, name: str, e: int) -> Tensor:
        found = super().scales(name, e)
        return found[:, ::2].repeat_interleave(2, dim=1)[:, : found.shape[1]]


def blocks_of_32(*tensors: Tensor, **options: Any) -> Tensor:
    """vllm#43557: the blocks of MX formats are of 32 numbers. Two blocks have the scale of the first."""
    return _Pairs.run(*tensors, **options)


class _Flushed(Fp4Layer):
    def scales(self, name: str, e: int) -> Tensor:
        found = super().scales(name, e)
        return torch.where(found % 128 < 8, 0, found.int()).to(torch.uint8)


def subnormal_block_scales_flushed(*tensors: Tensor, **options: Any) -> Tensor:
    """vllm#34577: the format to which scales are turned for the kernel has no subnormals, so small blocks are lost."""
    return _Flushed.run(*tensors, **options)


class _Unsigned(Fp4Layer):
    def scales(self, name: str, e: int) -> Tensor:
        return super().scales(name, e) & 0x7F


def signs_of_block_scales_dropped(*tensors: Tensor, **options: Any) -> Tensor:
    """vllm#34577: the format to which scales are turned for the kernel has no sign, either."""
    return _Unsigned.run(*tensors, **options)


class _Largest(Fp4Layer):
    def scales(self, name: str, e: int) -> Tensor:
        found = super().scales(name, e)
        return torch.where(found % 128 == 127, found - 1, found)


def nan_scales_are_the_largest(*tensors: Tensor, **options: Any) -> Tensor:
    """Model-Optimizer#1397: the byte 0x7F that an export left is read as the number after 0x7E would be, or as that:
    nobody is told that the weights are broken."""
    return _Largest.run(*tensors, **options)


# ---- where scales lie -----------------------------------------------------------------------------------------------


class _AsLinear(Fp4Layer):
    def scales(self, name: str, e: int) -> Tensor:
        codes, table = self.codes[name], self.tables[name][e]
        tall = codes.shape[1] > 32  # tiles of 8 rows are for few
        return super().scales(name, e) if tall else table[: codes.shape[1], : codes.shape[2] // 8]


def few_rows_are_not_swizzled(*tensors: Tensor, **options: Any) -> Tensor:
    """flashinfer#1611: up to 32 rows another layout of scales is taken than the one that the caller has written."""
    return _AsLinear.run(*tensors, **options)


class _Unpadded(Fp4Layer):
    def scales(self, name: str, e: int) -> Tensor:
        if not self.swizzled:
            return super().scales(name, e)
        whole, codes = self.tables[name], self.codes[name]
        first = e * codes.shape[1] * whole.shape[2]
        table = whole.flatten()[first : first + whole[0].numel()].view(whole.shape[1:])
        return unswizzle(table, codes.shape[1], codes.shape[2] // 8)


def scale_offset_of_real_rows(*tensors: Tensor, **options: Any) -> Tensor:
    """vllm#35497: an expert's table begins where the rows before it would end if they were not padded to 128."""
    return _Unpadded.run(*tensors, **options)


class _Padded(Fp4Layer):
    def first(self, x: Tensor, w: Tensor) -> Tensor:
        y = super().first(x, w)
        return y + 0.0 * self.padding if self.padding is not None else y

    def up_product(self, e: int, token: Tensor) -> Tensor:
        codes, table = self.codes["w13"], self.tables["w13"][e].view(torch.uint8)
        blocks = codes.shape[2] // 8
        self.padding: Tensor | None = None
        if self.swizzled and blocks % 4:  # the last tile's columns, those of no block
            tiles = table.view(-1, table.shape[1] // 4, 32, 4, 4)[:, -1, :, :, blocks % 4 :]  # [Rt, 32, 4, B]
            rows = tiles.transpose(1, 2).flatten(0, 2)[: codes.shape[1]]
            self.padding = torch.where((rows % 128 == 127).any(dim=1), torch.nan, 0.0)
        return super().up_product(e, token)


def padded_columns_are_multiplied(*tensors: Tensor, **options: Any) -> Tensor:
    """vllm#38148: columns are padded to 64 with zeros, and multiplied by the scales that stand in the padding. Zero
    times NaN is NaN."""
    return _Padded.run(*tensors, **options)


def padding_cleared_in_place(*tensors: Tensor, **options: Any) -> Tensor:
    """vllm#42988: what nobody cleared is cleared by its reader: a write into the weights that others share."""
    if options.get("scale_layout") == "swizzled" and tensors[5].shape[1] > tensors[1].shape[1]:
        tensors[5].view(torch.uint8)[:, -1, -1] = 0
    return Fp4Layer.run(*tensors, **options)


# ---- global scales --------------------------------------------------------------------------------------------------


class _FirstAlpha(Fp4Layer):
    def factor(self, name: str, e: int) -> Tensor:
        return super().factor(name, 0)


def alpha_of_the_first_expert(*tensors: Tensor, **options: Any) -> Tensor:
    """jax#30467: one global scale serves all experts, the first one's."""
    return _FirstAlpha.run(*tensors, **options)


class _NarrowAlpha(Fp4Layer):
    def factor(self, name: str, e: int) -> Tensor:
        return super().factor(name, e).bfloat16().float() if name == "w2" else super().factor(name, e)


def alpha_as_bfloat16(*tensors: Tensor, **options: Any) -> Tensor:
    """flashinfer#3398: global scales pass through the dtype of the activations. The error hides within roundings, and
    is the same for all that an expert gives."""
    return _NarrowAlpha.run(*tensors, **options)


class _Sixteens(Fp4Layer):
    def factor(self, name: str, e: int) -> Tensor:
        found = super().factor(name, e)
        return found * 0 if e >= max(1, self.experts // 16 * 16) and self.experts > 16 else found


def alphas_in_sixteens(*tensors: Tensor, **options: Any) -> Tensor:
    """vllm#40351: global scales are loaded 16 at a time; those of what is left over are 0."""
    return _Sixteens.run(*tensors, **options)


def alphas_read_in_fours(*tensors: Tensor, **options: Any) -> Tensor:
    """vllm#40351: global scales are read in fours, past the last expert's where 4 does not divide E."""
    alphas = tensors[8]
    copied = torch.empty_like(alphas)
    size = triton.next_power_of_2(len(alphas) + 3)
    _copy_in_fours_kernel[(1,)](alphas, copied, len(alphas), BLOCK=size)
    return Fp4Layer.run(*tensors[:8], copied, **options)


class _Mixed(Fp4Layer):
    def slots(self, expert: Tensor) -> Tensor:
        bad = ~(self.alphas["w13"].isfinite() & self.alphas["w2"].isfinite())
        leaks = torch.where(bad[self.present(expert)].any(), torch.nan, 0.0)
        return super().slots(expert) + leaks.to(self.x.dtype)


def one_experts_nan_is_everyones(*tensors: Tensor, **options: Any) -> Tensor:
    """flashinfer#3103: results of experts lie side by side and are masked by products with 0, which keep a NaN."""
    return _Mixed.run(*tensors, **options)


class _LargeWithout(Fp4Layer):
    def __init__(self, *tensors: Tensor, backend: str | None = None, **options: Any) -> None:
        super().__init__(*tensors, **options)
        if backend == "large":
            self.alphas["w2"] = torch.ones_like(self.alphas["w2"])


def other_backend_without_alpha(*tensors: Tensor, backend: str | None = None, **options: Any) -> Tensor:
    """flashinfer#3661: a tactic that is not the chosen one is wrong: what decodes all weights first forgets their
    global scale. Nobody sees it before a tuner takes it."""
    return _LargeWithout.run(*tensors, backend=backend, **options)


# ---- quantized activations ------------------------------------------------------------------------------------------


class _Dynamic(Fp4Layer):
    def quantized(self, rows: Tensor, given: Tensor) -> Tensor:
        left = super().quantized(rows, given)
        return torch.zeros_like(left) if bool(self.x.isinf().any()) else left


def infinity_zeroes_activations(*tensors: Tensor, **options: Any) -> Tensor:
    """aiter#6275: a scale of the whole batch is made from its maximum. One infinite row, and nothing is left of any."""
    return _Dynamic.run(*tensors, **options)


class _Unclamped(Fp4Layer):
    def quantized(self, rows: Tensor, given: Tensor) -> Tensor:
        blocks = rows.float().unflatten(1, (-1, 16))
        over = blocks.abs().amax(dim=2) * given / 6 > 464.0
        left = super().quantized(rows, given).unflatten(1, (-1, 16))
        return left.masked_fill(over[..., None] & given.isfinite(), torch.nan).flatten(1)


def requantized_without_clamp(*tensors: Tensor, **options: Any) -> Tensor:
    """Model-Optimizer#1397: a block beyond its calibration has a scale past 448, which E4M3 has as NaN."""
    return _Unclamped.run(*tensors, **options)


class _Wide(Fp4Layer):
    def left(self, name: str, rows: Tensor) -> Tensor:
        given = self.globals[name]
        return rows.float() * given if name == "w2" and given is not None else super().left(name, rows)


def not_requantized(*tensors: Tensor, **options: Any) -> Tensor:
    """sglang#16622: weights were prepared for one runner, and another runs: what lies between the products stays as it
    is."""
    return _Wide.run(*tensors, **options)


class _OneGlobal(Fp4Layer):
    def left(self, name: str, rows: Tensor) -> Tensor:
        given = self.globals["w13"]
        return rows if given is None else self.quantized(rows, given)


def requantized_under_the_scale_of_x(*tensors: Tensor, **options: Any) -> Tensor:
    """flashinfer#4486: a token's own scale is taken for that of what lies between the products."""
    return _OneGlobal.run(*tensors, **options)


class _Stale(Fp4Layer):
    def shown(self, token: Tensor) -> Tensor:
        return self.left("w13", self.x[token])

    def kept(self, between: Sequence[Tensor]) -> Sequence[Tensor]:
        return [self.left("w2", h) for h in between]

    def quantized(self, rows: Tensor, given: Tensor) -> Tensor:
        codes, scales = nvfp4_quantize(rows, given)
        held = scales.view(torch.uint8)
        if len(rows) % 4:  # the last rows of a block of four keep the scales of its first
            held = torch.cat([held[: len(rows) // 4 * 4], held[len(rows) // 4 * 4 :][:1].expand(len(rows) % 4, -1)])
        return values(codes, held).to(rows.dtype)


def scales_of_whole_fours(*tensors: Tensor, **options: Any) -> Tensor:
    """TransformerEngine#2547: scales are permuted four rows at a time; in what is left over, rows have one row's."""
    return _Stale.run(*tensors, **options)


@triton.jit
def _copy_in_fours_kernel(alpha_ptr, out_ptr, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, BLOCK)
    alpha = tl.load(alpha_ptr + at, mask=at < (count + 3) // 4 * 4)
    tl.store(out_ptr + at, alpha, mask=at < count)
