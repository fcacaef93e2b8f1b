"""Medians and their 95 % intervals by order statistics: no assumption on how times are distributed. Free of torch."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A median, and the interval that covers the true one with at least 95 % (where n allows; else all samples)."""

    median: float
    low: float
    high: float

    def to_json(self) -> list[float]:
        return [round(value, 5) for value in (self.median, self.low, self.high)]


def estimate(samples: Sequence[float]) -> Estimate:
    """The i-th smallest and i-th largest sample, i as large as the binomial distribution of ranks allows."""
    if not samples:
        raise ValueError("no samples")
    ordered = sorted(samples)
    rank = interval_rank(len(ordered))
    return Estimate(statistics.median(ordered), ordered[rank], ordered[-1 - rank])


def interval_rank(n: int) -> int:
    """The largest i such that [x(i), x(n-1-i)], counted from 0, covers the median with at least 95 %; at least 0."""
    outside, rank = 0.0, 0
    for i in range(n // 2):
        outside += math.comb(n, i) / 2**n  # P(at most i samples lie below the median)
        if 2 * outside > 1 - CONFIDENCE:
            break
        rank = i
    return rank


def paired(times: Sequence[float], base: Sequence[float]) -> Estimate:
    """The ratio of two candidates, round by round: what slows a machine down for a while slows both."""
    return estimate([one / other for one, other in zip(times, base, strict=True)])
