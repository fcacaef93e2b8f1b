"""Where a tensor lies between its guards: arithmetic only, the same for every device."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from moe_fuzz.errors import UsageError

MIN_GUARD = 1 << 20  # bytes


class Layout(NamedTuple):
    """A tensor's storage within its body: whole pages that begin at offset 0 and end at `pages * page`."""

    pages: int
    start: int  # byte offset of the storage in the body
    extent: int  # bytes of storage: up to and with the last reachable element
    guard: int  # bytes that each guard must have at least


def place(
    shape: Sequence[int], strides: Sequence[int], offset: int, itemsize: int, alignment: int, edge: str, page: int
) -> Layout:
    """Lays out a tensor of one element or more; `alignment` and `page` in bytes, `strides` and `offset` in elements."""
    if not 1 <= alignment <= page or alignment & (alignment - 1):
        raise UsageError(f"alignment must be a power of two from 1 to {page}, not {alignment}")
    if len(strides) != len(shape):
        raise UsageError(f"{len(strides)} strides do not fit the {len(shape)} dimensions of {tuple(shape)}")
    if offset < 0 or min(strides, default=0) < 0 or min(shape, default=1) < 1:
        raise UsageError(f"shape {tuple(shape)}, strides {tuple(strides)} and offset {offset} must not be negative")
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    extent = (last + 1) * itemsize
    step = max(alignment, itemsize)
    pages = -(-extent // page)
    start = 0 if edge == "left" else (pages * page - extent) // step * step
    reach = 2 * max(strides, default=0) * itemsize
    return Layout(pages, start, extent, max(MIN_GUARD, reach))


@lru_cache(maxsize=4096)
def contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides, in elements, of a packed row-major tensor."""
    strides = [1] * len(shape)
    for i in range(len(shape) - 2, -1, -1):
        strides[i] = strides[i + 1] * shape[i + 1]
    return tuple(strides)
