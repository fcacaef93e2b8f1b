"""A bucket: the static buffers of one token count, and what is replayed over them.

The buffers lie in fenced memory and are made once, since a graph keeps their addresses. They are filled before each
replay, tail and all, with what a server's buffer would hold then, and are read-only while it runs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from moe_fuzz.execute.calls import Call, Results, fetch
from moe_fuzz.fence import Arena
from moe_fuzz.ops.inputs import Inputs
from moe_fuzz.targets.bind import Target


class Bucket(ABC):
    """`replay` may be called until `close`, which comes before the arena's."""

    def __init__(self, inputs: Inputs, target: Target, arena: Arena, with_out: bool, pieces: bool) -> None:
        """inputs: of any step of the bucket. pieces: producer, target and consumer are graphs of their own.

        Raises what a call raises, and CaptureFailed.
        """
        self.pieces = pieces
        self.call = Call(inputs.blank(), target, arena, with_out)

    def replay(self, inputs: Inputs) -> Results:
        """The result for these inputs. Raises TargetError, BadResult, DeviceLost, MemoryError."""
        with self.call.arena.gathering():
            self.call.refill(inputs)
            self._poison()
        return fetch(self._replay(), inputs.device)

    @abstractmethod
    def _poison(self) -> None:
        """Makes what the replay must write look as if nothing had been written."""

    @abstractmethod
    def _replay(self) -> Results:
        """Replays over what the buffers hold."""

    @abstractmethod
    def close(self) -> None:
        """Gives up the graphs."""


class Simulated(Bucket):
    """Without CUDA graphs a replay is a call over the static buffers, whose result is that call's own.

    What the host computes, a graph keeps from its capture; here it is computed anew each time. So a number that was
    read on the host and baked in, a tactic chosen while capturing, and a target that cannot be captured at all do not
    show. What shows is all that depends on the buffers: on their addresses, on what their tail holds, on the replays
    before.
    """

    def __init__(self, inputs: Inputs, target: Target, arena: Arena, with_out: bool, pieces: bool) -> None:
        super().__init__(inputs, target, arena, with_out, pieces)
        self.call.unpacked(self.call.run())  # as the warm-up before a capture

    def _poison(self) -> None:
        self.call.poison()

    def _replay(self) -> Results:
        if self.pieces:
            clobber(self.call.first)
        results = self.call.unpacked(self.call.run())
        if self.pieces:
            clobber(self.call.first)
            results = tuple(None if tensor is None else tensor.clone() for tensor in results)
        return results

    def close(self) -> None:
        pass


def clobber(like: torch.Tensor) -> None:
    """Eager work between two pieces: it takes the memory that was freed last, and leaves NaN in it; in integers, a
    number that is no index."""
    value = torch.nan if like.is_floating_point() else torch.iinfo(like.dtype).max
    for _ in range(2):
        torch.full(like.shape, value, dtype=like.dtype, device=like.device)
