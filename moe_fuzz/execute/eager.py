"""The eager mode: one call a step, in one process. Each step has fenced memory of its own, taken from one pool, or that
of a step before, where its case says so."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial

from moe_fuzz.execute import trail
from moe_fuzz.execute.calls import Call, Results
from moe_fuzz.execute.steps import Steps
from moe_fuzz.fence import Arena
from moe_fuzz.ops.inputs import Inputs


class EagerSteps(Steps):
    """See Steps."""

    def run(self) -> None:
        self._calls: list[tuple[Inputs, Call]] = []  # of the steps so far, where others may refill their tensors
        with self.arena() if self.case.refilled else nullcontext() as kept:
            for index in range(len(self.case.steps)):
                self.index = index
                # Open while its results are judged: what the target allocated lives in it.
                with nullcontext(kept) if kept is not None else self.arena() as arena:
                    self.attempt(partial(self._step, self.inputs(index), arena))
                if self.violations:
                    return

    def _step(self, inputs: Inputs, arena: Arena) -> None:
        first = self._first(inputs, arena)

        def call(other: Inputs) -> Results:
            written = self.options.fence.readonly is not None  # perhaps: they were not read-only
            if other is not inputs or written:
                return self._call(other, arena).fetched(other.device)
            first.poison()
            return first.fetched(inputs.device)  # on the tensors that are there

        self.judge(inputs, first.fetched(inputs.device), call, [arena])

    def _first(self, inputs: Inputs, arena: Arena) -> Call:
        """The step's own call, over the tensors of the last one that they fit, if it refills those."""
        if not self.case.refilled:
            return self._call(inputs, arena)
        there = next((call for old, call in reversed(self._calls) if inputs.refills(old)), None)
        if there is None or not self.case.steps[self.index].refilled:
            there = self._call(inputs, arena)
        else:
            with arena.gathering():
                there.refill(inputs)
                there.poison()
            self._observe(there, inputs)
        self._calls.append((inputs, there))
        return there

    def _call(self, inputs: Inputs, arena: Arena) -> Call:
        call = Call(inputs, self.target, arena, self.with_out)
        self._observe(call, inputs)
        return call

    def _observe(self, call: Call, inputs: Inputs) -> None:
        if self.family.describe is not None and "observe" in self.target.keywords:
            call.arguments["observe"] = trail.observer(partial(self.family.describe, inputs))
