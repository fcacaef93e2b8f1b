"""What a table of caps should say, and what the one in use costs, from measured times. Child side, without a GPU.

A fused call takes the message as it is; an unfused one is an all-reduce of its own, followed by the norm.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from moe_fuzz.kernels.allreduce_rmsnorm.dispatch import ALWAYS, BACKENDS, Bounds, Caps, within

#: A choice of the table may be so much slower than the best one.
SLACK = 1.05


@dataclass(frozen=True)
class Point:
    """Medians of one size, in microseconds. The families of `unfused` are what may be active: the best of each
    counts."""

    hidden: int
    tokens: int
    message: int  # bytes
    fused: Mapping[str, float]  # by backend
    unfused: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # family -> way -> time

    def best_unfused(self, family: str) -> float:
        return min(self.unfused[family].values())

    @property
    def row(self) -> int:
        """Bytes."""
        return self.message // self.tokens


Times = Iterable[tuple[int, float, float]]  # bytes, time of the first way, time of the second


def best_cap(points: Times) -> int:
    """The cap in bytes up to which the first of two ways is taken: that one with which the worst choice is the least
    bad; of equal ones the sum decides. ALWAYS where the first is taken everywhere."""
    measured = sorted(points)
    if not measured:
        return ALWAYS
    return min([0, *_sizes(measured)[:-1], ALWAYS], key=lambda cap: (*_cost(measured, cap), -cap))


def best_bounds(points: Times) -> Bounds:
    """`best_cap`; or two bounds, between which the second way is taken, where no cap is within 5 % of the best choice
    everywhere and these are."""
    measured = sorted(points)
    cap = best_cap(measured)
    between = list(itertools.combinations([0, *_sizes(measured)], 2)) if measured else []
    if _cost(measured, cap)[0] <= SLACK or not between:
        return cap
    bounds = min(between, key=lambda two: _cost(measured, two))
    return bounds if _cost(measured, bounds)[0] <= SLACK else cap


def _sizes(measured: Times) -> list[int]:
    return sorted({size for size, _, _ in measured})


def _cost(measured: Times, bounds: Bounds) -> tuple[float, float]:
    """The worst choice against the best one, and the sum of all of them."""
    ratios = [(first if within(bounds, size) else second) / min(first, second) for size, first, second in measured]
    return max([*ratios, SLACK]), sum(ratios)


def caps_of_points(points: Sequence[Point], source: str) -> Caps:
    """The caps that the points ask for: for rows of any width where they are within 5 % of the best choice at every
    point, else for rows of each width that was measured, and those nearest to it."""
    whole = _caps(points, source)
    rows = sorted({point.row for point in points})
    if len(rows) < 2 or not misses(points, whole):
        return whole
    *narrower, widest = (_caps([point for point in points if point.row == row], "") for row in rows)
    edges = [math.isqrt(row * wider) for row, wider in itertools.pairwise(rows)]
    return replace(widest, source=source, narrower=tuple(zip(edges, narrower, strict=True)))


def _caps(points: Sequence[Point], source: str) -> Caps:
    one, split, two = BACKENDS
    families = sorted({name for point in points for name in point.unfused})
    others = [min(time for name, time in p.fused.items() if name != one) for p in points]
    cap = best_cap((p.message, p.fused[one], other) for p, other in zip(points, others, strict=True))
    above = [(p.message, p.fused[split], p.fused[two]) for p in points if p.message > cap and split in p.fused]
    caps = Caps(cap, source=source, split=best_cap(above) if above else 0)
    taken = [(p, p.fused[caps.backend(p.message)]) for p in points]
    fused = {name: best_bounds((p.message, time, p.best_unfused(name)) for p, time in taken if name in p.unfused)
             for name in families}  # fmt: skip
    return replace(caps, fused=fused)


def chosen(point: Point, caps: Caps, family: str | None) -> tuple[str, float]:
    """(name, time) of what is taken with these caps, where `family` is the active all-reduce."""
    caps = caps.of(point.row)
    if family is not None and not within(caps.fused.get(family, ALWAYS), point.message):
        return min(point.unfused[family].items(), key=lambda item: item[1])
    backend = caps.backend(point.message)
    return backend, point.fused[backend]


def misses(points: Sequence[Point], caps: Caps) -> list[dict[str, Any]]:
    """Where the table is more than 5 % slower than the best choice, with any active all-reduce, or with none."""
    found = []
    for point in points:
        for family in (None, *point.unfused):
            name, time = chosen(point, caps, family)
            ways = dict(point.fused) | (dict(point.unfused[family]) if family is not None else {})
            best = min(ways, key=lambda way: ways[way])
            if time > SLACK * ways[best]:
                found.append({"hidden": point.hidden, "tokens": point.tokens, "bytes": point.message,
                              "active": family or "none", "chosen": name, "us": time, "best": best,
                              "best_us": ways[best]})  # fmt: skip
    return found


def crossover(points: Sequence[Point], family: str) -> int | None:
    """The largest size in bytes at which fusing still wins over `family`, if it does not win at all sizes after it."""
    measured = sorted((p for p in points if family in p.unfused), key=lambda p: p.message)
    wins = [p.message for p in measured if min(p.fused.values()) <= p.best_unfused(family)]
    if not wins:
        return 0
    return None if wins[-1] == measured[-1].message else wins[-1]
