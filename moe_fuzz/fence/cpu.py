"""Fences on the CPU: `mmap` and `mprotect`. An access to a hard guard is a SIGSEGV of the process. Linux.

The pool is one a process and outlives the arenas. What a tensor still points to when its arena closes is set aside: it
stays mapped, valid and fenced, is checked by every later arena, and goes back to the pool when the last such tensor
has died. So a target may keep a workspace from call to call, and a tensor that it keeps by mistake can damage no other
case.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch

from moe_fuzz.errors import UsageError
from moe_fuzz.fence import ROLES, Arena, FenceOptions, canary
from moe_fuzz.fence.layout import Layout, contiguous, place
from moe_fuzz.fence.mapping import NONE, PAGE, READ, SOFT, WRITE, Pool, protect
from moe_fuzz.fence.own import own_memory
from moe_fuzz.verdict import Violation

OWN_ALIGNMENT = 16  # bytes, of memory that the target allocates itself
OWN_BYTES = 256 << 20  # most of it that one arena fences; the rest is ordinary memory
OWN_TENSORS = 4096

_POOL = Pool()
_KEPT: list[_Placed] = []  # of closed arenas, with a tensor still alive


class _Placed:
    """One tensor in its block: canaries in [lo, start) and [end, hi), and in the gaps of the storage [start, end)."""

    __slots__ = ("block", "body_lo", "end", "gaps", "hi", "lo", "name", "pages", "role", "start", "what")

    def __init__(self, name: str, role: str, what: str, layout: Layout, edge: str, options: FenceOptions) -> None:
        self.name, self.role, self.what = name, role, what
        self.block = _POOL.take(layout.pages, layout.guard)
        self.pages = layout.pages * PAGE
        self.body_lo = self.block.base + self.block.guard
        if edge == "right":
            self.body_lo += self.block.capacity - self.pages
        self.start = self.body_lo + layout.start
        self.end = self.start + layout.extent
        self.gaps: torch.Tensor | None = None
        hard_left, hard_right = options.is_hard(name, "left"), options.is_hard(name, "right")
        self.lo = self.body_lo if hard_left else self.body_lo - SOFT
        self.hi = self.body_lo + self.pages + (0 if hard_right else SOFT)
        guard = READ if options.access == "write" else NONE
        try:
            self.block.arrange(self.lo, self.hi, guard if hard_left else NONE, guard if hard_right else NONE)
        except MemoryError:
            self.block.unmap()
            raise

    def reset(self, whole: bool) -> None:
        """Lays the canaries: around the storage, or over it too."""
        if whole:
            canary.fill(self.lo, self.hi - self.lo)
        else:
            canary.fill(self.lo, self.start - self.lo)
            canary.fill(self.end, self.hi - self.end)

    def protect(self, access: int) -> None:
        protect(self.body_lo, self.pages, access)

    def damages(self) -> Iterator[Violation]:
        if damage := canary.compare(self.lo, self.start - self.lo):
            yield self._violation("left", damage, self.lo - self.start)
        if damage := canary.compare(self.end, self.hi - self.end):
            yield self._violation("right", damage, self.end - self.start)
        if self.gaps is not None and (damage := canary.compare(self.start, self.end - self.start, self.gaps)):
            yield self._violation("gap", damage, 0)

    def _violation(self, side: str, damage: canary.Damage, origin: int) -> Violation:
        first, last, size = origin + damage.first, origin + damage.last, self.end - self.start
        if side == "left":
            place = f"{_span(-last, -first)} before the first byte of {self.what}"
        elif side == "right":
            place = f"{_span(first - size + 1, last - size + 1)} past the last byte of {self.what}"
        else:
            place = f"between the elements of {self.what}, {_span(first, last)} into its storage"
        which = "own" if self.role == "own" else self.name  # own tensors are numbered by the call; a bug is not
        return Violation(
            check="canary", symptom=f"{which}:{side}", tensor=self.name, where=(first,),
            message=f"{_span(damage.size)} overwritten {place}",
            expected=damage.expected.hex(" "), got=damage.got.hex(" "),
        )  # fmt: skip


class CpuArena(Arena):
    """See Arena."""

    def __init__(self, options: FenceOptions, edge: str) -> None:
        began = time.perf_counter()
        self.options, self.edge = options, edge
        self._placed: list[_Placed] = []
        self._own_count = self._own_bytes = 0
        self._protected = self._closed = False
        _recycle()
        self.seconds = time.perf_counter() - began

    def tensor(
        self, name: str, shape: Sequence[int], dtype: torch.dtype, role: str = "input", alignment: int = 16,
        strides: Sequence[int] | None = None, offset: int = 0,
    ) -> torch.Tensor:  # fmt: skip
        began = time.perf_counter()
        if self._closed:
            raise UsageError(f"tensor {name!r} is asked of an arena that is closed")
        if role not in ROLES:
            raise UsageError(f"tensor {name!r}: role {role!r} is not one of {', '.join(ROLES)}")
        shape = tuple(shape)
        packed = strides is None and not offset
        strides = contiguous(shape) if strides is None else tuple(strides)
        if 0 in shape:
            return torch.empty_strided(shape, strides, dtype=dtype)
        layout = place(shape, strides, offset, dtype.itemsize, alignment, self.edge, PAGE)
        placed = _Placed(name, role, _describe(name, shape, dtype), layout, self.edge, self.options)
        self._placed.append(placed)
        placed.reset(whole=role == "input" or not packed)
        flat = torch.frombuffer(placed.block.lend(placed.start, layout.extent), dtype=dtype)
        if packed:
            tensor = flat.view(shape)
        else:
            tensor = flat.as_strided(shape, strides, offset)
            placed.gaps = _gaps(tensor, layout.extent)
        if role == "output":
            canary.poison(tensor)
        self.seconds += time.perf_counter() - began
        return tensor

    def protect(self) -> None:
        if not self._protected:
            self._protect_inputs(READ)
            self._protected = True

    def unprotect(self) -> None:
        if self._protected:
            self._protect_inputs(WRITE)
            self._protected = False

    def check(self) -> list[Violation]:
        began = time.perf_counter()
        found = [violation for placed in self._placed for violation in placed.damages()]
        for placed in _KEPT:
            stale = list(placed.damages())
            if stale:
                found += [_stale(violation) for violation in stale]
                placed.reset(whole=False)  # said once is enough
                placed.gaps = None
        self.seconds += time.perf_counter() - began
        return found

    def own(self) -> AbstractContextManager[object]:
        return own_memory(self._own) if self.options.own and not self._closed else nullcontext()

    def close(self) -> None:
        if self._closed:
            return
        self.unprotect()
        began = time.perf_counter()
        self._closed = True
        for placed in self._placed:
            if placed.block.referenced and any(placed.damages()):
                placed.reset(whole=False)  # done before the end: this arena's to tell, and not stale in the next
        _KEPT.extend(self._placed)
        self._placed = []
        _recycle()
        self.seconds += time.perf_counter() - began

    def _protect_inputs(self, access: int) -> None:
        began = time.perf_counter()
        for placed in self._placed:
            if placed.role == "input" and self.options.is_readonly(placed.name):
                placed.protect(access)
        self.seconds += time.perf_counter() - began

    def _own(self, like: torch.Tensor) -> torch.Tensor | None:
        """Fenced, poisoned memory with the geometry of `like`; None where it must stay ordinary memory."""
        size = like.untyped_storage().nbytes()
        if self._closed or self._own_count >= OWN_TENSORS or self._own_bytes + size > OWN_BYTES:
            self.unfenced += 1
            return None
        began = time.perf_counter()
        name = f"own{self._own_count}"
        self._own_count += 1
        self._own_bytes += size
        layout = place(like.shape, like.stride(), 0, like.element_size(), OWN_ALIGNMENT, "right", PAGE)
        placed = _Placed(name, "own", _describe(name, like.shape, like.dtype), layout, "right", self.options)
        self._placed.append(placed)
        placed.reset(whole=False)
        flat = torch.frombuffer(placed.block.lend(placed.start, layout.extent), dtype=like.dtype)
        canary.poison(flat)  # gaps too: the storage is the target's own, and views may reach all of it
        tensor = flat.as_strided(like.shape, like.stride())
        self.seconds += time.perf_counter() - began
        return tensor


def _span(first: int, last: int | None = None) -> str:
    if last is None or last == first:
        return f"{first} byte{'s' * (first != 1)}"
    return f"{first} to {last} bytes"


def _describe(name: str, shape: Sequence[int], dtype: torch.dtype) -> str:
    return f"{name} {list(shape)} {str(dtype).removeprefix('torch.')}"


def _recycle() -> None:
    """Gives blocks that no tensor points to any more back to the pool."""
    living = []
    for placed in _KEPT:
        if placed.block.referenced:
            living.append(placed)
        else:
            _POOL.give(placed.block)
    _KEPT[:] = living


def _stale(violation: Violation) -> Violation:
    return replace(violation, symptom=violation.symptom + ":stale",
                   message=violation.message + ", a tensor of an earlier case that the target has kept")


def _gaps(tensor: torch.Tensor, extent: int) -> torch.Tensor | None:
    """Which bytes of the storage no element reaches; None when all are reached."""
    size = tensor.element_size()
    gaps = torch.ones(extent // size, dtype=torch.bool)
    gaps.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).fill_(False)
    return gaps.repeat_interleave(size) if gaps.any() else None
