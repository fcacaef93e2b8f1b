"""The tensors of a routing case: made by the generator, faults laid, then placed inside memory fences. Worker side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from moe_fuzz import generator, group_faults  # noqa: F401 - they register
from moe_fuzz.case import Case
from moe_fuzz.contract import Capabilities
from moe_fuzz.faults import FAULTS, Canvas
from moe_fuzz.fence import Arena

_BIAS_MAGNITUDE = 2.0**-2
#: Of all fields of a case, what the target is given besides the tensors.
_OPTIONS = ("renormalize", "scale", "padding", "n_group", "topk_group", "scoring", "group_score", "n_shared")


@dataclass(frozen=True)
class Lie:
    """Where a tensor's elements lie; all numbers in elements."""

    gap: int = 0  # between the end of a row and the start of the next
    offset: int = 0  # before the first element
    column_stride: int = 0  # not 0: rows are packed no more than columns are, and a row's elements stand this far apart

    def strides(self, shape: Sequence[int]) -> tuple[int, ...]:
        if len(shape) != 2:
            return (1,)
        return (1, self.column_stride) if self.column_stride else (shape[1] + self.gap, 1)


@dataclass
class Inputs:
    """Arguments of one call. `plain` holds the tensors in ordinary memory, before they were fenced."""

    top_k: int
    options: dict[str, Any]  # renormalize, scale, padding; of grouped_topk also what it alone has
    plain: dict[str, torch.Tensor] = field(default_factory=dict)  # logits [T, E], bias [E], is_padding [T] bool, …
    lies: dict[str, Lie] = field(default_factory=dict)  # of the tensors that are not packed

    @property
    def width(self) -> int:
        """Slots of a row of the outputs: the routed ones, then those of fused shared experts."""
        return self.top_k + int(self.options.get("n_shared", 0))

    @property
    def device(self) -> torch.device:
        """Where `plain` is, and where the outputs are judged."""
        return self.plain["logits"].device

    def replace(self, **tensors: torch.Tensor) -> Inputs:
        """The same call with other tensors."""
        return Inputs(self.top_k, self.options, {**self.plain, **tensors}, self.lies)

    def place(self, arena: Arena, capabilities: Capabilities) -> dict[str, torch.Tensor]:
        """Lays the tensors into the arena, flush against its guards."""
        return {name: self._place(name, plain, arena, capabilities) for name, plain in self.plain.items()}

    def _place(self, name: str, plain: torch.Tensor, arena: Arena, capabilities: Capabilities) -> torch.Tensor:
        lie = self.lies.get(name, Lie())
        return arena.filled(
            name,
            plain,
            alignment=max(capabilities.alignment, plain.element_size()),
            strides=lie.strides(plain.shape) if lie.gap or lie.column_stride else None,
            offset=lie.offset,
        )


def materialize(case: Case, step_index: int, device: torch.device | str = "cpu") -> Inputs:
    """The inputs of one step of a case, a function of the case alone; the same bits on every device."""
    config, step = case.config, case.steps[step_index]
    experts = list(case.experts)
    inputs = Inputs(int(config["top_k"]), {key: config[key] for key in _OPTIONS if key in config})

    rows = list(step.rows)
    logits = _fresh(case, rows, case.stream(step_index), device)
    canvases = {"logits": Canvas("logits", logits, rows, experts, case.seed)}
    if config["bias"]:
        bias = generator.triangular(case.seed, "bias", [0], experts, device=device) * _BIAS_MAGNITUDE
        # Learned biases share an offset. With one below 0, a 0 that a kernel holds for "none" wins (sglang#3705).
        bias -= (generator.choice(case.seed, "bias/shift", [0], [0], 4, device=device) == 0).float()
        canvases["bias"] = Canvas("bias", bias, [0], experts, case.seed)
    if config.get("expert_map"):
        canvases["expert_map"] = Canvas("expert_map", _physical_ids(case).to(device), [0], experts, case.seed)
    for fault in step.faults:
        canvas = canvases[fault.tensor]
        positions = fault.rows.positions(step.rows) if fault.rows else list(range(len(canvas.rows)))
        if fault.stream is not None:  # what that step had put there, before its own faults
            canvas.values[positions] = _fresh(case, [rows[p] for p in positions], fault.stream, device)
        elif canvas.values.numel():
            FAULTS[fault.name].lay(canvas, positions)

    for name, canvas in canvases.items():
        inputs.plain[name] = canvas.values if name == "logits" else canvas.values[0]
        # The stride is that of the whole step, also where a check takes fewer rows: they are rows of the same view.
        column_stride = max(1, len(canvas.rows) + canvas.stride_gap) if canvas.transposed else 0
        inputs.lies[name] = Lie(0 if canvas.transposed else canvas.stride_gap, canvas.offset, column_stride)
    if config["is_padding"]:
        flags = torch.zeros(len(rows), dtype=torch.bool, device=device)
        flags[step.padding.positions(step.rows)] = True
        inputs.plain["is_padding"] = flags
    return inputs


def _fresh(case: Case, rows: list[int], stream: int, device: torch.device | str) -> torch.Tensor:
    """Logits [R, E] of these row labels before any fault."""
    values = generator.triangular(case.seed, "logits", rows, list(case.experts), stream, device)
    return (values * 2.0 ** int(case.config["magnitude"])).to(getattr(torch, str(case.config["dtype"])))


def _physical_ids(case: Case) -> torch.Tensor:
    """An injective map of the experts into a range wider than theirs, int32 [1, E], each a function of its label.

    Every id is past the logical ones and those of shared experts: what was not looked up cannot pass for what was.
    """
    labels = torch.tensor(list(case.experts))
    room = max(1024, 1 << int(labels.max()).bit_length())  # more than the largest label, so that 5 * label is injective
    turn = int(generator.choice(case.seed, "expert_map/turn", [0], [0], 1024))
    odd = generator.choice(case.seed, "expert_map", [0], labels.tolist(), 2)  # [1, E]
    return (2 * room + 2 * ((labels * 5 + turn) % room) + odd).to(torch.int32)


def benign_rows(
    case: Case, step_index: int, positions: list[int], device: torch.device | str = "cpu"
) -> torch.Tensor:  # fmt: skip
    """Ordinary logits [len(positions), E] for the rows at these positions: what padding could have held instead."""
    rows = list(case.steps[step_index].rows)
    names = [rows[p] for p in positions]
    values = generator.triangular(case.seed, "logits", names, list(case.experts), 62, device)
    return (4 * values).to(getattr(torch, str(case.config["dtype"])))


def element_bits(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's bits as integers of the same size, so that NaN equals NaN and -0 differs from +0."""
    kinds: Mapping[int, torch.dtype] = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(kinds[tensor.element_size()])
