"""Block shapes of the products that decode their weights, and which backend takes a call."""

from __future__ import annotations

import os
from dataclasses import dataclass

import triton

from moe_fuzz.kernels.experts_bf16.blocks import Blocks
from moe_fuzz.options import EXPERTS_NVFP4_BACKEND

#: `small` decodes weights where they are multiplied. `large` decodes all of them first, into a workspace of four times
#: their size, and leaves the products to the kernels of `experts_bf16`.
BACKENDS = ("small", "large")
#: The tensor cores of sm_100 multiply codes under scales themselves, where activations are quantized, too.
SCALED = "scaled"
VARIABLE = EXPERTS_NVFP4_BACKEND
#: Slots that an expert has on average, from which on the products take longer than writing and reading those weights.
LARGE_FROM = 512


@dataclass(frozen=True)
class Tile(Blocks):
    registers: int = 0  # of a thread at most, so that more programs fit a multiprocessor; 0: what the compiler takes


@dataclass(frozen=True)
class Plan:
    up_to: float  # slots an expert has on average
    gate_up: Tile
    down: Tile  # the same m
    inline_slots: int = 128  # up to so many slots, 128 at most, each program groups them itself: a launch less

    def __post_init__(self) -> None:
        if self.gate_up.m != self.down.m or self.inline_slots > 128:
            raise ValueError(f"both products need the same m, as `align` runs once, and inline_slots <= 128: {self}")
        if any(blocks.d % 128 or blocks.n < 16 for blocks in (self.gate_up, self.down)):
            raise ValueError(f"d must be a multiple of 128, whose columns are reordered, and n at least 16: {self}")


#: By the slots that an expert has on average. Rows of the weights are the rows of the tensor cores' tile: 64 or more.
PLANS = (
    # Memory bound; what else costs is the instructions of decoding, 4 a weight, and waits, which other programs fill.
    Plan(1, Tile(16, 64, 256, 1, 4, 3, 160), Tile(16, 64, 128, 1, 4, 4, 128), inline_slots=16),
    Plan(8, Tile(16, 64, 256, 1, 4, 3, 160), Tile(16, 64, 128, 1, 4, 4, 128)),
    Plan(24, Tile(32, 64, 256, 2, 4, 3, 160), Tile(32, 64, 128, 2, 4, 4, 128), inline_slots=16),
    Plan(96, Tile(64, 128, 128, 4, 8, 3), Tile(64, 128, 128, 4, 8, 3)),
    # Bound by the tensor cores: every decoded weight is multiplied with as many slots as registers allow.
    Plan(float("inf"), Tile(128, 128, 128, 8, 8, 3), Tile(128, 128, 128, 8, 8, 3)),
)


def choose(slots: int, num_ids: int) -> Plan:
    """The plan for `slots` slots spread over `num_ids` experts, of which some may be on other ranks."""
    return next(plan for plan in PLANS if slots / num_ids <= plan.up_to)


def interpreted(hidden: int, inter: int) -> Plan:
    """In the interpreter a step costs the same whatever its size, so there are few: of the first product, too, which
    writes whole 128 columns. One size in three is cut in two, for the seams are to be run as well. A tile groups its
    slots anew: from a handful on `align`, once, costs less."""

    def seam(size: int) -> bool:
        return -(-size // 16) % 3 == 0

    def blocks(rows: int, depth: int, cut: bool) -> Tile:
        d = min(max(triton.next_power_of_2(depth), 128), 1024)
        n = min(triton.next_power_of_2(rows), (1 << 18) // d)
        return Tile(16, max(n // 2 if cut else n, 16), max(d // 2, 128) if seam(depth) else d, 2, 4, 1)

    return Plan(0, blocks(2 * (inter + -inter % 128), hidden, seam(inter)), blocks(hidden, inter, seam(hidden)),
                inline_slots=4)  # fmt: skip


def choose_backend(
    slots: int, num_ids: int, quantizes: bool, forced: str | None = None, capability: tuple[int, int] = (0, 0)
) -> str:
    """The backend of a call: what is forced by the argument or by the environment, or else `large` from LARGE_FROM
    slots an expert, where activations are as given, and `small` everywhere else. See `rule`.

    Raises ValueError for one that is not there, or that cannot take the call; it names those that can.
    """
    forced = forced or os.environ.get(VARIABLE) or None
    if forced is None:
        return "large" if not quantizes and slots / num_ids >= LARGE_FROM else "small"
    possible = list(BACKENDS)
    if quantizes:  # what lies between the products is quantized in these alone
        possible = ["small", SCALED] if capability[0] == 10 else ["small"]
    if forced not in possible:
        why = "does not exist"
        if forced == "large":
            why = "cannot quantize activations"
        elif forced == SCALED:
            why = "needs sm_100" if quantizes else "needs quantized activations"
        raise ValueError(f"backend {forced!r} {why}; possible here: {', '.join(possible)} "
                         f"(argument backend=, environment {VARIABLE})")  # fmt: skip
    return forced


def formats() -> tuple[str, ...]:
    """The formats of activations that calls of this process may ask for: a backend that is forced takes some alone."""
    return {"large": ("as_given",), SCALED: ("nvfp4",)}.get(os.environ.get(VARIABLE, ""), ("as_given", "nvfp4"))


def rule() -> str:
    """How backends are chosen in this process, for a person."""
    forced = os.environ.get(VARIABLE)
    if forced:
        there = "" if forced in (*BACKENDS, SCALED) else f", which does not exist: {', '.join((*BACKENDS, SCALED))} do"
        return f"backend {forced}, forced by {VARIABLE}{there}"
    return (f"backend large from {LARGE_FROM} slots an expert where activations are as given, else small; "
            f"{SCALED} only by {VARIABLE}")  # fmt: skip


#: Of `scaled`, whose instruction multiplies 128 rows at once. It has run nowhere yet, so it is never chosen unasked.
SCALED_PLAN = Plan(float("inf"), Tile(64, 128, 256, 4, 4, 3), Tile(64, 128, 256, 4, 4, 3))
