"""The tensors of an nvfp4_quantize case: rows by the generator, faults laid, global scales for them. Worker side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from moe_fuzz import generator
from moe_fuzz.case import Case
from moe_fuzz.faults import FAULTS
from moe_fuzz.faults.align import IdsCanvas
from moe_fuzz.faults.fault import Canvas
from moe_fuzz.faults.nvfp4 import BlockCanvas
from moe_fuzz.fence.sparse import MAX_APART
from moe_fuzz.labels import Labels
from moe_fuzz.ops.inputs import Inputs, Lie, Result
from moe_fuzz.reference.nvfp4 import BLOCK, row_scale

_STALE = 62  # the stream of rows that no step of the case has had
_EXPERTS = (1, 2, 3, 4, 5, 6, 8, 10, 16, 17, 40, 128)  # 4 and 16 divide some (vllm#40351)
_MANY_EXPERTS = (129, 160, 192, 255, 256, 257, 384, 512, 1025)  # four times in five in place of 40 and of 128
_IDENTITY = 32.0
_SENSELESS = {"zero": 0.0, "infinite": torch.inf, "nan": torch.nan, "subnormal": 2.0**-130, "negative": -448.0}


@dataclass
class QuantizeInputs(Inputs):
    """layout; x [M, K] float32, bfloat16 or float16, [M, 2K] with an activation; activation where there is one;
    global_scale [1] or [E] float32 or bfloat16, expert_ids [M]."""

    fluid: ClassVar[tuple[str, ...]] = ("x", "expert_ids")

    @property
    def layout(self) -> str:
        return str(self.options["layout"])

    @property
    def activation(self) -> str | None:
        return self.options.get("activation")

    @property
    def columns(self) -> int:
        """K: those that are quantized."""
        return self.plain["x"].shape[1] // (2 if self.activation else 1)

    @property
    def results(self) -> dict[str, Result]:
        rows, columns = len(self.plain["x"]), self.columns
        blocks = columns // BLOCK
        scales = (-(-rows // 128) * 128, -(-blocks // 4) * 4) if self.layout == "swizzled" else (rows, blocks)
        return {"codes": ((rows, columns // 2), torch.uint8), "scales": (scales, torch.float8_e4m3fn)}


def materialize(case: Case, step_index: int, device: torch.device | str = "cpu") -> QuantizeInputs:
    """The inputs of one step of a case, a function of the case alone; the same bits on every device."""
    config, step = case.config, case.steps[step_index]
    rows, stream = list(step.rows), case.stream(step_index)
    inputs = QuantizeInputs({"layout": str(config["layout"])})
    if config["activation"] != "none":
        inputs.options["activation"] = str(config["activation"])
    inputs.plain["x"] = _plain(case, rows, stream, device)  # first of the tensors, as the op has it
    inputs.plain["global_scale"] = _global_scale(case, device)
    ids = None
    if config["expert_ids"] != "none":
        ids = _ids(case, step_index, device)
        inputs.plain["expert_ids"] = ids
    canvas = BlockCanvas("x", inputs.plain["x"], rows, _columns(case), case.seed,
                         scales=_usable(inputs.plain["global_scale"], len(rows), ids))  # fmt: skip
    for fault in step.faults:
        if fault.name == "noncontiguous" and fault.tensor != "x":
            _spread(inputs, fault.tensor, case.seed)
        if fault.tensor != "x":
            continue
        positions = fault.rows.positions(step.rows) if fault.rows else list(range(len(rows)))
        if fault.name == "stale_rows":
            old = _STALE if fault.stream is None else fault.stream
            canvas.values[positions] = _plain(case, [rows[p] for p in positions], old, device)
        elif canvas.values.numel() and not (fault.name == "far_columns" and _width(case) > MAX_APART):
            FAULTS[fault.name].lay(canvas, positions)
    inputs.plain["x"] = _activated(case, rows, stream, canvas.values)
    column_stride = max(1, len(rows) + canvas.stride_gap) if canvas.transposed else 0
    inputs.lies["x"] = Lie(0 if canvas.transposed else canvas.stride_gap, canvas.offset, column_stride)
    return inputs


def elements(case: Case, step_index: int) -> int:
    return case.steps[step_index].tokens * _width(case)


def _width(case: Case) -> int:
    """Columns of x: with an activation it is a gate beside a factor."""
    return len(_columns(case)) * (2 if case.config["activation"] != "none" else 1)


def fresh(case: Case, rows: Sequence[int], stream: int, device: torch.device | str) -> torch.Tensor:
    """Rows [R, K], or [R, 2K], of these labels before any fault."""
    return _activated(case, rows, stream, _plain(case, rows, stream, device))


def _activated(case: Case, rows: Sequence[int], stream: int, values: torch.Tensor) -> torch.Tensor:
    """x [R, 2K], the gate first, whose activation has to do with `values`, [R, K]; these themselves without one.

    Of each row, one of three: a gate of 32, where silu is the identity in float32, so that the product is the value, as
    its faults have aimed it; any gate beside it; or it is the gate.
    """
    if case.config["activation"] == "none":
        return values
    if not rows:
        return values.repeat(1, 2)
    gates = 8 * generator.triangular(case.seed, "gate", rows, _columns(case), stream, values.device)
    kind = generator.choice(case.seed, "gate/kind", rows, [0], 3, stream, values.device)
    any_gate, one = gates.to(values.dtype), torch.full_like(values, _IDENTITY)
    gate = torch.where(kind == 0, one, torch.where(kind == 1, any_gate, values))
    up = torch.where(kind == 0, values / _IDENTITY, torch.where(kind == 1, values, any_gate))
    return torch.cat([gate, up], dim=1)


def _plain(case: Case, rows: Sequence[int], stream: int, device: torch.device | str) -> torch.Tensor:
    """What is quantized of these rows, or is one of its factors, before any fault: [R, K]."""
    dtype, size = getattr(torch, str(case.config["dtype"])), 2.0 ** int(case.config["magnitude"])
    if not rows:
        return torch.empty((0, len(_columns(case))), dtype=dtype, device=device)
    return (generator.triangular(case.seed, "x", rows, _columns(case), stream, device) * size).to(dtype)


def _columns(case: Case) -> list[int]:
    return [BLOCK * block + at for block in Labels.parse(str(case.config["blocks"])) for at in range(BLOCK)]


def _global_scale(case: Case, device: torch.device | str) -> torch.Tensor:
    """[1] or [E]. |x| is below 2^magnitude, and comes near it."""
    kind, size = str(case.config["global_scale"]), 2.0 ** -int(case.config["magnitude"])
    dtype = getattr(torch, str(case.config["scale_dtype"]))
    seed, by_expert = case.seed, case.config["expert_ids"] != "none"
    count = _experts(seed) if by_expert else 1
    word = generator.words(seed, "global_scale", [0], list(range(count)), device=device)[0]  # [E]
    odd = (0.75 + (word & 0xFFFFF).float() * 2.0**-21) * (2688 * size)  # 0.75 to 1.25 times what fits
    power = (1 << (word >> 20) % 4).float() if by_expert else torch.ones_like(odd)  # 1 to 8
    limits = torch.finfo(dtype)
    scale = {
        "power": power * (2048 * size),
        "six": power * (6 * 256 * size),
        "small": odd * 2.0**-8,
        "large": odd * 2.0**8,
        "least": torch.full_like(odd, limits.smallest_normal),
        "greatest": torch.full_like(odd, limits.max),
    }.get(kind, odd)
    if kind in _SENSELESS:
        hit = (word >> 24) % 2 == 0 if by_expert else torch.ones_like(odd, dtype=torch.bool)
        scale = scale.masked_fill(hit, _SENSELESS[kind])
    return scale.to(dtype)


def _experts(seed: int) -> int:
    """How many have a global scale."""
    count = _EXPERTS[int(generator.choice(seed, "experts", [0], [0], len(_EXPERTS)))]
    many = int(generator.choice(seed, "experts/many", [0], [0], 5 * len(_MANY_EXPERTS)))
    return _MANY_EXPERTS[many // 4] if many < 4 * len(_MANY_EXPERTS) and count >= 40 else count


def _ids(case: Case, step_index: int, device: torch.device | str) -> torch.Tensor:
    """[M]: the expert of each row."""
    step, rows = case.steps[step_index], list(case.steps[step_index].rows)
    count = len(_global_scale(case, "cpu"))
    fresh_ids = generator.choice(case.seed, "expert_ids", rows or [0], [0], count, case.stream(step_index), device)
    values = fresh_ids[: len(rows)].to(getattr(torch, str(case.config["expert_ids"])))
    canvas = IdsCanvas("expert_ids", values, rows, [0], case.seed, experts=Labels.range(count))
    for fault in step.faults:
        if fault.tensor == "expert_ids" and fault.name != "noncontiguous" and rows:
            FAULTS[fault.name].lay(canvas, fault.rows.positions(step.rows))
    return canvas.values[:, 0].contiguous()


def _spread(inputs: QuantizeInputs, name: str, seed: int) -> None:
    """The numbers of a vector stand apart, as in a column of a table."""
    canvas = Canvas(name, inputs.plain[name].view(-1, 1), [0], [0], seed)
    FAULTS["noncontiguous"].lay(canvas, [0])
    inputs.lies[name] = Lie(0, canvas.offset, 1 + canvas.stride_gap)


def _usable(global_scale: torch.Tensor, rows: int, ids: torch.Tensor | None) -> torch.Tensor:
    scale = row_scale(global_scale, rows, ids)[:, 0]
    return torch.where(scale > 0, scale, 1.0)
