"""Block shapes of the grouped products, and when `align` runs. `benchmarks/tune_experts.py` measures them anew."""

from __future__ import annotations

from dataclasses import dataclass

import triton


@dataclass(frozen=True)
class Blocks:
    """How one product is cut."""

    m: int  # slots of one expert
    n: int  # rows of the weights; with a gate, half of them gate and half up-projection
    d: int  # of the dimension summed over, a step
    group: int  # blocks of slots that take the same tile of the weights one after another
    warps: int
    stages: int


@dataclass(frozen=True)
class Plan:
    up_to: float  # slots an expert has on average
    gate_up: Blocks
    down: Blocks  # the same m
    inline_slots: int = 16  # up to so many slots, 16 at most, each program groups them itself: a launch less
    overlaps: bool = False  # the second product and the sum are launched while the kernel before them still runs

    def __post_init__(self) -> None:
        if self.gate_up.m != self.down.m or not self.inline_slots <= 16 <= self.gate_up.m:
            raise ValueError("both products need the same m, as `align` runs once, and inline_slots <= 16 <= m: "
                             f"{self}")  # fmt: skip

#: By the slots that an expert has on average. bfloat16 and float16 are moved and multiplied at the same rate, so they
#: share the table.
PLANS = (
    # Memory bound: every tile of the weights is read once, whatever m is, so m is the least that tl.dot takes. Few
    # experts have a token, so tiles are small: there must be enough of them for every multiprocessor.
    Plan(1, Blocks(16, 64, 128, 1, 4, 4), Blocks(16, 128, 128, 1, 4, 3), overlaps=True),
    Plan(8, Blocks(16, 64, 256, 1, 4, 3), Blocks(16, 128, 128, 1, 4, 3), overlaps=True),
    # Two blocks of an expert stand side by side (group), so that the second finds the weights in the L2.
    Plan(24, Blocks(32, 128, 128, 4, 4, 3), Blocks(32, 128, 128, 4, 4, 3), overlaps=True),
    # Still memory bound. From 64 rows on Hopper's wgmma is used.
    Plan(96, Blocks(64, 128, 64, 4, 4, 3), Blocks(64, 128, 64, 4, 4, 4), overlaps=True),
    # Bound by the tensor cores, and by what a block's padding wastes of them.
    Plan(384, Blocks(128, 256, 64, 8, 8, 4), Blocks(128, 256, 64, 8, 8, 4)),
    Plan(float("inf"), Blocks(128, 256, 64, 16, 8, 4), Blocks(128, 256, 64, 8, 8, 3), overlaps=True),
)


def choose(slots: int, num_ids: int) -> Plan:
    """The plan for `slots` slots spread over `num_ids` experts, of which some may be on other ranks."""
    return next(plan for plan in PLANS if slots / num_ids <= plan.up_to)


def interpreted(hidden: int, inter: int) -> Plan:
    """In the interpreter a step costs the same whatever its size, so there are few. One size in five is cut in two, for
    the seams are to be run as well. A tile groups its slots anew: from a handful on `align`, once, costs less."""

    def blocks(rows: int, depth: int) -> Blocks:
        d = min(triton.next_power_of_2(depth), 4096)
        n = min(triton.next_power_of_2(rows), (1 << 20) // d)
        return Blocks(16, max(n // 2 if rows % 5 == 0 else n, 2), d // 2 if depth % 5 == 0 else d, 2, 4, 1)

    return Plan(0, blocks(2 * inter, hidden), blocks(hidden, inter), inline_slots=4)
