"""Faults on groups of experts. A group is a run of neighbouring columns, so each is laid along a row with a period.

They are functions of the columns' labels, as all faults are: what a period divides is a group for some group sizes, and
crosses groups for others.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moe_fuzz import generator
from moe_fuzz.faults.fault import Canvas, Fault, register

#: columns; the sizes of groups that people serve (20, 32), and what divides them and others
_PERIODS = (1, 2, 3, 4, 5, 8, 10, 16, 20, 32)


def _periodic(canvas: Canvas, positions: Sequence[int], name: str) -> torch.Tensor:
    """float32 [P, columns]: values that repeat along the row, a few of them equal within a period too."""
    rows = canvas.labels(positions)
    period = canvas.table(_PERIODS)[canvas.choose_rows(positions, len(_PERIODS), name + "/period")]  # [P, 1]
    table = 4 * generator.triangular(canvas.seed, f"{canvas.name}/{name}", rows, range(max(_PERIODS)),
                                 device=canvas.device)  # [P, 32]
    table = table.to(canvas.values.dtype).float()
    return table.gather(1, canvas.table(list(canvas.columns)).view(1, -1) % period)


@register
class TiedGroups(Fault):
    """Values that repeat along a row: groups of a multiple of the period hold the same values and tie."""

    name = "tied_groups"
    replaces = True

    def lay(self, canvas: Canvas, positions: Sequence[int]) -> None:
        canvas.values[canvas.at(positions)] = _periodic(canvas, positions, self.name).to(canvas.values.dtype)


@register
class NearTiedGroups(Fault):
    """The same, with the last bit of one value in four changed: groups differ by less than a rounding, or by little."""

    name = "near_tied_groups"
    replaces = True

    def lay(self, canvas: Canvas, positions: Sequence[int]) -> None:
        values = _periodic(canvas, positions, self.name).to(canvas.values.dtype)
        pick = canvas.choose(positions, 8, self.name)
        up = torch.full_like(values, torch.inf)
        values = torch.where(pick == 0, torch.nextafter(values, up), values)
        canvas.values[canvas.at(positions)] = torch.where(pick == 1, torch.nextafter(values, -up), values)


@register
class MaskedGroups(Fault):
    """Of the runs of a period's length every second, third or fourth is masked by -Inf; in every second row the first
    expert of each such run is left."""

    name = "masked_groups"

    def lay(self, canvas: Canvas, positions: Sequence[int]) -> None:
        lengths = canvas.table([p for p in _PERIODS if p > 1])
        length = lengths[canvas.choose_rows(positions, len(lengths), self.name + "/length")]  # [P, 1]
        every = 2 + canvas.choose_rows(positions, 3, self.name + "/every")
        phase = canvas.choose_rows(positions, 4, self.name + "/phase") % every
        spared = canvas.choose_rows(positions, 2, self.name + "/spared") == 1
        column = canvas.table(list(canvas.columns)).view(1, -1)
        hit = (column // length % every == phase) & ~(spared & (column % length == 0))
        canvas.values[canvas.at(positions)] = canvas.values[canvas.at(positions)].masked_fill(hit, -torch.inf)


@register
class OverlappingMap(Fault):
    """Every expert lies one place further on: physical ids are logical ones of other experts too, so that what is
    looked up twice, or in place one after the other, names another expert."""

    name = "overlapping_map"

    def lay(self, canvas: Canvas, positions: Sequence[int]) -> None:
        canvas.values[canvas.at(positions)] = canvas.table([label + 1 for label in canvas.columns], canvas.values.dtype)
