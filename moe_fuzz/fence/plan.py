"""What follows from how a tensor is asked for. Cases ask for the same tensors again and again, so it is kept."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

from moe_fuzz.fence import sparse
from moe_fuzz.fence.layout import Layout, contiguous, place
from moe_fuzz.fence.placed import describe


class Plan(NamedTuple):
    """How a tensor lies in its memory."""

    layout: Layout
    strides: tuple[int, ...]  # in elements
    packed: bool  # every byte of the storage is an element's
    rows: tuple[sparse.Island, ...]  # of one whose rows lie far apart; of others none
    what: str  # the tensor, to a person


@lru_cache(maxsize=4096)
def plan(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, strides: tuple[int, ...] | None, offset: int, alignment: int,
    edge: str, page: int, apart: bool = True,
) -> Plan:  # fmt: skip
    """The plan of a tensor of one element or more. strides, offset: in elements; alignment, page: in bytes. apart: rows
    that lie far apart get memory each by itself. Raises UsageError."""
    packed = strides is None and not offset
    strides = contiguous(shape) if strides is None else strides
    layout = place(shape, strides, offset, dtype.itemsize, alignment, edge, page)
    rows: tuple[sparse.Island, ...] = ()
    if apart and sparse.far(shape, strides, dtype.itemsize):
        # An offset that wraps in 32 bits lies up to 2^31 elements before or behind the tensor: guard there too.
        layout = layout._replace(guard=max(layout.guard, dtype.itemsize << 31))
        rows = sparse.islands(name, layout, shape, strides, offset, dtype.itemsize, page)
    return Plan(layout, strides, packed, rows, describe(name, shape, dtype))
