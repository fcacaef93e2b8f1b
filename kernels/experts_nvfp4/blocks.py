"""Block shapes of the products that decode their weights, and which backend takes a call."""

from __future__ import annotations

import functools
import math
import os
from dataclasses import dataclass

import torch
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
LARGE_FROM = 340


@dataclass(frozen=True)
class Tile(Blocks):
    registers: int = 0  # of a thread at most, so that more programs fit a multiprocessor; 0: what the compiler takes


@dataclass(frozen=True)
class Plan:
    up_to: float  # slots an expert has on average
    gate_up: Tile
    down: Tile  # the same m

    def __post_init__(self) -> None:
        if self.gate_up.m != self.down.m:
            raise ValueError(f"both products need the same m, as `align` runs once: {self}")
        if any(blocks.d % 128 or blocks.n < 16 for blocks in (self.gate_up, self.down)):
            raise ValueError(f"d must be a multiple of 128, whose columns are reordered, and n at least 16: {self}")


#: Up to FEW slots an expert memory is what binds: each tile of the weights is read once, and m is the least that tl.dot
#: takes. What else costs is the instructions of decoding, 4 a weight, and waits, which other programs fill: so there
#: are few registers to each. Rows of the weights are rows of the tensor cores' tile: 64 or more. See `tile_of`.
FEW = 8
NARROW = Tile(16, 64, 128, 1, 4, 4, 128)
DEEP = Tile(16, 64, 256, 1, 4, 3, 168)
WIDE = Tile(16, 128, 128, 1, 4, 3, 128)

#: Of more, by the slots that an expert has on average.
PLANS = (
    Plan(36, Tile(32, 128, 128, 1, 4, 3, 168), Tile(32, 128, 128, 4, 4, 3, 152)),
    # Bound by decoding: every decoded weight is multiplied with as many slots as registers allow to four warps, which
    # wait for each other less than eight do.
    Plan(float("inf"), Tile(64, 128, 128, 8, 4, 3), Tile(64, 128, 128, 8, 4, 3)),
)
#: Every tile that a call can take, as either product.
EVERY_PLAN = (*(Plan(FEW, tile, tile) for tile in (NARROW, DEEP, WIDE)), *PLANS)


def tile_of(rows: int, depth: int, busy: float, multiprocessors: int) -> Tile:
    """The tile of a product of few slots an expert, with `busy` experts of so many rows of weights.

    WIDE has half as many tiles, which cost a step and a wait less each. There must be tiles enough, or multiprocessors
    idle at the end: about ten for each, and five where rows are short and soon done. Steps are longer where rows are
    very long, and where all tiles run at once: then what takes the time is one row.
    """
    at_once = 3 * multiprocessors >= busy * triton.cdiv(rows, DEEP.n)  # DEEP's registers are enough for three
    if (depth >= 4096 and depth % DEEP.d == 0) or (depth >= 512 and at_once):
        return DEEP
    tiles = busy * triton.cdiv(rows, WIDE.n)
    return WIDE if tiles >= (5 if depth <= 1024 else 10) * multiprocessors else NARROW


@functools.lru_cache(maxsize=4096)
def choose(
    slots: int, num_ids: int, experts: int, gate_up: tuple[int, int], down: tuple[int, int], multiprocessors: int
) -> Plan:
    """The plan for `slots` slots spread over `num_ids` experts, `experts` of them on this rank, whose weights have so
    many rows and columns."""
    each = slots / num_ids
    if each > FEW:
        return next(plan for plan in PLANS if each <= plan.up_to)
    busy = experts * -math.expm1(-each)  # as many have a slot, where tokens choose at random
    up, last = (tile_of(*sizes, busy, multiprocessors) for sizes in (gate_up, down))
    return Plan(FEW, up, last)


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

    return Plan(0, blocks(2 * (inter + -inter % 128), hidden, seam(inter)), blocks(hidden, inter, seam(hidden)))


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


def scales() -> bool:
    """Whether this machine has a GPU for `scaled`."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 10


def devices() -> tuple[str, ...]:
    """Where calls of this process run: a backend that is forced may need what this machine has not."""
    return () if os.environ.get(VARIABLE) == SCALED and not scales() else ("cpu", "cuda")


def rule() -> str:
    """How backends are chosen in this process, for a person."""
    forced = os.environ.get(VARIABLE)
    if forced:
        there = "" if forced in (*BACKENDS, SCALED) else f", which does not exist: {', '.join((*BACKENDS, SCALED))} do"
        if forced == SCALED and not scales():
            there = ", which needs sm_100"
        return f"backend {forced}, forced by {VARIABLE}{there}"
    return (f"backend large from {LARGE_FROM} slots an expert where activations are as given, else small; "
            f"{SCALED} only by {VARIABLE}")  # fmt: skip


#: Of `scaled`, whose instruction multiplies 128 rows at once. It has run nowhere yet, so it is never chosen unasked.
SCALED_PLAN = Plan(float("inf"), Tile(64, 128, 256, 4, 4, 3), Tile(64, 128, 256, 4, 4, 3))
