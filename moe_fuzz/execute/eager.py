"""The eager mode: one call a step, in one process. Each step has fenced memory of its own, taken from one pool."""

from __future__ import annotations

from functools import partial

from moe_fuzz.checks.observation import Outputs
from moe_fuzz.execute.routing import call_once
from moe_fuzz.execute.steps import Steps
from moe_fuzz.fence import Arena
from moe_fuzz.ops.routing.inputs import Inputs, materialize


class EagerSteps(Steps):
    """See Steps."""

    def run(self) -> None:
        for index in range(len(self.case.steps)):
            self.index = index
            with self.arena() as arena:  # open while its results are judged: what the target allocated lives in it
                self.attempt(partial(self._step, materialize(self.case, index), arena))
            if self.violations:
                return

    def _step(self, inputs: Inputs, arena: Arena) -> None:
        def call(other: Inputs) -> Outputs:
            return call_once(other, self.target, arena, bool(self.case.config["out"]))

        self.judge(inputs, call(inputs), call, arena.check)
