"""Device memory with guards: blocks of mapped granules in reserved address space, pooled and reused.

    base                  lo         body         hi                    end
    | guard … | left zone |  granules of the body  | right zone | guard … |

A guard is address space without memory: it costs nothing, and any access to it is an illegal access. A zone is one
granule wide. It is a part of the guard (`HARD`), or canaries (`SOFT`), or, with the guard behind it, canaries that can
be read and not written (`READABLE`).

The body may have a twin: the same memory at a second address, where it can be written, while at the first it never can.
So an input is filled through the twin and is read-only for the target from the beginning, inside a graph too, and
nobody waits for the driver to switch a protection (30 us, twice a tensor and call). The CUDA programming guide allows
such aliases as long as one kernel does not use both; ours are a fill and a later launch of the target's.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from functools import cached_property
from typing import NamedTuple

import torch

from moe_fuzz.fence import allocator, cuda_driver
from moe_fuzz.fence.cuda_driver import READ, WRITE

HARD, SOFT, READABLE = "hard", "soft", "readable"
WORD = 0x7FFD  # the canary, see canary.py
_ALIAS = 32 << 20  # bytes of memory that a readable guard shows again and again


class Kind(NamedTuple):
    """What a block is reused by."""

    device: int
    body: int  # bytes, whole granules
    guard: int  # bytes, a multiple of _ALIAS
    left: str
    right: str
    twin: bool = False
    parts: tuple[tuple[int, int], ...] = ()  # (offset, size) in the body, whole granules: all of it that has memory


def kind_of(
    device: int, body: int, guard: int, left: str, right: str, twin: bool = False,
    parts: tuple[tuple[int, int], ...] = (),
) -> Kind:  # fmt: skip
    """The kind of a block with guards of at least `guard` bytes."""
    return Kind(device, body, -(-guard // _ALIAS) * _ALIAS, left, right, twin, parts)


#: What NumPy has a name for. A tensor of these is made in one go, and any other out of bytes.
_KINDS = {
    torch.uint8: "|u1", torch.int8: "|i1", torch.bool: "|b1", torch.int16: "<i2", torch.int32: "<i4",
    torch.int64: "<i8", torch.float16: "<f2", torch.float32: "<f4", torch.float64: "<f8",
}  # fmt: skip


class _Lent:
    """What torch makes a tensor from. The tensor's storage keeps it alive, so its death tells of the storage's."""

    __slots__ = ("__cuda_array_interface__", "__weakref__")

    def __init__(self, address: int, shape: tuple[int, ...], kind: str = "|u1") -> None:
        """kind: of an element, in NumPy's letters."""
        self.__cuda_array_interface__ = {
            "data": (address, False), "shape": shape, "typestr": kind, "strides": None, "version": 2,
        }  # fmt: skip


