"""What a fault is: a class with a name and `lay`, which is given a canvas."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from moe_fuzz import generator
from moe_fuzz.mirror import uploaded

_BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
#: quiet NaNs of both signs, the canonical one and one with a payload, as bits of each dtype
_NANS = {
    torch.float32: (0x7FC00000, 0xFFC00000, 0x7FC01234, 0xFFFFFFFF),
    torch.bfloat16: (0x7FC0, 0xFFC0, 0x7FC5, 0xFFFF),
    torch.float16: (0x7E00, 0xFE00, 0x7E05, 0xFFFF),
}


@dataclass
class Canvas:
    """A tensor while its faults are laid: plain memory, not yet fenced."""

    name: str
    values: torch.Tensor  # [rows, columns], in the dtype the target will see
    rows: Sequence[int]  # label of each row
    columns: Sequence[int]  # label of each column
    seed: int
    stride_gap: int = 0  # elements between the end of a row and the start of the next; of a column, where transposed
    transposed: bool = False  # columns are packed, not rows
    offset: int = 0  # elements between the aligned start of the memory and the first element

    def at(self, positions: Sequence[int]) -> slice | torch.Tensor:
        """The rows at these positions as an index into the values. Those of a range are neither looked up nor copied.
        """
        if isinstance(positions, range):
            return slice(positions.start, positions.stop)
        return uploaded(torch.tensor(positions, dtype=torch.int64), self.device)

    def labels(self, positions: Sequence[int]) -> Sequence[int]:
        """Of the rows at these positions."""
        if isinstance(positions, range):
            return self.rows[positions.start : positions.stop]
        return [self.rows[p] for p in positions]

    def choose(self, positions: Sequence[int], count: int, fault: str) -> torch.Tensor:
        """int64 [len(positions), columns] in [0, count): a fault's own choice at each place."""
        rows = self.labels(positions)
        return generator.choice(self.seed, f"{self.name}/{fault}", rows, self.columns, count, device=self.device)

    def choose_rows(self, positions: Sequence[int], count: int, fault: str) -> torch.Tensor:
        """int64 [len(positions), 1] in [0, count): a fault's own choice for each row."""
        rows = self.labels(positions)
        return generator.choice(self.seed, f"{self.name}/{fault}", rows, [0], count, device=self.device)

    def table(self, values: Sequence[float], dtype: torch.dtype | None = None) -> torch.Tensor:
        """The values as a tensor where the canvas is."""
        return uploaded(torch.tensor(values, dtype=dtype), self.device)

    @property
    def device(self) -> torch.device:
        return self.values.device

    def nans(self, positions: Sequence[int], fault: str) -> torch.Tensor:
        """NaN [len(positions), columns]: of one bit pattern a row, as a computation leaves them, or of several.

        A row of one pattern is the harder one: among NaNs of both signs, some are always on the side that wins.
        """
        dtype = self.values.dtype
        bits = self.table(_NANS[dtype], torch.int64).to(_BITS[dtype])  # wraps to the signed pattern
        mode = self.choose_rows(positions, 2 * len(bits), fault + "/pattern")  # [P, 1]
        mixed = self.choose(positions, len(bits), fault)
        return bits[torch.where(mode < len(bits), mode, mixed)].view(dtype)


class Fault:
    """A kind of fault. `lay` changes the canvas at the given row positions (all rows, where the case names none), each
    of which is named once; a range of them, where they follow one another, has the least work."""

    name: ClassVar[str]
    #: it writes every element of its rows, whatever was there: that need not be made
    replaces: ClassVar[bool] = False

    def lay(self, canvas: Canvas, positions: Sequence[int]) -> None:
        raise NotImplementedError


FAULTS: dict[str, Fault] = {}


def register(kind: type[Fault]) -> type[Fault]:
    FAULTS[kind.name] = kind()
    return kind
