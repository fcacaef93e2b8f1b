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

from moe_fuzz.execute import meeting
from moe_fuzz.execute.buckets import Bucket, clobber
from moe_fuzz.execute.call import CaptureFailed, TargetError, guarded
from moe_fuzz.execute.calls import Results
from moe_fuzz.fence import Arena, cuda_driver
from moe_fuzz.fence.cuda_driver import DeviceLost
from moe_fuzz.ops.inputs import Inputs
from moe_fuzz.targets.bind import Target

_MAX_IDLE = 1 << 30  # bytes


@dataclass
class GraphPool:
    """What the graphs of one case share.

    `torch.cuda.graph` empties torch's caches before each capture, of the host's memory too: to fill them again takes
    longer than all else that a small case does. So a capture is begun by hand, and the pool is one a process: a graph
    that is never given up keeps it, and with it the memory that the graphs of the cases before have left.
    """

    handle: Any
    stream: torch.cuda.Stream
    keeper: Any = None

    @classmethod
    def of_process(cls) -> GraphPool:
        # Asked once, and plainly: torch's own words for these two numbers take longer than a small replay.
        bytes_of = torch.cuda.memory_stats_as_nested_dict()
        reserved, used = (bytes_of[f"{what}_bytes"]["all"]["current"] for what in ("reserved", "allocated"))
        if reserved - used > _MAX_IDLE:  # while a capture is under way torch cannot give back what it caches
            torch.cuda.empty_cache()
        return _pool()

    def capture(self, function: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
        """The graph of a call, and what the call returned. Raises CaptureFailed."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.stream(self.stream):
                graph.capture_begin(pool=self.handle, capture_error_mode=_error_mode())
                try:
                    result = function()
                except (Exception, SystemExit, KeyboardInterrupt):
                    with contextlib.suppress(RuntimeError):  # another error, which would hide this one
                        graph.capture_end()
                    raise
                graph.capture_end()
        except (Exception, SystemExit, KeyboardInterrupt) as error:
            with contextlib.suppress(DeviceLost):  # the process is given up either way
                cuda_driver.synchronize()
            raise CaptureFailed(TargetError(error)) from error
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
            cuda_driver.synchronize()  # a kernel that breaks the context does so here, and not in a capture
            if pieces:
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
        self._poisoned = [] if call.out else [one for one in fresh if 0 not in one.stride()]
        self._poisoned += [one for one in self._result if one is not None] if pieces else []

    def _record(self, pool: GraphPool, function: Callable[[], Any]) -> Any:
        graph, result = pool.capture(function)
        self._graphs.append(graph)
        return result

    def _poison(self) -> None:
        self.call.poison()
        self.call.arena.poison(self._poisoned)

    def _replay(self) -> Results:
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


def _error_mode() -> str:
    """Whose forbidden calls break a capture: any thread's, as by torch's default. But a rank's process has NCCL's
    watchdog beside it, which asks for events when it likes."""
    return "thread_local" if meeting.present() else "global"


def _extent(tensor: torch.Tensor) -> int:
    return 1 + sum(max(0, size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


@cache
def _pool() -> GraphPool:
    pool = GraphPool(torch.cuda.graph_pool_handle(), torch.cuda.Stream())
    pool.keeper = pool.capture(lambda: torch.zeros(1, device="cuda"))
    return pool
