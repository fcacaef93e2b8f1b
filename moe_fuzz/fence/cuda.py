"""Fences on CUDA: virtual memory mappings. An access to a hard guard is an illegal access: the context is lost.

Where a tensor lies between its guards stands in cuda_placed.py. Canaries are laid and compared on the device, without a
wait; whoever asks for the answer has waited.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch

from moe_fuzz.errors import EnvironmentProblem
from moe_fuzz.fence import Arena, FenceOptions, allocator, canary, cuda_driver
from moe_fuzz.fence.cuda_placed import POOL, CudaPlaced, CudaSparse, kinds_of
from moe_fuzz.fence.cuda_regions import SMALL, Move, Piece, changed, is_small, lay, move, staged, to_host
from moe_fuzz.fence.layout import Layout
from moe_fuzz.fence.pooled import PooledArena
from moe_fuzz.fence.sparse import Island
from moe_fuzz.verdict import Violation

_STAGED = 16 << 20  # bytes of an input that are copied through pinned memory
_GATHERED = nullcontext()  # a block in a block of one's own, whose end is soon enough
_KEPT: list[CudaPlaced] = []  # of closed arenas, with a tensor still alive


class _Gathering:
    """A block of `gathering`. Not a generator: there are several a call."""

    __slots__ = ("_arena",)

    def __init__(self, arena: CudaArena) -> None:
        self._arena = arena

    def __enter__(self) -> None:
        self._arena._moves = []

    def __exit__(self, *error: object) -> None:
        moves, self._arena._moves = self._arena._moves, None
        move(moves or ())


class CudaArena(PooledArena[CudaPlaced]):
    """See Arena. On the current device."""

    device = "cuda"
    own_bytes = 2 << 30
    own_tensors = 512

    def __init__(self, options: FenceOptions, edge: str) -> None:
        if not (torch.cuda.is_initialized() or torch.cuda.is_available()):
            raise EnvironmentProblem("there is no CUDA device that torch can use", "--device cpu")
        self._index = torch.cuda.current_device()
        cuda_driver.make_current(self._index)  # which the driver's calls need
        self._kinds = kinds_of(options)
        self._clean = False  # whether the canaries have been looked at since the last call
        self._hit: set[int] = set()  # what was damaged then
        self._moves: list[Move] | None = None  # gathered, in a block of `gathering`
        self._coming = False  # whether the tensor at hand is about to be filled, as part of what is gathered
        self.page = cuda_driver.granularity(self._index)
        super().__init__(options, edge, _KEPT)

    def _take(self, name: str, role: str, what: str, layout: Layout, edge: str, fixed: bool = False) -> CudaPlaced:
        return CudaPlaced(name, role, what, layout, self._index, self._kinds, fixed)

    def _take_sparse(
        self, name: str, role: str, what: str, layout: Layout, rows: tuple[Island, ...], fixed: bool = False
    ) -> CudaPlaced:
        return CudaSparse(name, role, what, layout, self._index, rows, fixed and self.options.is_readonly(name))

    def _give(self, placed: CudaPlaced) -> None:
        POOL.give(placed.block)

    def gathering(self) -> AbstractContextManager[None]:
        return _GATHERED if self._moves is not None else _Gathering(self)

    def filled(
        self, name: str, value: torch.Tensor, alignment: int = 16, strides: Sequence[int] | None = None, offset: int = 0
    ) -> torch.Tensor:  # fmt: skip
        if self._moves is None or strides is not None or offset or not _stageable(value):
            return super().filled(name, value, alignment, strides, offset)
        self._coming = True
        try:
            tensor = self._tensor(name, value.shape, value.dtype, "input", alignment, None, 0, fixed=True)
        finally:
            self._coming = False
        placed = self._placed[-1]
        self._moves.append(staged(value, placed.start + placed.block.away))
        return tensor

    def fill(self, tensor: torch.Tensor, value: torch.Tensor) -> None:
        there = self._writable(tensor)
        if self._moves is not None and _stageable(value) and is_small(there) and there.dtype == value.dtype:
            self._moves.append(staged(value.expand(there.shape), there.data_ptr()))
            return
        if value.device.type == "cpu" and 0 < value.nbytes <= _STAGED:
            value = value.pin_memory()  # from pageable memory a copy is waited for
        there.copy_(value, non_blocking=True)

    def poison(self, tensors: Sequence[torch.Tensor]) -> None:
        small = [tensor for tensor in tensors if is_small(tensor)]
        pieces = [Piece(one.data_ptr(), one.nbytes, canary.poison_pattern(one.dtype)) for one in small]
        if self._moves is not None:
            self._moves += [Move(*piece) for piece in pieces]
        else:
            for at in range(0, len(pieces), 3):
                lay(pieces[at : at + 3])
        if len(small) < len(tensors):
            super().poison([tensor for tensor in tensors if not is_small(tensor)])

    def protect(self) -> None:
        self._clean = False
        super().protect()

    def look(self, beside: Sequence[Arena] = ()) -> Callable[[], list[Violation]]:
        began = time.perf_counter()
        others = [arena for arena in beside if isinstance(arena, CudaArena)]
        told = self._compare([*self._placed, *self._kept, *(one for arena in others for one in arena._placed)])
        self.seconds += time.perf_counter() - began

        def answer() -> list[Violation]:
            damaged = told()
            theirs = {id(one): arena for arena in others for one in arena._placed} if damaged else {}
            found = self._tell([one for one in damaged if id(one) not in theirs])
            self._clean = True
            for arena in others:
                found += arena._tell([one for one in damaged if theirs.get(id(one)) is arena])
                arena._hit, arena._clean = self._hit, True
            return found

        return answer

    def check(self) -> list[Violation]:
        found = super().check()
        self._clean = True
        return found

    def _damaged(self, placed: Iterable[CudaPlaced]) -> Iterable[CudaPlaced]:
        if self._closed and self._clean:  # whatever was damaged has been told, and was not since
            return [tensor for tensor in placed if id(tensor) in self._hit]
        told = self._compare(placed)
        cuda_driver.synchronize()
        return told()

    def _compare(self, placed: Iterable[CudaPlaced]) -> Callable[[], list[CudaPlaced]]:
        """Enqueues the comparison; what it gives tells of it when the device has been waited for."""
        tensors: list[CudaPlaced] = []
        owners: list[CudaPlaced] = []  # of the pieces
        pieces: list[Piece] = []
        others: list[tuple[CudaPlaced, torch.Tensor]] = []
        for tensor in placed:
            if tensor.fixed:  # beside those nobody can write
                continue
            tensors.append(tensor)
            if tensor.gaps is None and type(tensor) is not CudaSparse:
                around = tensor.pieces(whole=False)
                pieces += around
                owners += [tensor] * len(around)
            else:
                others += [(tensor, flag) for flag in tensor.differs()]
        flags = changed(pieces)
        bits = to_host(torch.stack([flag for _, flag in others])) if others else torch.zeros(0, dtype=torch.bool)

        def told() -> list[CudaPlaced]:
            hit = {id(tensor) for tensor, flag in zip(owners, flags.tolist(), strict=True) if flag}
            hit |= {id(tensor) for (tensor, _), flag in zip(others, bits.tolist(), strict=True) if flag}
            self._hit = hit
            return [tensor for tensor in tensors if id(tensor) in hit]

        return told

    def _lay(self, placed: CudaPlaced, whole: bool, storage: torch.Tensor | None) -> None:
        if isinstance(placed, CudaSparse):
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
