"""Address space with guards: blocks of `mmap`ped pages between inaccessible ones, pooled and reused. Linux.

    base        body area (capacity pages)            end
    | guard … | surplus pages | rw_lo … rw_hi | guard |

Only [rw_lo, rw_hi) is writable; it holds the pages in use and, on a soft side, 64 KiB more. All else is guard.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import weakref
from collections import OrderedDict

from moe_fuzz.errors import EnvironmentProblem

PAGE = mmap.PAGESIZE
SOFT = max(1 << 16, PAGE)  # bytes of a soft guard

NONE, READ, WRITE = 0, mmap.PROT_READ, mmap.PROT_READ | mmap.PROT_WRITE
_NORESERVE = 0x4000
_FLAGS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE

_libc = ctypes.PyDLL(None, use_errno=True)
_mmap, _munmap, _mprotect = _libc.mmap, _libc.munmap, _libc.mprotect
_mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_mmap.restype = ctypes.c_void_p
_munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def protect(address: int, size: int, access: int) -> None:
    """Sets the protection of whole pages."""
    if size and _mprotect(address, size, access):
        raise _failure("mprotect", size)


class Block:
    """A reservation of address space: `capacity` bytes for a body, and `guard` bytes on either side of them."""

    def __init__(self, capacity: int, guard: int) -> None:
        self.capacity, self.guard = capacity, guard
        self.size = guard + capacity + guard
        base = _mmap(None, self.size, NONE, _FLAGS, -1, 0)
        if base in (None, ctypes.c_void_p(-1).value):
            raise _failure("mmap", self.size)
        self.base: int = base
        self.end = base + self.size
        self.view = memoryview((ctypes.c_uint8 * self.size).from_address(base)).cast("B")
        self.rw_lo = self.rw_hi = base
        self._arranged = (base, base, NONE, NONE)
        self._lease: weakref.ref[memoryview] | None = None

    def arrange(self, rw_lo: int, rw_hi: int, left: int, right: int) -> None:
        """Makes [rw_lo, rw_hi) writable, and what is left and right of it NONE or READ."""
        wanted = (rw_lo, rw_hi, left, right)
        if wanted != self._arranged:
            protect(self.base, rw_lo - self.base, left)
            protect(rw_lo, rw_hi - rw_lo, WRITE)
            protect(rw_hi, self.end - rw_hi, right)
            self.rw_lo, self.rw_hi, self._arranged = rw_lo, rw_hi, wanted

    def lend(self, address: int, size: int) -> memoryview:
        """The memory to make a tensor from. Its storage keeps this view alive, so the view's death tells of its own."""
        lent = self.view[address - self.base : address - self.base + size]
        self._lease = weakref.ref(lent)
        return lent

    @property
    def referenced(self) -> bool:
        """Whether a tensor still points into the block."""
        return self._lease is not None and self._lease() is not None

    def unmap(self) -> None:
        self.view.release()
        if _munmap(self.base, self.size):
            raise _failure("munmap", self.size)


class Pool:
    """Idle blocks by size, and blocks set aside because a tensor outlived its arena."""

    def __init__(self, max_bytes: int = 256 << 20, max_blocks: int = 512) -> None:
        self.max_bytes, self.max_blocks = max_bytes, max_blocks
        self.idle_bytes = 0
        self._idle: dict[tuple[int, int], list[Block]] = {}
        self._order: OrderedDict[Block, None] = OrderedDict()  # least recently used first

    def __len__(self) -> int:
        return len(self._order)

    def take(self, pages: int, guard: int) -> Block:
        """A block with room for `pages`, and guards of at least `guard` bytes even next to a soft zone."""
        key = (_size_class(pages) * PAGE, _size_class(-(-(guard + SOFT) // PAGE)) * PAGE)
        blocks = self._idle.get(key)
        if not blocks:
            return Block(*key)
        block = blocks.pop()
        del self._order[block]
        self.idle_bytes -= _footprint(block)
        return block

    def give(self, block: Block) -> None:
        """Takes back a block that nothing points to."""
        self._idle.setdefault((block.capacity, block.guard), []).append(block)
        self._order[block] = None
        self.idle_bytes += _footprint(block)
        while self.idle_bytes > self.max_bytes or len(self._order) > self.max_blocks:
            oldest, _ = self._order.popitem(last=False)
            self._idle[oldest.capacity, oldest.guard].remove(oldest)
            self.idle_bytes -= _footprint(oldest)
            oldest.unmap()


def _footprint(block: Block) -> int:
    """Most bytes of real memory that the block can hold."""
    return block.capacity + 2 * SOFT


def _size_class(pages: int) -> int:
    """The next of 1 2 3 … 8 10 12 14 16 20 24 …: at most a quarter more than asked for. Pages in excess are guard."""
    shift = max(0, (pages - 1).bit_length() - 3)
    return -(-pages >> shift) << shift


def _failure(call: str, size: int) -> Exception:
    code = ctypes.get_errno()
    if code == errno.ENOMEM:
        return MemoryError(f"{call} of {size} bytes for a memory fence: {os.strerror(code)}")
    return EnvironmentProblem(f"{call} of {size} bytes for a memory fence failed: {os.strerror(code)}")
