"""What every mode of a case has in common: its steps are judged one after the other, up to the first bad one.

A mode (eager.py, graph.py) makes the calls. Here its results are judged and added up.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import torch

from moe_fuzz.case import Case
from moe_fuzz.checks import CHECKS, RELATIONS
from moe_fuzz.checks.families import FAMILIES
from moe_fuzz.checks.family import answered
from moe_fuzz.execute import clock
from moe_fuzz.execute.ahead import Asked, Runs
from moe_fuzz.execute.call import CaptureFailed, TargetError
from moe_fuzz.execute.calls import BadResult, Results
from moe_fuzz.fence import Arena, cuda_driver, open_arena
from moe_fuzz.fence.cuda_driver import DeviceLost
from moe_fuzz.ops import get_space
from moe_fuzz.ops.inputs import Inputs
from moe_fuzz.options import RunOptions
from moe_fuzz.targets.bind import Target
from moe_fuzz.verdict import Violation

#: From which on a device judges: about where a host takes as long. What an element is, each family says.
DEVICE_ELEMENTS = 1 << 15
_BRIEF = contextlib.nullcontext()


@lru_cache(maxsize=64)
def _named(op: str, family: str, wanted: tuple[str, ...] | None, relations: bool) -> tuple[tuple[str, ...], bool]:
    """The checks of an op, of those that are asked for, in the order of attribution; whether one is a relation.

    relations: whether those may be among them.
    """
    related = RELATIONS.get(family, [])
    names = tuple(name for name in get_space(op).checks if name in CHECKS[family] and (relations or name not in related)
                  and (wanted is None or name in wanted))  # fmt: skip
    return names, not set(related).isdisjoint(names)


class Steps(ABC):
    """One run of a case. What was found so far stands in the attributes, also where `run` raises."""

    def __init__(self, case: Case, target: Target, options: RunOptions, device: str) -> None:
        self.case, self.target, self.options, self.device = case, target, options, device
        self.family = FAMILIES[case.op]
        self.with_out = bool(case.config.get("out"))
        self.index = 0  # of the step at hand
        self.all_inputs: Sequence[Inputs] = ()  # of all steps, where a mode makes them before it judges the first
        self._of_all: Sequence[Mapping[str, Any]] = ()
        self.violations: list[Violation] = []
        self.detail = ""  # for a person: the traceback of what the target raised
        names, _ = _named(case.op, self.family.name, options.checks, relations=True)
        self._compares = bool(set(names) - {"structure"})  # else nobody asked for what a result is compared with
        self.parity = self._compares  # of every step so far
        self.budget = 0.0
        self.fence_seconds = 0.0
        self.stats: Counter[str] = Counter()  # what the family counts of its inputs

    @abstractmethod
    def run(self) -> None:
        """Runs the steps until one has violations. Raises DeviceLost and MemoryError, TargetError where the target ran
        out of memory, and what a mode adds to it."""

    def inputs(self, index: int) -> Inputs:
        """The inputs of a step. They are made, and judged, on the host where they are small, else on the device: a few
        thousand elements take the host less time than launches take, millions take it seconds."""
        elements = self.family.elements(self.case, index)
        # Where every allocation on the device is fenced, those of the judgement would be too.
        there = self.device != "cpu" and elements >= DEVICE_ELEMENTS and self.options.fence.own != "all"
        with self._ours(elements), self._quietly():
            return self.family.materialize(self.case, index, self.device if there else "cpu")

    @contextlib.contextmanager
    def staged(self) -> Iterator[None]:
        """Around `run`: what the family sets up for a case, and the target as it is called there."""
        if self.family.staged is None:
            yield
            return
        with self.family.staged(self.case, self.target, self.device, self.options) as self.target:
            yield

    @contextlib.contextmanager
    def arena(self) -> Iterator[Arena]:
        arena = open_arena(self.device, self.options.fence, str(self.case.config["edge"]))
        try:
            with arena:
                yield arena
        finally:
            self.fence_seconds += arena.seconds

    def add(self, check: str, *found: Violation) -> None:
        """Takes in violations of one check, if it is asked for; where there are several steps, with the step."""
        if not found or not self._wanted(check):
            return
        if len(self.case.steps) > 1:
            found = tuple(replace(v, step=self.index, message=f"step {self.index}: {v.message}") for v in found)
        self.violations += found

    def _add_first(self, at: int, check: str, found: Sequence[Violation]) -> None:
        """`add`, in front of what was found since: what else is wrong may come of it."""
        since, self.violations = self.violations[at:], self.violations[:at]
        self.add(check, *found)
        self.violations += since

    def attempt(self, doing: Callable[[], object], when: Callable[[], str] = str) -> bool:
        """Lets the target work; what it raises, or returns instead of a result, is a violation. Whether it went well.

        when: says what the work was for, if it was not the step itself.
        """
        try:
            doing()
        except TargetError as error:
            if error.out_of_memory or error.uninterpreted:
                raise
            self.detail = error.text
            self.add("error", replace(error.violation, message=error.violation.message + when()))
        except BadResult as bad:
            self.add("structure", replace(bad.violation, message=bad.violation.message + when()))
        except (DeviceLost, CaptureFailed):
            raise
        except Exception:
            self.wait()  # what our own code raised may come of a kernel of the target: then this raises DeviceLost
            raise
        else:
            return True
        self.parity = False
        return False

    def wait(self) -> None:
        """Until the device is done with all that was asked of it. Raises DeviceLost."""
        if self.device == "cuda":
            with clock.calling():
                cuda_driver.synchronize()

    def judge(
        self, inputs: Inputs, results: Results, call: Runs, arenas: Sequence[Arena], eager: Runs | None = None,
        relations: bool = True,
    ) -> None:  # fmt: skip
        """Has every check judge one result. What an earlier check finds stays, whatever later ones raise.

        results: enqueued; nobody has waited for them. call, eager: as in Family.observe, without a wait.
        arenas: in which the calls are made. relations: also run the checks that call the target again, each at the
        price of a step.
        """
        names, related = _named(self.case.op, self.family.name, self.options.checks, relations)
        asked = Asked(call, self.wait, self.family.outputs)
        other = Asked(eager, self.wait, self.family.outputs) if eager else None
        seen = self.family.observe(self.case, self.index, self.target.info, inputs, None, asked, other)
        seen.__dict__.update(self._known())
        look: Callable[[], list[Violation]] = partial(_checked, arenas)
        if self.device == "cuda":
            if related:
                with self._quietly():
                    known = self.family.ahead(seen)
                for one in known:
                    asked.ahead(one)
            if other is not None and "replay" in names and inputs.tokens and self.target.info.contract.deterministic:
                other.ahead(inputs)
            look = arenas[0].look(arenas[1:])
            self.wait()
        with self._ours(self.family.elements(self.case, self.index)), self._quietly():
            self._judged(inputs, results, seen, names, asked, other, arenas, look)

    def _known(self) -> Mapping[str, Any]:
        """What is known of this step's inputs, where those of all steps are there: it is computed once for them all."""
        if self.family.together is None or len(self.all_inputs) < 2:
            return {}
        if not self._of_all:
            elements = sum(self.family.elements(self.case, index) for index in range(len(self.all_inputs)))
            with self._ours(elements), self._quietly():
                self._of_all = self.family.together(self.case, self.target.info, self.all_inputs)
        return self._of_all[self.index]

    @staticmethod
    def _ours(elements: int) -> contextlib.AbstractContextManager[None]:
        """Around what is our own work and not the target's, where it may take long: to tell the parent takes time."""
        return clock.judging() if elements >= DEVICE_ELEMENTS else _BRIEF

    def _quietly(self) -> contextlib.AbstractContextManager[object]:
        """Around what the family makes and judges, never around a call of the target or the work of the fences."""
        return torch.inference_mode() if self.family.inference else _BRIEF

    def _judged(
        self, inputs: Inputs, results: Results, seen: Any, names: Sequence[str], asked: Asked, other: Asked | None,
        arenas: Sequence[Arena], look: Callable[[], list[Violation]],
    ) -> None:  # fmt: skip
        """The second half of `judge`: the device has done what was asked of it."""
        checks = CHECKS[self.family.name]
        if self.family.statistics is not None:
            self.stats.update(self.family.statistics(self.case, self.index, inputs))
        seen = answered(seen, self.family.outputs(*results))

        def canaries() -> list[Violation]:
            """The damage to canaries since it was last asked. Once, for this result and for what the checks called."""
            late = asked.later or (other is not None and other.later)
            if not late:
                with torch.inference_mode(False):
                    return look()
            # Where a call raised, nobody has waited for what it had launched before.
            with clock.calling(), torch.inference_mode(False):
                return _checked(arenas)

        before = len(self.violations)
        self.add("structure", *checks["structure"](seen))
        if not seen.shaped:
            self.parity = False
            self._add_first(before, "canary", canaries())
            return
        name = ""

        def others() -> None:
            nonlocal name
            for name in names:
                if name != "structure":
                    self.add(name, *checks[name](seen))

        # What one of them raises ends it for all: the others would only call the target again.
        self.attempt(others, lambda: f" (when `{name}` called it again)")
        self._add_first(before, "canary", canaries())
        self.budget = max(self.budget, *seen.budget.values(), 0.0)
        if not self._compares:
            return
        last = self.index == len(self.case.steps) - 1
        # Binding costs as much as all the checks together, and says something of the case: once is enough.
        self.parity = self.parity and len(self.violations) == before and not (last and self.family.binding(seen))

    def _wanted(self, check: str) -> bool:
        return self.options.checks is None or check in self.options.checks


def _checked(arenas: Sequence[Arena]) -> list[Violation]:
    return [violation for arena in arenas for violation in arena.check()]
