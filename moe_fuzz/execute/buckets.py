"""A bucket: the static buffers of one token count, and what is replayed over them.

The buffers lie in fenced memory and are made once, since a graph keeps their addresses. They are filled before each
replay, tail and all, with what a server's buffer would hold then, and are read-only while it runs.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import partial

import torch

from moe_fuzz.execute.call import CaptureFailed, TargetError, guarded
from moe_fuzz.execute.calls import Call, Results, fetch
from moe_fuzz.execute.tape import NotWhole, Tape
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

    What the host computes, a graph keeps from its capture; here it is computed anew each time. What shows is all that
    depends on the buffers: on their addresses, on what their tail holds, on the replays before.
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


class Taped(Simulated):
    """A replay does again what a call asked torch and Triton for, and nothing of what the host did (see tape.py): of
    targets whose host code is the same on every device (`one_host_path`). They may read nothing on the host meanwhile.

    Where a call is more than that, as its tape shows when it is replayed at once, a replay is a call: as in Simulated.
    """

    def __init__(self, inputs: Inputs, target: Target, arena: Arena, with_out: bool, pieces: bool) -> None:
        super().__init__(inputs, target, arena, with_out, pieces)
        call = self.call
        self._tape: Tape | None = None
        if call.shared:  # done again, it would find what it has written
            return
        tape = Tape([*call.tensors.values(), *call.out])
        try:
            with self._calling(), arena.own():
                results = call.unpacked(guarded(partial(tape.record, call.bare), call.device.type))
        except TargetError as error:
            if tape.refused is not None:
                raise CaptureFailed(error) from error
            return  # the second call of the target fails, as the first replay will
        with self._calling():
            if tape.whole and tape.does_it_again(results):
                self._tape, self._results = tape, results

    def _run(self, tape: Tape) -> None:
        with self._calling():
            try:
                guarded(tape.replay, self.call.device.type)
            except TargetError as error:
                if isinstance(error.__cause__, NotWhole):
                    raise error.__cause__ from error
                raise

    @contextlib.contextmanager
    def _calling(self) -> Iterator[None]:
        self.call.arena.protect()
        try:
            yield
        finally:
            self.call.arena.unprotect()

    def _poison(self) -> None:
        super()._poison()
        if self._tape is not None:
            self._tape.poison()

    def _replay(self) -> Results:
        if self._tape is None:
            return super()._replay()
        if self.pieces:
            clobber(self.call.first)
        try:
            self._run(self._tape)
        except NotWhole:
            self._tape = None
            return super()._replay()
        return self._results

    def close(self) -> None:
        self._tape, self._results = None, ()


def clobber(like: torch.Tensor) -> None:
    """Eager work between two pieces: it takes the memory that was freed last, and leaves NaN in it; in integers, a
    number that is no index."""
    value = torch.nan if like.is_floating_point() else torch.iinfo(like.dtype).max
    for _ in range(2):
        torch.full(like.shape, value, dtype=like.dtype, device=like.device)
