"""The tensors of a case of `moe_layer`: made by the generator, faults laid. Worker side.

dense: hidden states and weights for which logits, activations and results are of order 1. integer: those of the
experts' recipe of that name (ops/experts/recipes.py), under which sums are exact; the gate reads one column for each
expert, 64 times, so that many logits are equal, and weights often powers of two.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import ClassVar

import torch

from moe_fuzz import generator
from moe_fuzz.case import Case, Scalar
from moe_fuzz.faults import FAULTS, Canvas
from moe_fuzz.labels import Labels
from moe_fuzz.ops.experts import recipes
from moe_fuzz.ops.experts.fields import bias_dtypes
from moe_fuzz.ops.inputs import Inputs, Lie, Result

#: Of a config, what the target is given as plain arguments.
_OPTIONS = ("top_k", "scoring", "renormalize", "scale", "dialect", "activation", "gate_layout")
_ROW = 1 << 16  # labels of a weight's rows: expert * _ROW + row, so that an expert keeps its own when others go
_BIAS_MAGNITUDE = 2.0**-2
_STEEP = 64.0  # between two logits of an integer case, or 0: what exp leaves of a lower one is nothing beside 1


@dataclass
class LayerInputs(Inputs):
    """hidden [T, H], gate [E, H], w13 [E, 2I, H], w2 [E, H, I]; bias [E], b13, b2, is_padding [T] where there are."""

    fluid: ClassVar[tuple[str, ...]] = ("hidden", "is_padding")
    rows: list[int] = field(default_factory=list)  # the labels of the rows, for those that a check makes anew

    @property
    def top_k(self) -> int:
        return int(self.options["top_k"])

    @property
    def results(self) -> dict[str, Result]:
        hidden = self.plain["hidden"]
        slots = (hidden.shape[0], self.top_k)
        decision: dict[str, Result] = {"weights": (slots, torch.float32), "ids": (slots, torch.int32)}
        return {"y": (tuple(hidden.shape), hidden.dtype)} | decision


def materialize(case: Case, step_index: int, device: torch.device | str = "cpu") -> LayerInputs:
    """The inputs of one step of a case, a function of the case alone; the same bits on every device."""
    config, step = case.config, case.steps[step_index]
    rows, experts, columns = list(step.rows), list(case.experts), range(int(config["hidden"]))
    options = {key: config[key] for key in _OPTIONS} | {"ranks": config["dp"], "shards": config["ep"]}
    hidden = fresh_rows(case, rows, case.stream(step_index), device)
    canvases = {"hidden": Canvas("hidden", hidden, rows, columns, case.seed)}
    if config["bias"]:
        bias = generator.triangular(case.seed, "bias", [0], experts, device=device) * _BIAS_MAGNITUDE
        canvases["bias"] = Canvas("bias", bias, [0], experts, case.seed)
    weights = _weights(case.seed, tuple(sorted(case.config.items())), str(device))
    canvases["gate"] = Canvas("gate", weights["gate"], experts, columns, case.seed)  # only its layout can be a fault
    if config["is_padding"]:
        flags = torch.zeros((1, len(rows)), dtype=torch.bool, device=device)
        flags[0, step.padding.positions(step.rows)] = True
        canvases["is_padding"] = Canvas("is_padding", flags, [0], rows, case.seed)
    for fault in step.faults:
        canvas = canvases[fault.tensor]
        positions = fault.rows.positions(step.rows) if fault.rows else list(range(len(canvas.rows)))
        if fault.stream is not None:  # what that step had put there, before its own faults
            canvas.values[positions] = fresh_rows(case, [rows[p] for p in positions], fault.stream, device)
        elif canvas.values.numel():
            FAULTS[fault.name].lay(canvas, positions)

    inputs = LayerInputs(options, {"hidden": canvases["hidden"].values}, rows=rows)
    inputs.plain |= weights
    for name, canvas in canvases.items():
        if name in ("bias", "is_padding"):
            inputs.plain[name] = canvas.values[0]
        if canvas.stride_gap or canvas.transposed or canvas.offset:
            inputs.lies[name] = _lie(name, canvas)
    return inputs


def _lie(name: str, canvas: Canvas) -> Lie:
    """The stride is that of the whole step, also where a check takes fewer rows: they are rows of the same view."""
    if name in ("bias", "is_padding"):  # what stands between rows is what stands between a vector's elements
        return Lie(0, canvas.offset, 1 + canvas.stride_gap)
    if canvas.transposed:
        return Lie(0, canvas.offset, max(1, len(canvas.rows) + canvas.stride_gap))
    return Lie(canvas.stride_gap, canvas.offset)


def fresh_rows(case: Case, rows: Sequence[int], stream: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Hidden states [R, H] of these row labels before any fault, of ordinary size whatever the magnitude, if stream 62:
    what padding could have held instead."""
    if case.config["recipe"] != "dense":
        return recipes.tokens_of(_as_experts(case.seed, case.config), rows, stream, device)
    values = generator.triangular(case.seed, "hidden", rows, range(int(case.config["hidden"])), stream, device)
    magnitude = 0 if stream == 62 else int(case.config["magnitude"])
    return (values * 2.0**magnitude).to(getattr(torch, str(case.config["dtype"])))


