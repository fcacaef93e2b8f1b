"""Tensors whose rows, or packed columns, lie so far apart that their offsets pass 2^31 elements: gigabytes of
addresses, and memory for these alone. What lies between two of them faults like any guard.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from moe_fuzz.errors import UsageError
from moe_fuzz.fence.layout import Layout

FAR = 8 << 20  # bytes between two rows; from here on nothing is mapped in between
MAX_APART = 64  # rows, or columns: each has pages of its own


class Island(NamedTuple):
    """Mapped pages [lo, hi) that hold one row, or column, [start, end); byte offsets in the body."""

    lo: int
    hi: int
    start: int
    end: int


def islands(
    name: str, layout: Layout, shape: Sequence[int], strides: Sequence[int], offset: int, itemsize: int, page: int
) -> tuple[Island, ...]:
    """The rows, or columns, of a tensor [rows, columns] that are `far` apart, each in pages of its own."""
    apart = 0 if strides[1] == 1 else 1
    if shape[apart] > MAX_APART:
        what = ("rows", "columns")[apart]
        raise UsageError(f"tensor {name!r} spans {layout.extent} bytes: {shape[apart]} {what} lie far apart, "
                         f"and at most {MAX_APART} may")  # fmt: skip
    return tuple(_islands(layout, shape[apart], shape[1 - apart], strides[apart], offset, itemsize, page))


def far(shape: Sequence[int], strides: Sequence[int], itemsize: int) -> bool:
    """Whether these are packed rows, or packed columns, with much address space in between."""
    if len(shape) != 2 or 1 not in strides:
        return False
    apart = 0 if strides[1] == 1 else 1
    return (strides[apart] - shape[1 - apart]) * itemsize >= FAR


def _islands(
    layout: Layout, count: int, length: int, stride: int, offset: int, itemsize: int, page: int
) -> Iterator[Island]:
    for nth in range(count):
        start = layout.start + (offset + nth * stride) * itemsize
        end = start + length * itemsize
        yield Island(start // page * page, -(-end // page) * page, start, end)
