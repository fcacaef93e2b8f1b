"""Where and what, for a person: coordinates of a mask, a row as text."""

from __future__ import annotations

import torch


def first(mask: torch.Tensor) -> tuple[int, ...]:
    """The coordinate of the first True."""
    return tuple(int(i) for i in mask.nonzero()[0])


def row_text(row: torch.Tensor, limit: int = 8) -> str:
    """A row for a person: `[0.25, 0.125, …]`."""
    items = [f"{float(v):.6g}" if row.is_floating_point() else str(int(v)) for v in row[:limit]]
    return "[" + ", ".join(items) + (", …]" if row.numel() > limit else "]")
