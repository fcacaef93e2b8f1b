"""Hypothesis as a generator, and only that: it draws rounds; it never sees a failure.

A failure would end its run (or be called flaky), so verdicts are recorded by the caller and nothing is raised. Nor does
it climb on a score: neither the error budget nor imbalance found bugs in fewer cases (benchmarks/guidance.py).
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, Phase, Verbosity, given, seed, settings, strategies
from hypothesis.errors import Flaky
from hypothesis.internal.conjecture.providers import HypothesisProvider

from moe_fuzz.campaign.interfaces import Cases

FRUITLESS = 64  # draws that give no round, beyond one for each that did: what a drive may take before it is ended


class Enough(BaseException):
    """Ends a drive from inside. Not an Exception: Hypothesis would take that for a failure and run it again."""


def derive_seed(root: int, *parts: object) -> int:
    """A 63-bit seed for one part of a plan: the same in every process, version and order of execution."""
    text = "\0".join([str(root), *map(str, parts)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def drive(
    rounds: strategies.SearchStrategy[Cases], root: int, examples: int, run: Callable[[Cases], object]
) -> bool:
    """Draws up to `examples` rounds from the seed `root` and hands each to `run`.

    Returns False if `run` raised Enough, or most draws gave no round: Hypothesis puts parts of rounds into others, and
    allows itself 45 that run out of choices for each that does not. It keeps a record of every one, and meanwhile
    nothing is tested. Errors of `run` come out as they are. Thread-safe. What is drawn depends on `root` and `examples`
    alone, until `run` ends it; one that calls `hypothesis.target` has it climb on that as well.
    """

    failed: list[Exception] = []
    drawn = given_out = 0
    tired = False

    @strategies.composite
    def counted(draw: strategies.DrawFn) -> Cases:
        nonlocal drawn, given_out, tired
        drawn += 1
        if drawn > FRUITLESS + 2 * given_out:
            tired = True
            raise Enough
        cases = draw(rounds)
        given_out += 1
        return cases

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
    @given(counted())
    def body(cases: Cases) -> None:
        try:
            run(cases)
        except Exception as error:
            failed.append(error)  # Hypothesis would run the round again, and call it flaky
            raise Enough from error

    _driving.now = True
    try:
        body()
    except (Enough, Flaky) as error:
        if failed:
            raise failed[0] from None
        if isinstance(error, Flaky) and not tired:  # a draw that ends where another one went on is flaky, to Hypothesis
            raise
        return False
    finally:
        _driving.now = False
    return True


# Hypothesis mixes in the number literals of whatever local modules are loaded, so the same seed would give other cases
# in a checkout than in a wheel, or under pytest. Our dictionary is in the strategies. There is no setting for it, and
# it happens in more places than one, hence this; a user's own Hypothesis tests in the same process keep their literals.
_driving = threading.local()
_maybe_draw_constant: Any = HypothesisProvider._maybe_draw_constant


def _no_literals(self: HypothesisProvider, *args: Any, **options: Any) -> Any:
    return None if getattr(_driving, "now", False) else _maybe_draw_constant(self, *args, **options)


setattr(HypothesisProvider, "_maybe_draw_constant", _no_literals)  # noqa: B010 - a method, to mypy
