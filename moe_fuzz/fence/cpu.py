"""Fences on the CPU: `mmap` and `mprotect`. An access to a hard guard is a SIGSEGV of the process. Linux.

The pool is one a process and outlives the arenas (see pooled.py).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from moe_fuzz.fence import FenceOptions, canary
from moe_fuzz.fence.layout import Layout
from moe_fuzz.fence.mapping import NONE, PAGE, READ, SOFT, WRITE, Block, Pool, protect
from moe_fuzz.fence.placed import Placed
from moe_fuzz.fence.pooled import PooledArena
from moe_fuzz.fence.sparse import Island
from moe_fuzz.verdict import Violation

_POOL = Pool()
_KEPT: list[_Placed] = []  # of closed arenas, with a tensor still alive


class _Placed(Placed):
    """See Placed."""

    __slots__ = ("block", "body_lo", "pages")

    def __init__(self, name: str, role: str, what: str, layout: Layout, edge: str, options: FenceOptions) -> None:
        super().__init__(name, role, what)
        self.block = _POOL.take(layout.pages, layout.guard)
        self.pages = layout.pages * PAGE
        self.body_lo = self.block.base + self.block.guard
        if edge == "right":
            self.body_lo += self.block.capacity - self.pages
        self.start = self.body_lo + layout.start
        self.end = self.start + layout.extent
        hard_left, hard_right = options.is_hard(name, "left"), options.is_hard(name, "right")
        self.lo = self.body_lo if hard_left else self.body_lo - SOFT
        self.hi = self.body_lo + self.pages + (0 if hard_right else SOFT)
        guard = READ if options.access == "write" else NONE
        try:
            self.block.arrange(self.lo, self.hi, guard if hard_left else NONE, guard if hard_right else NONE)
        except MemoryError:
            self.block.unmap()
            raise

    @property
    def referenced(self) -> bool:
        return self.block.referenced

    def lend(self, dtype: torch.dtype) -> torch.Tensor:
        return torch.frombuffer(self.block.lend(self.start, self.end - self.start), dtype=dtype)

    def reset(self, whole: bool) -> None:
        if whole:
            canary.fill(self.lo, self.hi - self.lo)
        else:
            canary.fill(self.lo, self.start - self.lo)
            canary.fill(self.end, self.hi - self.end)

    def protect(self, readonly: bool) -> None:
        protect(self.body_lo, self.pages, READ if readonly else WRITE)

    def compare(self, lo: int, hi: int, where: torch.Tensor | None = None) -> canary.Damage | None:
        return canary.compare(lo, hi - lo, where)


class _Sparse(_Placed):
    """One whose rows lie far apart: an island of pages each, all hard around them."""

    __slots__ = ("rows",)

    def __init__(self, name: str, role: str, what: str, layout: Layout, rows: tuple[Island, ...]) -> None:
        Placed.__init__(self, name, role, what)
        self.pages = layout.pages * PAGE
        self.block = Block(self.pages, -(-layout.guard // PAGE) * PAGE)
        self.body_lo = self.lo = self.block.base + self.block.guard
        self.hi = self.body_lo + self.pages
        self.start = self.body_lo + layout.start
        self.end = self.start + layout.extent
        self.rows = [Island(*(self.body_lo + at for at in row)) for row in rows]
        try:
            self.protect(readonly=False)
        except MemoryError:
            self.block.unmap()
            raise

    def reset(self, whole: bool) -> None:
        for row in self.rows:
            canary.fill(row.lo, (row.hi if whole else row.start) - row.lo)
            if not whole:
                canary.fill(row.end, row.hi - row.end)

    def protect(self, readonly: bool) -> None:
        for row in self.rows:
            protect(row.lo, row.hi - row.lo, READ if readonly else WRITE)

    def damages(self) -> Iterator[Violation]:
        yield from self.around(self.rows)


class CpuArena(PooledArena[_Placed]):
    """See Arena."""

    device = "cpu"
    page = PAGE
    own_bytes = 256 << 20
    own_tensors = 4096

    def __init__(self, options: FenceOptions, edge: str) -> None:
        super().__init__(options, edge, _KEPT)

    def _take(self, name: str, role: str, what: str, layout: Layout, edge: str, fixed: bool = False) -> _Placed:
        return _Placed(name, role, what, layout, edge, self.options)

    def _take_sparse(
        self, name: str, role: str, what: str, layout: Layout, rows: tuple[Island, ...], fixed: bool = False
    ) -> _Placed:
        return _Sparse(name, role, what, layout, rows)

    def _give(self, placed: _Placed) -> None:
        if isinstance(placed, _Sparse):
            placed.block.unmap()
        else:
            _POOL.give(placed.block)
