"""An arena over pooled memory: what the devices have in common.

What a tensor still points to when its arena closes is set aside: it stays mapped, valid and fenced, is checked by every
later arena, and goes back to the pool when the last such tensor has died. So a target may keep a workspace from call to
call, and a tensor that it keeps by mistake can damage no other case.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import ClassVar, Generic, TypeVar

import torch

from moe_fuzz.errors import UsageError
from moe_fuzz.fence import ROLES, Arena, FenceOptions, canary, sparse
from moe_fuzz.fence.layout import Layout, contiguous
from moe_fuzz.fence.own import TorchDispatchMode, own_memory, suits
from moe_fuzz.fence.placed import Placed, find_gaps, stale
from moe_fuzz.fence.plan import plan
from moe_fuzz.verdict import Violation

OWN_ALIGNMENT = 16  # bytes, of memory that the target allocates itself

P = TypeVar("P", bound=Placed)


class PooledArena(Arena, Generic[P]):
    """See Arena."""

    device: ClassVar[str]
    page: int  # bytes that share a protection
    own_bytes: ClassVar[int]  # most memory of the target's own that one arena fences; the rest is ordinary memory
    own_tensors: ClassVar[int]

    def __init__(self, options: FenceOptions, edge: str, kept: list[P]) -> None:
        """kept: the placed tensors of closed arenas of this process that somebody still points to."""
        began = time.perf_counter()
        self.options, self.edge = options, edge
        self.weights = {}
        self._placed: list[P] = []
        self._kept = kept
        self._own_count = self._own_bytes = 0
        self._protected = self._closed = False
        self._mode: TorchDispatchMode | None = None  # of `own`
        self._switched: list[P] = []  # inputs whose protection `protect` and `unprotect` switch
        self._twins: dict[int, tuple[P, torch.dtype, int]] = {}  # read-only tensors and their offsets, by address
        self._recycle()
        self.seconds = time.perf_counter() - began

    @abstractmethod
    def _take(self, name: str, role: str, what: str, layout: Layout, edge: str, fixed: bool = False) -> P:
        """Places a tensor in a block of the pool; `fixed` if nobody but `fill` writes it. Raises MemoryError."""

    @abstractmethod
    def _give(self, placed: P) -> None:
        """Takes back the block of a tensor that nobody points to."""

    @abstractmethod
    def _take_sparse(
        self, name: str, role: str, what: str, layout: Layout, rows: tuple[sparse.Island, ...], fixed: bool = False
    ) -> P:
        """Places a tensor whose rows lie far apart: in addresses of its own, with memory for the rows alone."""

    def _damaged(self, placed: Iterable[P]) -> Iterable[P]:
        """Those that may be damaged; the rest certainly is not."""
        return placed

    def _allocator(self) -> AbstractContextManager[object]:
        """Fences what is allocated behind torch's back, too. On a CPU there is no such thing."""
        return own_memory(self._own, self.device)

    def _lay(self, placed: P, whole: bool, storage: torch.Tensor | None) -> None:
        """Lays the canaries, as Placed.reset does, and poisons the storage if it is given."""
        placed.reset(whole)
        if storage is not None:
            canary.poison(storage)

    def _settle(self) -> None:
        """Waits until the device is done with what was asked of it."""

    @property
    def _lost(self) -> bool:
        """Whether the device can no longer be used by this process."""
        return False

    def tensor(
        self, name: str, shape: Sequence[int], dtype: torch.dtype, role: str = "input", alignment: int = 16,
        strides: Sequence[int] | None = None, offset: int = 0,
    ) -> torch.Tensor:  # fmt: skip
        return self._tensor(name, shape, dtype, role, alignment, strides, offset)

    def filled(
        self, name: str, value: torch.Tensor, alignment: int = 16, strides: Sequence[int] | None = None, offset: int = 0
    ) -> torch.Tensor:  # fmt: skip
        tensor = self._tensor(name, value.shape, value.dtype, "input", alignment, strides, offset, fixed=True)
        self.fill(tensor, value)
        return tensor

    def fill(self, tensor: torch.Tensor, value: torch.Tensor) -> None:
        self._writable(tensor).copy_(value)

    def _writable(self, tensor: torch.Tensor) -> torch.Tensor:
        """Where a tensor of this arena can be written: itself, or the same elements of its twin. Its shape need not be
        the one that was asked for: weights are placed as rows, and unfolded afterwards."""
        found = self._twins.get(tensor.data_ptr())
        if found is None:
            return tensor
        placed, dtype, offset = found
        twin = placed.twin(dtype)
        return twin.as_strided(tensor.shape, tensor.stride(), twin.storage_offset() + offset)

    def _tensor(
        self, name: str, shape: Sequence[int], dtype: torch.dtype, role: str, alignment: int,
        strides: Sequence[int] | None, offset: int, fixed: bool = False,
    ) -> torch.Tensor:  # fmt: skip
        began = time.perf_counter()
        if self._closed:
            raise UsageError(f"tensor {name!r} is asked of an arena that is closed")
        if role not in ROLES:
            raise UsageError(f"tensor {name!r}: role {role!r} is not one of {', '.join(ROLES)}")
        shape, strides = tuple(shape), None if strides is None else tuple(strides)
        if 0 in shape:
            return torch.empty_strided(shape, contiguous(shape) if strides is None else strides, dtype=dtype,
                                       device=self.device)  # fmt: skip
        layout, strides, packed, rows, what = plan(name, shape, dtype, strides, offset, alignment, self.edge, self.page)
        if rows:
            placed = self._take_sparse(name, role, what, layout, rows, fixed)
        else:
            placed = self._take(name, role, what, layout, self.edge, fixed)
        self._placed.append(placed)
        placed.packed = packed
        if placed.fixed:
            self._twins[placed.start + offset * dtype.itemsize] = placed, dtype, offset
        elif role == "input" and self.options.is_readonly(name):
            self._switched.append(placed)
        if packed:
            tensor = placed.lend_packed(dtype, shape)
            self._lay(placed, role == "input", tensor if role == "output" else None)
        else:
            tensor = placed.lend(dtype).as_strided(shape, strides, offset)
            self._lay(placed, True, None)
            if not rows and not placed.fixed:  # nobody can write into the gaps of one that is
                placed.gaps = find_gaps(shape, strides, offset, dtype.itemsize, layout.extent)
            if role == "output":
                canary.poison(tensor)
        self.seconds += time.perf_counter() - began
        return tensor

    def protect(self) -> None:
        if not self._protected:
            self._protect_inputs(readonly=True)
            self._protected = True

    def unprotect(self) -> None:
        if self._protected and not self._lost:
            self._protect_inputs(readonly=False)
            self._protected = False

    def check(self) -> list[Violation]:
        began = time.perf_counter()
        found = self._tell(self._damaged([*self._placed, *self._kept]))
        self.seconds += time.perf_counter() - began
        return found

    def _tell(self, damaged: Iterable[P]) -> list[Violation]:
        """What is wrong around these, those that were kept last."""
        found = []
        ours = {id(placed) for placed in self._placed}
        for placed in damaged:
            damages = list(placed.damages())
            if id(placed) in ours:
                found += damages
            elif damages:
                found += [stale(violation) for violation in damages]
                placed.reset(whole=False)  # said once is enough
                placed.gaps = None
        return found

    def own(self) -> AbstractContextManager[object]:
        if self.options.own == "all":
            return self._allocator()
        if self.options.own != "torch" or self._closed:
            return nullcontext()
        if self._mode is None or not suits(self._mode):
            self._mode = own_memory(self._own, self.device)
        return self._mode

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._mode = None  # which refers to the arena
        if self._lost:  # the process ends anyway; its memory goes with it
            return
        self.unprotect()
        began = time.perf_counter()
        self.weights.clear()
        for placed in self._damaged(placed for placed in self._placed if placed.referenced):
            if any(placed.damages()):
                placed.reset(whole=False)  # done before the end: this arena's to tell, and not stale in the next
        self._kept.extend(self._placed)
        self._placed, self._switched = [], []
        self._twins.clear()
        self._recycle()
        self.seconds += time.perf_counter() - began

    def _protect_inputs(self, readonly: bool) -> None:
        if not self._switched:
            return
        began = time.perf_counter()
        self._settle()
        for placed in self._switched:
            placed.protect(readonly)
        self.seconds += time.perf_counter() - began

    def _own(self, like: torch.Tensor) -> torch.Tensor | None:
        """Fenced, poisoned memory with the geometry of `like`; None where it must stay ordinary memory."""
        name, shape, strides = f"own{self._own_count}", tuple(like.shape), like.stride()
        layout, *_, what = plan(name, shape, like.dtype, strides, 0, OWN_ALIGNMENT, "right", self.page, False)
        size = layout.pages * self.page
        if self._closed or self._own_count >= self.own_tensors or self._own_bytes + size > self.own_bytes:
            self.unfenced += 1
            return None
        began = time.perf_counter()
        self._own_count += 1
        self._own_bytes += size
        placed = self._take(name, "own", what, layout, "right")
        self._placed.append(placed)
        if like.is_contiguous():
            storage = tensor = placed.lend_packed(like.dtype, shape)
        else:
            storage = tensor = placed.lend(like.dtype)
        self._lay(placed, False, storage)  # gaps too: the storage is the target's own, and views may reach all of it
        if tensor.stride() != strides:  # of a dimension of one element any stride is contiguous
            tensor = storage.as_strided(shape, strides)
        self.seconds += time.perf_counter() - began
        return tensor

    def _recycle(self) -> None:
        """Gives blocks that no tensor points to any more back to the pool."""
        if not self._kept:
            return
        living = []
        for placed in self._kept:
            if placed.referenced:
                living.append(placed)
            else:
                self._give(placed)
        self._kept[:] = living
