"""`--fence all`: an allocator of our own under torch. What a target allocates in C++, or in a thread of its own, then
lies in fences too: workspaces of operators, scratch of sorts, buffers that no Python code ever sees.

torch calls back into Python for each allocation, through ctypes, with the interpreter's lock taken; nothing here calls
torch, which is in the middle of something. Memory comes poisoned with canaries and lies flush against unmapped address
space. What is freed is used again on the stream it was used on, poisoned anew there, so the order of work protects it.

It is installed before CUDA starts and stays for the life of the process. Graph capture wants torch's own allocator.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from moe_fuzz.fence import FenceOptions, cuda_driver
from moe_fuzz.fence.cuda_driver import READ, WRITE, DeviceLost

NAME = "own0"  # what all of this memory is called where FenceOptions names tensors
ALIGNMENT = 16  # bytes
_GUARD = 256 << 20  # bytes of address space on either side
_MAX_IDLE = 1 << 30  # bytes
_POISON = 0x7FFD  # 16-bit words, see canary.py

_ALLOC = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p)
_FREE = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p)


class Kind(NamedTuple):
    """What a region is reused by."""

    device: int
    stream: int
    body: int  # bytes, whole granules
    left: str  # "hard" | "soft" | "readable", see cuda_mapping.py
    right: str


@dataclass(eq=False)
class Region:
    """One reservation: guard, a granule of zone, the body, a granule of zone, guard."""

    kind: Kind
    base: int
    size: int
    body: int
    mapped: list[tuple[int, int]]


class Allocator:
    """The regions of one process."""

    def __init__(self) -> None:
        self.options, self.edge = FenceOptions(), "right"
        self.made = 0
        self.failed: Exception | None = None  # what an allocation ended in; torch was given a null pointer
        self._lock = threading.Lock()
        self._used: dict[int, Region] = {}
        self._idle: OrderedDict[Region, None] = OrderedDict()  # least recently used first
        self._idle_bytes = 0
        self._callbacks = (_ALLOC(self._alloc), _FREE(self._free))  # must live as long as the process

    def install(self) -> None:
        """Makes torch use it. Before CUDA is initialized in this process."""
        import torch

        alloc, free = (ctypes.cast(callback, ctypes.c_void_p).value or 0 for callback in self._callbacks)
        torch._C._cuda_changeCurrentAllocator(torch._C._cuda_customAllocator(alloc, free))

    def take(self, size: int, device: int, stream: int) -> int:
        """The address of `size` bytes, poisoned in the order of the stream. Raises MemoryError."""
        cuda_driver.make_current(device)
        granule = cuda_driver.granularity(device)
        sides = (self._side("left"), self._side("right"))
        kind = Kind(device, stream, -(-size // granule) * granule, *sides)
        with self._lock:
            region = next((r for r in reversed(self._idle) if r.kind == kind), None)
            if region is not None:
                del self._idle[region]
                self._idle_bytes -= kind.body
        if region is None:
            try:
                region = self._map(kind, granule)
            except MemoryError:
                self.shrink(0)
                region = self._map(kind, granule)
        cuda_driver.fill(region.body, _POISON, kind.body, stream)
        room = kind.body - -(-size // ALIGNMENT) * ALIGNMENT
        address = region.body + (room if self.edge == "right" else 0)
        with self._lock:
            self._used[address] = region
        return address

    def give(self, address: int) -> None:
        """Takes memory back, for the next allocation on its stream."""
        with self._lock:
            region = self._used.pop(address)
            self._idle[region] = None
            self._idle_bytes += region.kind.body
        if self._idle_bytes > _MAX_IDLE:
            self.shrink(_MAX_IDLE // 2)

    def shrink(self, size: int) -> None:
        """Frees what was not used for longest, down to `size` bytes."""
        cuda_driver.synchronize()
        while True:
            with self._lock:
                if self._idle_bytes <= size:
                    return
                region, _ = self._idle.popitem(last=False)
                self._idle_bytes -= region.kind.body
            self._unmap(region)

    @contextlib.contextmanager
    def fencing(self, options: FenceOptions, edge: str) -> Iterator[None]:
        """During the block new memory is fenced as `options` say. Raises MemoryError where there was none to give."""
        before = self.options, self.edge
        self.options, self.edge, self.failed = options, edge, None
        try:
            yield
        finally:
            self.options, self.edge = before
        if self.failed is not None:
            raise MemoryError(str(self.failed))

    def _side(self, side: str) -> str:
        if not self.options.is_hard(NAME, side):
            return "soft"
        return "readable" if self.options.access == "write" else "hard"

    def _map(self, kind: Kind, granule: int) -> Region:
        size = 2 * (_GUARD + granule) + kind.body
        base = cuda_driver.reserve(size)
        body = base + _GUARD + granule
        region = Region(kind, base, size, body, [])
        self.made += 1
        try:
            self._back(region, body, kind.body, WRITE)
            for side, zone in ((kind.left, body - granule), (kind.right, body + kind.body)):
                if side != "hard":
                    self._back(region, zone, granule, WRITE)
                    cuda_driver.fill(zone, _POISON, granule, kind.stream)
                if side == "readable":
                    cuda_driver.synchronize()
                    cuda_driver.protect(zone, granule, kind.device, READ)
        except MemoryError:
            self._unmap(region)
            raise
        return region

    def _back(self, region: Region, address: int, size: int, access: int) -> None:
        cuda_driver.back(address, size, region.kind.device)
        region.mapped.append((address, size))
        cuda_driver.protect(address, size, region.kind.device, access)

    def _unmap(self, region: Region) -> None:
        for address, size in region.mapped:
            cuda_driver.unmap(address, size)
        cuda_driver.free(region.base, region.size)

    def _alloc(self, size: int, device: int, stream: int | None) -> int | None:
        try:
            return self.take(size, device, stream or 0) if size else None
        except DeviceLost:  # by a kernel before: whoever waits for that one is told, and no memory was short
            return None
        except Exception as error:  # noqa: BLE001 - nothing may pass through C; the case asks for it when it is over
            self.failed = self.failed or error
            return None

    def _free(self, address: int | None, size: int, device: int, stream: int | None) -> None:
        if address is None or cuda_driver.lost() is not None:
            return
        try:
            with contextlib.suppress(DeviceLost):
                self.give(address)
        except Exception as error:  # noqa: BLE001 - as above
            self.failed = self.failed or error


_installed: Allocator | None = None


def install() -> None:
    """Makes this process fence whatever torch allocates on its GPU. Before CUDA starts; once."""
    global _installed
    if _installed is None:
        _installed = Allocator()
        _installed.install()


def installed() -> Allocator | None:
    """The allocator of this process, where it has one."""
    return _installed


def fencing(options: FenceOptions, edge: str) -> contextlib.AbstractContextManager[Any]:
    """The installed allocator's `fencing`; nothing where none is installed."""
    return _installed.fencing(options, edge) if _installed is not None else contextlib.nullcontext()
