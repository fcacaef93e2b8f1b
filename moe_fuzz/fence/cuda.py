"""Fences on CUDA: virtual memory mappings. An access to a hard guard is an illegal access: the context is lost.

The pool is one a process and outlives the arenas (see pooled.py). Memory is mapped and protected in granules of 2 MiB,
so the side of a tensor that is not flush has up to 2 MiB of slack, all of it canaries. Canaries are laid and compared
on the device, without a wait; whoever asks for the answer has waited.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch

from moe_fuzz.errors import EnvironmentProblem
from moe_fuzz.fence import FenceOptions, allocator, canary, cuda_driver
from moe_fuzz.fence.cuda_driver import READ, WRITE
from moe_fuzz.fence.cuda_mapping import HARD, READABLE, SOFT, WORD, Pool, SparseBlock, bytes_at
from moe_fuzz.fence.cuda_regions import SMALL, Move, Piece, changed, is_small, lay, move, staged, to_host
from moe_fuzz.fence.layout import Layout
from moe_fuzz.fence.placed import Placed
from moe_fuzz.fence.pooled import PooledArena
from moe_fuzz.fence.sparse import Island
from moe_fuzz.verdict import Violation

MIN_GUARD = 256 << 20  # bytes
_CANARY = int.from_bytes(canary.WORD * 4, "little")
_LOW, _HIGH = canary.WORD  # a canary's bytes at even and at odd addresses

_STAGED = 16 << 20  # bytes of an input that are copied through pinned memory

_POOL = Pool()
_KEPT: list[_Placed] = []  # of closed arenas, with a tensor still alive


class _Placed(Placed):
    """See Placed."""

    __slots__ = ("block", "device")

    def __init__(
        self, name: str, role: str, what: str, layout: Layout, device: int, options: FenceOptions, fixed: bool
    ) -> None:
        """fixed: filled through `twin` alone. With soft guards the memory beside the tensor must be writable, so there
        is none, and the protection is switched."""
        super().__init__(name, role, what)
        guard = READABLE if options.access == "write" else HARD
        left, right = (guard if options.is_hard(name, side) else SOFT for side in ("left", "right"))
        body = layout.pages * cuda_driver.granularity(device)
        self.device = device
        twin = fixed and options.is_readonly(name) and (left, right) == (HARD, HARD)
        self.block = _POOL.take(device, body, max(MIN_GUARD, layout.guard), left, right, twin)
        self.lo, self.hi = self.block.lo, self.block.hi
        self.start = self.block.body + layout.start
        self.end = self.start + layout.extent

    @property
    def referenced(self) -> bool:
        return self.block.referenced

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

    def twin(self, dtype: torch.dtype) -> torch.Tensor | None:
        start = self.start - self.lo
        return self.block.bytes[start : start + self.end - self.start].view(dtype) if self.block.kind.twin else None

    def protect(self, readonly: bool) -> None:
        cuda_driver.protect(self.block.body, self.block.kind.body, self.device, READ if readonly else WRITE)

    def compare(self, lo: int, hi: int, where: torch.Tensor | None = None) -> canary.Damage | None:
        memory = self.block.bytes[lo - self.lo - (lo & 1) : hi - self.lo].cpu()  # even, as a canary's phase wants it
        return canary.compare(memory.data_ptr() + (lo & 1), hi - lo, where)

    def pieces(self, whole: bool) -> list[Piece]:
        """The canaries: around the storage, or over it too."""
        away = self.block.bytes.data_ptr() - self.lo  # of the twin, where there is one
        spans = ((self.lo, self.hi),) if whole else ((self.lo, self.start), (self.end, self.hi))
        return [Piece(lo + away, hi - lo, _CANARY) for lo, hi in spans if hi > lo]

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


class _Sparse(_Placed):
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
        block = _POOL.take(device, body, max(MIN_GUARD, layout.guard), HARD, HARD, twin, parts)
        assert isinstance(block, SparseBlock)
        self.block = block
        self.lo, self.hi = self.block.body, self.block.body + body
        self.start = self.block.body + layout.start
        self.end = self.start + layout.extent
        self.rows = [Island(*(self.block.body + at for at in row)) for row in rows]

    def twin(self, dtype: torch.dtype) -> torch.Tensor | None:
        start = self.block.writable + self.start - self.lo
        return bytes_at(start, self.end - self.start).view(dtype) if self.block.kind.twin else None

    def reset(self, whole: bool) -> None:
        if self.block.kind.twin:  # beside it nobody can write: what was laid there is there
            if self.block.laid == self.rows:
                return
            self.block.laid = self.rows
        away = self.block.writable - self.lo
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
        found = []
        for row in self.rows:
            for lo, hi in ((row.lo, row.start), (row.end, row.hi)):
                lo, hi = lo + (lo & 1), hi - (hi & 1)
                if hi > lo:
                    found.append((bytes_at(lo, hi - lo).view(torch.int16) != WORD).any())
        return found

    def damages(self) -> Iterator[Violation]:
        yield from self.around(self.rows)


class CudaArena(PooledArena[_Placed]):
    """See Arena. On the current device."""

    device = "cuda"
    own_bytes = 2 << 30
    own_tensors = 512

    def __init__(self, options: FenceOptions, edge: str) -> None:
        if not torch.cuda.is_available():
            raise EnvironmentProblem("there is no CUDA device that torch can use", "--device cpu")
        self._index = torch.cuda.current_device()
        cuda_driver.make_current(self._index)  # which the driver's calls need
        self._clean = False  # whether the canaries have been looked at since the last call
        self._hit: set[int] = set()  # what was damaged then
        self._moves: list[Move] | None = None  # gathered, in a block of `gathering`
        self._coming = False  # whether the tensor at hand is about to be filled, as part of what is gathered
        self.page = cuda_driver.granularity(self._index)
        super().__init__(options, edge, _KEPT)

    def _take(self, name: str, role: str, what: str, layout: Layout, edge: str, fixed: bool = False) -> _Placed:
        return _Placed(name, role, what, layout, self._index, self.options, fixed)

    def _take_sparse(
        self, name: str, role: str, what: str, layout: Layout, rows: tuple[Island, ...], fixed: bool = False
    ) -> _Placed:
        return _Sparse(name, role, what, layout, self._index, rows, fixed and self.options.is_readonly(name))

    def _give(self, placed: _Placed) -> None:
        _POOL.give(placed.block)

    @contextmanager
    def gathering(self) -> Iterator[None]:
        self._moves = []
        try:
            yield
        finally:
            moves, self._moves = self._moves, None
            move(moves)

    def filled(
        self, name: str, value: torch.Tensor, alignment: int = 16, strides: Sequence[int] | None = None, offset: int = 0
    ) -> torch.Tensor:  # fmt: skip
        self._coming = self._moves is not None and strides is None and not offset and _stageable(value)
        try:
            return super().filled(name, value, alignment, strides, offset)
        finally:
            self._coming = False

    def fill(self, tensor: torch.Tensor, value: torch.Tensor) -> None:
        there = self._writable(tensor)
        if self._moves is not None and _stageable(value) and is_small(there) and there.dtype == value.dtype:
            self._moves.append(staged(value.expand(there.shape), there.data_ptr()))
            return
        if value.device.type == "cpu" and 0 < value.nbytes <= _STAGED:
            value = value.pin_memory()  # from pageable memory a copy is waited for
        there.copy_(value, non_blocking=True)

    def poison(self, tensors: Sequence[torch.Tensor]) -> None:
        for at in range(0, len(tensors), 3):
            some = tensors[at : at + 3]
            if all(is_small(tensor) for tensor in some):
                lay([Piece(one.data_ptr(), one.nbytes, canary.poison_pattern(one.dtype)) for one in some])
            else:
                super().poison(some)

    def protect(self) -> None:
        self._clean = False
        super().protect()

    def look(self) -> Callable[[], list[Violation]]:
        began = time.perf_counter()
        told = self._compare([*self._placed, *self._kept])
        self.seconds += time.perf_counter() - began

        def answer() -> list[Violation]:
            found = self._tell(told())
            self._clean = True
            return found

        return answer

    def check(self) -> list[Violation]:
        found = super().check()
        self._clean = True
        return found

    def _damaged(self, placed: Iterable[_Placed]) -> Iterable[_Placed]:
        if self._closed and self._clean:  # whatever was damaged has been told, and was not since
            return [tensor for tensor in placed if id(tensor) in self._hit]
        told = self._compare(placed)
        cuda_driver.synchronize()
        return told()

    def _compare(self, placed: Iterable[_Placed]) -> Callable[[], list[_Placed]]:
        """Enqueues the comparison; what it gives tells of it when the device has been waited for."""
        tensors = [tensor for tensor in placed if not tensor.fixed]  # beside those nobody can write
        plain = [tensor for tensor in tensors if not isinstance(tensor, _Sparse) and tensor.gaps is None]
        pieces = [(tensor, piece) for tensor in plain for piece in tensor.pieces(whole=False)]
        flags = changed([piece for _, piece in pieces])
        others = [(tensor, flag) for tensor in set(tensors) - set(plain) for flag in tensor.differs()]
        bits = to_host(torch.stack([flag for _, flag in others])) if others else torch.zeros(0, dtype=torch.bool)

        def told() -> list[_Placed]:
            hit = {id(tensor) for (tensor, _), flag in zip(pieces, flags.tolist(), strict=True) if flag}
            hit |= {id(tensor) for (tensor, _), flag in zip(others, bits.tolist(), strict=True) if flag}
            self._hit = hit
            return [tensor for tensor in tensors if id(tensor) in hit]

        return told

    def _lay(self, placed: _Placed, whole: bool, storage: torch.Tensor | None) -> None:
        if isinstance(placed, _Sparse):
            super()._lay(placed, whole, storage)
            return
        if placed.fixed:  # beside it nobody can write: what was laid there is there, and the rest is filled next
            here = (placed.start, placed.end) if placed.packed else None
            if here is not None and placed.block.laid == here:
                return
            placed.block.laid = here
        pieces = placed.pieces(whole and not self._coming)
        if storage is not None:
            size = placed.end - placed.start
            pieces.append(Piece(placed.start, size, canary.poison_pattern(storage.dtype)))
        if self._moves is not None and (self._coming or storage is not None):  # else a copy of torch's comes next
            self._moves += [Move(*piece) for piece in pieces]
        else:
            lay(pieces)

    def _allocator(self) -> AbstractContextManager[object]:
        if allocator.installed() is None:  # such as for graphs, which want torch's own
            return super()._allocator()
        return allocator.fencing(self.options, self.edge)

    def _settle(self) -> None:
        cuda_driver.synchronize()

    @property
    def _lost(self) -> bool:
        return cuda_driver.lost() is not None


def _stageable(value: torch.Tensor) -> bool:
    return value.device.type == "cpu" and 0 < value.nbytes <= SMALL
