"""The ranks of a case of allreduce_rmsnorm, as a target sees them: `group=` of its calls.

Where all ranks live in one process, x is [R, T, H] and results are; where each has a process of its own, a target is
given its own [T, H], and `process_group` to find the others. Around the call that is judged there may be others of
other sizes, and a second group that calls at the same time (`burst` and `groups` of the config); nobody waits between
them, and only then does anybody look.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from moe_fuzz.case import Case
from moe_fuzz.execute import meeting, tape
from moe_fuzz.options import RunOptions
from moe_fuzz.targets.bind import Target
from moe_fuzz.verdict import Violation

TAIL = 256  # bytes behind each rank's buffer that nobody may write
_FEW = 8  # calls of a burst but in the first call of a case that has rows: its burst is as long as the config has it
_PATTERN = 0xA7
_PAUSE = 0.004  # seconds by which a rank with a process of its own may be late


@dataclass
class Peers:
    """Who the ranks are, and what they keep from call to call. One for each group of each case."""

    world: int
    rank: int | None  # None: all of them are in this process
    device: torch.device
    capacity: int  # bytes of the largest message, that is, of one rank's x
    launches: str  # "phases" | "single", where all ranks are in this process
    pace: str  # who is ahead of whom, for targets that stand for ranks which run at the same time
    seed: int
    number: int = 0  # of this group among those of the case
    timeout_s: float = 2.0  # after which a rank gives up to wait for another
    signals: list[torch.Tensor] = field(default_factory=list)  # int32: zero when all calls have ended
    kept: dict[Any, Any] = field(default_factory=dict)  # of targets: it lives as long as the group
    case: dict[Any, Any] = field(default_factory=dict)  # the same for all groups of a case
    waits: list[Callable[[], object]] = field(default_factory=list)  # what a target does until its calls have ended
    closes: list[Callable[[], object]] = field(default_factory=list)
    buffers: list[tuple[str, list[torch.Tensor]]] = field(default_factory=list)

    @property
    def process_group(self) -> Any:
        """Of torch.distributed, where each rank has a process; else None."""
        return meeting.process_group(self.number, self.device) if self.rank is not None else None

    def made(self, key: Any, make: Callable[[], Any]) -> Any:
        """What `make` gives, made once for this group."""
        if key not in self.kept:
            self.kept[key] = make()
        return self.kept[key]

    def memory(self, name: str, size: int, host: bool = False) -> list[torch.Tensor]:
        """uint8 [size] of each rank, zero at first, which all of them can read and write; the same at every call for
        it. On the device, or on the host."""
        where = torch.device("cpu") if host else self.device
        return self.made(("memory", name, size), lambda: self._memory(name, size, where))

    def _memory(self, name: str, size: int, where: torch.device) -> list[torch.Tensor]:
        if self.rank is None:
            whole = [torch.zeros(size + TAIL, dtype=torch.uint8, device=where) for _ in range(self.world)]
        else:
            whole = meeting.shared(f"{self.number}-{name}", size + TAIL, where)
        mine = whole if self.rank is None else whole[self.rank : self.rank + 1]
        for buffer in mine:
            buffer[size:] = _PATTERN
        self.buffers.append((name, [buffer[size:] for buffer in mine]))
        if self.rank is not None:
            meeting.gather(None)  # nobody writes before everybody has laid his pattern
        return [buffer[:size] for buffer in whole]

    def check(self) -> None:
        """Waits until all calls have ended. Raises what a rank reports."""
        meeting.state("device")
        for wait in self.waits:
            wait()
        meeting.state("call")

    def close(self) -> None:
        for close in self.closes:
            close()
        self.kept.clear()


_present: list[Peers] = []  # of the case at hand


_left: list[Violation] = []  # what `look` has found since `pads` was asked


def look() -> None:
    """Looks at the pads now, while no other rank can have begun its next call, which would signal again."""
    _left.extend(_pads())


def pads() -> list[Violation]:
    """One violation for the first signal that is left in each group's pads."""
    if any(peers.rank is not None for peers in _present):
        found = list(_left)
        _left.clear()
        return found
    return _pads()


def _pads() -> list[Violation]:
    found = []
    for peers in _present:
        for at, pad in enumerate(peers.signals):
            left = pad.flatten().nonzero()
            if len(left):
                rank, place = at if peers.rank is None else peers.rank, int(left[0])
                value = int(pad.flatten()[place])
                message = f"the signal pad of rank {rank} holds {value} in word {place} after all calls have ended"
                found.append(Violation("pads", "left", message, f"pad{rank}", (place,), "0", str(value)))
                break
    return found


