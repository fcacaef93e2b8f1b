"""The steps of an exhibit (execute/exhibit.py) for every family but routing, whose scripts judge more than these.

    {"tokens": 3, "tensors": {"x": TENSOR, …}, "positional": [{"tensor": "x"}, {"value": 8}], "keywords": {…},
     "spelled": {"expert_map": "map", …}: an argument of the op -> the target's name for it,
     "options": {"block_size": 8, …}, "fluid": ["x", …], "blank": {"ids": TENSOR}, "others": {…},
     "results": {"y": {"dtype": "bfloat16", "shape": [3, 64]}},
     "out": {"y": {…}} or null, "in_place": {"residual_out": "residual"}, "generous": false}

TENSOR has also "fold": the [rows, columns] or [elements] as which it is laid into memory; null: as it is;
and "turned": its columns are packed, and its rows are not.
`blank`: what a graph is captured on where that is not zeros.
`in_place`: results whose buffer is an input's, too.
`generous`: results may be larger than said. `others`: see execute/exhibit_others.py.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from moe_fuzz.case import Case
from moe_fuzz.checks.families import FAMILIES
from moe_fuzz.errors import CaseError
from moe_fuzz.execute.exhibit_others import others_of
from moe_fuzz.execute.exhibit_tensor import tensor
from moe_fuzz.ops import get_space
from moe_fuzz.ops.inputs import Inputs, Lie
from moe_fuzz.targets.bind import Target


def general_step(case: Case, index: int, target: Target) -> dict[str, Any]:
    """One step of a case. CaseError for one whose ranks have a process each."""
    if case.processes > 1:
        raise CaseError("mode", "a script calls all ranks in one process, not a process each", "use `moe-fuzz replay`")
    inputs = FAMILIES[case.op].materialize(case, index, "cpu")
    alignment = target.info.capabilities.alignment
    results = {name: {"dtype": str(dtype).removeprefix("torch."), "shape": list(shape)}
               for name, (shape, dtype) in inputs.results.items()}  # fmt: skip
    has_out = bool(case.config.get("out"))
    sizes = {name: dtype.itemsize for name, (_, dtype) in inputs.results.items()}
    given: dict[str, dict[str, Any]] = {name: {"value": value} for name, value in inputs.options.items()}
    given |= {name: {"tensor": name} for name in inputs.plain}
    keywords = {target.keywords[name]: value for name, value in given.items() if name in target.keywords}
    if has_out and "out" in target.keywords:
        keywords[target.keywords["out"]] = {"out": True}
    return {
        "tokens": inputs.tokens,
        "tensors": {name: _placed(name, inputs, alignment) for name in inputs.plain},
        "positional": [given[name] for name in target.positional],
        "keywords": keywords,
        "spelled": dict(target.keywords),
        "options": inputs.options,
        "fluid": list(inputs.fluid),
        "blank": _blank(inputs) if case.mode in ("graph", "piecewise") else {},
        "others": others_of(case, index, target, inputs),
        "results": results,
        "out": {name: one | {"alignment": max(sizes[name], alignment)} for name, one in results.items()}
        if has_out else None,
        "in_place": inputs.in_place if has_out else {},
        "generous": get_space(case.op).family == "align",
        "healed": None,
    }  # fmt: skip


def _blank(inputs: Inputs) -> dict[str, Any]:
    made = inputs.blank().plain
    return {name: tensor(made[name]) for name in inputs.fluid if name in made and made[name].any()}


def _placed(name: str, inputs: Inputs, alignment: int) -> dict[str, Any]:
    plain, lie = inputs.plain[name], inputs.lies.get(name, Lie())
    rows = getattr(inputs, "folds", {}).get(name)
    apart = lie.gap or lie.column_stride
    as_it_is = plain.dim() in (1, 2) or apart or name in inputs.fluid
    fold = [rows, plain.numel() // rows] if rows else None if as_it_is else [plain.numel()]
    strides = list(lie.strides(fold or plain.shape))
    if name in getattr(inputs, "turned", ()):
        fold, strides = None, [plain[0].numel(), 1, plain.shape[1]]
    found = tensor(plain) | asdict(lie) | {"turned": name in getattr(inputs, "turned", ())}
    return found | {"strides": strides, "alignment": max(alignment, plain.element_size()), "fold": fold}