@lru_cache(maxsize=4)
def _weights(seed: int, items: tuple[tuple[str, Scalar], ...], device: str) -> dict[str, torch.Tensor]:
    """gate, w13, w2 and the experts' biases, sized so that logits, activations and results are of order 1. The steps of
    a case, and what the reducer makes of it, share them."""
    config = dict(items)
    if config["recipe"] != "dense":
        return _whole_numbers(seed, config, device)
    experts = list(Labels.parse(str(config["experts"])))
    hidden, inter = int(config["hidden"]), int(config["intermediate"])
    dtype = getattr(torch, str(config["dtype"]))
    rows = inter if config["activation"] == "relu2" else 2 * inter

    def draw(name: str, height: int, width: int, size: float, kind: torch.dtype = dtype) -> torch.Tensor:
        labels = [expert * _ROW + row for expert in experts for row in range(height)]
        values = generator.triangular(seed, name, labels, range(width), device=device) * size
        return values.to(kind).view(len(experts), height, width)

    gate_dtype = torch.float32 if config["gate_dtype"] == "float32" else dtype
    found = {"gate": draw("gate", 1, hidden, _size(8, hidden), gate_dtype).view(len(experts), hidden),
             "w13": draw("w13", rows, hidden, _size(4, hidden)),
             "w2": draw("w2", hidden, inter, _size(4, inter))}  # fmt: skip
    for name, length, said in zip(("b13", "b2"), (rows, hidden), bias_dtypes(config["expert_bias"]), strict=True):
        if said != "none":
            kind = torch.float32 if said == "float32" else dtype
            found[name] = draw(name, length, 1, 0.5, kind).view(len(experts), length)
    return found


def _whole_numbers(seed: int, config: Mapping[str, Scalar], device: str) -> dict[str, torch.Tensor]:
    """The same of the recipe integer."""
    experts, hidden = list(Labels.parse(str(config["experts"]))), int(config["hidden"])
    kind = torch.float32 if config["gate_dtype"] == "float32" else getattr(torch, str(config["dtype"]))
    column = generator.choice(seed, "gate", experts, [0], max(1, hidden - 1), device=device)  # [E, 1]; 0 is a constant
    gate = torch.zeros((len(experts), hidden), dtype=kind, device=device)
    gate.scatter_(1, (column + (hidden > 1)).long(), _STEEP)
    return {"gate": gate, **recipes.projections(_as_experts(seed, config), experts, device)}


def _as_experts(seed: int, config: Mapping[str, Scalar]) -> Case:
    """The experts of a layer as a case of their own."""
    return Case("experts_bf16", {**config, "bias": config["expert_bias"], "weight_on_input": False}, (), seed)


def _size(at_one: float, depth: int) -> float:
    """A power of two near at_one / sqrt(depth)."""
    return 2.0 ** round(math.log2(at_one / math.sqrt(depth)))
