"""The feature lattice: what a case covers, and the fewest cases that cover what many do.

A point of it is (op, provider, class of configs, fault, mode, nearness to the bound). A case covers every pairing of
its classes (`Space.features`) with its faults, at its own nearness and at every lesser one: of two cases that are alike
the one nearer to the bound says more.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar

from moe_fuzz.campaign.interfaces import Space
from moe_fuzz.case import Case

T = TypeVar("T")
ANY, NONE = "any", "none"  # whatever the config is; no fault
#: Error over bound from which on a case is one level nearer. Level 0: nothing was judged against a bound, or hardly.
NEARNESS = (0.05, 0.25, 0.5, 0.75, 0.9)


class Cell(NamedTuple):
    """A point of the lattice."""

    op: str
    provider: str  # as the target names it; empty for a case that is nobody's
    config_class: str  # ANY, or one of `Space.features`
    fault: str  # NONE, or its name
    mode: str
    nearness: int  # index into NEARNESS, plus 1


def nearness(budget: float) -> int:
    """The level of the largest error over bound that was still accepted."""
    return sum(budget >= limit for limit in NEARNESS)


def cells(space: Space, case: Case, budget: float) -> frozenset[Cell]:
    """All points that a passing case covers. budget: its largest error over bound."""
    classes = [ANY, *(name for name in space.features(case) if not name.startswith("fault:"))]
    faults = case.fault_names or (NONE,)
    provider = case.target.partition("@")[2]
    levels = range(nearness(budget) + 1)
    return frozenset(
        Cell(case.op, provider, name, fault, case.mode, level)
        for name in classes for fault in faults for level in levels
    )  # fmt: skip


def cover(
    items: Mapping[str, frozenset[Cell]], keep: Sequence[str] = (),
    weight: Callable[[str], tuple[float, ...]] = lambda name: (),
) -> list[str]:
    """Names whose cells together are all cells, those of `keep` among them, in order of their names.

    The smallest such set is hard to know (set cover); this is the greedy one, which is at most ln n times as large,
    less whatever turns out to be covered by others. weight: the lower, the better, if equal gains do not decide.
    """
    chosen = list(dict.fromkeys(keep))
    left = set().union(*items.values()) - set().union(*(items[name] for name in chosen))
    line = [(-len(found), weight(name), name) for name, found in items.items() if name not in set(chosen)]
    heapq.heapify(line)
    while left:
        _, cost, name = heapq.heappop(line)
        gain = len(items[name] & left)
        if line and (-gain, cost, name) > line[0]:  # it was worth more when it was put in line: others have some of it
            heapq.heappush(line, (-gain, cost, name))
            continue
        chosen.append(name)
        left -= items[name]
    return sorted(_needed(chosen, items, frozenset(keep)))


def _needed(chosen: Sequence[str], items: Mapping[str, frozenset[Cell]], keep: frozenset[str]) -> Iterator[str]:
    """Those without which a cell would be lost; the last chosen, which brought least, are asked first."""
    times = Counter(cell for name in chosen for cell in items[name])
    for name in reversed(chosen):
        if name in keep or any(times[cell] == 1 for cell in items[name]):
            yield name
        else:
            times.subtract(items[name])
