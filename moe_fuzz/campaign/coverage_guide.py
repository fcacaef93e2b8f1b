"""Feature coverage as a guide: which cases of a round are worth a run.

The cases of a round are alike: they share a config and a few faults. Of those that cover a point of the feature lattice
for the first time all run; of a round that has none, the first two. benchmarks/guidance.py says what that buys.
"""

from __future__ import annotations

from moe_fuzz.campaign import lattice
from moe_fuzz.campaign.interfaces import Cases, Space
from moe_fuzz.contract import TargetInfo

MOST_ALIKE = 2  # of a round that covers nothing new


class Guide:
    """What one unit of the plan has covered so far. A function of the unit alone, like everything in it."""

    def __init__(self, space: Space, info: TargetInfo, device: str) -> None:
        self._space = space
        # Where a config is compiled, which takes as long as hundreds of cases, no case of it is dropped.
        self._on = device == "cpu" or not info.capabilities.compiles
        self._covered: set[lattice.Cell] = set()

    def worth(self, cases: Cases) -> Cases:
        """The cases of a round that are to run."""
        if not self._on:
            return cases
        fresh = []
        for case in cases:
            found = lattice.cells(self._space, case, 0.0)
            if not found <= self._covered:
                self._covered |= found
                fresh.append(case)
        return tuple(fresh) or cases[:MOST_ALIKE]
