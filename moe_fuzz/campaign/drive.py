"""Hypothesis as a generator, and only that: it draws rounds; it never sees a failure.

A failure would end its run (or be called flaky), so verdicts are recorded by the caller and nothing is raised. Nor does
it climb on a score: neither the error budget nor imbalance found bugs in fewer cases (benchmarks/guidance.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, Phase, Verbosity, given, seed, settings, strategies
from hypothesis.errors import Flaky
from hypothesis.internal.conjecture.providers import AVAILABLE_PROVIDERS, HypothesisProvider

from moe_fuzz.campaign.interfaces import Cases

FRUITLESS = 64  # draws that give no round, beyond one for each that did: what a drive may take before it is ended


class Enough(BaseException):
    """Ends a drive from inside. Not an Exception: Hypothesis would take that for a failure and run it again."""


def derive_seed(root: int, *parts: object) -> int:
    """A 63-bit seed for one part of a plan: the same in every process, version and order of execution."""
    text = "\0".join([str(root), *map(str, parts)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


class Plain(HypothesisProvider):
    """Draws what the strategies say and nothing else. Hypothesis by itself grows its examples from small ones, repeats
    parts of earlier ones, leans towards zero, and mixes in the number literals of whatever local modules are loaded: so
    the same seed would give other cases in a checkout than in a wheel, under another version, or under pytest; and a
    bug takes 1.2 times as many (benchmarks/guidance.py). Our dictionary and our sizes are in the strategies."""

    def _maybe_draw_constant(self, *args: Any, **options: Any) -> None:
        return None

    def draw_integer(self, min_value: int | None = None, max_value: int | None = None, **options: Any) -> int:
        if min_value is None or max_value is None:
            return super().draw_integer(min_value, max_value, **options)
        assert self._random is not None
        return self._random.randint(min_value, max_value)


PLAIN = "moe-fuzz"
AVAILABLE_PROVIDERS[PLAIN] = f"{__name__}.{Plain.__name__}"


def drive(
    rounds: strategies.SearchStrategy[Cases], root: int, examples: int, run: Callable[[Cases], object],
    backend: str = PLAIN,
) -> bool:  # fmt: skip
    """Draws up to `examples` rounds from the seed `root` and hands each to `run`.

    Returns False if `run` raised Enough, or most draws gave no round: Hypothesis puts parts of rounds into others, and
    allows itself 45 that run out of choices for each that does not. It keeps a record of every one, and meanwhile
    nothing is tested. Errors of `run` come out as they are. Thread-safe. What is drawn depends on `root` and `examples`
    alone, until `run` ends it. backend: of Hypothesis; its own would climb where `run` calls `hypothesis.target`.
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
        backend=backend,
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

    try:
        body()
    except (Enough, Flaky) as error:
        if failed:
            raise failed[0] from None
        if isinstance(error, Flaky) and not tired:  # a draw that ends where another one went on is flaky, to Hypothesis
            raise
        return False
    return True
