"""The reducer: from a failing case to the smallest one that fails the same way, whatever its origin.

It works on the JSON value alone: cases that ran before, steps, faults, rows and padding, then the op's own simpler
configs, and round again until nothing more can go. What is left keeps its values, because every value is a function of
labels. Given the same verdicts it takes the same way.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

from moe_fuzz.campaign.interfaces import Cases, Space
from moe_fuzz.case import Case, Step
from moe_fuzz.errors import CaseError
from moe_fuzz.labels import Labels
from moe_fuzz.ops import get_space

T = TypeVar("T")


@dataclass(frozen=True)
class Minimized:
    """`before` are the cases that must run first in the same process: the culprits; `case` is the victim."""

    case: Case
    before: Cases
    tries: int
    complete: bool  # False: the time was up first
    explain: tuple[str, ...]


class OutOfTime(Exception):
    """The budget is spent; what was reached so far is the answer."""


class Reducer:
    """`fails(cases)` runs the cases in one fresh process and says whether the last one still fails the same way."""

    def __init__(
        self, space: Space, fails: Callable[[Cases], bool], seconds: float,
        clock: Callable[[], float] = time.monotonic, progress: Callable[[int, Case], None] | None = None,
        tries: int | None = None,
    ) -> None:  # fmt: skip
        """seconds, tries: the budget, whichever ends first. With tries alone the clock has no part in the answer."""
        self._space = space
        self._fails = fails
        self._clock = clock
        self._end = clock() + seconds
        self._most = tries
        self._progress = progress
        self._tried: dict[tuple[str, ...], bool] = {}
        self._best: Cases = ()
        self._way: list[Case] = []

    @property
    def way(self) -> tuple[Case, ...]:
        """The cases that `run` accepted, one after the other."""
        return tuple(self._way)

    def run(self, case: Case, before: Cases = ()) -> Minimized:
        """Takes away what can go. `(*before, case)` must fail; it is not run again."""
        self._best = (*before, case)
        self._tried = {_digests(self._best): True}
        complete = True
        plain: Cases = ()
        try:
            while self._pass():
                pass
            plain = self._best
            for sharper in self._space.sharpen(plain[-1]):
                if self._accept((*plain[:-1], sharper)):
                    while self._pass():
                        pass
        except OutOfTime:
            complete = False
        if plain and self._size(self._best) >= self._size(plain):
            self._best = plain  # as small without it
        tries = len(self._tried) - 1
        last = self._best[-1]
        return Minimized(last, self._best[:-1], tries, complete, explain(case, last, len(before), len(self._best) - 1))

    def _size(self, cases: Cases) -> tuple[int, ...]:
        victim = cases[-1]
        labels = sum(map(len, self._space.label_axes(victim).values()))
        return len(cases), sum(step.tokens for step in victim.steps), labels, len(victim.fault_names)

    def _pass(self) -> bool:
        """Every kind of reduction once; whether any of them helped."""
        at_first = self._best
        if len(self._best) > 1:  # first, because it makes every later try cheaper
            ddmin(self._best[:-1], lambda kept: self._accept((*kept, self._best[-1])), may_be_empty=True)
        # The victim first: what it does not need, its culprits rarely do.
        for back in range(1, len(self._best) + 1):
            self._reduce_case(len(self._best) - back)
        return self._best != at_first

    def _reduce_case(self, at: int) -> None:
        def accept(case: Case) -> bool:
            return self._accept((*self._best[:at], case, *self._best[at + 1 :]))

        def now() -> Case:
            return self._best[at]

        def step_now(index: int) -> Step:
            return now().steps[index]

        def accept_step(index: int, step: Step) -> bool:
            return accept(now().with_step(index, step))

        at_first = now()
        ddmin(range(len(at_first.steps)), lambda kept: accept(at_first.keep_steps(kept)))
        for index in range(len(now().steps)):  # before the config, under which another fault may fail in its place
            self._reduce_faults(partial(accept_step, index), partial(step_now, index))
        self._leap(accept, now())
        if now().way:  # together, as the steps of one bucket must
            ddmin(_every_row(now()), lambda rows: accept(_keep_rows(now(), Labels.of(rows))))
        for index in range(len(now().steps)):
            self._reduce_step(partial(accept_step, index), partial(step_now, index))
        self._halve(accept, now)
        space = self._space_of(at_first)
        while any(accept(simpler) for simpler in space.simplify(now())):
            pass

        def accept_labels(axis: str, kept: tuple[int, ...]) -> bool:
            return accept(space.keep(now(), axis, Labels.of(kept)))

        for axis, labels in space.label_axes(now()).items():
            ddmin(tuple(labels), partial(accept_labels, axis))

    def _leap(self, accept: Callable[[Case], bool], case: Case) -> None:
        """Everything plain that can be plain, at once. A try is a fresh worker, on a GPU two seconds: one value at a
        time, the budget ends in the middle of the sizes, and what nobody had time to take away counts as needed."""
        plain = self._plainest(case).config
        fancy = [name for name in case.config if case.config[name] != plain[name]]

        def accept_fancy(kept: tuple[str, ...]) -> bool:
            return accept(case.with_config(**{name: plain[name] for name in fancy if name not in kept}))

        ddmin(fancy, accept_fancy, may_be_empty=True)

    def _halve(self, accept: Callable[[Case], bool], now: Callable[[], Case]) -> None:
        """Of the simpler values of each axis, the middle one first. Sizes mostly fail from one of them on, and trying
        them in turn from the smallest, a case of 160 experts that needs 65 takes 15 tries. Those are tried anyway."""
        case = now()
        axes: dict[tuple[str, ...], list[Case]] = {}
        for simpler in self._space_of(case).simplify(case):
            changed = tuple(name for name in case.config if simpler.config[name] != case.config[name])
            axes.setdefault(changed, []).append(simpler)
        axes.pop((), None)
        for changed, values in axes.items():
            low, high = 0, len(values)
            while low < high:
                middle = (low + high) // 2
                if accept(now().with_config(**{name: values[middle].config[name] for name in changed})):
                    high = middle
                else:
                    low = middle + 1

    def _plainest(self, case: Case) -> Case:
        """Where it ends, if nothing holds it, taking the first valid step of each pass. Nothing is run."""
        seen = {case.digest}
        while True:
            news = (new for new in self._space_of(case).simplify(case) if new.digest not in seen and self._valid(new))
            simpler = next(news, None)
            if simpler is None:
                return case
            seen.add(simpler.digest)
            case = simpler

    def _space_of(self, case: Case) -> Space:
        """A culprit may be of another op."""
        return self._space if case.op == self._space.op else get_space(case.op)

    def _valid(self, case: Case) -> bool:
        try:
            self._space_of(case).validate(case)
        except CaseError:
            return False
        return True

    def _reduce_faults(self, accept: Callable[[Step], bool], now: Callable[[], Step]) -> None:
        ddmin(now().faults, lambda faults: accept(replace(now(), faults=faults)), may_be_empty=True)

    def _reduce_step(self, accept: Callable[[Step], bool], now: Callable[[], Step]) -> None:
        self._reduce_faults(accept, now)
        if not now().rows:  # one row is the plain case; having none is a feature, kept only if the failure needs it
            accept(replace(now(), rows=Labels.range(1)))
        ddmin(tuple(now().rows), lambda rows: accept(now().keep_rows(Labels.of(rows))))
        if now().padding:
            accept(replace(now(), padding=Labels()))

    def _accept(self, cases: Cases) -> bool:
        """Tries; keeps what still fails. What was tried before is known and not taken again, so this ends."""
        digests = _digests(cases)
        if digests in self._tried:
            return False
        if not all(map(self._valid, cases)):
            return False
        if self._clock() >= self._end or (self._most is not None and len(self._tried) > self._most):
            raise OutOfTime
        failed = self._fails(cases)
        self._tried[digests] = failed
        if failed:
            self._best = cases
            self._way.append(cases[-1])
        if self._progress is not None:
            self._progress(len(self._tried) - 1, self._best[-1])
        return failed


def ddmin(items: Sequence[T], accept: Callable[[tuple[T, ...]], bool], may_be_empty: bool = False) -> tuple[T, ...]:
    """Zeller's ddmin: a subset of `items`, in order, of which no single item can go. `accept` tells and remembers."""
    kept = tuple(items)
    if not kept or (may_be_empty and accept(())):
        return ()
    parts = 2
    while len(kept) > 1:
        chunks = _chunks(kept, parts)
        subset = next((chunk for chunk in chunks if len(chunk) < len(kept) and accept(chunk)), None)
        if subset is not None:
            kept, parts = subset, 2
            continue
        rests = (tuple(x for other in chunks if other is not chunk for x in other) for chunk in chunks)
        rest = next((rest for rest in rests if rest and parts > 2 and accept(rest)), None)
        if rest is not None:
            kept, parts = rest, max(parts - 1, 2)
        elif parts < len(kept):
            parts = min(len(kept), parts * 2)
        else:
            break
    return kept


