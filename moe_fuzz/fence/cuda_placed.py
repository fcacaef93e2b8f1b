"""Where one tensor lies on a GPU, between its guards: in a block of the process's pool.

Memory is mapped and protected in granules of 2 MiB, so the side of a tensor that is not flush has up to 2 MiB of slack,
all of it canaries. What nobody can write beside needs none: an input is filled through a twin mapping.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch

from moe_fuzz.fence import FenceOptions, canary, cuda_driver
from moe_fuzz.fence.cuda_driver import READ, WRITE
from moe_fuzz.fence.cuda_mapping import HARD, READABLE, SOFT, WORD, Kind, Pool, SparseBlock, bytes_at, kind_of
from moe_fuzz.fence.cuda_regions import Piece
from moe_fuzz.fence.evenly import Evenly
from moe_fuzz.fence.layout import Layout
from moe_fuzz.fence.placed import Placed
from moe_fuzz.fence.sparse import Island
from moe_fuzz.verdict import Violation

MIN_GUARD = 256 << 20  # bytes
POOL = Pool()  # one a process, and it outlives the arenas: see pooled.py
_CANARY = int.from_bytes(canary.WORD * 4, "little")
_MAX_KINDS = 4096
_LOW, _HIGH = canary.WORD  # a canary's bytes at even and at odd addresses


class Kinds(dict[tuple[int, int, int, str, bool], Kind]):
    """The kinds of the blocks of tensors fenced by the same options: by device, pages, bytes of guard, the tensor's
    name, and whether it is `fixed`. Cases ask for the same ones again and again."""

    def __init__(self, options: FenceOptions) -> None:
        super().__init__()
        self._options = options

    def __missing__(self, key: tuple[int, int, int, str, bool]) -> Kind:
        device, pages, guard, name, fixed = key
        options = self._options
        hard = READABLE if options.access == "write" else HARD
        left, right = (hard if options.is_hard(name, side) else SOFT for side in ("left", "right"))
        twin = fixed and options.is_readonly(name) and (left, right) == (HARD, HARD)
        kind = kind_of(device, pages * cuda_driver.granularity(device), max(MIN_GUARD, guard), left, right, twin)
        if len(self) >= _MAX_KINDS:
            self.clear()
        self[key] = kind
        return kind


@lru_cache(maxsize=256)
def kinds_of(options: FenceOptions) -> Kinds:
    return Kinds(options)


class CudaPlaced(Placed):
    """See Placed."""

    __slots__ = ("block", "device")

    def __init__(
        self, name: str, role: str, what: str, layout: Layout, device: int, kinds: Kinds, fixed: bool
    ) -> None:
        """fixed: filled through `twin` alone. With soft guards the memory beside the tensor must be writable, so there
        is none, and the protection is switched."""
        super().__init__(name, role, what)
        self.device = device
        self.block = POOL.take(kinds[device, layout.pages, layout.guard, name, fixed])
        self.lo, self.hi = self.block.lo, self.block.hi
        self.start = self.block.body + layout.start
        self.end = self.start + layout.extent

    @property
    def referenced(self) -> bool:
        lease = self.block._lease  # asked of every tensor again and again, so without the block's own property
        return lease is not None and lease() is not None

    def lend_packed(self, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        return self.block.lend_packed(self.start, self.end - self.start, dtype, shape)

    def lend(self, dtype: torch.dtype) -> torch.Tensor:
        return self.block.lend(self.start, self.end - self.start).view(dtype)

    def reset(self, whole: bool) -> None:
        if whole:
            self.block.words.fill_(WORD)
            return
        for words, edge, value in self._around():
            words.fill_(WORD)
            edge.fill_(value)

    @property
    def fixed(self) -> bool:
        return self.block.kind.twin

    def twin(self, dtype: torch.dtype) -> torch.Tensor:
        start = self.start - self.lo
        return self.block.bytes[start : start + self.end - self.start].view(dtype)

    def protect(self, readonly: bool) -> None:
        cuda_driver.protect(self.block.body, self.block.kind.body, self.device, READ if readonly else WRITE)

    def compare(self, lo: int, hi: int, where: torch.Tensor | None = None) -> canary.Damage | None:
        memory = self.block.bytes[lo - self.lo - (lo & 1) : hi - self.lo].cpu()  # even, as a canary's phase wants it
        return canary.compare(memory.data_ptr() + (lo & 1), hi - lo, where)

    def pieces(self, whole: bool) -> list[Piece]:
        """The canaries: around the storage, or over it too."""
        away, lo, start, end, hi = self.block.away, self.lo, self.start, self.end, self.hi
        if whole:
            return [Piece(lo + away, hi - lo, _CANARY)]
        found = [Piece(lo + away, start - lo, _CANARY)] if start > lo else []
        if hi > end:
            found.append(Piece(end + away, hi - end, _CANARY))
        return found

    def differs(self) -> list[torch.Tensor]:
        """Flags on the device: bool [1] each, true where canaries changed."""
        found: list[torch.Tensor] = []
        if self.block.kind.twin:  # nobody can write there
            return found
        for words, edge, value in self._around():
            found += [(part != wanted).any() for part, wanted in ((words, WORD), (edge, value)) if part.numel()]
        if self.gaps is not None:
            phase = torch.arange(self.start, self.end, device="cuda") & 1
            wrong = self.block.bytes[self.start - self.lo : self.end - self.lo] != _LOW + (_HIGH - _LOW) * phase
            found.append((wrong & self.gaps.to("cuda", non_blocking=True)).any())
        return found

    def _around(self) -> tuple[tuple[torch.Tensor, torch.Tensor, int], ...]:
        """Left and right of the storage: whole words, the single byte next to it (or none), and that byte's canary."""
        start, end = self.start - self.lo, self.end - self.lo
        words, flat = self.block.words, self.block.bytes
        return (
            (words[: start // 2], flat[start - (start & 1) : start], _LOW),
            (words[(end + 1) // 2 :], flat[end : end + (end & 1)], _HIGH),
        )


class CudaSparse(CudaPlaced):
    """One whose rows lie far apart: granules of memory for each, all hard around them."""

    __slots__ = ("rows",)

    block: SparseBlock

    def __init__(
        self, name: str, role: str, what: str, layout: Layout, device: int, rows: tuple[Island, ...], twin: bool
    ) -> None:
        """twin: it is filled through its twin alone."""
        Placed.__init__(self, name, role, what)
        self.device = device
        body = layout.pages * cuda_driver.granularity(device)
        parts = tuple((row.lo, row.hi - row.lo) for row in rows)
        block = POOL.take(kind_of(device, body, max(MIN_GUARD, layout.guard), HARD, HARD, twin, parts))
        assert isinstance(block, SparseBlock)
        self.block = block
        self.lo, self.hi = self.block.body, self.block.body + body
        self.start = self.block.body + layout.start
        self.end = self.start + layout.extent
        self.rows = [Island(*(self.block.body + at for at in row)) for row in rows]

    def twin(self, dtype: torch.dtype) -> torch.Tensor:
        return bytes_at(self.start + self.block.away, self.end - self.start).view(dtype)

    def reset(self, whole: bool) -> None:
        if self.block.kind.twin:  # beside it nobody can write: what was laid there is there
            last, self.block.laid = self.block.laid, self.rows
            if last == self.rows:
                return
            evenly = Evenly.of(last) if isinstance(last, list) else None
            if evenly is not None:  # all but the rows that the tensor before had
                evenly.rows(self.block.away).fill_(WORD)
                return
        away, evenly = self.block.away, Evenly.of(self.rows)
        if whole and evenly is not None:
            evenly.pages(away).fill_(WORD)
            return
        for row in (Island(*(away + at for at in row)) for row in self.rows):
            for lo, hi in ((row.lo, row.hi),) if whole else ((row.lo, row.start), (row.end, row.hi)):
                odd = lo & 1  # a byte beside a row, where an element is one
                if odd and hi > lo:
                    bytes_at(lo, 1).fill_(_HIGH)
                if hi - lo - odd > 1:
                    bytes_at(lo + odd, (hi - lo - odd) // 2 * 2).view(torch.int16).fill_(WORD)
                if (hi - lo - odd) % 2 and hi - lo > odd:
                    bytes_at(hi - 1, 1).fill_(_LOW)

    def protect(self, readonly: bool) -> None:
        for row in self.rows:
            cuda_driver.protect(row.lo, row.hi - row.lo, self.device, READ if readonly else WRITE)

    def compare(self, lo: int, hi: int, where: torch.Tensor | None = None) -> canary.Damage | None:
        if hi == lo:
            return None
        odd = lo & 1
        memory = bytes_at(lo - odd, hi - lo + odd).cpu()
        return canary.compare(memory.data_ptr() + odd, hi - lo, where)

    def differs(self) -> list[torch.Tensor]:
        evenly = Evenly.of(self.rows)
        if evenly is not None:
            return [evenly.differs(WORD)]
        found = []
        for row in self.rows:
            for lo, hi in ((row.lo, row.start), (row.end, row.hi)):
                lo, hi = lo + (lo & 1), hi - (hi & 1)
                if hi > lo:
                    found.append((bytes_at(lo, hi - lo).view(torch.int16) != WORD).any())
        return found

    def damages(self) -> Iterator[Violation]:
        yield from self.around(self.rows)
