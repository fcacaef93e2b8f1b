"""The coverage of a campaign as a heat map: for each target and mode, classes of configs down, faults across.

What no case had stays visible as a hole: the columns are all faults that the op knows, drawn or not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from moe_fuzz.campaign.events import ALL_CONFIGS, NO_FAULT, Cell
from moe_fuzz.case import ALL_MODES
from moe_fuzz.errors import UsageError
from moe_fuzz.ops import get_space
from moe_fuzz.report.text import count

LEVELS = 6  # of heat, on a logarithmic scale


@dataclass(frozen=True)
class Spot:
    """One cell of a table. heat: 0 (no case) to LEVELS."""

    cases: int
    bad: int
    budget: float
    heat: int
    tip: str


@dataclass(frozen=True)
class Row:
    name: str
    spots: tuple[Spot, ...]


@dataclass(frozen=True)
class Map:
    """One target in one mode. covered: cells with a case, of all that the table has."""

    target: str
    mode: str
    faults: tuple[str, ...]
    rows: tuple[Row, ...]
    covered: int

    @property
    def total(self) -> int:
        return len(self.rows) * len(self.faults)


def maps(cells: Sequence[Cell]) -> Iterator[Map]:
    """Targets with bad cases first, else in the order of `cells`; then in that of the modes."""
    targets = dict.fromkeys(cell.target for cell in cells)
    for target in sorted(targets, key=lambda name: not any(cell.bad for cell in cells if cell.target == name)):
        own = [cell for cell in cells if cell.target == target]
        modes = {cell.mode for cell in own}
        for mode in (*(m for m in ALL_MODES if m in modes), *sorted(modes - set(ALL_MODES))):
            yield _map(target, mode, [cell for cell in own if cell.mode == mode])


def _map(target: str, mode: str, cells: Sequence[Cell]) -> Map:
    at = {(cell.config_class, cell.fault): cell for cell in cells}
    seen = {cell.fault for cell in cells}
    faults = (NO_FAULT, *sorted((seen | _possible(target, mode)) - {NO_FAULT}))
    classes = (ALL_CONFIGS, *sorted({cell.config_class for cell in cells} - {ALL_CONFIGS}, key=_natural))
    most = max((cell.cases for cell in cells), default=1)
    rows = tuple(
        Row(name, tuple(_spot(name, fault, at.get((name, fault)), most) for fault in faults)) for name in classes
    )
    covered = sum(spot.cases > 0 for row in rows for spot in row.spots)
    return Map(target, mode, faults, rows, covered)


def _spot(name: str, fault: str, cell: Cell | None, most: int) -> Spot:
    where = f"{name}, {'no fault' if fault == NO_FAULT else fault}"
    if cell is None:
        return Spot(0, 0, 0.0, 0, f"{where}: no case")
    heat = 1 if most <= 1 else 1 + round((LEVELS - 1) * math.log(cell.cases) / math.log(most))
    bad = f", {cell.bad:,} bad" if cell.bad else ""
    budget = f", largest error {cell.budget:.0%} of its bound" if cell.budget else ""
    tip = f"{where}: {count(cell.cases, 'case')}{bad}{budget}"
    return Spot(cell.cases, cell.bad, cell.budget, heat, tip)


def _possible(target: str, mode: str) -> set[str]:
    """The faults that the op has a place for in this mode. A target may lack a tensor that they lie on."""
    try:
        places = get_space(target.partition("@")[0]).places
    except UsageError:  # an op that a plugin or a test brings along
        return set()
    return {place.fault for place in places if mode in place.modes}


def _natural(name: str) -> tuple[str, float, str]:
    """`T>8` before `T>32`."""
    head, sign, tail = name.partition(">")
    return (head + sign, float(tail) if tail.isdigit() else 0.0, name)
