"""Faults on rows that are to be quantized to NVFP4: blocks at the edges of the format, and values at its ties.

They are aimed by the global scale of each row: a number meant for a tie lies on it where the scale makes that exact,
and within a few bits of it elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from moe_fuzz.faults.fault import Canvas, Fault, register
from moe_fuzz.generator import choice
from moe_fuzz.ops.inputs import element_bits
from moe_fuzz.reference.nvfp4 import BLOCK, E2M1, E4M3

_POWERS = (2.0**-4, 2.0**-2, 1.0, 2.0, 2.0**4)  # of scales


@dataclass
class BlockCanvas(Canvas):
    """Rows of blocks while their faults are laid. `columns` are labels of whole blocks."""

    scales: torch.Tensor = field(default_factory=lambda: torch.ones(0))  # float32 [rows]: 1 where there is none

    def blocks(self, positions: Sequence[int]) -> torch.Tensor:
        """float32 [P, B, 16]"""
        return self.values[self.at(positions)].float().view(len(positions), -1, BLOCK)

    def put(self, positions: Sequence[int], blocks: torch.Tensor) -> None:
        """Stores blocks; finite numbers as such, at most the largest of the dtype."""
        limit = torch.finfo(self.values.dtype).max
        held = torch.where(blocks.isfinite(), blocks.clamp(-limit, limit), blocks)
        self.values[self.at(positions)] = held.flatten(1).to(self.values.dtype)

    def by_block(self, positions: Sequence[int], count: int, fault: str) -> torch.Tensor:
        """int64 [P, B] in [0, count)"""
        rows, labels = [self.rows[p] for p in positions], [column // BLOCK for column in self.columns[::BLOCK]]
        return choice(self.seed, f"{self.name}/{fault}/block", rows, labels, count, device=self.device)

    def steps(self, positions: Sequence[int]) -> torch.Tensor:
        """float32 [P, 1]: what a block's maximum is multiplied by for its scale."""
        scales = self.scales[positions]
        return (scales / torch.full_like(scales, 6.0))[:, None]  # by a number a GPU would take its reciprocal

    def with_maximum(self, positions: Sequence[int], maximum: torch.Tensor) -> torch.Tensor:
        """The blocks shrunk or stretched to these maxima, [P, B]. Zeros and NaN give way to a one."""
        blocks = self.blocks(positions)
        amax = blocks.abs().amax(dim=2, keepdim=True)
        usable = amax.isfinite() & (amax > 0)
        unit = torch.where(usable, blocks / torch.where(usable, amax, 1.0), 0.0)
        unit[..., 0] = torch.where(usable[..., 0], unit[..., 0], 1.0)
        return unit * maximum[..., None]

    def beside(self, values: torch.Tensor, positions: Sequence[int], fault: str) -> torch.Tensor:
        """The values, one in four the next one of the dtype towards 0, one in four the next away from it. [P, B, 16]"""
        there = values.to(self.values.dtype)
        bits = element_bits(there)  # of finite numbers: the next one is the next integer, whatever the sign
        pick = self.choose(positions, 4, fault + "/beside").view(there.shape)
        step = (pick == 1).to(bits.dtype) - ((pick == 0) & (there != 0)).to(bits.dtype)
        return torch.where(there.isfinite(), (bits + step).view(there.dtype), there).float()


@dataclass
class ScaleCanvas(Canvas):
    """Tables of scales uint8 [E, bytes] while faults are laid into some of their bytes."""

    hit: torch.Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))  # [E, bytes]

    def fill(self, what: torch.Tensor) -> None:
        """The bytes that are hit: those of the padding where the layout is swizzled, or of some blocks."""
        self.values = torch.where(self.hit, what, self.values)


@register
class PoisonScales(Fault):
    """The padding of swizzled scales is 0x7F, the NaN of E4M3: what memory holds that was poisoned, or filled with all
    bits (vllm#38148)."""

    name = "poison_scales"

    def lay(self, canvas: Canvas, positions: Sequence[int]) -> None:
        assert isinstance(canvas, ScaleCanvas), f"{self.name} is laid on scales, not on {canvas.name}"
        canvas.fill(torch.full_like(canvas.values, 0x7F))


