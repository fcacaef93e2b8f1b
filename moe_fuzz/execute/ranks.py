"""The mode `ranks` of an all-reduce: this process is one rank of several, and all of them run the same case.

Every rank makes the inputs of all, calls the target on its own, and shows the others what it got. So each sees the same
answer, judges it alike, and asks for the same further calls: they stay in step without anybody who leads. What only one
of them can see, an error or a hurt canary, it tells the others before they go on.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from moe_fuzz.execute import meeting, peers
from moe_fuzz.execute.buckets import Bucket, Simulated
from moe_fuzz.execute.call import CaptureFailed, TargetError
from moe_fuzz.execute.calls import BadResult, Call, Results
from moe_fuzz.execute.capture import Captured, GraphPool
from moe_fuzz.execute.steps import Steps
from moe_fuzz.fence import Arena
from moe_fuzz.ops.inputs import Inputs
from moe_fuzz.verdict import Violation


class OneRank(Inputs):
    """The part of a call that one rank makes: its own x, and what all have."""

    def __init__(self, whole: Inputs, rank: int) -> None:
        plain = {name: tensor[rank] if name == "x" else tensor for name, tensor in whole.plain.items()}
        super().__init__(whole.options, plain, whole.lies, in_place=whole.in_place)
        self.fluid = whole.fluid  # type: ignore[misc]
        self._results = {name: (shape[1:], dtype) for name, (shape, dtype) in whole.results.items()}

    @property
    def results(self) -> dict[str, Any]:
        return self._results

    def replace(self, **tensors: torch.Tensor) -> OneRank:
        made = OneRank.__new__(OneRank)
        made.__dict__.update(self.__dict__)
        made.plain = {**self.plain, **tensors}
        return made


class RankSteps(Steps):
    """See Steps. `run` also raises CaptureFailed."""

    def run(self) -> None:
        self.rank = meeting.rank()
        captured = bool(self.case.config["captured"])
        buckets: dict[Any, Bucket] = {}
        with self.arena() as static:
            try:
                pool = GraphPool.of_process() if captured and self.device == "cuda" else None
                for index in range(len(self.case.steps)):
                    self.index = index
                    with self.arena() as fresh:
                        self.attempt(partial(self._step, self.inputs(index), static, fresh, buckets, captured, pool))
                    if any(meeting.gather(bool(self.violations))):
                        return
            finally:
                for bucket in buckets.values():
                    bucket.close()

    def _step(
        self, inputs: Inputs, static: Arena, fresh: Arena, buckets: dict[Any, Bucket], captured: bool,
        pool: GraphPool | None,
    ) -> None:  # fmt: skip
        def eager(other: Inputs) -> Results:
            return self._together(lambda: self._called(other, fresh), other)

        def replayed(other: Inputs) -> Results:
            key = (other.tokens, tuple(sorted(other.lies.items())))
            if key not in buckets:
                self._agreed(lambda: buckets.__setitem__(key, self._bucket(other, static, pool)))
            return self._together(lambda: buckets[key].replay(OneRank(other, self.rank)), other)

        run = replayed if captured else eager
        last = self.index == len(self.case.steps) - 1
        self.judge(inputs, run(inputs), run, [static, fresh] if captured else [fresh], eager if captured else None,
                   last)  # fmt: skip

    def _called(self, inputs: Inputs, arena: Arena) -> Results:
        own = OneRank(inputs, self.rank)
        return Call(own, self.target, arena, self.with_out).fetched(own.device)

    def _bucket(self, inputs: Inputs, arena: Arena, pool: GraphPool | None) -> Bucket:
        own = OneRank(inputs, self.rank)
        if pool is None:
            return Simulated(own, self.target, arena, self.with_out, False)
        return Captured(own, self.target, arena, self.with_out, False, pool)

    def _together(self, call: Any, inputs: Inputs) -> Results:
        """The results of all ranks, stacked. Raises on every rank what was raised on one."""
        shown = self._agreed(call)
        found = []
        for at in range(len(inputs.results)):
            parts = [one[at] for one in shown]
            if any(part.shape != parts[0].shape or part.dtype != parts[0].dtype for part in parts):
                name = list(inputs.results)[at]
                raise BadResult(Violation(
                    "structure", f"{name}:ranks", f"{name} is of another kind on other ranks", name, (),
                    str(tuple(parts[0].shape)), str([tuple(part.shape) for part in parts]),
                ))  # fmt: skip
            found.append(torch.stack(parts).to(inputs.device))
        return tuple(found)

    def _agreed(self, call: Any) -> list[Any]:
        """What each rank's call has given, as tensors of the host."""
        error: Exception | None = None
        mine: Any = None
        # What our own work has cost one of them, no other is to wait for inside a kernel: there it takes the device's
        # time, and may be given up.
        meeting.gather(None)
        meeting.state("call")
        try:
            mine = call()
            meeting.state("device")
            self.wait()
            peers.look()
            mine = None if mine is None else tuple(None if part is None else part.cpu() for part in mine)
        except (TargetError, BadResult, CaptureFailed, MemoryError) as raised:
            error = raised
        told = None if error is None else _told(error)
        shown = meeting.gather((told, mine))
        if error is not None:
            raise error
        for rank, (other, _) in enumerate(shown):
            if other is not None:
                raise Elsewhere(rank, other)
        return [part for _, part in shown]


class Elsewhere(TargetError):
    """Another rank's call failed: what that says of it stands in its own verdict."""

    def __init__(self, rank: int, told: tuple[str, bool]) -> None:
        super().__init__(RuntimeError(told[0]))
        self.out_of_memory = told[1]
        self.violation = Violation("error", "elsewhere", f"rank {rank}: {told[0]}", expected="a result", got=told[0])


def _told(error: Exception) -> tuple[str, bool]:
    if isinstance(error, TargetError):
        return error.violation.message, error.out_of_memory
    if isinstance(error, CaptureFailed):
        return error.error.violation.message, error.error.out_of_memory
    if isinstance(error, BadResult):
        return error.violation.message, False
    return str(error), True
