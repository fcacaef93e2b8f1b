"""Large tensors of a case, cheaply: one word a row and one a column by the generator, mixed for each element.

As in generator.py a value is a function of (seed, name, row label, column label, stream) and of nothing else, and has
the same bits on every device. A weight costs eight integer operations of 32 bits instead of the generator's hundred.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy
import torch

from moe_fuzz import generator
from moe_fuzz.generator import Device
from moe_fuzz.mirror import uploaded

_M1, _M2 = 0x7FEB352D, 0x846CA68B  # of the integer hash "lowbias32" by C. Wellons
_CHUNK = {"cpu": 1 << 16, "cuda": 1 << 26}  # elements that are mixed at once: what fits into a cache, or into memory
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}  # by bytes: bfloat16 is none of numpy's
SIZE = 1 << 16  # of a table: as many values as a draw tells apart

#: The name of a tensor, the labels of its rows, how many each label has (labels too), its columns, and the stream.
Wanted = tuple[str, Sequence[int], Sequence[int], Sequence[int], int]


class Drawn:
    """The words of the rows of some tensors, and of their columns, which are the same in every step, whatever the
    stream. They are made on the host, all at once: those of one take hardly less time."""

    def __init__(self, seed: int, *wanted: Wanted) -> None:
        parts = [part for name, rows, each, columns, stream in wanted
                 for part in ((name, rows, each, stream), (f"{name}/columns", [0], columns, 0))]  # fmt: skip
        words = iter(generator.several(seed, parts))
        self._words = {name: (rows.flatten(), columns[0])
                       for (name, *_), rows, columns in zip(wanted, words, words, strict=True)}  # fmt: skip

    def rows(self, name: str, device: Device = "cpu") -> torch.Tensor:
        """int32 [R * len(each)]"""
        return uploaded(self._words[name][0], device)

    def lines(self, name: str, device: Device = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
        """int32 [R * len(each)] and [C]"""
        row, column = self._words[name]
        return uploaded(row, device), uploaded(column, device)


def mixed(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """int32 [R, C] in [0, 2^16): the words of a row and of a column, int32 [R] and [C], mixed."""
    if rows.device.type == "cpu":  # in numpy, which has unsigned numbers, and whose operations cost less
        return torch.from_numpy(_mixed(_unsigned(rows), _unsigned(columns)).view(numpy.int32))
    word = rows[:, None] ^ columns
    word *= _M1
    word ^= (word >> 15) & 0x1FFFF
    word *= _M2 - (1 << 32)  # which wraps
    word >>= 16
    word &= 0xFFFF
    return word


def _mixed(rows: Any, columns: Any) -> Any:
    there = numpy.bitwise_xor.outer(rows, columns)
    there *= numpy.uint32(_M1)
    there ^= there >> numpy.uint32(15)
    there *= numpy.uint32(_M2)
    there >>= numpy.uint32(16)
    return there


def _unsigned(words: torch.Tensor) -> Any:
    return words.numpy().view(numpy.uint32)


def looked_up(table: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """table's dtype [R, C]: of its 2^16 values the one that each place draws."""
    step = max(1, _CHUNK[table.device.type] // max(1, len(columns)))
    if table.device.type == "cpu":  # the bits, in numpy
        values, row, column = table.view(_BITS[table.element_size()]).numpy(), _unsigned(rows), _unsigned(columns)
        found = numpy.empty((len(row), len(column)), dtype=values.dtype)
        for first in range(0, len(row), step):  # nothing is out of range; "clip" is what writes without a copy
            values.take(_mixed(row[first : first + step], column), out=found[first : first + step], mode="clip")
        return torch.from_numpy(found).view(table.dtype)
    out = table.new_empty((len(rows), len(columns)))
    for first in range(0, len(rows), step):
        part = mixed(rows[first : first + step], columns)
        torch.index_select(table, 0, part.flatten(), out=out[first : first + step].view(-1))
    return out