@register
class StaleScales(Fault):
    """The padding of swizzled scales is any bytes: a table that was allocated and not cleared (vllm#42988)."""

    name = "stale_scales"

    def lay(self, canvas: Canvas, positions: Sequence[int]) -> None:
        assert isinstance(canvas, ScaleCanvas), f"{self.name} is laid on scales, not on {canvas.name}"
        rows, columns = canvas.values.shape
        word = (torch.arange(columns, device=canvas.device) * 0x9E3779B1 + 0x5BD1 * canvas.seed % (1 << 20)) >> 7
        canvas.fill((word & 0xFF).to(torch.uint8).expand(rows, columns))


@register
class NanBlocks(Fault):
    """The scales of some blocks are NaN: what a checkpoint holds whose weights were quantized without a clamp
    (Model-Optimizer#1397, Model-Optimizer#1633). Of some experts; others have none.

    All of one sign, or of both: beside a NaN that is kept, one that is lost shows in no sum.
    """

    name = "nan_blocks"

    def lay(self, canvas: Canvas, positions: Sequence[int]) -> None:
        assert isinstance(canvas, ScaleCanvas), f"{self.name} is laid on scales, not on {canvas.name}"
        place = torch.arange(canvas.values.shape[1], device=canvas.device)
        signs = canvas.choose_rows([0], 3, self.name + "/signs")  # +, -, or both; of all experts, that share tokens
        negative = torch.where(signs == 2, place % 3 == 0, signs == 1)  # [1, bytes]
        canvas.fill((0x7F | negative.to(torch.uint8) << 7).expand_as(canvas.values))


@register
class SignedBlocks(Fault):
    """The scales of some blocks are below 0, and their codes have the other sign: each weight is what it was. No
    quantizer that is known writes such scales, but E4M3 has a sign, and whoever reads it as unsigned takes the sign for
    a bit of the exponent, or drops it (vllm#34577: S0E5M3)."""

    name = "signed_blocks"

    def lay(self, canvas: Canvas, positions: Sequence[int]) -> None:
        assert isinstance(canvas, ScaleCanvas), f"{self.name} is laid on scales, not on {canvas.name}"
        canvas.fill(canvas.values ^ 0x80)


class SenselessScale(Fault):
    """A global scale that is no normal number above 0, or the inverse of one: an expert that calibration never gave a
    token, or that saw zeros alone (compressed-tensors#595)."""

    value = 0.0

    def lay(self, canvas: Canvas, positions: Sequence[int]) -> None:
        canvas.values[canvas.at(positions)] = self.value


@register
class ZeroScale(SenselessScale):
    """A global scale is 0."""

    name = "zero_scale"


@register
class SubnormalScale(SenselessScale):
    """A global scale is a number above 0, and no normal one."""

    name, value = "subnormal_scale", 2.0**-130


@register
class NegativeScale(SenselessScale):
    """A global scale is below 0."""

    name, value = "negative_scale", -448.0


@register
class InfiniteScale(SenselessScale):
    """A global scale is infinite."""

    name, value = "infinite_scale", torch.inf


@register
class NanScale(SenselessScale):
    """A global scale is NaN."""

    name, value = "nan_scale", torch.nan


class BlockFault(Fault):
    """A kind of fault on blocks."""

    def lay(self, canvas: Canvas, positions: Sequence[int]) -> None:
        assert isinstance(canvas, BlockCanvas), f"{self.name} is laid on blocks, not on {canvas.name}"
        canvas.put(positions, self.changed(canvas, positions))

    def changed(self, canvas: BlockCanvas, positions: Sequence[int]) -> torch.Tensor:
        """The blocks of these rows, float32 [P, B, 16]."""
        raise NotImplementedError


@register
class ZeroBlock(BlockFault):
    """One block in two is zero, of either sign: its scale is zero, and 0 / 0 a NaN (Model-Optimizer#1397,
    flashinfer#2238)."""

    name = "zero_block"

    def changed(self, canvas: BlockCanvas, positions: Sequence[int]) -> torch.Tensor:
        hit = canvas.by_block(positions, 2, self.name) == 0
        blocks = canvas.blocks(positions)
        return torch.where(hit[..., None], torch.zeros_like(blocks).copysign(blocks), blocks)


@register
class TinyBlock(BlockFault):
    """One block in two is so small that its scale is zero, halfway to the first subnormal, or a subnormal
    (vllm#34577)."""

    name = "tiny_block"

    def changed(self, canvas: BlockCanvas, positions: Sequence[int]) -> torch.Tensor:
        table = canvas.table([2.0**-40, 2.0**-12, 0.9 * 2.0**-10, 2.0**-10, 1.1 * 2.0**-10, 2.0**-9, 3 * 2.0**-10,
                              5 * 2.0**-9, 15.5 * 2.0**-10, 2.0**-6])  # fmt: skip
        pick = canvas.by_block(positions, 2 * len(table), self.name)
        tiny = canvas.with_maximum(positions, table[pick.clamp(max=len(table) - 1)] / canvas.steps(positions))
        return torch.where((pick < len(table))[..., None], tiny, canvas.blocks(positions))


