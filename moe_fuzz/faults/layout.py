"""Faults on layout: where the elements of a tensor lie."""

from __future__ import annotations

from collections.abc import Sequence

from moe_fuzz import generator
from moe_fuzz.faults.fault import Canvas, Fault, register
from moe_fuzz.fence.sparse import MAX_APART

_PAGES = 1 << 21  # elements that are whole pages, whatever the dtype and the device


def _far(canvas: Canvas, fault: str, count: int) -> int:
    """The stride of `count` rows, or columns, of which the last begins past 2^31 elements. But for a few elements it is
    whole pages, so that all tensors of so many rows use the same memory, which takes milliseconds to map."""
    gap = 1 + int(generator.choice(canvas.seed, f"{canvas.name}/{fault}", [0], [0], 13))
    apart = max(-(-(1 << 31) // max(1, count - 1)), canvas.values.numel() // count)
    return -(-apart // _PAGES) * _PAGES + gap


@register
class Noncontiguous(Fault):
    """Rows stand apart, as in a slice of a wider buffer, or the elements of a vector, as in a column of one; what lies
    between them is no one's to touch.

    One time in four far apart, so that the distance of the last row from the first leaves 24 bits where rows are many.
    """

    name = "noncontiguous"

    def lay(self, canvas: Canvas, positions: Sequence[int]) -> None:
        gap = int(generator.choice(canvas.seed, f"{canvas.name}/{self.name}", [0], [0], 16))
        canvas.stride_gap = 1 + gap if gap < 12 else 256 * (gap - 11) + 1


@register
class Int32Boundary(Fault):
    """Rows so far apart that the last begins past 2^31 elements, as the rows of a large buffer do: an offset that is
    computed in 32 bits wraps (vllm#42201, vllm#39213, flashinfer#3007). Only the rows have memory."""

    name = "int32_boundary"

    def lay(self, canvas: Canvas, positions: Sequence[int]) -> None:
        if canvas.transposed:
            return
        rows = max(1, len(canvas.rows))
        canvas.stride_gap = _far(canvas, self.name, rows) - canvas.values.numel() // rows


@register
class FarColumns(Fault):
    """Columns so far apart that the last begins past 2^31 elements, in a view whose columns are packed: an offset of a
    column that is computed in 32 bits wraps. Only the columns have memory, so there are few of them, or it is not laid.
    """

    name = "far_columns"

    def lay(self, canvas: Canvas, positions: Sequence[int]) -> None:
        columns = len(canvas.columns)
        if not 2 <= columns <= MAX_APART:
            return
        canvas.transposed = True
        canvas.stride_gap = _far(canvas, self.name, columns) - len(canvas.rows)


@register
class Transposed(Fault):
    """The tensor is a transposed view, as `(W @ x.T).T` gives it: the experts of a token stand apart."""

    name = "transposed"

    def lay(self, canvas: Canvas, positions: Sequence[int]) -> None:
        canvas.transposed = True
        canvas.stride_gap = int(generator.choice(canvas.seed, f"{canvas.name}/{self.name}", [0], [0], 14))


@register
class Misaligned(Fault):
    """The first element is not where vector loads want it: a storage offset of 1 to 3 elements."""

    name = "misaligned"

    def lay(self, canvas: Canvas, positions: Sequence[int]) -> None:
        canvas.offset = 1 + int(generator.choice(canvas.seed, f"{canvas.name}/{self.name}", [0], [0], 3))
