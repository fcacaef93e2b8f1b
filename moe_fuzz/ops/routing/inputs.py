"""The tensors of a routing case: made by the generator, faults laid, then placed inside memory fences. Worker side."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from moe_fuzz import generator
from moe_fuzz.case import Case
from moe_fuzz.contract import Capabilities
from moe_fuzz.faults import FAULTS, Canvas
from moe_fuzz.fence import Arena

#: Of all fields of a case, what the target is given besides the tensors.
_BIAS_MAGNITUDE = 2.0**-2


@dataclass
class Inputs:
    """Arguments of one call. `plain` holds the tensors in ordinary memory, before they were fenced."""

    top_k: int
    options: dict[str, object]  # renormalize, scale, padding
    plain: dict[str, torch.Tensor] = field(default_factory=dict)  # logits [T, E], bias [E], is_padding [T] bool
    gaps: dict[str, tuple[int, int]] = field(default_factory=dict)  # tensor -> (stride gap, offset), in elements

    def replace(self, **tensors: torch.Tensor) -> Inputs:
        """The same call with other tensors."""
        return Inputs(self.top_k, self.options, {**self.plain, **tensors}, self.gaps)

    def place(self, arena: Arena, capabilities: Capabilities) -> dict[str, torch.Tensor]:
        """Lays the tensors into the arena, flush against its guards."""
        return {name: self._place(name, plain, arena, capabilities) for name, plain in self.plain.items()}

    def _place(self, name: str, plain: torch.Tensor, arena: Arena, capabilities: Capabilities) -> torch.Tensor:
        gap, offset = self.gaps.get(name, (0, 0))
        strides = (plain.shape[1] + gap, 1) if plain.dim() == 2 and gap else None
        tensor = arena.tensor(
            name,
            tuple(plain.shape),
            plain.dtype,
            role="input",
            alignment=max(capabilities.alignment, plain.element_size()),
            strides=strides,
            offset=offset,
        )
        return tensor.copy_(plain)


def materialize(case: Case, step_index: int) -> Inputs:
    """The inputs of one step of a case, a function of the case alone."""
    config, step = case.config, case.steps[step_index]
    experts = list(case.experts)
    dtype = getattr(torch, str(config["dtype"]))
    inputs = Inputs(int(config["top_k"]), {key: config[key] for key in ("renormalize", "scale", "padding")})

    rows = list(step.rows)
    logits = generator.triangular(case.seed, "logits", rows, experts, stream=step_index) * 2.0 ** int(
        config["magnitude"]
    )
    canvases = {"logits": Canvas("logits", logits.to(dtype), rows, experts, case.seed)}
    if config["bias"]:
        bias = generator.triangular(case.seed, "bias", [0], experts) * _BIAS_MAGNITUDE
        canvases["bias"] = Canvas("bias", bias, [0], experts, case.seed)
    for fault in step.faults:
        canvas = canvases[fault.tensor]
        positions = fault.rows.positions(step.rows) if fault.rows else list(range(len(canvas.rows)))
        if canvas.values.numel():
            FAULTS[fault.name].lay(canvas, positions)

    for name, canvas in canvases.items():
        inputs.plain[name] = canvas.values[0] if name == "bias" else canvas.values
        inputs.gaps[name] = (canvas.stride_gap, canvas.offset)
    if config["is_padding"]:
        flags = torch.zeros(len(rows), dtype=torch.bool)
        flags[step.padding.positions(step.rows)] = True
        inputs.plain["is_padding"] = flags
    return inputs


def benign_rows(case: Case, step_index: int, positions: list[int]) -> torch.Tensor:
    """Ordinary logits [len(positions), E] for the rows at these positions: what padding could have held instead."""
    rows = list(case.steps[step_index].rows)
    values = generator.triangular(case.seed, "logits", [rows[p] for p in positions], list(case.experts), stream=62)
    return (4 * values).to(getattr(torch, str(case.config["dtype"])))


def element_bits(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's bits as integers of the same size, so that NaN equals NaN and -0 differs from +0."""
    kinds: Mapping[int, torch.dtype] = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(kinds[tensor.element_size()])