@register
class ScaleSaturation(BlockFault):
    """One block in two is past what its global scale can hold: by less than a rounding, by half a step (where some
    casts still saturate, and others give NaN), by far (Model-Optimizer#1633)."""

    name = "scale_saturation"

    def changed(self, canvas: BlockCanvas, positions: Sequence[int]) -> torch.Tensor:
        table = canvas.table([432.0, 448.0, 449.0, 464.0, 465.0, 479.0, 480.0, 496.0, 512.0, 1e3, 1e6])
        pick = canvas.by_block(positions, 2 * len(table), self.name)
        large = canvas.with_maximum(positions, table[pick.clamp(max=len(table) - 1)] / canvas.steps(positions))
        return torch.where((pick < len(table))[..., None], large, canvas.blocks(positions))


@register
class ScaleTies(BlockFault):
    """A block's maximum lies where its scale is halfway between two of E4M3, or beside that."""

    name = "scale_ties"

    def changed(self, canvas: BlockCanvas, positions: Sequence[int]) -> torch.Tensor:
        middle = ((E4M3[1:] + E4M3[:-1]) / 2).to(canvas.device)
        target = middle[canvas.by_block(positions, len(middle), self.name)] / canvas.steps(positions)
        blocks = canvas.with_maximum(positions, target) / 2
        blocks[..., 3] = target
        return canvas.beside(blocks, positions, self.name)


@register
class CodeTies(BlockFault):
    """Values halfway between two codes of their block, or beside that; 6 is among them, and a scale of a power of 2."""

    name = "code_ties"

    def changed(self, canvas: BlockCanvas, positions: Sequence[int]) -> torch.Tensor:
        middle = ((E2M1[1:] + E2M1[:-1]) / 2).to(canvas.device)
        blocks = _codes(canvas, positions, middle, self.name)
        largest = blocks[..., 5].clone()
        blocks = canvas.beside(blocks, positions, self.name)
        blocks[..., 5] = largest
        return blocks


@register
class CodeGrid(BlockFault):
    """Values that codes hold exactly, 6 among those of each block, under a scale of a power of two."""

    name = "code_grid"

    def changed(self, canvas: BlockCanvas, positions: Sequence[int]) -> torch.Tensor:
        return _codes(canvas, positions, E2M1.to(canvas.device), self.name)


@register
class LoneNumber(BlockFault):
    """A block of zeros but for one number, anywhere in it: whatever takes the maximum of other 16 misses it."""

    name = "lone_number"

    def changed(self, canvas: BlockCanvas, positions: Sequence[int]) -> torch.Tensor:
        there = canvas.by_block(positions, BLOCK, self.name)[..., None]
        place = torch.arange(BLOCK, device=canvas.device)
        return torch.where(place == there, canvas.blocks(positions), 0.0)


@register
class NonfiniteBlock(BlockFault):
    """One block in three has one NaN, of either sign, or one Inf, of either sign. Its neighbours have none."""

    name = "nonfinite_block"

    def changed(self, canvas: BlockCanvas, positions: Sequence[int]) -> torch.Tensor:
        hit = canvas.by_block(positions, 3 * BLOCK, self.name)[..., None]
        table = canvas.table([torch.nan, -torch.nan, torch.inf, -torch.inf])
        number = table[canvas.by_block(positions, len(table), self.name + "/number")][..., None]
        return torch.where(torch.arange(BLOCK, device=canvas.device) == hit, number, canvas.blocks(positions))


def _codes(canvas: BlockCanvas, positions: Sequence[int], table: torch.Tensor, fault: str) -> torch.Tensor:
    """Values of the table, of either sign, under a scale of a power of two; the sixth of each block is 6."""
    unit = canvas.table(_POWERS)[canvas.by_block(positions, len(_POWERS), fault)] / canvas.scales[positions][:, None]
    pick = canvas.choose(positions, 2 * len(table), fault).view(*unit.shape, BLOCK)
    value = table[pick % len(table)] * torch.where(pick < len(table), 1.0, -1.0)
    value[..., 5] = 6.0
    return value * unit[..., None]
