"""The eager mode: one call a step, in one process. Each step has fenced memory of its own, taken from one pool."""

from __future__ import annotations

from functools import partial

from moe_fuzz.execute import trail
from moe_fuzz.execute.calls import Call, Results
from moe_fuzz.execute.steps import Steps
from moe_fuzz.fence import Arena
from moe_fuzz.ops.inputs import Inputs


class EagerSteps(Steps):
    """See Steps."""

    def run(self) -> None:
        for index in range(len(self.case.steps)):
            self.index = index
            with self.arena() as arena:  # open while its results are judged: what the target allocated lives in it
                self.attempt(partial(self._step, self.inputs(index), arena))
            if self.violations:
                return

    def _step(self, inputs: Inputs, arena: Arena) -> None:
        first = self._call(inputs, arena)

        def call(other: Inputs) -> Results:
            written = self.options.fence.readonly is not None  # perhaps: they were not read-only
            if other is not inputs or written:
                return self._call(other, arena).fetched(other.device)
            first.poison()
            return first.fetched(inputs.device)  # on the tensors that are there

        self.judge(inputs, first.fetched(inputs.device), call, [arena])

    def _call(self, inputs: Inputs, arena: Arena) -> Call:
        call = Call(inputs, self.target, arena, self.with_out)
        if self.family.describe is not None and "observe" in self.target.keywords:
            call.arguments["observe"] = trail.observer(partial(self.family.describe, inputs))
        return call
