"""Processes of one group that run the same case, a rank each: how they find each other, and wait for each other.

The parent gives each its rank, their number, and a directory of their own (see worker/group.py). They meet in memory of
the host, so that a rank whose device hangs can still be told from those that wait for it: each one's state stands there
for the parent to read.
"""

from __future__ import annotations

import mmap
import os
import pickle
import struct
import time
from functools import cache
from pathlib import Path
from typing import Any

import torch

RANK, SIZE, PLACE = "MOE_FUZZ_RANK", "MOE_FUZZ_RANKS", "MOE_FUZZ_MEETING"  # variables, see worker/group.py
STATES = ("idle", "call", "device", "wait")  # what a rank is doing: nothing, the target's code, its device, the others
_ROOM = 256 << 20  # bytes of what a rank shows the others at once, at most; of them only those written are real
_HEAD = 64


class Broken(RuntimeError):
    """What a rank has to show does not fit."""


def present() -> bool:
    """Whether this process is one of a group."""
    return PLACE in os.environ


def rank() -> int:
    return int(os.environ[RANK])


def size() -> int:
    return int(os.environ[SIZE])


def state(name: str) -> None:
    """Tells the parent what this rank is doing from now on."""
    if present():
        _board().tell(STATES.index(name))


def gather(mine: Any) -> list[Any]:
    """What each rank has brought, in their order. All of them must come; whoever does not is for the parent to find."""
    return _board().gather(mine)


class _Board:
    """Memory in which each rank has a head, [generation, length, state], and room for what it shows."""

    def __init__(self) -> None:
        self.rank, self.size = rank(), size()
        self._generation = 0
        self._maps = [self._open(number) for number in range(self.size)]

    def _open(self, number: int) -> mmap.mmap:
        path = Path(os.environ[PLACE]) / f"rank-{number}"
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(file, _HEAD + 2 * _ROOM)  # two rooms by turns: one is read while the other is written
            return mmap.mmap(file, _HEAD + 2 * _ROOM)
        finally:
            os.close(file)

    def tell(self, number: int) -> None:
        struct.pack_into("<q", self._maps[self.rank], 16, number)

    def gather(self, mine: Any) -> list[Any]:
        data = pickle.dumps(mine, protocol=pickle.HIGHEST_PROTOCOL)
        if len(data) > _ROOM:
            raise Broken(f"a rank has {len(data)} bytes to show, and {_ROOM} have room")
        self._generation += 1
        room = _HEAD + (self._generation % 2) * _ROOM
        own = self._maps[self.rank]
        own[room : room + len(data)] = data
        struct.pack_into("<q", own, 8, len(data))
        struct.pack_into("<q", own, 24 + 8 * (self._generation % 2), len(data))
        self.tell(STATES.index("wait"))
        struct.pack_into("<q", own, 0, self._generation)
        found = []
        for number, other in enumerate(self._maps):
            pause = 0.0
            while struct.unpack_from("<q", other, 0)[0] < self._generation:
                time.sleep(pause)  # 0 gives the core away, where ranks outnumber cores
                pause = min(0.001, pause + 1e-5)
            length = struct.unpack_from("<q", other, 24 + 8 * (self._generation % 2))[0]
            found.append(mine if number == self.rank else pickle.loads(other[room : room + length]))  # noqa: S301 - ours
        self.tell(STATES.index("idle"))
        return found


@cache
def _board() -> _Board:
    return _Board()


@cache
def process_group(number: int, device: torch.device) -> Any:
    """The group of torch.distributed of this number, each of which has all ranks: gloo, and NCCL on GPUs of their own.

    Made when it is first asked for, by all ranks at once.
    """
    import torch.distributed as dist

    if not dist.is_initialized():
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
        alone = device.type == "cuda" and torch.cuda.device_count() >= size()
        store = dist.FileStore(str(Path(os.environ[PLACE]) / "store"), size())
        dist.init_process_group("cpu:gloo,cuda:nccl" if alone else "gloo", store=store, rank=rank(), world_size=size())
    if number == 0:
        return dist.group.WORLD
    return dist.new_group(list(range(size())))


def shared(name: str, count: int, device: torch.device) -> list[torch.Tensor]:
    """uint8 [count] of each rank, which all can read and write: memory of the host, or symmetric memory of GPUs."""
    if device.type == "cuda":
        import torch.distributed._symmetric_memory as symm_mem

        group = process_group(0, device)
        mine = symm_mem.empty(count, dtype=torch.uint8, device=device)
        mine.zero_()
        handle = symm_mem.rendezvous(mine, group.group_name)
        return [mine if r == rank() else handle.get_buffer(r, (count,), torch.uint8) for r in range(size())]
    found = []
    for number in range(size()):
        path = Path(os.environ[PLACE]) / f"memory-{name}-{number}-{count}"
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(file, count)
            found.append(torch.frombuffer(mmap.mmap(file, count), dtype=torch.uint8))
        finally:
            os.close(file)
    return found
