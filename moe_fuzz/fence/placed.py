"""A tensor in fenced memory, and what is said of it when its surroundings were written to: alike on every device."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import torch

from moe_fuzz.fence import canary
from moe_fuzz.fence.sparse import Island
from moe_fuzz.verdict import Violation


class Placed(ABC):
    """One tensor in its block: canaries in [lo, start) and [end, hi), and in the gaps of the storage [start, end)."""

    __slots__ = ("end", "gaps", "hi", "lo", "name", "packed", "role", "start", "what")

    def __init__(self, name: str, role: str, what: str) -> None:
        self.name, self.role, self.what = name, role, what
        self.lo = self.start = self.end = self.hi = 0  # addresses
        self.packed = False  # every byte of the storage is an element's
        self.gaps: torch.Tensor | None = None  # bool [end - start] on the CPU: bytes that no element reaches

    @property
    @abstractmethod
    def referenced(self) -> bool:
        """Whether a tensor still points into the block."""

    @abstractmethod
    def lend(self, dtype: torch.dtype) -> torch.Tensor:
        """The storage as a flat tensor, which keeps the block `referenced` while it lives."""

    def lend_packed(self, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        """The storage as a packed tensor of this shape, which fills it. See `lend`."""
        return self.lend(dtype).view(shape)

    @property
    def fixed(self) -> bool:
        """Whether it is read-only all the time, and filled through its twin."""
        return False

    def twin(self, dtype: torch.dtype) -> torch.Tensor:
        """The same storage, flat, where it can be written. Only of one that is `fixed`."""
        raise NotImplementedError

    @abstractmethod
    def reset(self, whole: bool) -> None:
        """Lays the canaries: around the storage, or over it too."""

    @abstractmethod
    def protect(self, readonly: bool) -> None:
        """Makes the tensor's pages read-only, or writable again."""

    @abstractmethod
    def compare(self, lo: int, hi: int, where: torch.Tensor | None = None) -> canary.Damage | None:
        """What changed in the canaries of [lo, hi); `where`, a bool mask [hi - lo], leaves bytes out."""

    def damages(self) -> Iterator[Violation]:
        if damage := self.compare(self.lo, self.start):
            yield self._violation("left", damage, self.lo - self.start)
        if damage := self.compare(self.end, self.hi):
            yield self._violation("right", damage, self.end - self.start)
        if self.gaps is not None and (damage := self.compare(self.start, self.end, self.gaps)):
            yield self._violation("gap", damage, 0)

    def around(self, rows: Iterable[Island]) -> Iterator[Violation]:
        """What changed beside rows that lie far apart; their numbers are addresses."""
        for row in rows:
            for lo, hi in ((row.lo, row.start), (row.end, row.hi)):
                if damage := self.compare(lo, hi):
                    side = "left" if lo < self.start else "right" if hi > self.end else "gap"
                    origin = self.end - self.start if side == "right" else lo - self.start
                    yield self._violation(side, damage, origin)

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


def describe(name: str, shape: Sequence[int], dtype: torch.dtype) -> str:
    return f"{name} {list(shape)} {str(dtype).removeprefix('torch.')}"


def stale(violation: Violation) -> Violation:
    return replace(violation, symptom=violation.symptom + ":stale",
                   message=violation.message + ", a tensor of an earlier case that the target has kept")


def find_gaps(
    shape: Sequence[int], strides: Sequence[int], offset: int, itemsize: int, extent: int
) -> torch.Tensor | None:
    """Which bytes of a storage of `extent` bytes no element reaches; None when all are reached."""
    gaps = torch.ones(extent // itemsize, dtype=torch.bool)
    gaps.as_strided(shape, strides, offset).fill_(False)
    return gaps.repeat_interleave(itemsize) if gaps.any() else None


def _span(first: int, last: int | None = None) -> str:
    if last is None or last == first:
        return f"{first} byte{'s' * (first != 1)}"
    return f"{first} to {last} bytes"
