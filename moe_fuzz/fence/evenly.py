"""Rows far apart on a GPU that lie evenly: all of them, or all that is beside them, written and compared at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from moe_fuzz.fence.cuda_mapping import bytes_at
from moe_fuzz.fence.sparse import Island


class Evenly(NamedTuple):
    """Islands of the same size at even addresses, the same distance apart, and so their rows: all are written, or
    compared, at once. Sizes in bytes."""

    first: Island
    number: int
    pages_apart: int
    rows_apart: int

    @classmethod
    def of(cls, islands: Sequence[Island]) -> Evenly | None:
        """None where they are not like that."""
        first, second = islands[0], islands[min(1, len(islands) - 1)]
        found = cls(first, len(islands), second.lo - first.lo, second.start - first.start)
        even = not any(at & 1 for at in (*first, found.rows_apart))
        return found if even and all(found._nth(n) == island for n, island in enumerate(islands)) else None

    def _nth(self, n: int) -> Island:
        pages, rows = n * self.pages_apart, n * self.rows_apart
        first = self.first
        return Island(first.lo + pages, first.hi + pages, first.start + rows, first.end + rows)

    def pages(self, away: int = 0) -> torch.Tensor:
        """int16 [count, words of an island's pages]"""
        return _words(self.first.lo + away, self.number, self.first.hi - self.first.lo, self.pages_apart)

    def rows(self, away: int = 0) -> torch.Tensor:
        """int16 [count, words of a row]"""
        return _words(self.first.start + away, self.number, self.first.end - self.first.start, self.rows_apart)

    def differs(self, word: int) -> torch.Tensor:
        """bool, on the device: whether a word beside the rows is another."""
        found = (self.pages() != word).contiguous()
        step = found.shape[1] + (self.rows_apart - self.pages_apart) // 2
        rows = (self.number, (self.first.end - self.first.start) // 2)
        found.as_strided(rows, (step, 1), (self.first.start - self.first.lo) // 2).zero_()
        return found.any()


def _words(address: int, count: int, size: int, apart: int) -> torch.Tensor:
    """int16 [count, size / 2]: of each `apart` bytes the first `size`."""
    memory = bytes_at(address, (count - 1) * apart + size).view(torch.int16)
    return memory.as_strided((count, size // 2), (apart // 2, 1))
