"""Faults on the ids and routing weights of an experts case, and what stands in the slots of padding rows. Worker side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from moe_fuzz import generator
from moe_fuzz.faults.align import IdsCanvas, IdsFault
from moe_fuzz.faults.fault import Canvas, Fault, register


@dataclass
class WeightsCanvas(Canvas):
    """Routing weights while their faults are laid; those that hang on the ids come when these are known."""

    dropped: torch.Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))  # [T, k]: no expert here


@register
class LastExperts(IdsFault):
    """The rows name the last experts, as many as an eighth of them at least: ids that a narrow type cuts, and ends of
    tables. k distinct experts of a row stay so."""

    name = "last_experts"

    def lay_ids(self, canvas: IdsCanvas, positions: Sequence[int]) -> None:
        top_k, experts = canvas.values.shape[1], len(canvas.experts)
        few = max(top_k, experts // 8)
        first = canvas.choose_rows(positions, few, self.name)  # [P, 1]
        slot = torch.arange(top_k, device=canvas.device)
        canvas.values[positions] = (experts - 1 - (first + slot) % few).to(canvas.values.dtype)


@register
class NanDropped(Fault):
    """The weights of slots that have no expert here are NaN: what a router leaves in rows that nobody should read
    (sglang#24850)."""

    name = "nan_dropped"

    def lay(self, canvas: Canvas, positions: Sequence[int]) -> None:
        assert isinstance(canvas, WeightsCanvas), f"{self.name} is laid on weights, not on {canvas.name}"
        hit = canvas.dropped[positions]
        canvas.values[positions] = torch.where(hit, canvas.nans(positions, self.name), canvas.values[positions])


@register
class Int64Ids(Fault):
    """The ids are int64, as torch's own routers give them (sglang#29929)."""

    name = "int64_ids"

    def lay(self, canvas: Canvas, positions: Sequence[int]) -> None:
        canvas.values = canvas.values.long()


@register
class ExtremeWeights(Fault):
    """Half of a row's routing weights are ±0, negative, tiny or huge: what a router leaves that does not renormalize,
    or scales."""

    name = "extreme_weights"

    def lay(self, canvas: Canvas, positions: Sequence[int]) -> None:
        table = canvas.table([0.0, -0.0, -1.0, -0.375, 2.0**-100, -(2.0**-24), 2.0**10, -(2.0**7)], torch.float32)
        pick = canvas.choose(positions, 2 * len(table), self.name)
        row = canvas.values[positions]
        canvas.values[positions] = torch.where(pick < len(table), table[pick.clamp(max=len(table) - 1)], row)


@register
class BrokenBiases(Fault):
    """NaN, +Inf or -Inf in the biases of experts: in one place alone, a gate's or one that a gate multiplies, or in one
    in four. A NaN of x is in both, and so shows in what they make, whatever becomes of either. The place is the same in
    all of them: beside a NaN that one expert keeps, one that another loses shows in no sum."""

    name = "broken_biases"

    def lay(self, canvas: Canvas, positions: Sequence[int]) -> None:
        count = canvas.values.shape[1]
        alone = canvas.choose_rows([0], count + -(-count // 7), self.name + "/alone")  # [1, 1]: 7 in 8 are
        place = torch.arange(count, device=canvas.device)
        hit = torch.where(alone < count, alone == place, canvas.choose(positions, 4, self.name + "/where") == 0)
        infinite = canvas.table([torch.inf, -torch.inf], canvas.values.dtype)
        kind = canvas.choose_rows([0], 10, self.name)  # NaN in four of five
        broken = torch.where(kind > 1, canvas.nans(positions, self.name), infinite[kind.clamp(max=1)])
        canvas.values[positions] = torch.where(hit, broken, canvas.values[positions])


@register
class BrokenWeights(Fault):
    """NaN, +Inf or -Inf in the projections of experts, as one leaves them that was never loaded: all of an expert, one
    number in four, or one alone. Beside tokens that name it are those that do not, and no mask of zeros keeps it from
    them."""

    name = "broken_weights"

    def lay(self, canvas: Canvas, positions: Sequence[int]) -> None:
        count = canvas.values.shape[1]
        extent = int(generator.choice(canvas.seed, f"{canvas.name}/{self.name}/extent", [0], [0], 4))
        if extent == 0:  # one alone, in each expert another
            where = f"{canvas.name}/{self.name}/where"  # of more places than `choice` can tell apart
            word = generator.words(canvas.seed, where, canvas.labels(positions), [0], device=canvas.device)
            hit = word % count == torch.arange(count, device=canvas.device)
        elif extent == 1:
            hit = canvas.choose(positions, 4, self.name + "/where") == 0
        else:
            hit = torch.ones((), dtype=torch.bool, device=canvas.device)
        infinite = canvas.table([torch.inf, -torch.inf], canvas.values.dtype)
        kind = canvas.choose_rows(positions, 10, self.name)  # NaN in four of five
        broken = torch.where(kind > 1, canvas.nans(positions, self.name), infinite[kind.clamp(max=1)])
        canvas.values[positions] = torch.where(hit, broken, canvas.values[positions])


def write_padding(dialect: str, ids: IdsCanvas, weights: WeightsCanvas, positions: Sequence[int]) -> None:
    """The ids and weights of flagged rows, as a router that speaks this dialect writes them."""
    if dialect == "distinct" or not positions:
        return
    if dialect == "garbage":
        count, limits = len(ids.experts), torch.iinfo(torch.int32)
        odd = ids.table([-1, -2, count, count + 1, 2 * count, limits.max, limits.min], torch.int32)
        pick = ids.choose(positions, 2 * len(odd), dialect)
        ids.values[positions] = torch.where(pick < len(odd), odd[pick.clamp(max=len(odd) - 1)], ids.values[positions])
        left = weights.table([torch.nan, torch.inf, -1.0, 0.0, 2.0**100, -torch.inf, 1.0, 0.5], torch.float32)
        weights.values[positions] = left[weights.choose(positions, len(left), dialect)]
        return
    ids.values[positions] = {"minus_one": -1, "num_experts": len(ids.experts), "zero_weight": 0}[dialect]
    weights.values[positions] = 0.0
