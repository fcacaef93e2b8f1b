"""Who the ranks of a call are, and the memory through which they reach each other."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from moe_fuzz.kernels.allreduce_rmsnorm.barrier import unpack_fault

_INTERPRETED = triton.knobs.runtime.interpret
#: Bytes of a rank's signal pad in torch 2.11. A grid that needs more would write behind it: nothing there checks.
SIGNAL_BYTES = 9216
LAUNCHES = ("phases", "single")
_MAX_WORLD = 8
_UNIT = 1024  # bytes, to which capacities are rounded up


class RankTimeout(RuntimeError):
    """A rank waited for a peer that did not come. What its calls gave is NaN since, and the group is of no more use."""

    def __init__(self, rank: int, peer: int, block: int, stage: int, timeout_s: float) -> None:
        self.rank, self.peer, self.block, self.stage = rank, peer, block, stage
        super().__init__(f"rank {rank} waited {timeout_s:g} s for rank {peer} (block {block}, barrier {stage}): "
                         "it died, hangs, or was not called with the same shapes. Make a new group")  # fmt: skip


class Group:
    """What `allreduce_rmsnorm` needs of its ranks. Make a LocalGroup or a RankGroup.

    Two groups may work at once on the same devices; the calls of one group are made in the same order on every rank,
    and on one stream at a time.
    """

    world: int
    rank: int | None  # None: all ranks are in this process
    device: torch.device
    process_group: Any = None  # torch.distributed's, where each rank is a process
    launches: str = "single"
    capacity: int  # bytes of the largest [T, H] that goes in one launch; more are cut into several
    timeout_s: float
    links: str  # between devices: "nvlink" | "pcie" | "local", a key of the dispatch table
    buffers: Tensor  # [world] int64: addresses of each rank's buffer: two halves, and behind them a second pad
    pads: Tensor  # [world] int64: addresses of each rank's signal pad
    state: Tensor  # [ranks here] int64, see barrier.py
    faults: Tensor  # [ranks here] int64 that the host can read at any time; 0: none
    signals: list[Tensor]  # the pads of the ranks here, int32, two each: zero when all ranks have finished
    _kept: Any = None

    @property
    def ranks_here(self) -> int:
        return self.world if self.rank is None else 1

    @property
    def half_bytes(self) -> int:
        """One shot: a slot of the whole message for each rank. Two shots: a row for each rank at least, and the whole
        message once more; each slot begins at a multiple of 16 bytes."""
        return (self.world + 1) * (self.capacity + _UNIT)

    def raise_fault(self) -> None:
        """RankTimeout where a block has left a report by now. Does not wait for the device."""
        for packed in self.faults.tolist():
            if packed:
                raise RankTimeout(*unpack_fault(packed), self.timeout_s)

    def check(self) -> None:
        """Waits for the device, and raises RankTimeout where a wait was given up."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.raise_fault()

    def close(self) -> None:
        """Lets go of the memory. No call of any rank may be under way."""
        self._kept = None
        self.signals = []
        del self.buffers, self.pads, self.state

    def _prepare(self, world: int, rank: int | None, device: torch.device, capacity: int, timeout_s: float) -> None:
        if not 1 <= world <= _MAX_WORLD:
            raise ValueError(f"a group has 1 to {_MAX_WORLD} ranks, not {world}")
        if capacity < 1 or not timeout_s > 0:
            raise ValueError(f"capacity must be at least a byte and timeout_s above 0, not {capacity} and {timeout_s}")
        self.world, self.rank, self.device, self.timeout_s = world, rank, device, timeout_s
        self.capacity = -(-capacity // _UNIT) * _UNIT
        self.state = torch.zeros(self.ranks_here, dtype=torch.int64, device=device)
        self.faults = torch.zeros(self.ranks_here, dtype=torch.int64, pin_memory=device.type == "cuda")

    def _second_pad(self, memory: Tensor) -> Tensor:
        """Of a buffer of this group: as large as the first, and the group's own, as signal pads are of torch's size."""
        return memory[2 * self.half_bytes :].view(torch.int32)

    def _share(self, buffers: Sequence[int], pads: Sequence[int]) -> None:
        table = torch.tensor([*buffers, *pads], dtype=torch.int64, device=self.device)  # one line of the cache
        self.buffers, self.pads = table[: self.world], table[self.world :]


class LocalGroup(Group):
    """All ranks on one device of this process; x, residual and results are [R, T, H].

    launches: "phases": a launch for each phase, and its end is the barrier; this one can be interpreted.
        "single": one launch with rank = program id and real barriers, on a GPU. All its blocks are resident at once.
    """

    def __init__(
        self, world: int, device: torch.device | str = "cuda", *, capacity: int = 1 << 20, launches: str = "phases",
        timeout_s: float = 10.0,
    ) -> None:  # fmt: skip
        device = torch.empty(0, device=device).device  # "cuda" with its index, as tensors name it
        if launches not in LAUNCHES:
            raise ValueError(f"launches must be one of {', '.join(LAUNCHES)}, not {launches!r}")
        if launches == "single" and (_INTERPRETED or device.type != "cuda"):
            raise ValueError("launches='single' needs a GPU: the interpreter runs programs one after another")
        self._prepare(world, None, device, capacity, timeout_s)
        self.launches, self.links = launches, "local"
        memory = torch.zeros((world, 2 * self.half_bytes + SIGNAL_BYTES), dtype=torch.uint8, device=device)
        pads = torch.zeros((world, SIGNAL_BYTES // 4), dtype=torch.int32, device=device)
        self.signals, self._kept = [*pads, *map(self._second_pad, memory)], (memory, pads)
        self._share([row.data_ptr() for row in memory], [row.data_ptr() for row in pads])


class RankGroup(Group):
    """This process is one rank, with a GPU of its own; x, residual and results are [T, H]. Making one is collective.

    process_group: of torch.distributed, the default one if None; NVLink multicast is switched off for the process.
    timeout_s: how long a rank waits for another in a kernel. Peers may still compile when the first one starts.
    """

    def __init__(
        self, process_group: Any = None, device: torch.device | str | None = None, *, capacity: int = 8 << 20,
        timeout_s: float = 30.0,
    ) -> None:  # fmt: skip
        # before the first rendezvous: mapping multicast memory is what it would try first
        os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"
        os.environ["NCCL_NVLS_ENABLE"] = "0"
        import torch.distributed as dist
        import torch.distributed._symmetric_memory as symm_mem

        group = dist.group.WORLD if process_group is None else process_group
        device = torch.device("cuda", torch.cuda.current_device()) if device is None else torch.device(device)
        self._prepare(dist.get_world_size(group), dist.get_rank(group), device, capacity, timeout_s)
        self.process_group, self.launches = group, "single"
        memory = symm_mem.empty(2 * self.half_bytes + SIGNAL_BYTES, dtype=torch.uint8, device=device)
        second = self._second_pad(memory).zero_()
        handle = symm_mem.rendezvous(memory, group)  # type: ignore[arg-type]
        if handle.signal_pad_size < SIGNAL_BYTES:
            raise ValueError(f"a signal pad has {handle.signal_pad_size} bytes, and {SIGNAL_BYTES} are needed")
        rank = handle.rank
        self.signals = [handle.get_signal_pad(rank, (SIGNAL_BYTES // 4,), torch.int32), second]
        self._kept = (memory, handle)
        self.links = links_of(device, self.world)
        self._share(handle.buffer_ptrs, handle.signal_pad_ptrs)
        torch.cuda.synchronize(device)
        dist.barrier(group)  # nobody signals before every pad is there


def links_of(device: torch.device, world: int) -> str:
    """"nvlink" where the device reaches `world` - 1 others directly, else "pcie"."""
    index = device.index if device.index is not None else torch.cuda.current_device()
    reached = sum(torch.cuda.can_device_access_peer(index, other)
                  for other in range(torch.cuda.device_count()) if other != index)  # fmt: skip
    return "nvlink" if reached >= world - 1 else "pcie"
