"""Hypothesis as a generator, and only that: it draws rounds and climbs on a score; it never sees a failure.

A failure would end its run (or be called flaky), so verdicts are recorded by the caller and nothing is raised.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, Phase, Verbosity, given, seed, settings, strategies, target

from moe_fuzz.campaign.interfaces import Cases


class Enough(BaseException):
    """Ends a drive from inside. Not an Exception: Hypothesis would take that for a failure and run it again."""


def derive_seed(root: int, *parts: object) -> int:
    """A 63-bit seed for one part of a plan: the same in every process, version and order of execution."""
    text = "\0".join([str(root), *map(str, parts)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def drive(
    rounds: strategies.SearchStrategy[Cases], root: int, examples: int, run: Callable[[Cases], float | None]
) -> bool:
    """Draws up to `examples` rounds from the seed `root` and hands each to `run`, which gives the score to climb on.

    Returns False if `run` raised Enough. Thread-safe; what is drawn depends on `root`, `examples` and the scores alone.
    """

    @seed(root)
    @settings(
        phases=[Phase.generate, Phase.target],
        backend="hypothesis",
        database=None,
        deadline=None,
        derandomize=False,
        max_examples=examples,
        print_blob=False,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
        verbosity=Verbosity.quiet,
    )
    @given(strategies.data())
    def body(data: strategies.DataObject) -> None:
        # Hypothesis mixes in the number literals of whatever local modules are loaded, so the same seed would give
        # other cases in a checkout than in a wheel, or under pytest. Our dictionary is in the strategies.
        provider: Any = data.conjecture_data.provider
        provider._maybe_draw_constant = _no_constant
        score = run(data.draw(rounds))
        if score is not None and math.isfinite(score):
            target(float(score), label="error budget")

    try:
        body()
    except Enough:
        return False
    return True


def _no_constant(*_args: object, **_kwargs: object) -> None:
    return None
