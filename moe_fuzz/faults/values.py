"""Faults on the values of rows, or of a bias: what padding holds, what ties, what overflows."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moe_fuzz import generator
from moe_fuzz.faults.fault import Canvas, Fault, register


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


_BLOCKS = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # experts


def _moved(values: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
    """Their sums, rounded. A NaN keeps its bits: a conversion leaves other ones in a vector than alone."""
    return torch.where(values.isnan(), values, (values.float() + by).to(values.dtype))


@register
class MaskedExperts(Fault):
    """Experts are masked by -Inf: one in three, or in every second row the first ones, the last ones, or a run of them,
    as many as a kernel may have in a block. The row stays defined while k finite ones are left.

    In every second row these lie far down, below the finite numbers that kernels take for -Inf (-1e4, -65504, -1e9).
    """

    name = "masked_experts"

    def lay(self, canvas: Canvas, positions: Sequence[int]) -> None:
        hit = torch.where(
            canvas.choose_rows(positions, 2, self.name + "/runs") == 0,
            canvas.choose(positions, 3, self.name) == 0, self._run(canvas, positions),
        )  # fmt: skip
        depths = (0, 0, 15, 15) if canvas.values.dtype == torch.float16 else (0, 0, 20, 40)
        down = canvas.table([-(2.0**depth) if depth else 0.0 for depth in depths])
        pick = canvas.choose_rows(positions, len(depths), self.name + "/down")  # [P, 1]
        row = _moved(canvas.values[canvas.at(positions)], down[pick])
        canvas.values[canvas.at(positions)] = torch.where(hit, torch.full_like(row, -torch.inf), row)

    def _run(self, canvas: Canvas, positions: Sequence[int]) -> torch.Tensor:
        """bool [P, columns]: by the experts' labels, so that those which are left after others are gone stay as they
        were."""
        label = canvas.table(canvas.columns, torch.int64)[None, :]
        block = canvas.table(_BLOCKS)[canvas.choose_rows(positions, len(_BLOCKS), self.name + "/block")]  # [P, 1]
        kind = canvas.choose_rows(positions, 3, self.name + "/kind")  # before `block`, from it on, the second one
        first, second = label < block, (label >= block) & (label < 2 * block)
        return torch.where(kind == 0, first, torch.where(kind == 1, ~first, second))


#: Of a row: a warp most often, parts of it and several, and numbers that divide those of experts.
_LANES = (32,) * 7 + (8, 16, 64) * 3 + (2, 4, 128) * 2 + (3, 5, 6, 10, 12, 20, 24, 48)
_VECTORS = (1,) * 8 + (2, 4, 8, 16, 32, 64, 128, 256, 512)  # experts that a lane has side by side


def _of_a_lane(canvas: Canvas, positions: Sequence[int], name: str) -> torch.Tensor:
    """bool [P, columns]: whether an expert is in the lane that a row is about."""
    label = canvas.table(canvas.columns, torch.int64)[None, :]
    lanes = canvas.table(_LANES)[canvas.choose_rows(positions, len(_LANES), name + "/lanes")]  # [P, 1]
    vector = canvas.table(_VECTORS)[canvas.choose_rows(positions, len(_VECTORS), name + "/vector")]
    # One of the first 1, 2, 4, … 1024 experts, by its label: so that the lane is there where experts are few, too.
    least = canvas.choose_rows(positions, 1024, name) >> canvas.choose_rows(positions, 11, name + "/few")
    return label // vector % lanes == least // vector % lanes


@register
class ClusteredTop(Fault):
    """The best experts of a row are all in one lane of a kernel: every second, every 32nd, a run of them, or a half. A
    lane that keeps its best few candidates only loses some (TensorRT-LLM#7068).

    Experts are dealt to the lanes in turn, one or a vector of them at a time. Those of the lane are positive, all
    others negative; no magnitude changes, so that no two values become equal which differed.
    """

    name = "clustered_top"

    def lay(self, canvas: Canvas, positions: Sequence[int]) -> None:
        hit = _of_a_lane(canvas, positions, self.name)
        row = canvas.values[canvas.at(positions)]
        laid = torch.where(hit, row.abs(), -row.abs())
        canvas.values[canvas.at(positions)] = torch.where(row.isfinite(), laid, row)


@register
class ShiftedRows(Fault):
    """A row's logits share an offset. Softmax does not see it; an exponential from which the row's maximum was not
    subtracted, or a maximum that started at 0, over- or underflows where it is large, up or down.

    In one row of four it is -12 to -24: the sigmoids are small, and their sum is not below 2^-40, so that an epsilon
    in a denominator is seen in the weights.
    """

    name = "shifted_rows"

    def lay(self, canvas: Canvas, positions: Sequence[int]) -> None:
        powers = (5, 8, 14) if canvas.values.dtype == torch.float16 else (5, 8, 14, 20)
        offsets = canvas.table([sign * 2.0**power for power in powers for sign in (-1, 1)])
        offset = offsets[canvas.choose_rows(positions, len(offsets), self.name)]  # [P, 1]
        depth = canvas.choose_rows(positions, 16, self.name + "/faint")
        offset = torch.where(depth < 4, -12.0 - 4.0 * depth.float(), offset)
        canvas.values[canvas.at(positions)] = _moved(canvas.values[canvas.at(positions)], offset)


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
class TiedLane(Fault):
    """The best experts of a row are all in one lane of a kernel, as in ClusteredTop, and have few values: 1 to 4, those
    of the others as many. Where a lane sorts its own, ties lose their order; but of a few experts that tie, and lie
    anywhere, hardly two are in the same list."""

    name = "tied_lane"
    replaces = True

    def lay(self, canvas: Canvas, positions: Sequence[int]) -> None:
        few = 1 + canvas.choose_rows(positions, 4, self.name + "/values")  # [P, 1]
        level = 0.25 * (1 + canvas.choose(positions, 12, self.name + "/level") % few)  # 12: of 1 to 4 alike
        hit = _of_a_lane(canvas, positions, self.name)
        canvas.values[canvas.at(positions)] = torch.where(hit, level, -level).to(canvas.values.dtype)


@register
class TiedBest(Fault):
    """Few experts of a row are its best and tie, wherever they lie: one in 2, 4, … 64, as many again below them, and
    the others tie, too. Of many that tie, the first ones win, of which no list of a kernel has two; of as few as win,
    some lie in one list, and are out of order where that loses it."""

    name = "tied_best"
    replaces = True

    def lay(self, canvas: Canvas, positions: Sequence[int]) -> None:
        share = 2048 >> canvas.choose_rows(positions, 6, self.name + "/share")  # [P, 1]
        place = canvas.choose(positions, 4096, self.name)
        low = -0.25 * (1 + place % 3)
        level = torch.where(place < share, 1.0, torch.where(place < 2 * share, 0.5, low))
        canvas.values[canvas.at(positions)] = level.to(canvas.values.dtype)


@register
class ZeroRows(Fault):
    """The rows are zero: a static buffer in which nobody has written yet."""

    name = "zero_rows"
    replaces = True

    def lay(self, canvas: Canvas, positions: Sequence[int]) -> None:
        canvas.values[canvas.at(positions)] = 0.0


@register
class SignedZeros(Fault):
    """Rows of zeros of both signs, which are equal: all of them are ties."""

    name = "signed_zeros"
    replaces = True

    def lay(self, canvas: Canvas, positions: Sequence[int]) -> None:
        zeros = canvas.table([0.0, -0.0], torch.float32).to(canvas.values.dtype)
        canvas.values[canvas.at(positions)] = zeros[canvas.choose(positions, 2, self.name)]


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
class BrokenBias(Fault):
    """NaN, +Inf or -Inf in a bias: in few places, in one of three, or everywhere. Where NaN or +Inf is, no row is
    defined, and each still has k experts; -Inf masks an expert, and leaves rows defined. It is often nearly
    everywhere: who marks with -Inf what is taken names an expert twice only where fewer than k others are left."""

    name = "broken_bias"

    def lay(self, canvas: Canvas, positions: Sequence[int]) -> None:
        one_of = canvas.table([12, 3, 1], torch.int64)[canvas.choose_rows(positions, 3, self.name + "/spread")]
        place = canvas.choose(positions, 12, self.name + "/hit")  # told by an expert's label alone
        infinite = canvas.table([torch.inf, -torch.inf], canvas.values.dtype)
        kind = canvas.choose_rows(positions, 3, self.name)
        few_left = (kind == 1) & (canvas.choose_rows(positions, 2, self.name + "/left") == 0) & (one_of > 1)
        hit = torch.where(few_left, canvas.choose(positions, 32, self.name + "/lone") != 0, place % one_of == 0)
        broken = torch.where(kind == 2, canvas.nans(positions, self.name), infinite[kind.clamp(max=1)])
        canvas.values[canvas.at(positions)] = torch.where(hit, broken, canvas.values[canvas.at(positions)])


@register
class TiedBias(Fault):
    """The bias has few values, most often one alone: as it is before anything was learned. With any other one, no two
    experts tie whose logits do, and who breaks ties wrongly beside a bias is not seen."""

    name = "tied_bias"
    replaces = True

    def lay(self, canvas: Canvas, positions: Sequence[int]) -> None:
        table = canvas.table([0.0, 0.25, -0.5, 1.0], canvas.values.dtype)
        first = canvas.choose_rows(positions, len(table), self.name)  # [P, 1]
        few = canvas.table([1, 1, 2, 3], torch.int64)[canvas.choose_rows(positions, 4, self.name + "/few")]
        level = canvas.choose(positions, 6, self.name + "/level") % few
        canvas.values[canvas.at(positions)] = table[(first + level) % len(table)]


@register
class NegativeBias(Fault):
    """Every biased score is negative: a taken or masked expert that is reset to 0 wins (sglang#3705)."""

    name = "negative_bias"

    def lay(self, canvas: Canvas, positions: Sequence[int]) -> None:
        canvas.values[canvas.at(positions)] = -2.0 - canvas.values[canvas.at(positions)].abs()
