"""A bucket: the static buffers of one token count, and what is replayed over them.

The buffers lie in fenced memory and are made once, since a graph keeps their addresses. They are filled before each
replay, tail and all, with what a server's buffer would hold then, and are read-only while it runs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from moe_fuzz.checks.observation import Outputs
from moe_fuzz.execute.routing import RoutingCall, fetch
from moe_fuzz.fence import Arena, canary
from moe_fuzz.ops.routing.inputs import Inputs
from moe_fuzz.targets.bind import Target


class Bucket(ABC):
    """`replay` may be called until `close`, which comes before the arena's."""

    def __init__(self, inputs: Inputs, target: Target, arena: Arena, with_out: bool, pieces: bool) -> None:
        """inputs: of any step of the bucket. pieces: producer, router and consumer are graphs of their own.

        Raises what a call raises, and CaptureFailed.
        """
        self.pieces = pieces
        self.call = RoutingCall(_dummy(inputs), target, arena, with_out)

    def replay(self, inputs: Inputs) -> Outputs:
        """The result for these inputs. Raises TargetError, BadResult, DeviceLost, MemoryError."""
        for name, tensor in self.call.tensors.items():
            self.call.arena.fill(tensor, inputs.plain[name])
        return fetch(self._replay(), inputs.device)

    @abstractmethod
    def _replay(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Poisons what the replay must write, and replays."""

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
        self.call.pair(self.call.run())  # as the warm-up before a capture

    def _replay(self) -> tuple[torch.Tensor, torch.Tensor]:
        for tensor in self.call.out:
            canary.poison(tensor)
        logits = self.call.tensors["logits"]
        if self.pieces:
            clobber(logits)
        weights, ids = self.call.pair(self.call.run())
        if self.pieces:
            clobber(logits)
            weights, ids = weights.clone(), ids.clone()
        return weights, ids

    def close(self) -> None:
        pass


def clobber(like: torch.Tensor) -> None:
    """Eager work between two pieces: it takes the memory that was freed last, and leaves NaN in it."""
    for _ in range(2):
        torch.full(like.shape, torch.nan, dtype=like.dtype, device=like.device)


def _dummy(inputs: Inputs) -> Inputs:
    """What a server captures on: zeros, and every row a token. The bias is there: it is a weight."""
    plain = inputs.plain
    blank = {name: torch.zeros_like(plain[name]) for name in ("logits", "is_padding") if name in plain}
    return inputs.replace(**blank)
