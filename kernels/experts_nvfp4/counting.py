"""The first half of the sorting as a part of a kernel that runs before the products anyway: so it costs no launch."""

from __future__ import annotations

from typing import Any, NamedTuple

from moe_fuzz.kernels.align import Sorting

_OPERANDS, _NUMBERS = 7, 10
_NO_CONSTANTS = {"HAS_MAP": False, "CHUNK": 16, "EXPERT_PAD": 16, "PART": 16, "ONE": True}


class Counting(NamedTuple):
    """What such a kernel is given: its first `programs` count, the others see numbers from 0 on."""

    programs: int
    operands: tuple[Any, ...]
    numbers: tuple[int, ...]
    constants: dict[str, Any]
    warps: int


def counted(sorting: Sorting | None) -> Counting:
    """The arguments of `count_slots` in a kernel with 4 warps or more; with None nothing is counted."""
    if sorting is None:
        return Counting(0, (None,) * _OPERANDS, (0,) * _NUMBERS, {**_NO_CONSTANTS, "COUNTS": False}, 4)
    return Counting(sorting.chunks, sorting.operands, sorting.numbers, {**sorting.constants, "COUNTS": True},
                    sorting.warps)  # fmt: skip