def tails() -> list[Violation]:
    """One violation for each buffer that was written behind its end."""
    found = []
    for peers in _present:
        for name, ends in peers.buffers:
            for at, end in enumerate(ends):
                hurt = (end != _PATTERN).nonzero()
                if len(hurt):
                    rank, place = at if peers.rank is None else peers.rank, int(hurt[0])
                    message = f"{len(hurt)} bytes behind the buffer {name!r} of rank {rank} were written"
                    found.append(Violation("tail", f"{name}:right", message, name, (place,), f"{_PATTERN:#04x}",
                                           f"{int(end[place]):#04x}"))  # fmt: skip
                    end.fill_(_PATTERN)  # once is enough
    return found


def capacity_of(case: Case) -> int:
    """Bytes of the largest message that the groups of a case are made for."""
    config = case.config
    row = int(config["hidden"]) * getattr(torch, str(config["dtype"])).itemsize
    largest = max(step.tokens for step in case.steps) * row
    sizes = {"exact": largest, "double": 2 * largest, "half": largest // 2, "short": largest - row}
    return max(16, row, sizes[str(config["capacity"])])


@contextlib.contextmanager
def staged(case: Case, target: Target, device: str, options: RunOptions) -> Iterator[Target]:
    """The target with its group, and with the calls around its own. The groups live as long as the block."""
    config = case.config
    rank = meeting.rank() if case.processes > 1 else None
    capacity = capacity_of(case)
    where = torch.device(device) if device == "cpu" else torch.device("cuda", torch.cuda.current_device())
    groups = [
        Peers(int(config["ranks"]), rank, where, capacity, str(config["launches"]), str(config["pace"]), case.seed, at,
              timeout_s=max(0.5, min(4.0, options.deadline / 2)))
        for at in range(int(config["groups"]))
    ]  # fmt: skip
    for peers in groups:
        peers.case = groups[0].case
    _present[:] = groups
    _left.clear()
    try:
        yield replace(target, function=_Around(case, target, groups))
    finally:
        _present.clear()
        for peers in groups:
            peers.close()


class _Around:
    """A target's function with other calls before and after its own, none of which is waited for until the last."""

    def __init__(self, case: Case, target: Target, groups: list[Peers]) -> None:
        self._function, self._groups = target.function, groups
        self._spelled = target.keywords.get("group")
        self._burst, self._before = int(case.config["burst"]), 1 - case.seed % 2
        self._begun = False  # a first call was made, of any rows: without them nobody sends anything
        self._calls = 0

    def __call__(self, x: Any, residual: Any, gamma: Any, eps: float, **given: Any) -> Any:
        capturing = tape.recording() or (x.is_cuda and torch.cuda.is_current_stream_capturing())
        burst = min(self._burst, _FEW) if capturing or self._begun else self._burst
        self._begun = self._begun or x.shape[-2] > 0
        others = list(self._others(x, residual, gamma)) if burst or len(self._groups) > 1 else []
        result = None
        own = (burst + self._before) // 2  # of two, one has its other call before it, one behind it
        for at in range(burst + 1):
            mine = at == own
            one, held, scale = (x, residual, gamma) if mine else others[at % len(others)]
            self._pause(capturing)
            found = self._call(0, one, held, scale, eps, given if mine else {})
            result = found if mine else result
            for number in range(1, len(self._groups)):
                one, held, scale = others[(at + number) % len(others)]
                self._call(number, one, held, scale, eps, {})
        if not capturing:
            for peers in self._groups:
                peers.check()
        return result

    def _call(self, number: int, x: Any, residual: Any, gamma: Any, eps: float, given: dict[str, Any]) -> Any:
        group = {self._spelled: self._groups[number]} if self._spelled else {}
        return self._function(x, residual, gamma, eps, **group, **given)

    @staticmethod
    def _others(x: torch.Tensor, residual: torch.Tensor | None, gamma: torch.Tensor) -> Iterator[tuple[Any, Any, Any]]:
        """Calls of as many rows, of one row, of half of them; other numbers and weights, of the same sizes."""
        tokens, scale = x.shape[-2], -gamma.flip(0)
        for count in (tokens, min(1, tokens), tokens // 2):
            held = None if residual is None else residual[..., tokens - count :, :].clone()
            yield -x[..., tokens - count :, :].clone(), held, scale

    def _pause(self, capturing: bool) -> None:
        """Lets a rank with a process of its own be late, on the host or on the device."""
        peers = self._groups[0]
        self._calls += 1
        if peers.rank is None or peers.pace == "together":
            return
        chosen = random.Random(f"{peers.seed} {self._calls if peers.pace == 'random' else 0}")
        singled = chosen.randrange(peers.world)
        late = {"late": peers.rank == singled, "ahead": peers.rank != singled,
                "random": chosen.random() < 0.5 and peers.rank == singled}[peers.pace]  # fmt: skip
        if not late or self._calls > 8:
            return
        if peers.device.type == "cuda" and (capturing or chosen.random() < 0.5):
            torch.cuda._sleep(int(chosen.random() * _PAUSE * 1e9))
        elif not capturing:
            time.sleep(chosen.random() * _PAUSE)
