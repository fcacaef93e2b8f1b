"""The tensors of a routing case: made by the generator, faults laid, then placed inside memory fences. Worker side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import numpy
import torch

from moe_fuzz import generator
from moe_fuzz.case import Case, Fault
from moe_fuzz.faults import FAULTS, Canvas, groups  # noqa: F401 - they register
from moe_fuzz.labels import Labels
from moe_fuzz.lazy import cached
from moe_fuzz.ops.inputs import Inputs, Lie, Result

_BIAS_MAGNITUDE = 2.0**-2
#: Of all fields of a case, what the target is given besides the tensors.
_OPTIONS = ("top_k", "renormalize", "scale", "padding", "n_group", "topk_group", "scoring", "group_score", "n_shared")


@dataclass
class RoutingInputs(Inputs):
    """top_k, renormalize, scale, padding, of grouped_topk also what it alone has; logits [T, E], bias [E],
    is_padding [T] bool, expert_map [E]."""

    fluid: ClassVar[tuple[str, ...]] = ("logits", "is_padding")

    @cached
    def top_k(self) -> int:
        return int(self.options["top_k"])

    @cached
    def width(self) -> int:
        """Slots of a row of the outputs: the routed ones, then those of fused shared experts."""
        return self.top_k + int(self.options.get("n_shared", 0))

    @cached
    def results(self) -> dict[str, Result]:
        shape = (self.tokens, self.width)
        return {"weights": (shape, torch.float32), "ids": (shape, torch.int32)}


def materialize(case: Case, step_index: int, device: torch.device | str = "cpu") -> RoutingInputs:
    """The inputs of one step of a case, a function of the case alone; the same bits on every device."""
    config, step = case.config, case.steps[step_index]
    experts = _in_order(case.experts)
    inputs = RoutingInputs({key: config[key] for key in _OPTIONS if key in config})

    rows = _in_order(step.rows)
    faults = [(fault, _positions(fault, step.rows)) for fault in step.faults if fault.tensor == "logits"]
    logits = _before_faults(case, rows, experts, case.stream(step_index), faults, device)
    for fault, positions in faults:
        if fault.stream is not None:  # what that step had put there, before its own faults
            labels = logits.labels(positions)
            logits.values[logits.at(positions)] = _fresh(case, labels, experts, fault.stream, device)
        elif logits.values.numel():
            FAULTS[fault.name].lay(logits, positions)
    inputs.plain["logits"], inputs.lies["logits"] = logits.values, _lie(logits)
    names = tuple(name for name in ("bias", "expert_map") if config.get(name))
    if names:
        laid = tuple(fault for fault in step.faults if fault.tensor in names)
        within = step.rows if any(fault.rows for fault in laid) else Labels()
        for name, (tensor, lie) in _weights(names, case.seed, case.experts, laid, within, str(device)).items():
            inputs.plain[name], inputs.lies[name] = tensor, lie
    if config["is_padding"]:
        flags = numpy.zeros(len(rows), dtype=bool)
        flags[step.padding.positions(step.rows)] = True
        inputs.plain["is_padding"] = torch.from_numpy(flags).to(device)
        canvas = Canvas("is_padding", inputs.plain["is_padding"][None], [0], rows, case.seed)
        for fault in step.faults:
            if fault.tensor == "is_padding":
                FAULTS[fault.name].lay(canvas, [0])
                inputs.lies["is_padding"] = _lie_of_vector(canvas)
    return inputs


@lru_cache(maxsize=16)
def _weights(
    names: tuple[str, ...], seed: int, labels: Labels, faults: tuple[Fault, ...], within: Labels, device: str
) -> dict[str, tuple[torch.Tensor, Lie]]:  # fmt: skip
    """What is no different from step to step, [E] each. They are the same tensors in every step, so that one which lies
    in a fence already stays there.

    within: the rows of the step, where a fault names some.
    """
    experts = _in_order(labels)
    found = {}
    for name in names:
        if name == "bias":
            values = generator.triangular(seed, "bias", [0], experts, device=device) * _BIAS_MAGNITUDE
            # Learned biases share an offset. With one below 0, a 0 that a kernel holds for "none" wins (sglang#3705).
            values -= (generator.choice(seed, "bias/shift", [0], [0], 4, device=device) == 0).float()
        else:
            values = _physical_ids(seed, experts).to(device)
        canvas = Canvas(name, values, [0], experts, seed)
        for fault in faults:
            if fault.tensor == name and canvas.values.numel():
                FAULTS[fault.name].lay(canvas, fault.rows.positions(within) if fault.rows else [0])
        found[name] = canvas.values[0], _lie_of_vector(canvas)
    return found


def _in_order(labels: Labels) -> Sequence[int]:
    """The labels; as a range where they follow one another, as those of most cases do."""
    return range(*labels.spans[0]) if len(labels.spans) == 1 else _listed(labels)


@lru_cache(maxsize=64)
def _listed(labels: Labels) -> tuple[int, ...]:
    return tuple(labels)


def _positions(fault: Fault, rows: Labels) -> Sequence[int]:
    """Where the fault lies in a step of these rows; as a range where they follow one another, as padding does."""
    if not fault.rows:
        return range(len(rows))
    runs = fault.rows.runs(rows)
    return runs[0] if len(runs) == 1 else _as_range(fault.rows.positions(rows))


def _as_range(ascending: list[int]) -> Sequence[int]:
    """The same numbers, as a range if they are one."""
    first, last = (ascending[0], ascending[-1]) if ascending else (0, -1)
    return range(first, last + 1) if last - first == len(ascending) - 1 else ascending


def _before_faults(
    case: Case, rows: Sequence[int], experts: Sequence[int], stream: int,
    faults: Sequence[tuple[Fault, Sequence[int]]], device: torch.device | str,
) -> Canvas:  # fmt: skip
    """The logits of a step before any fault, 0 in rows that a fault writes as a whole."""
    replaced = [positions for fault, positions in faults if fault.stream is not None or FAULTS[fault.name].replaces]
    if not any(replaced):
        return Canvas("logits", _fresh(case, rows, experts, stream, device), rows, experts, case.seed)
    kept = numpy.ones(len(rows), dtype=bool)
    for positions in replaced:
        kept[slice(positions.start, positions.stop) if isinstance(positions, range) else positions] = False
    dtype = getattr(torch, str(case.config["dtype"]))
    zeros = torch.zeros(len(rows), len(experts), dtype=dtype, device=device)
    canvas = Canvas("logits", zeros, rows, experts, case.seed)
    if left := _as_range(numpy.flatnonzero(kept).tolist()):
        canvas.values[canvas.at(left)] = _fresh(case, canvas.labels(left), experts, stream, device)
    return canvas


def _lie(canvas: Canvas) -> Lie:
    """The stride is that of the whole step, also where a check takes fewer rows: they are rows of the same view."""
    column_stride = max(1, len(canvas.rows) + canvas.stride_gap) if canvas.transposed else 0
    return Lie(0 if canvas.transposed else canvas.stride_gap, canvas.offset, column_stride)


def _lie_of_vector(canvas: Canvas) -> Lie:
    """Of a canvas of one row: what stands between rows is what stands between its elements."""
    return Lie(0, canvas.offset, 1 + canvas.stride_gap if canvas.stride_gap else 0)


def _fresh(
    case: Case, rows: Sequence[int], experts: Sequence[int], stream: int, device: torch.device | str
) -> torch.Tensor:  # fmt: skip
    """Logits [R, E] of these row labels before any fault."""
    scale = 2.0 ** int(case.config["magnitude"])
    values = generator.triangular(case.seed, "logits", rows, experts, stream, device, scale)
    return values.to(getattr(torch, str(case.config["dtype"])))


def _physical_ids(seed: int, experts: Sequence[int]) -> torch.Tensor:
    """An injective map of the experts into a range wider than theirs, int32 [1, E], each a function of its label.

    Every id is past the logical ones and those of shared experts: what was not looked up cannot pass for what was.
    """
    labels = torch.tensor(experts)
    room = max(1024, 1 << max(experts).bit_length())  # more than the largest label, so that 5 * label is injective
    turn = int(generator.choice(seed, "expert_map/turn", [0], [0], 1024))
    odd = generator.choice(seed, "expert_map", [0], experts, 2)  # [1, E]
    return (2 * room + 2 * ((labels * 5 + turn) % room) + odd).to(torch.int32)


def benign_rows(
    case: Case, step_index: int, positions: list[int], device: torch.device | str = "cpu"
) -> torch.Tensor:  # fmt: skip
    """Ordinary logits [len(positions), E] for the rows at these positions: what padding could have held instead."""
    rows = _in_order(case.steps[step_index].rows)
    names = [rows[p] for p in positions]
    values = generator.triangular(case.seed, "logits", names, _in_order(case.experts), 62, device, 4.0)
    return values.to(getattr(torch, str(case.config["dtype"])))

