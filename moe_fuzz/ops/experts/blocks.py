"""The projections of an `experts_nvfp4` case: codes, scales of blocks, global scales. Worker side.

dense and ladder draw codes and scale bytes themselves, so that every code and every scale byte occurs. The recipes
of few numbers have the values that they have in `recipes.py`, written as codes under scales that are powers of two, or
for the gates of `curve` of 4 bits: which one hangs on the block, so that a scale from elsewhere is wrong.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch

from moe_fuzz import generator
from moe_fuzz.case import Case
from moe_fuzz.mirror import uploaded
from moe_fuzz.ops.experts import draw, recipes
from moe_fuzz.ops.experts.recipes import WRITTEN, Device, Tensors
from moe_fuzz.reference.nvfp4 import BLOCK, E4M3

_LARGEST = 6.0 * 448.0
#: The largest scale byte of a dense case; its blocks have this one or one of the 16 below, subnormals at last.
_TOPS = (0x7E, 0x40, 0x28, 0x14)


class Blocks(NamedTuple):
    """codes uint8 [E, R, C], one a byte, and scale bytes uint8 [E, R, C/16]."""

    codes: torch.Tensor
    scales: torch.Tensor


# ---- tables ---------------------------------------------------------------------------------------------------------


@cache
def _bytes(least: int, most: int, device: torch.device) -> torch.Tensor:
    """The 2^16 values that a draw takes one of: integers from `least` to `most`."""
    at = torch.arange(draw.SIZE)
    return (at * (most - least + 1) // draw.SIZE + least).to(torch.uint8).to(device)


@cache
def _power_bytes(device: torch.device) -> torch.Tensor:
    """E4M3 of 2^(n - 9), n from 0 to 17."""
    return torch.tensor([1 << n if n < 3 else (n - 2) << 3 for n in range(18)], dtype=torch.uint8, device=device)


# ---- weights --------------------------------------------------------------------------------------------------------


def projections(case: Case, labels: Sequence[int], device: Device) -> Tensors:
    """w13, w2 [E, R, C/2], w13_scales, w2_scales uint8 [E, R, C/16], w13_alpha, w2_alpha float32 [E] and, where there
    are, b13 and b2 of the experts of these labels, in this order. Scales are linear."""
    makers = {name: Maker(case, labels, device, name) for name in ("w13", "w2")}
    gate_up, found = makers["w13"], dict[str, Blocks]()
    up = gate_up.encoded("w13/up", gate_up.up)
    if case.config["activation"] != "relu2":
        gate = gate_up.encoded("w13/gate", gate_up.gate)
        up = Blocks(*(gate_up.arranged(one, other) for one, other in zip(gate, up, strict=True)))
    found["w13"] = up
    found["w2"] = makers["w2"].encoded("w2", makers["w2"].down)
    made: Tensors = {name: packed(blocks.codes) for name, blocks in found.items()}
    made |= {f"{name}_scales": blocks.scales for name, blocks in found.items()}
    made |= {f"{name}_alpha": maker.alpha for name, maker in makers.items()}
    return made | recipes.biases(gate_up)


class Maker(recipes.Maker):
    """One projection of a case."""

    together = BLOCK

    def __init__(self, case: Case, labels: Sequence[int], device: Device, name: str) -> None:
        super().__init__(case, labels, device, ("w2",) if name == "w2" else ("w13/gate", "w13/up"))
        self.alpha = self._alpha(name)  # float32 [E]

    def _wanted(self, names: Sequence[str]) -> list[draw.Wanted]:
        """The scales of the blocks, too."""
        sides = {name: self.sides(name) for name in names}
        return super()._wanted(names) + [(f"{name}/scales", self.labels, range(rows), range(columns // BLOCK), 0)
                                         for name, (rows, columns) in sides.items()]  # fmt: skip

    def _alpha(self, name: str) -> torch.Tensor:
        """A power of two where numbers are few; else what makes the largest weight less than 2^weight_scale, or 2^6 and
        in float16 1 on a ladder, and more than half of that."""
        word = generator.words(self.case.seed, f"{name}_alpha", [0], self.labels)[0]  # int64 [E]
        if self.recipe in WRITTEN:
            least = 2 if self.recipe == "cancel" and name == "w13" else -2  # its largest number is 4096
            return uploaded(torch.exp2((word % 5 + least).float()), self.device)
        limit = 2.0**self.scale
        if self.recipe == "ladder":
            limit = 2.0 ** (6 if self.dtype == torch.bfloat16 else 0)
        share = 0.5 + (word & 0xFFFFF).double() * 2.0**-21  # 0.5 to 1
        return uploaded((share * limit / (6.0 * float(E4M3[self._range()[1]]))).float(), self.device)

    def _range(self) -> tuple[int, int]:
        """The least and the largest scale byte."""
        if self.recipe == "ladder":
            return 0, 0x7E
        top = _TOPS[int(generator.choice(self.case.seed, "scales", [0], [0], len(_TOPS)))]
        return top - 16, top

    def encoded(self, name: str, values: object) -> Blocks:
        """The projection of this name. values: what makes it, where its bits are known."""
        rows = self.sides(name)[0]
        row, column = self.drawn.lines(f"{name}/scales", self.device)
        if self.recipe in WRITTEN:
            assert callable(values)
            return self._written(values(), row, column)
        scales = draw.looked_up(_bytes(*self._range(), row.device), row, column)
        codes = draw.looked_up(_bytes(0, 15, row.device), *self.drawn.lines(name, self.device))
        return Blocks(self._shaped(codes, rows), self._shaped(scales, rows))

    def _written(self, values: torch.Tensor, row: torch.Tensor, column: torch.Tensor) -> Blocks:
        """Values [E, R, C] that are 0, or in each block one number of up to 4 bits and its half and double."""
        blocks = values.float().unflatten(2, (-1, BLOCK))  # [E, R, B, 16]
        amax = blocks.abs().amax(dim=3)
        word = draw.mixed(row, column).view(amax.shape)
        mantissa, exponent = torch.frexp(amax / self.alpha[:, None, None])
        bits = (mantissa * 16).int() & 7  # of E4M3
        # the largest is written as 1, 2 or 4, so that its half has a code as well; 3 bits need a scale that has them
        shift, zero = word % 3, amax == 0
        shift = torch.where(bits > 0, torch.minimum(shift, (exponent + 5).clamp(min=0)), shift)
        shift = torch.maximum(shift, exponent - 9)  # no scale is larger than 2^8
        power = exponent - 1 - shift
        share = blocks.abs() / torch.where(zero, 1.0, amax)[..., None]  # 0, a half, 1
        size = (share * 2).int() << shift[..., None]  # 0, 1, 2, 4, 8
        codes = torch.where(size > 4, 6, size) + 8 * blocks.signbit().int()
        held = torch.where(zero, (word >> 2) % 127, _power_bytes(word.device)[(power + 9).clamp(0, 17).long()] | bits)
        return Blocks(codes.to(torch.uint8).flatten(2), held.to(torch.uint8))


def packed(codes: torch.Tensor) -> torch.Tensor:
    """uint8 [..., C] -> [..., C/2]: the first of two in the low nibble."""
    return codes[..., ::2] | codes[..., 1::2] << 4


# ---- global scales of activations -----------------------------------------------------------------------------------


def global_scales(case: Case, device: Device) -> Tensors:
    """x_global and h_global float32 [1], for a case that quantizes its activations."""
    kind, seed = str(case.config["global_scale"]), case.seed
    found = {}
    for name, amax in zip(("x_global", "h_global"), _largest(case), strict=True):
        scale = 2.0 ** math.floor(math.log2(_LARGEST / amax))
        scale *= {"small": 2.0**-8, "large": 2.0**8}.get(kind, 1.0)
        if kind == "fitted":
            word = int(generator.words(seed, name, [0], [0])[0, 0])
            scale = _LARGEST / amax * (0.75 + (word & 0xFFFFF) * 2.0**-21)
        found[name] = uploaded(torch.tensor([scale], dtype=torch.float32), device)
    return found


def _largest(case: Case) -> tuple[float, float]:
    """About the largest |x|, and the largest of what lies between the products."""
    config, relu2 = case.config, case.config["activation"] == "relu2"
    recipe, wide = str(config["recipe"]), config["dtype"] == "bfloat16"
    if recipe in recipes.WHOLE:
        return 6.0, 512.0 if relu2 else 32.0 * 64.0
    if recipe in ("one_hot", "curve"):
        return 6.0, 512.0 if relu2 else 24.0 * (32.0 if recipe == "one_hot" else 8.0)
    x, w = 2.0 ** int(config["magnitude"]), 2.0 ** int(config["weight_scale"])
    if recipe == "ladder":
        x, w = (2.0**12, 2.0**4) if wide else (1.0, 1.0)
    a = 0.3 * x * w * math.sqrt(int(config["hidden"]))  # about three standard deviations
    h = 56.0 if config["activation"] == "swiglu_oai" and a > 8 else a * a if relu2 or a > 1 else a * a / 2
    return x, min(h, 2.0**100 if wide else 2.0**15)
