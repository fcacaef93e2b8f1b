"""Which cases of a target would take too long here, as far as those that ran can tell. For a CPU.

A space knows what a case costs where a kernel has the programs that ours has (`Space.cost`), and has none drawn that
costs too much. Triton's interpreter takes milliseconds for each program, and a user's kernel may have one for each row,
or for each slot and each block of columns. So what cases take is laid on that cost and on their sizes, and a case of
which much is to be expected is left out of the campaign. It stays what it is, and runs when it is replayed.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass, field
from itertools import combinations

from moe_fuzz.campaign.interfaces import Space
from moe_fuzz.case import Case
from moe_fuzz.ops.space import Means
from moe_fuzz.verdict import BROKEN, CRASH, HANG, OOM, REJECTED, UNJUDGED, Verdict

LIMIT = 1.0  # seconds beyond its cost that a case may be expected to take
TRUSTED = 6.0  # times its cost: what a case may take on a slow or busy machine, where a kernel of ours takes that too
ENOUGH = 3  # cases that took half of that and more, before any is left out
WEIGHED = 0.1  # seconds: of cases that take longer, what counts is their error in proportion
FADING = 0.99  # of what was learned at each further case: the machine may have been busy
SELDOM = 16  # cases are left out for each that goes all the same: no kind of case is never tried
DEAR = 4.0  # seconds that such a one may be expected to take, unless all take longer
DEAREST = 7.0  # and then: well before a deadline
_SWEEPS = 50


class Thrift:
    """Of one target. Safe to use from every thread."""

    def __init__(self, space: Space, means: Means) -> None:
        self._space, self._means = space, means
        self._lock = threading.Lock()
        self._slow = 0
        self._fit = _Fit()
        self._left_out: list[float] = []  # seconds expected of the last ones

    def learn(self, case: Case, verdict: Verdict) -> None:
        """What died or hung says nothing of its size, nor does what was refused at once."""
        if verdict.kind in (CRASH, HANG, OOM, BROKEN) or (verdict.kind == REJECTED and UNJUDGED not in verdict.stats):
            return
        cost, seconds = self._space.cost(case, self._means), verdict.seconds
        with self._lock:
            self._slow += seconds > TRUSTED * cost / 2 + WEIGHED
            self._fit.add((cost, *sizes(self._space, case)), seconds, 1 / (WEIGHED + seconds) ** 2)

    def too_slow(self, case: Case) -> bool:
        cost = self._space.cost(case, self._means)
        allowed = max(cost + LIMIT, TRUSTED * cost)
        with self._lock:
            expected = self._fit.of((cost, *sizes(self._space, case))) if self._slow >= ENOUGH else 0.0
            if expected <= allowed:
                return False
            if len(self._left_out) >= SELDOM and expected <= self._may_take():
                self._left_out.clear()
                return False
            self._left_out.append(expected)
            return True

    def _may_take(self) -> float:
        """Where all of them take longer, one of the quicker quarter: the quickest yet would be long in coming. But none
        that may be taken for one that hangs, unless it is the quickest."""
        least, *others = sorted(self._left_out)
        return DEAR if least <= DEAR else max(least, min(others[len(others) // 4], DEAREST))


def extent(space: Space, case: Case) -> float:
    """By which the cheap cases come first, as long as nothing is known of a target: the product of all sizes, rows
    twice, as many rows are slow to interpret however small they are."""
    _, rows, *products = sizes(space, case)
    return rows * (products[-1] if products else rows)


def sizes(space: Space, case: Case) -> tuple[float, ...]:
    """What the time of a case may be in proportion to: nothing, its rows, and these times any of its sizes."""
    labels = space.label_axes(case)
    each = [float(len(labels[name]) if name in labels else int(case.config[name])) for name in space.sizes]
    products = (math.prod(some) for count in range(len(each) + 1) for some in combinations(each, count))
    launches = getattr(space, "launches", None)
    times = 1 if launches is None else launches(case.config)
    rows = times * sum(step.tokens for step in case.steps)
    return (float(times), *(rows * product for product in products))


@dataclass
class _Fit:
    """Seconds as a sum over sizes, each times a factor of at least 0: the least squares of what was added."""

    products: list[list[float]] = field(default_factory=list)  # of each two sizes
    seconds: list[float] = field(default_factory=list)  # times each size
    factors: list[float] = field(default_factory=list)
    fresh: bool = True

    def add(self, x: tuple[float, ...], seconds: float, weight: float) -> None:
        if not self.seconds:
            self.products, self.seconds = [[0.0] * len(x) for _ in x], [0.0] * len(x)
            self.factors = [0.0] * len(x)
        for at, one in enumerate(x):
            self.seconds[at] = FADING * self.seconds[at] + weight * one * seconds
            self.products[at] = [FADING * old + weight * one * two
                                 for old, two in zip(self.products[at], x, strict=True)]  # fmt: skip
        self.fresh = False

    def of(self, x: tuple[float, ...]) -> float:
        if not self.fresh:
            self._solve()
        return sum(factor * one for factor, one in zip(self.factors, x, strict=True))

    def _solve(self) -> None:
        """One factor after the other, from where they were."""
        for _ in range(_SWEEPS):
            for at, row in enumerate(self.products):
                if row[at]:
                    others = sum(a * b for a, b in zip(row, self.factors, strict=True)) - row[at] * self.factors[at]
                    self.factors[at] = max(0.0, (self.seconds[at] - others) / row[at])
        self.fresh = True
