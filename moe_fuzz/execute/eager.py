"""The eager mode: one call a step, in one process. Each step has fenced memory of its own, taken from one pool."""

from __future__ import annotations

from functools import partial

from moe_fuzz.checks.observation import Outputs
from moe_fuzz.execute.routing import RoutingCall, call_once
from moe_fuzz.execute.steps import Steps
from moe_fuzz.fence import Arena, canary
from moe_fuzz.ops.routing.inputs import Inputs


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
        first = RoutingCall(inputs, self.target, arena, bool(self.case.config["out"]))

        def call(other: Inputs) -> Outputs:
            written = self.options.fence.readonly is not None  # perhaps: they were not read-only
            if other is not inputs or written:
                return call_once(other, self.target, arena, bool(self.case.config["out"]))
            for tensor in first.out:
                canary.poison(tensor)
            return first.fetched(inputs.device)  # on the tensors that are there

        self.judge(inputs, first.fetched(inputs.device), call, arena.check)
