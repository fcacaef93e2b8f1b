"""The faults: adversities that serving brings and tests do not, each a small class that lays itself into a tensor.

A fault on values writes into the rows a case names; a fault on layout changes where the elements lie. Both take all
they need from the case's own generator, so that a fault is the same after rows or experts have been taken away.
Which fault may lie where is said by the spaces (ops/*/space.py), by name.
"""

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


@register
class NanRows(Fault):
    """Whole rows of NaN, as attention leaves them in CUDA-graph and data-parallel padding (vllm#37758, vllm#39391)."""

    name = "nan_rows"
    replaces = True

    def lay(self, canvas: Canvas, positions: Sequence[int]) -> None:
        canvas.values[canvas.at(positions)] = canvas.nans(positions, self.name)


@register
class InfRows(Fault):
    """Whole rows of +Inf."""

    name = "inf_rows"
    replaces = True

    def lay(self, canvas: Canvas, positions: Sequence[int]) -> None:
        canvas.values[canvas.at(positions)] = torch.inf


@register
class NegInfRows(Fault):
    """Whole rows of -Inf: every expert masked."""

    name = "neg_inf_rows"
    replaces = True

    def lay(self, canvas: Canvas, positions: Sequence[int]) -> None:
        canvas.values[canvas.at(positions)] = -torch.inf


@register
class PartialNan(Fault):
    """One place in three of a row is NaN."""

    name = "partial_nan"

    def lay(self, canvas: Canvas, positions: Sequence[int]) -> None:
        hit = canvas.choose(positions, 3, self.name + "/where") == 0
        nans = canvas.nans(positions, self.name)
        canvas.values[canvas.at(positions)] = torch.where(hit, nans, canvas.values[canvas.at(positions)])


@register
class PartialInf(Fault):
    """Of a row, one place in four is +Inf and one in four -Inf."""

    name = "partial_inf"

    def lay(self, canvas: Canvas, positions: Sequence[int]) -> None:
        pick = canvas.choose(positions, 4, self.name)
        row = canvas.values[canvas.at(positions)]
        row = torch.where(pick == 0, torch.full_like(row, torch.inf), row)
        canvas.values[canvas.at(positions)] = torch.where(pick == 1, torch.full_like(row, -torch.inf), row)