def _chunks(items: tuple[T, ...], parts: int) -> list[tuple[T, ...]]:
    bounds = [len(items) * i // parts for i in range(parts + 1)]
    return [items[a:b] for a, b in itertools.pairwise(bounds) if b > a]


def _every_row(case: Case) -> tuple[int, ...]:
    return tuple(sorted({row for step in case.steps for row in step.rows}))


def _keep_rows(case: Case, rows: Labels) -> Case:
    """The case with these rows only, but a step that has none of them as it is."""
    return replace(case, steps=tuple(s.keep_rows(s.rows & rows) if s.rows & rows else s for s in case.steps))


def _digests(cases: Cases) -> tuple[str, ...]:
    return tuple(case.digest for case in cases)


def explain(first: Case, last: Case, before: int, before_now: int) -> tuple[str, ...]:
    """What was taken away, line by line."""
    facts: list[tuple[str, object, object]] = [
        ("cases before it", before, before_now),
        ("steps", len(first.steps), len(last.steps)),
        ("runs", first.way or "eager", last.way or "eager"),
        ("rows", sum(s.tokens for s in first.steps), sum(s.tokens for s in last.steps)),
        ("padding rows", sum(len(s.padding) for s in first.steps), sum(len(s.padding) for s in last.steps)),
        ("faults", ", ".join(first.fault_names) or "none", ", ".join(last.fault_names) or "none"),
    ]
    facts += [(key, value, last.config.get(key)) for key, value in first.config.items()]
    return tuple(f"{name}: {old} → {new}" for name, old, new in facts if old != new)
