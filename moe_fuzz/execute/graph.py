"""The graph modes: every bucket is captured once, the largest first, all in one pool; then the steps are replayed.

Each replay is judged like an eager call, and against one. Relations that need more calls are run on the last step; they
replay too, so that replaying twice must give what replaying once gives.
"""

from __future__ import annotations

from functools import partial

from moe_fuzz.case import RANKS
from moe_fuzz.execute.buckets import Bucket, Simulated, Taped
from moe_fuzz.execute.calls import Call, Results
from moe_fuzz.execute.capture import Captured, GraphPool
from moe_fuzz.execute.steps import Steps
from moe_fuzz.fence import Arena
from moe_fuzz.ops.inputs import Inputs, Lie

_Key = tuple[int, tuple[tuple[str, Lie], ...]]  # token count and layout: what cannot change inside a graph


class GraphSteps(Steps):
    """See Steps. `run` also raises CaptureFailed."""

    def run(self) -> None:
        inputs = self.all_inputs = [self.inputs(index) for index in range(len(self.case.steps))]
        keys = [_key(one) for one in inputs]
        buckets: dict[_Key, Bucket] = {}
        with self.arena() as static:  # open to the end: the addresses in it are in the graphs
            try:
                pool = GraphPool.of_process() if self.device == "cuda" else None
                for key in sorted(set(keys), key=lambda key: (-key[0], keys.index(key))):
                    self.index = keys.index(key)
                    make = partial(self._make, buckets, key, inputs[self.index], static, pool)
                    if not self.attempt(make, partial(str, f" (warming up the bucket of {key[0]} tokens)")):
                        return
                for index, key in enumerate(keys):
                    self.index = index
                    with self.arena() as fresh:
                        self.attempt(partial(self._step, inputs[index], buckets[key], static, fresh))
                    if self.violations:
                        return
            finally:
                for bucket in buckets.values():
                    bucket.close()

    def _make(
        self, buckets: dict[_Key, Bucket], key: _Key, inputs: Inputs, arena: Arena, pool: GraphPool | None
    ) -> None:
        with_out, pieces = self.with_out, self.case.mode == "piecewise"
        # Ranks pad their batches into static buffers whether or not what runs over them is captured.
        called = self.case.mode == RANKS and not self.target.info.contract.graph
        if pool is not None and not called:
            buckets[key] = Captured(inputs, self.target, arena, with_out, pieces, pool)
        elif self.target.info.capabilities.one_host_path and not called:
            buckets[key] = Taped(inputs, self.target, arena, with_out, pieces)
        else:
            buckets[key] = Simulated(inputs, self.target, arena, with_out, pieces)

    def _step(self, inputs: Inputs, bucket: Bucket, static: Arena, fresh: Arena) -> None:
        def eager(other: Inputs) -> Results:
            return Call(other, self.target, fresh, self.with_out).fetched(other.device)

        def call(other: Inputs) -> Results:
            return bucket.replay(other) if _key(other)[0] == _key(inputs)[0] else eager(other)

        last = self.index == len(self.case.steps) - 1
        self.judge(inputs, call(inputs), call, [static, fresh], eager, last)


def _key(inputs: Inputs) -> _Key:
    return inputs.tokens, tuple(sorted(inputs.lies.items(), key=lambda item: item[0]))