def _moved(values: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
    """Their sums, rounded. A NaN keeps its bits: a conversion leaves other ones in a vector than alone."""
    return torch.where(values.isnan(), values, (values.float() + by).to(values.dtype))


@register
class MaskedExperts(Fault):
    """One expert in three is masked by -Inf; the row stays defined while k finite ones are left.

    In every second row these lie far down, below the finite numbers that kernels take for -Inf (-1e4, -65504, -1e9).
    """

    name = "masked_experts"

    def lay(self, canvas: Canvas, positions: Sequence[int]) -> None:
        hit = canvas.choose(positions, 3, self.name) == 0
        depths = (0, 0, 15, 15) if canvas.values.dtype == torch.float16 else (0, 0, 20, 40)
        down = canvas.table([-(2.0**depth) if depth else 0.0 for depth in depths])
        pick = canvas.choose_rows(positions, len(depths), self.name + "/down")  # [P, 1]
        row = _moved(canvas.values[canvas.at(positions)], down[pick])
        canvas.values[canvas.at(positions)] = torch.where(hit, torch.full_like(row, -torch.inf), row)


@register
class ShiftedRows(Fault):
    """A row's logits share a large offset, up or down. Softmax does not see it; an exponential from which the row's
    maximum was not subtracted, or a maximum that started at 0, over- or underflows."""

    name = "shifted_rows"

    def lay(self, canvas: Canvas, positions: Sequence[int]) -> None:
        powers = (5, 8, 14) if canvas.values.dtype == torch.float16 else (5, 8, 14, 20)
        offsets = canvas.table([sign * 2.0**power for power in powers for sign in (-1, 1)])
        pick = canvas.choose_rows(positions, len(offsets), self.name)  # [P, 1]
        canvas.values[canvas.at(positions)] = _moved(canvas.values[canvas.at(positions)], offsets[pick])


@register
class HugeRows(Fault):
    """The dtype's largest and smallest finite numbers, both signs, among ordinary values."""

    name = "huge_rows"

    def lay(self, canvas: Canvas, positions: Sequence[int]) -> None:
        limits = torch.finfo(canvas.values.dtype)
        table = canvas.table([limits.max, limits.min, limits.max / 2, limits.min / 2], canvas.values.dtype)
        pick = canvas.choose(positions, 8, self.name)
        row = canvas.values[canvas.at(positions)]
        canvas.values[canvas.at(positions)] = torch.where(pick < 4, table[pick.clamp(max=3)], row)


@register
class Ladder(Fault):
    """±0, subnormals and a geometric ladder of magnitudes of both signs: where underflow and cancellation live."""

    name = "ladder"
    replaces = True

    def lay(self, canvas: Canvas, positions: Sequence[int]) -> None:
        limits = torch.finfo(canvas.values.dtype)
        rungs = [0.0, -0.0, limits.tiny, -limits.tiny, limits.smallest_normal / 4, -limits.smallest_normal / 4]
        rungs += [sign * 2.0**power for power in range(-14, 15, 2) for sign in (1, -1)]
        table = canvas.table(rungs, torch.float64).to(canvas.values.dtype)
        canvas.values[canvas.at(positions)] = table[canvas.choose(positions, len(rungs), self.name)]


@register
class Ties(Fault):
    """Rows of few distinct values: all equal, or two values, or ±0, so that every cut goes through a tie."""

    name = "ties"
    replaces = True

    def lay(self, canvas: Canvas, positions: Sequence[int]) -> None:
        table = canvas.table([0.0, 0.0, -0.0, 1.0, 1.0, -1.0], canvas.values.dtype)
        pick = canvas.choose(positions, len(table), self.name)
        few = canvas.table([1, 3, 5, 6])[canvas.choose_rows(positions, 4, self.name + "/few")]  # [P, 1]
        canvas.values[canvas.at(positions)] = table[pick % few]


@register
class ZeroRows(Fault):
    """The rows are zero: a static buffer in which nobody has written yet."""

    name = "zero_rows"
    replaces = True

    def lay(self, canvas: Canvas, positions: Sequence[int]) -> None:
        canvas.values[canvas.at(positions)] = 0.0


@register
class StaleRows(Fault):
    """The rows hold what an earlier step left there: finite, ordinary, and somebody else's.

    Where the case says which step it was (`Fault.stream`), they hold its very values (ops/routing/inputs.py).
    """

    name = "stale_rows"
    replaces = True

    def lay(self, canvas: Canvas, positions: Sequence[int]) -> None:
        rows = canvas.labels(positions)
        old = generator.triangular(canvas.seed, canvas.name, rows, canvas.columns, 63, canvas.device, 4.0)
        canvas.values[canvas.at(positions)] = old.to(canvas.values.dtype)


@register
class ExtremeBias(Fault):
    """A bias of every sign and magnitude, 2^-14 to 2^14, zeros and -Inf among it (sglang#31017, sglang#3705)."""

    name = "extreme_bias"

    def lay(self, canvas: Canvas, positions: Sequence[int]) -> None:
        rungs = [0.0, -0.0, -torch.inf, 0.5, -0.5, 11.0, -11.0]
        rungs += [sign * 2.0**power for power in (-14, -7, -3, 3, 7, 14) for sign in (1, -1)]
        table = canvas.table(rungs, canvas.values.dtype)
        canvas.values[canvas.at(positions)] = table[canvas.choose(positions, len(rungs), self.name)]


@register
class NegativeBias(Fault):
    """Every biased score is negative: a taken or masked expert that is reset to 0 wins (sglang#3705)."""

    name = "negative_bias"

    def lay(self, canvas: Canvas, positions: Sequence[int]) -> None:
        canvas.values[canvas.at(positions)] = -2.0 - canvas.values[canvas.at(positions)].abs()


@register
class Noncontiguous(Fault):
    """Rows stand apart, as in a slice of a wider buffer; what lies between them is no one's to touch.

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
        apart = 1 << 31
        gap = 1 + int(generator.choice(canvas.seed, f"{canvas.name}/{self.name}", [0], [0], 13))
        canvas.stride_gap = apart // max(1, len(canvas.rows) - 1) + gap


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
