"""Sizes beside those of a space's dictionary.

A dictionary holds the ends of blocks, vectors and warps, and their neighbours: what breaks most kernels. A kernel may
also be wrong in all numbers that no list names, such as the multiples of 16 that are none of 32.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from moe_fuzz.case import Scalar

SHARE = 4  # one draw in so many
STEPS = (1, 2, 4, 8, 16, 32)  # of which the size is a multiple, each as often: of 16 alone few numbers are
_TRIES = 4  # of numbers that a target takes


def any_number(size: int) -> bool:
    """For an axis of which a target takes every size up to the largest."""
    return True


def loosened(
    size: int, dictionary: Sequence[Scalar], chosen: random.Random, takes: Callable[[int], bool] | None = None
) -> int:
    """The size; or, one time in SHARE, another number between it and the next smaller one of the dictionary, where
    there is one that the target takes. What can be afforded at `size` can be there."""
    if chosen.randrange(SHARE):
        return size
    below = max((int(value) for value in dictionary if int(value) < size), default=0)
    step = chosen.choice(STEPS)
    room = range(below // step * step + step, size, step)
    for _ in range(_TRIES if room else 0):
        found = chosen.choice(room)
        if takes is None or takes(found):
            return found
    return size
