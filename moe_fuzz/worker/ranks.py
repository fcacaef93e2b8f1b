"""The groups of a worker: cases that take several processes, and where these may run. Free of torch."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from moe_fuzz.case import Case
from moe_fuzz.options import RunOptions
from moe_fuzz.verdict import Verdict
from moe_fuzz.worker.group import Group, refused
from moe_fuzz.worker.launch import Process
from moe_fuzz.worker.leases import Lease, Leases
from moe_fuzz.worker.protocol import provider_of
from moe_fuzz.worker.stats import Stats
from moe_fuzz.worker.turns import turn

#: NVLink multicast stays off: it is the user's to enable.
_CUDA: Mapping[str, str] = {"TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NCCL_NVLS_ENABLE": "0"}

SpawnRank = Callable[[str, Path, Mapping[str, str]], Process]  # provider, log, variables


def next_part(cases: Sequence[Case]) -> tuple[int, Sequence[Case]]:
    """The first cases that take as many processes, and how many these are."""
    size = cases[0].processes
    return size, tuple(itertools.takewhile(lambda case: case.processes == size, cases))


class Groups:
    """What a pool gives its workers for groups: GPUs, processes, and their turn."""

    def __init__(self, leases: Leases | None, spawn: SpawnRank, turn: threading.Lock) -> None:
        self._leases, self._spawn, self._turn = leases, spawn, turn

    @property
    def room(self) -> int | None:
        """GPUs; None on the host, where ranks share the cores."""
        return None if self._leases is None else len(self._leases.gpus)

    def turn(self) -> contextlib.AbstractContextManager[object]:
        """Groups of one pool take turns: to take GPUs, and to run there."""
        return contextlib.nullcontext() if self._leases is None else self._turn

    def turn_on(self, leases: Sequence[Lease]) -> contextlib.AbstractContextManager[object]:
        """While the group runs it has the GPUs of these leases for itself. Who waits here waits for nobody who waits
        for a slot: all have theirs."""
        if (ours := self._leases) is None:
            return contextlib.nullcontext()
        return turn(ours.directory, [lease.gpu.uuid for lease in leases], given_up=lambda: ours.closed)

    def take(self, size: int) -> list[Lease]:
        return [] if self._leases is None else self._leases.take_all(size)

    def spawn(self, leases: Sequence[Lease], provider: str) -> Callable[[int, Path, Mapping[str, str]], Process]:
        """How a rank's process is made. All of them see the same GPUs, and each takes that of its number."""

        def rank_process(rank: int, log: Path, variables: Mapping[str, str]) -> Process:
            own: dict[str, str] = {}
            if leases:
                seen = ",".join(lease.gpu.uuid for lease in leases)
                own = {**leases[rank].environment, **_CUDA, "CUDA_VISIBLE_DEVICES": seen}
            return self._spawn(provider, log, {**own, **variables})

        return rank_process


class Ranks:
    """Of one worker: the groups that it has needed so far, one of each size."""

    def __init__(self, log: Path, stats: Stats, groups: Groups | None) -> None:
        self._log, self._stats, self._groups = log, stats, groups
        self._made: dict[int, tuple[Group, list[Lease]]] = {}
        self._last = 0  # the size of the one that ran last

    @property
    def past(self) -> deque[Case]:
        """What the group that ran last has run, oldest first."""
        return self._made[self._last][0].past if self._last in self._made else deque()

    @property
    def pids(self) -> list[int]:
        return [pid for group, _ in self._made.values() for pid in group.pids]

    def run(
        self, size: int, cases: Sequence[Case], target: str, options: RunOptions, give: Callable[[Verdict], None]
    ) -> None:
        """See Group.run."""
        groups, self._last = self._groups, size
        if groups is None or (groups.room is not None and size > groups.room):
            for _ in cases:
                give(refused(size, 0 if groups is None else groups.room or 0))
            return
        with groups.turn():
            if size not in self._made:
                leases = groups.take(size)
                group = Group(size, groups.spawn(leases, provider_of(target)), self._log, self._stats)
                self._made[size] = group, leases
            group, leases = self._made[size]
            group.ready(target)  # while others may still be at work there
            with groups.turn_on(leases):
                group.run(cases, target, options, give)

    def close(self) -> None:
        """Ends the groups, and gives their GPUs back. Idempotent."""
        made, self._made = self._made, {}
        for group, leases in made.values():
            group.discard()
            for lease in leases:
                lease.release()
