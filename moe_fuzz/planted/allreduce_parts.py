"""A device of several ranks in one process, on which planted all-reduces run: what is asynchronous on GPUs is so here.

A call puts a program on the stream of each rank and returns. A program is a generator: between two of its steps any
other rank may run, for as long as it likes, as far as the target's own signals let it; it yields None, or what it waits
for. Who is ahead of whom is said by the case (`group.pace`). Nothing has happened for certain before `group.check()`.
What this device computes is right; the flaws are in the files beside it.
"""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable, Generator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

Program = Generator[Callable[[], bool] | None, None, None]


class GivenUp(RuntimeError):
    """A wait that no rank can end."""


class Device:
    """The streams of all ranks, one for each group; where a rank has a process of its own, its streams alone."""

    def __init__(self, group: Any) -> None:
        self.group = group
        self._streams: dict[tuple[int, int], deque[Program]] = {}  # by group and rank
        self._blocked: dict[tuple[int, int], Callable[[], bool] | None] = {}
        self._chosen = random.Random(group.seed)
        self._single = self._chosen.randrange(group.world)
        self._turn = 0

    def launch(self, group: Any, rank: int, program: Program) -> None:
        self._streams.setdefault((group.number, rank), deque()).append(program)

    def run(self) -> None:
        """Until all streams are empty. Raises GivenUp where each rank that is left waits."""
        with _disable_current_modes():  # a fence of each small tensor between two steps would cost more than the step
            self._run()

    def _run(self) -> None:
        until = time.monotonic() + self.group.timeout_s
        while left := [key for key, stream in self._streams.items() if stream]:
            able = [key for key in left if (wait := self._blocked.get(key)) is None or wait()]
            if able:
                self._step(self._next(able))
            elif self.group.rank is None or time.monotonic() > until:
                self._streams.clear()
                self._blocked.clear()
                raise GivenUp(f"rank {left[0][1]} gave up to wait for the others")
            else:
                time.sleep(1e-4)

    def _next(self, able: list[tuple[int, int]]) -> tuple[int, int]:
        """Whose turn it is."""
        pace = self.group.pace
        if pace == "random":
            return self._chosen.choice(able)
        of_single = [key for key in able if key[1] == self._single]
        if pace == "ahead" and of_single:
            able = of_single
        elif pace == "late" and len(of_single) < len(able):
            able = [key for key in able if key[1] != self._single]
        self._turn += 1
        return able[self._turn % len(able)]

    def _step(self, key: tuple[int, int]) -> None:
        try:
            self._blocked[key] = next(self._streams[key][0])
        except StopIteration:
            self._streams[key].popleft()
            self._blocked[key] = None


def device(group: Any) -> Device:
    """The same for all groups of a case."""
    found = group.case.setdefault("device", Device(group))
    group.made("waits for the device", lambda: group.waits.append(found.run))
    return found


def signals(group: Any, slots: int = 1) -> list[Tensor]:
    """int32 [slots * R] of each rank, on the host: who has signalled it. Zero once all calls have ended."""

    def make() -> list[Tensor]:
        pads = [part.view(torch.int32) for part in group.memory("pad", 4 * slots * group.world, host=True)]
        group.signals.extend(pads if group.rank is None else pads[group.rank : group.rank + 1])
        return pads

    return group.made(("signals", slots), make)


def barrier(pads: list[Tensor], rank: int, world: int) -> Program:
    """Signals everybody, waits for everybody's signal, and takes it back. A signal is only given when the one before
    has been taken."""
    words = [pad.numpy() for pad in pads]  # the same memory, which numpy reads at a tenth of the price
    others = [peer for peer in range(world) if peer != rank]
    for peer in others:
        while words[peer][rank] != 0:
            yield lambda peer=peer: words[peer][rank] == 0  # type: ignore[misc]
        words[peer][rank] = 1
    for peer in others:
        while words[rank][peer] != 1:
            yield lambda peer=peer: words[rank][peer] == 1  # type: ignore[misc]
        words[rank][peer] = 0
    yield None


def parts_of(x: Tensor, group: Any) -> dict[int, Tensor]:
    """x [T, H] of each rank of this process."""
    return dict(enumerate(x)) if group.rank is None else {group.rank: x}


def results(x: Tensor, out: Any) -> tuple[Tensor, Tensor]:
    return out if out is not None else (torch.empty_like(x), torch.empty_like(x))


def buffers(group: Any, name: str = "buffer", size: int | None = None) -> list[Tensor]:
    """Memory of each rank that all can read, of the size of the largest message."""
    return group.memory(name, group.capacity if size is None else size)


def message(buffer: Tensor, like: Tensor) -> Tensor:
    """The beginning of a buffer as a tensor like this one."""
    return buffer[: like.numel() * like.element_size()].view(like.dtype).view(like.shape)


def summed(parts: list[Tensor], residual: Tensor | None) -> Tensor:
    """float32, from rank 0 on, the residual last."""
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part.float()
    return total if residual is None else total + residual.float()


def norm(stored: Tensor, gamma: Tensor, eps: float) -> Tensor:
    value = stored.float()
    return (value * torch.rsqrt(value.square().mean(dim=-1, keepdim=True) + eps) * gamma.float()).to(stored.dtype)


Finish = Callable[[int, list[Tensor]], None]


def one_shot(
    x: Tensor, group: Any, finish: Finish, *, end_barrier: bool = True, first_barrier: bool = True,
    copy: Callable[[Tensor, Tensor], Program] | None = None, memory: list[Tensor] | None = None,
) -> None:  # fmt: skip
    """Every rank shows its x, waits until all have, reads all of them, and lets nobody go on before all have read.

    finish(rank, [x of each rank as it was read]): from there to the results.
    """
    shown = buffers(group) if memory is None else memory
    pads, ranks = signals(group), device(group)

    def program(rank: int, own: Tensor) -> Program:
        if copy is None:
            message(shown[rank], own).copy_(own)
            yield None
        else:
            yield from copy(message(shown[rank], own), own)
        if first_barrier:
            yield from barrier(pads, rank, group.world)
        read = []
        for peer in range(group.world):
            read.append(message(shown[peer], own).clone())
            yield None
        finish(rank, read)
        yield None
        if end_barrier:
            yield from barrier(pads, rank, group.world)

    for rank, own in parts_of(x, group).items():
        ranks.launch(group, rank, program(rank, own))


def of_rank(tensor: Tensor, rank: int, group: Any) -> Tensor:
    """A rank's part of a result."""
    return tensor[rank] if group.rank is None else tensor


def finisher(x: Tensor, residual: Tensor | None, gamma: Tensor, eps: float, group: Any, out: Any
             ) -> tuple[tuple[Tensor, Tensor], Finish]:  # fmt: skip
    """The results, and how a rank writes its part of them."""
    normed, residual_out = results(x, out)

    def finish(rank: int, read: list[Tensor]) -> None:
        total = summed(read, residual).to(x.dtype)
        of_rank(residual_out, rank, group).copy_(total)
        of_rank(normed, rank, group).copy_(norm(total, gamma, eps))

    return (normed, residual_out), finish
