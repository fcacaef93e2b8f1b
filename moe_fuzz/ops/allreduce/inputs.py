"""The tensors of a case of `allreduce_rmsnorm`: made by the generator, faults laid. Worker side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from moe_fuzz import generator
from moe_fuzz.case import Case
from moe_fuzz.faults import FAULTS, Canvas, allreduce  # noqa: F401 - its faults register
from moe_fuzz.ops.allreduce.text import IN_PLACE
from moe_fuzz.ops.inputs import Inputs, Lie, Result

#: Integers up to this are exact in each dtype: what all ranks and the residual may come to.
WHOLE = {torch.bfloat16: 1 << 8, torch.float16: 1 << 11, torch.float32: 1 << 24}
BENIGN = 62  # the generator's stream of what a bad row could have held instead


@dataclass
class AllreduceInputs(Inputs):
    """x [R, T, H], of each rank; residual [T, H], the same on all; gamma [H]."""

    fluid: ClassVar[tuple[str, ...]] = ("x", "residual")
    rows: list[int] = field(default_factory=list)  # the labels of the rows, for those that a check makes anew

    @property
    def tokens(self) -> int:
        return self.plain["x"].shape[1]

    @property
    def results(self) -> dict[str, Result]:
        x = self.plain["x"]
        return {name: (tuple(x.shape), x.dtype) for name in ("normed", "residual_out")}


def elements(case: Case, step_index: int) -> int:
    """What is made and judged, in elements."""
    return case.steps[step_index].tokens * int(case.config["hidden"]) * int(case.config["ranks"])


def materialize(case: Case, step_index: int, device: torch.device | str = "cpu") -> AllreduceInputs:
    """The inputs of one step of a case, a function of the case alone; the same bits on every device."""
    config, step = case.config, case.steps[step_index]
    rows, columns = list(step.rows), range(int(config["hidden"]))
    x, residual = fresh_rows(case, rows, case.stream(step_index), device)
    dtype = x.dtype
    tensors = {"residual": residual} if config["residual"] else {}
    parts = [Canvas(f"x{rank}", part, rows, columns, case.seed) for rank, part in enumerate(x)]
    places: dict[str, list[Canvas]] = {"x": parts, "x0": parts[:1], "x1": parts[-1:]}
    places["residual"] = [Canvas(name, tensor, rows, columns, case.seed) for name, tensor in tensors.items()]
    gamma = _gamma(case, columns, dtype, device)
    places["gamma"] = [Canvas("gamma", gamma.view(1, -1), [0], columns, case.seed)]
    for fault in step.faults:
        positions = fault.rows.positions(step.rows) if fault.rows else list(range(len(rows)))
        if fault.stream is not None:  # what that step had put there, before its own faults
            old, old_residual = fresh_rows(case, [rows[p] for p in positions], fault.stream, device)
            x[:, positions] = old
            if config["residual"]:
                residual[positions] = old_residual
        else:
            for canvas in places[fault.tensor]:
                if canvas.values.numel():
                    FAULTS[fault.name].lay(canvas, positions)
    options = {"eps": config["eps"], "residual": None}
    in_place = {"residual_out": "residual"} if config["out"] == IN_PLACE else {}
    inputs = AllreduceInputs(options, {"x": x, **tensors, "gamma": gamma}, in_place=in_place, rows=rows)
    for name in inputs.plain:
        inputs.lies[name] = _lie(places[name])
    return inputs


_NEAR = 12  # elements between two rows
_MOST_APART = 1 << 22  # between the first and the last of all ranks: what a guard looks through at each call


def _lie(canvases: Sequence[Canvas]) -> Lie:
    """Of gamma, or of the matrix of each rank, which all lie alike."""
    canvas = canvases[0]
    if canvas.name == "gamma":
        return Lie(0, canvas.offset, 1 + canvas.stride_gap if canvas.stride_gap else 0)
    beside = len(canvases) * len(canvas.columns if canvas.transposed else canvas.rows)
    gap = min(canvas.stride_gap, max(_NEAR, _MOST_APART // max(1, beside)))
    column_stride = max(1, len(canvas.rows) + gap) if canvas.transposed else 0
    return Lie(0 if canvas.transposed else gap, canvas.offset, column_stride)


def fresh_rows(
    case: Case, rows: Sequence[int], stream: int, device: torch.device | str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [R, T, H] and residual [T, H] of these row labels before any fault."""
    config, world = case.config, int(case.config["ranks"])
    dtype, columns = getattr(torch, str(config["dtype"])), range(int(config["hidden"]))
    names = [*(f"x{rank}" for rank in range(world)), "residual"]
    drawn = torch.stack([generator.triangular(case.seed, name, rows, columns, stream, device) for name in names])
    if config["recipe"] == "integer":
        drawn = (drawn * (WHOLE[dtype] // (world + 1))).trunc()
    elif stream != BENIGN:
        if dtype == torch.float32:  # with bits down to the last place: else sums are exact, in whatever order
            low = [generator.triangular(case.seed, name + "/low", rows, columns, stream, device) for name in names]
            drawn = drawn + torch.stack(low) * 2.0**-10
        if config["recipe"] == "wide":
            down = [generator.choice(case.seed, name + "/down", rows, columns, 20, stream, device) for name in names]
            drawn = torch.ldexp(drawn, -torch.stack(down))
        drawn = drawn * 2.0 ** min(int(config["magnitude"]), 10 if dtype == torch.float16 else 14)
    drawn = drawn.to(dtype)
    return drawn[:world].clone(), drawn[world].clone()


def _gamma(case: Case, columns: range, dtype: torch.dtype, device: torch.device | str) -> torch.Tensor:
    """[H], between a half and three halves, some of it negative. Of a wider dtype than x it has bits that x has not."""
    kind = str(case.config["gamma_dtype"])
    values = generator.triangular(case.seed, "gamma", [0], columns, device=device)[0]
    values = torch.where(values.abs() < 0.1, -1.0 - values, 1.0 + values / 2)
    return values.to(dtype if kind == "dtype" else getattr(torch, kind))