class Block:
    """One reservation. `lo` and `hi` bound what the device may write, apart from read-only inputs."""

    def __init__(self, kind: Kind) -> None:
        self.kind = kind
        device, self._zone = kind.device, cuda_driver.granularity(kind.device)
        self.size = 2 * (kind.guard + self._zone) + kind.body
        self.base = cuda_driver.reserve(self.size)
        self.body = self.base + kind.guard + self._zone
        end = self.body + kind.body
        self._mapped: list[tuple[int, int]] = []
        self._lease: weakref.ref[_Lent] | None = None
        self._twin = cuda_driver.reserve(kind.body) if kind.twin else None
        self.laid: object = None  # of one with a twin: around these addresses, all over the rest, there are canaries
        try:
            self._back(self.body, kind.body, twin=self._twin)
            for side, zone, guard in (
                (kind.left, self.body - self._zone, self.base),
                (kind.right, end, end + self._zone),
            ):
                if side != HARD:
                    self._back(zone, self._zone)
                if side == READABLE:
                    self._back(guard, _ALIAS, kind.guard // _ALIAS)
                    self._make_readable(zone, self._zone, self._zone)
                    self._make_readable(guard, kind.guard, _ALIAS)
            self.lo = self.body - (self._zone if kind.left == SOFT else 0)
            self.hi = end + (self._zone if kind.right == SOFT else 0)
            cuda_driver.protect(self.lo, self.hi - self.lo, device, READ if kind.twin else WRITE)
            if self._twin is not None:
                cuda_driver.protect(self._twin, kind.body, device, WRITE)
        except MemoryError:
            self.unmap()
            raise
        self.away = 0 if self._twin is None else self._twin - self.lo  # from where it is to where it can be written
        self.bytes = bytes_at(self.lo + self.away, self.hi - self.lo)
        self.words = self.bytes.view(torch.int16)

    @cached_property
    def footprint(self) -> int:
        """Bytes of memory."""
        sides = (self.kind.left, self.kind.right)
        return self.kind.body + sum(self._zone for s in sides if s != HARD) + _ALIAS * sides.count(READABLE)

    def lend(self, address: int, size: int) -> torch.Tensor:
        """A flat uint8 tensor of memory in the block."""
        lent = _Lent(address, (size,))
        self._lease = weakref.ref(lent)
        return torch.as_tensor(lent, device="cuda")

    def lend_packed(self, address: int, size: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        """A packed tensor of `size` bytes of memory in the block."""
        kind = _KINDS.get(dtype)
        if kind is None:
            return self.lend(address, size).view(dtype).view(shape)
        lent = _Lent(address, shape, kind)
        self._lease = weakref.ref(lent)
        return torch.as_tensor(lent, device="cuda")

    @property
    def referenced(self) -> bool:
        """Whether a tensor still points into the block."""
        return self._lease is not None and self._lease() is not None

    def unmap(self, wait: bool = True) -> None:
        """Frees the memory. No tensor may point into it. wait: for the device, which must be done with it."""
        if wait:
            cuda_driver.synchronize()
        for address, size in self._mapped:
            cuda_driver.unmap(address, size)
        self._mapped = []
        cuda_driver.free(self.base, self.size)
        if self._twin is not None:
            cuda_driver.free(self._twin, self.kind.body)

    def _back(self, address: int, size: int, times: int = 1, twin: int | None = None) -> None:
        cuda_driver.back(address, size, self.kind.device, times, twin)
        self._mapped += [(address + i * size, size) for i in range(times)]
        self._mapped += [(twin, size)] if twin is not None else []

    def _make_readable(self, address: int, size: int, alias: int) -> None:
        """Canaries in `size` bytes that show the same `alias` bytes of memory again and again, then read-only."""
        cuda_driver.protect(address, size, self.kind.device, WRITE)
        bytes_at(address, alias).view(torch.int16).fill_(WORD)
        cuda_driver.synchronize()
        cuda_driver.protect(address, size, self.kind.device, READ)


class SparseBlock(Block):
    """A reservation of which only the parts of the body that its kind names have memory, each by itself. Its guards are
    hard, and so is what lies between the parts."""

    def __init__(self, kind: Kind) -> None:
        self.kind, self._zone = kind, 0
        self.size = 2 * kind.guard + kind.body
        self.base = cuda_driver.reserve(self.size)
        self.body = self.base + kind.guard
        self._mapped = []
        self._lease = None
        self._twin = cuda_driver.reserve(kind.body) if kind.twin else None
        self.away = 0 if self._twin is None else self._twin - self.body
        self.laid = None
        try:
            for offset, size in kind.parts:
                twin = None if self._twin is None else self._twin + offset
                self._back(self.body + offset, size, twin=twin)
                cuda_driver.protect(self.body + offset, size, kind.device, READ if kind.twin else WRITE)
                if twin is not None:
                    cuda_driver.protect(twin, size, kind.device, WRITE)
        except MemoryError:
            self.unmap()
            raise

    @cached_property
    def footprint(self) -> int:
        return sum(size for _, size in self.kind.parts)


class Pool:
    """Idle blocks by kind."""

    def __init__(self, max_bytes: int = 2 << 30, max_blocks: int = 512, max_addresses: int = 2 << 40) -> None:
        """max_addresses: bytes of address space, of which a block whose rows lie far apart takes tens of gigabytes."""
        self.max_bytes, self.max_blocks, self.max_addresses = max_bytes, max_blocks, max_addresses
        self.made = 0  # blocks, ever
        self.idle_bytes = self.idle_addresses = 0
        self._idle: dict[Kind, list[Block]] = {}
        self._order: OrderedDict[Block, None] = OrderedDict()  # least recently used first

    def __len__(self) -> int:
        return len(self._order)

    def take(self, kind: Kind) -> Block:
        """A block of this kind. Raises MemoryError when the device has no more memory."""
        blocks = self._idle.get(kind)
        if blocks:
            block = blocks.pop()
            del self._order[block]
            self.idle_bytes -= block.footprint
            self.idle_addresses -= block.size
            return block
        self.made += 1
        make = SparseBlock if kind.parts else Block
        try:
            return make(kind)
        except MemoryError:
            self.shrink(0, 0)  # what others may have: our idle blocks, and torch's
            if allocator.installed() is None:  # which has no cache, and gave up its own idle memory before
                torch.cuda.empty_cache()
            return make(kind)

    def give(self, block: Block) -> None:
        """Takes back a block that nothing points to."""
        self._idle.setdefault(block.kind, []).append(block)
        self._order[block] = None
        self.idle_bytes += block.footprint
        self.idle_addresses += block.size
        if self._over(self.max_bytes, self.max_blocks):
            self.shrink(self.max_bytes, self.max_blocks)

    def _over(self, max_bytes: int, max_blocks: int) -> bool:
        many = self.idle_bytes > max_bytes or len(self._order) > max_blocks
        return many or self.idle_addresses > self.max_addresses

    def shrink(self, max_bytes: int, max_blocks: int) -> None:
        """Frees the blocks that were not used for longest, down to these limits."""
        if self._over(max_bytes, max_blocks):
            cuda_driver.synchronize()
        while self._over(max_bytes, max_blocks):
            oldest, _ = self._order.popitem(last=False)
            self._idle[oldest.kind].remove(oldest)
            self.idle_bytes -= oldest.footprint
            self.idle_addresses -= oldest.size
            oldest.unmap(wait=False)


def bytes_at(address: int, size: int) -> torch.Tensor:
    """Device memory as a flat uint8 tensor."""
    return torch.as_tensor(_Lent(address, (size,)), device="cuda")
