"""Faults of all-reduces: numbers that a protocol between ranks, or a sum of squares, may take for something else."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moe_fuzz.faults.fault import Canvas, Fault, register


@register
class NegativeZeros(Fault):
    """Rows of -0, the sentinel of protocols that see by the data that they have arrived (flashinfer#3304)."""

    name = "negative_zeros"

    def lay(self, canvas: Canvas, positions: Sequence[int]) -> None:
        canvas.values[positions] = -0.0


@register
class NegativeSubnormals(Fault):
    """One place in three is negative and below the normal numbers: where these are flushed, it is -0."""

    name = "negative_subnormals"

    def lay(self, canvas: Canvas, positions: Sequence[int]) -> None:
        limits = torch.finfo(canvas.values.dtype)
        table = canvas.table([-limits.smallest_normal / 2, -limits.smallest_normal / 4], torch.float64)
        pick = canvas.choose(positions, 6, self.name)
        row = canvas.values[positions]
        canvas.values[positions] = torch.where(pick < 2, table.to(row.dtype)[pick.clamp(max=1)], row)


@register
class OverflowingSquares(Fault):
    """Finite numbers of both signs, few or all of a row, whose squares pass the largest float32; of float16, the
    largest numbers that it has."""

    name = "overflowing_squares"

    def lay(self, canvas: Canvas, positions: Sequence[int]) -> None:
        size = 2.0**14 if canvas.values.dtype == torch.float16 else 2.0**70
        table = canvas.table([size, -size], canvas.values.dtype)
        share = canvas.table([2, 32])[canvas.choose_rows(positions, 2, self.name + "/share")]  # [P, 1]
        pick = canvas.choose(positions, 64, self.name)
        row = canvas.values[positions]
        canvas.values[positions] = torch.where(pick < share, table[pick % 2], row)
