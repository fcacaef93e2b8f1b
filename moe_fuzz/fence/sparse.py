"""Tensors whose rows lie so far apart that their offsets pass 2^31 elements: gigabytes of addresses, and memory for the
rows alone. What lies between two rows faults like any guard.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from moe_fuzz.errors import UsageError
from moe_fuzz.fence.layout import Layout

FAR = 8 << 20  # bytes between two rows; from here on nothing is mapped in between
MAX_ROWS = 64  # each has pages of its own


class Island(NamedTuple):
    """Mapped pages [lo, hi) that hold one row [start, end); byte offsets in the body."""

    lo: int
    hi: int
    start: int
    end: int


def islands(
    name: str, layout: Layout, shape: Sequence[int], strides: Sequence[int], offset: int, itemsize: int, page: int
) -> tuple[Island, ...]:
    """The rows of a tensor [rows, columns] that are `far` apart, each in pages of its own."""
    if shape[0] > MAX_ROWS:
        raise UsageError(f"tensor {name!r} spans {layout.extent} bytes: {shape[0]} rows lie far apart, "
                         f"and at most {MAX_ROWS} may")  # fmt: skip
    return tuple(_islands(layout, shape, strides[0], offset, itemsize, page))


def far(shape: Sequence[int], strides: Sequence[int], itemsize: int) -> bool:
    """Whether these are packed rows with much address space in between."""
    return len(shape) == 2 and strides[1] == 1 and (strides[0] - shape[1]) * itemsize >= FAR


def _islands(
    layout: Layout, shape: Sequence[int], stride: int, offset: int, itemsize: int, page: int
) -> Iterator[Island]:
    for row in range(shape[0]):
        start = layout.start + (offset + row * stride) * itemsize
        end = start + shape[1] * itemsize
        yield Island(start // page * page, -(-end // page) * page, start, end)
