"""Buckets as CUDA graphs. All of a case share one memory pool and one side stream, as a server's do.

Memory that the target allocates while it is captured belongs to the graphs' pool, which replays rely on. So it cannot
be fenced (`Arena.own` is off then); the warm-up call, which does the same, has it fenced. The static buffers are fenced
in every replay.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch

from moe_fuzz.execute.buckets import Bucket, clobber
from moe_fuzz.execute.call import TargetError, guarded
from moe_fuzz.execute.calls import Results
from moe_fuzz.fence import Arena, canary, cuda_driver
from moe_fuzz.fence.cuda_driver import DeviceLost
from moe_fuzz.ops.inputs import Inputs
from moe_fuzz.targets.bind import Target


class CaptureFailed(Exception):
    """The target cannot be captured. torch's allocator may go on believing that a capture is under way, so this
    process must not run another case."""

    def __init__(self, error: TargetError) -> None:
        super().__init__(str(error))
        self.error = error


@dataclass
class GraphPool:
    """What the graphs of one case share."""

    handle: Any
    stream: torch.cuda.Stream

    @classmethod
    def new(cls) -> GraphPool:
        return cls(torch.cuda.graph_pool_handle(), _side_stream())

    def capture(self, function: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
        """The graph of a call, and what the call returned. Raises CaptureFailed."""
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        raised: list[BaseException] = []

        def call() -> Any:
            try:
                return function()
            except (Exception, SystemExit) as error:
                raised.append(error)  # ending the capture raises another error, which hides this one
                raise

        try:
            with torch.cuda.graph(graph, pool=self.handle, stream=self.stream):
                result = call()
        except (Exception, SystemExit) as error:
            torch.cuda.set_stream(current)  # torch leaves the side stream behind where a capture does not end well
            with contextlib.suppress(DeviceLost):  # the process is given up either way
                cuda_driver.synchronize()
            raise CaptureFailed(TargetError(raised[0] if raised else error)) from error
        return graph, result

    def warm_up(self, function: Callable[[], Any]) -> Any:
        """The call without a capture, on the side stream: it compiles, tunes and allocates what stays."""

        def call() -> Any:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                result = function()
            torch.cuda.current_stream().wait_stream(self.stream)
            return result

        return guarded(call, "cuda")


class Captured(Bucket):
    """See Bucket."""

    def __init__(
        self, inputs: Inputs, target: Target, arena: Arena, with_out: bool, pieces: bool, pool: GraphPool
    ) -> None:
        super().__init__(inputs, target, arena, with_out, pieces)
        self._graphs: list[torch.cuda.CUDAGraph] = []
        call, staging = self.call, self.call.first
        call.arena.protect()
        try:
            # The whole chain, so that no kernel is compiled or loaded for the first time while capturing.
            first = pool.warm_up(partial(_produce, staging)) if pieces else staging
            with call.arena.own():
                warm = call.unpacked(pool.warm_up(partial(call.bare, first)))
            if pieces:
                pool.warm_up(partial(_consume, warm, staging))
                first = self._record(pool, partial(_produce, staging))
            self._given: Results = call.unpacked(self._record(pool, partial(call.bare, first)))
            del first  # what comes after the target may take its place in the pool
            self._result = self._record(pool, partial(_consume, self._given, staging)) if pieces else self._given
        finally:
            call.arena.unprotect()
        # A buffer that came back from the warm-up too is one that the target keeps. It may hold what never changes, and
        # no replay need write it again.
        pairs = [(one, old) for one, old in zip(self._given, warm, strict=True) if one is not None and old is not None]
        fresh = [one for one, old in pairs if one.data_ptr() != old.data_ptr()]
        self._poisoned = [*call.out] if call.out else [one for one in fresh if 0 not in one.stride()]
        self._poisoned += [one for one in self._result if one is not None] if pieces else []

    def _record(self, pool: GraphPool, function: Callable[[], Any]) -> Any:
        graph, result = pool.capture(function)
        self._graphs.append(graph)
        return result

    def _replay(self) -> Results:
        for tensor in self._poisoned:
            canary.poison(tensor)
        self.call.arena.protect()
        try:
            guarded(self._launch, "cuda")
        finally:
            self.call.arena.unprotect()
        return self._result

    def _launch(self) -> None:
        for number, graph in enumerate(self._graphs):
            if number:
                clobber(self.call.first)
            graph.replay()

    def close(self) -> None:
        self._given = self._result = ()
        self._poisoned = []
        if cuda_driver.lost() is not None:
            return  # the process ends with them
        for graph in self._graphs:
            graph.reset()
        self._graphs = []


def _produce(staging: torch.Tensor) -> torch.Tensor:
    """The first tensor as the layer before leaves it: in the pool, laid out as the case has it."""
    memory = staging.new_empty(staging.storage_offset() + _extent(staging))
    return memory.as_strided(staging.shape, staging.stride(), staging.storage_offset()).copy_(staging)


def _consume(given: Results, staging: torch.Tensor) -> Results:
    """The layer behind: it may get the memory of the first tensor, and takes over the results."""
    clobber(staging)
    return tuple(None if tensor is None else tensor.clone() for tensor in given)


def _extent(tensor: torch.Tensor) -> int:
    return 1 + sum(max(0, size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


@cache
def _side_stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()
