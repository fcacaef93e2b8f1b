"""What the checks of nvfp4_quantize see of one call: rows, what came back, and the bytes that may have come back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

from moe_fuzz.case import Case
from moe_fuzz.checks.nvfp4.activated import activated_span
from moe_fuzz.contract import TargetInfo
from moe_fuzz.fence import unwritten
from moe_fuzz.ops.nvfp4.inputs import QuantizeInputs, fresh
from moe_fuzz.reference.nvfp4 import (
    BLOCK,
    E2M1,
    E4M3,
    codes_of,
    nearest,
    row_scale,
    scale_bytes,
    silu_and_mul,
    swizzle,
    unpack,
    unswizzle,
)

ULPS = 4 * 2.0**-23  # how far, relatively, float32 arithmetic of another order may be from ours (docs/numerics.md)
TINY = 2.0**-9  # of E4M3, its least number: below it libraries have scales of their own


@dataclass(frozen=True)
class Outputs:
    """What a target returned, as it was returned."""

    codes: torch.Tensor
    scales: torch.Tensor


@dataclass(frozen=True)
class QuantizeObservation:
    """One call under test. All tensors are on one device, that of the inputs; M rows, B blocks a row."""

    case: Case
    step_index: int
    info: TargetInfo
    inputs: QuantizeInputs
    outputs: Outputs
    call: Callable[[QuantizeInputs], Outputs]  # runs the target again, in fences; a graph is replayed
    eager: Callable[[QuantizeInputs], Outputs] | None = None  # runs it without a graph, where `call` is a replay
    budget: dict[str, float] = field(default_factory=dict)  # nothing here is within a bound of its own
    brief: bool = False  # nobody reads the violations: what would have been right need not be found out

    def with_outputs(self, outputs: Outputs) -> QuantizeObservation:
        """The same inputs and another answer; what is known of the inputs is not computed again."""
        other = replace(self, outputs=outputs, budget={}, brief=True)
        for name in ("values", "span", "sizes", "row_scales", "ideal", "ideals", "scale_bytes", "expected", "sound"):
            other.__dict__[name] = getattr(self, name)
        return other

    def repeated(self, row: int, block: int, times: int) -> QuantizeObservation:
        """One block, and what came back of it, as the only one of each of so many rows."""

        def held(part: torch.Tensor) -> torch.Tensor:
            return part[row : row + 1, block : block + 1].repeat(times, *[1] * (part.dim() - 1))

        other = replace(self, budget={}, brief=True)
        known: dict[str, Any] = {name: held(getattr(self, name)) for name in ("values", "codes", "bytes")}
        known |= {name: tuple(map(held, getattr(self, name))) for name in ("sizes", "ideals")}
        known["span"] = tuple(map(held, self.span)) if self.inputs.activation else (known["values"],) * 2
        known["row_scales"] = self.row_scales[row : row + 1].repeat(times, 1)
        other.__dict__.update(known)
        return other

    # ---- inputs -----------------------------------------------------------------------------------------------------

    @property
    def exact(self) -> bool:
        """Whether the target promises the contract's bytes."""
        return self.info.contract.rounding == "exact"

    @property
    def rows(self) -> int:
        return self.inputs.plain["x"].shape[0]

    @property
    def blocks(self) -> int:
        return self.inputs.columns // BLOCK

    @cached_property
    def values(self) -> torch.Tensor:
        """float32 [M, B, 16]: what is quantized, the activation's result where there is one."""
        x = self.inputs.plain["x"]
        held = silu_and_mul(x, self.inputs.activation) if self.inputs.activation else x
        return held.float().reshape(self.rows, self.blocks, BLOCK)

    @cached_property
    def span(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The least and the greatest that a target may have of `values`, float32 [M, B, 16]; of x there is one alone.
        """
        if not self.inputs.activation:
            return self.values, self.values
        low, high = activated_span(self.inputs.plain["x"])
        shape = self.values.shape
        return low.float().reshape(shape), high.float().reshape(shape)

    @cached_property
    def sizes(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Of each value, the least and the greatest magnitude that it may have, float32 [M, B, 16]; 0 for NaN."""
        low, high = (part.nan_to_num(0.0, torch.inf, -torch.inf) for part in self.span)
        least = torch.where((low < 0) & (high > 0), 0.0, torch.minimum(low.abs(), high.abs()))
        return least, torch.maximum(low.abs(), high.abs())

    @cached_property
    def row_scales(self) -> torch.Tensor:
        """float32 [M, 1]: the global scale of each row; 0 where it has none, or one that makes no sense."""
        return row_scale(self.inputs.plain["global_scale"], self.rows, self.inputs.plain.get("expert_ids"))

    @cached_property
    def ideal(self) -> torch.Tensor:
        """float64 [M, B]: amax * global_scale / 6, which a scale byte rounds."""
        return self._ideal_of(self.values.abs().nan_to_num(nan=0.0, posinf=torch.inf))

    @cached_property
    def ideals(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The least and the greatest that `ideal` may be."""
        if not self.inputs.activation:
            return self.ideal, self.ideal
        least, greatest = self.sizes
        return self._ideal_of(least), self._ideal_of(greatest)

    def _ideal_of(self, sizes: torch.Tensor) -> torch.Tensor:
        scale = self.row_scales.double()
        return torch.where(scale > 0, sizes.double().amax(dim=2) * scale / 6, 0.0)

    @cached_property
    def scale_bytes(self) -> tuple[torch.Tensor, torch.Tensor]:
        """uint8 [M, B]: the least and the greatest scale byte, as the contract rounds; one and the same without an
        activation."""
        if not self.inputs.activation:
            return self.expected, self.expected
        least, greatest = self.sizes
        return scale_bytes(least, self.row_scales), scale_bytes(greatest, self.row_scales)

    @cached_property
    def expected(self) -> torch.Tensor:
        """uint8 [M, B]: the contract's scale bytes."""
        return scale_bytes(self.values, self.row_scales)

    @cached_property
    def sound(self) -> torch.Tensor:
        """bool [M, B]: blocks of finite numbers only, in x as well."""
        found = (self.values.isfinite() & self.span[0].isfinite() & self.span[1].isfinite()).all(dim=2)
        if self.inputs.activation:
            halves = self.inputs.plain["x"].isfinite().view(self.rows, 2, self.blocks, BLOCK)
            found &= halves.all(dim=3).all(dim=1)
        return found

    @property
    def promised(self) -> torch.Tensor:
        """bool [M, B]: blocks whose bytes somebody promises: NaN and Inf are a matter of the target's own policy."""
        return torch.ones_like(self.sound) if self.info.contract.nonfinite == "reference" else self.sound

    @cached_property
    def healed_inputs(self) -> QuantizeInputs:
        """The same with ordinary numbers in each block that has NaN or Inf; the very same where none has."""
        if bool(self.sound.all()):
            return self.inputs
        x = self.inputs.plain["x"]
        stream = self.case.stream(self.step_index)
        ordinary = fresh(self.case, list(self.case.steps[self.step_index].rows), stream, x.device)
        whole = self.sound.repeat_interleave(BLOCK, dim=1).repeat(1, x.shape[1] // self.inputs.columns)
        return self.inputs.replace(x=torch.where(whole, x, ordinary))

    @cached_property
    def fewer(self) -> tuple[torch.Tensor, QuantizeInputs]:
        """Every second row from the last, or some eight of them, int64 [R], and the inputs of these rows alone."""
        apart = 2 if self.case.seed % 2 else max(2, self.rows // 8)
        rows = torch.arange(self.rows, device=self.values.device).flip(0)[::apart]
        held = {name: self.inputs.plain[name] for name in self.inputs.fluid if name in self.inputs.plain}
        return rows, self.inputs.replace(**{name: tensor[rows] for name, tensor in held.items()})

    # ---- outputs ----------------------------------------------------------------------------------------------------

    @property
    def shaped(self) -> bool:
        """Whether results have the contract's shape, and bytes; without it nothing else can be judged."""
        shapes = [shape for shape, _ in self.inputs.results.values()]
        found = (self.outputs.codes, self.outputs.scales)
        return all(tuple(t.shape) == shape and t.element_size() == 1 for t, shape in zip(found, shapes, strict=True))

    @cached_property
    def bytes(self) -> torch.Tensor:
        """uint8 [M, B]: the scale bytes of the blocks, wherever they lie."""
        table = self.outputs.scales.view(torch.uint8)
        return unswizzle(table, self.rows, self.blocks) if self.inputs.layout == "swizzled" else table

    @cached_property
    def padding(self) -> torch.Tensor:
        """bool, of the shape of the scales: what belongs to no block."""
        ones = torch.ones((self.rows, self.blocks), dtype=torch.uint8, device=self.values.device)
        return (swizzle(ones) if self.inputs.layout == "swizzled" else ones) == 0

    @cached_property
    def codes(self) -> torch.Tensor:
        """uint8 [M, B, 16]"""
        return unpack(self.outputs.codes).view(self.rows, self.blocks, BLOCK)

    @cached_property
    def lawful(self) -> torch.Tensor:
        """bool [M, B]: blocks whose scale byte is a number, not below 0."""
        return (self.bytes <= 126) & ~self._scale_left

    @cached_property
    def right_codes(self) -> torch.Tensor:
        """uint8 [M, B, 16]: the contract's codes under the target's own scale bytes."""
        return self._codes_of(self.values)

    @cached_property
    def span_codes(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The same of the least and of the greatest value."""
        low, high = self.span
        return (self.right_codes, self.right_codes) if low is high else (self._codes_of(low), self._codes_of(high))

    def _codes_of(self, values: torch.Tensor) -> torch.Tensor:
        usable = torch.where(self.row_scales > 0, self.row_scales, 1.0)
        scales = torch.where(self.row_scales > 0, self.bytes.clamp(max=126), 0)
        return codes_of(values, scales, usable)

    @cached_property
    def unwritten(self) -> dict[str, torch.Tensor]:
        """Which bytes of each result still hold their poison. That of codes is a pair of codes as well, so a block of
        them counts where all of it is poison and should not be; that of scales is no number, unless they were allocated
        as integers, which shows in the padding."""
        wrong = (self.codes != self.right_codes).any(dim=2) & self.promised
        left = unwritten(self.outputs.codes).view(self.rows, self.blocks, BLOCK // 2).all(dim=2) & wrong
        scales = unwritten(self.outputs.scales)
        if self.info.contract.scale_padding == "zero":
            scales |= self.padding & unwritten(self.outputs.scales.view(torch.uint8))
        else:
            scales &= ~self.padding
        return {"codes": left.repeat_interleave(BLOCK // 2, dim=1), "scales": scales}

    @cached_property
    def _scale_left(self) -> torch.Tensor:
        left = unwritten(self.outputs.scales).to(torch.uint8)
        return (unswizzle(left, self.rows, self.blocks) if self.inputs.layout == "swizzled" else left) > 0


def scale_range(least: torch.Tensor, greatest: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The least and the greatest scale byte, uint8, that a few roundings may have made of what is in between, float64.
    """
    low, high = (nearest((ideal * factor).clamp(max=448.0), E4M3.double())
                 for ideal, factor in ((least, 1 - ULPS), (greatest, 1 + ULPS)))  # fmt: skip
    return low, high


def level(codes: torch.Tensor) -> torch.Tensor:
    """int32, -7 to 7: the place of each code's value among all; both zeros are 0."""
    return torch.where(codes < 8, codes.int(), 8 - codes.int())


def value_of(codes: torch.Tensor) -> torch.Tensor:
    """float64 values of codes."""
    return E2M1.double().to(codes.device)[codes.long() % 8] * torch.where(codes < 8, 1.0, -1.0)
