"""What a table of caps should say, and what the one in use costs, from measured times. Child side, without a GPU.

A fused call takes the message as it is; an unfused one is an all-reduce of its own, followed by the norm.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from moe_fuzz.kernels.allreduce_rmsnorm.dispatch import ALWAYS, BACKENDS, Caps

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


def best_cap(points: Iterable[tuple[int, float, float]]) -> int:
    """The cap in bytes up to which the first of two times is taken, of (bytes, first, second): that one with which the
    worst choice is the least bad; of equal ones the sum decides. ALWAYS where the first is taken everywhere."""
    measured = sorted(points)
    if not measured:
        return ALWAYS
    sizes = sorted({size for size, _, _ in measured})

    def cost(cap: int) -> tuple[float, float]:
        ratios = [(first if size <= cap else second) / min(first, second) for size, first, second in measured]
        return max(max(ratios), SLACK), sum(ratios)

    return min([0, *sizes[:-1], ALWAYS], key=lambda cap: (*cost(cap), -cap))


def caps_of_points(points: Sequence[Point], source: str) -> Caps:
    """The caps that the points ask for."""
    one, two = BACKENDS
    families = sorted({name for point in points for name in point.unfused})
    return Caps(
        best_cap((p.message, p.fused[one], p.fused[two]) for p in points),
        {name: best_cap((p.message, min(p.fused.values()), p.best_unfused(name))
                        for p in points if name in p.unfused) for name in families},
        source,
    )  # fmt: skip


def chosen(point: Point, caps: Caps, family: str | None) -> tuple[str, float]:
    """(name, time) of what is taken with these caps, where `family` is the active all-reduce."""
    if family is not None and point.message > caps.fused.get(family, ALWAYS):
        return min(point.unfused[family].items(), key=lambda item: item[1])
    backend = BACKENDS[point.message > caps.one_shot]
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
