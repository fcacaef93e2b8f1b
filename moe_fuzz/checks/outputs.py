"""What every family asks of what a target gives back: its shapes, its dtypes, and that it was written at all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from moe_fuzz.checks.coordinates import first
from moe_fuzz.ops.inputs import Result
from moe_fuzz.verdict import Violation


def structure(outputs: Any, results: Mapping[str, Result]) -> list[Violation]:
    """Of each result (an attribute of `outputs`), its shape if it is wrong, else its dtype if that is."""
    found = []
    for name, (shape, dtype) in results.items():
        tensor = getattr(outputs, name)
        if tuple(tensor.shape) != shape:
            found.append(wrong(name, "shape", shape, tuple(tensor.shape)))
        elif tensor.dtype != dtype:
            found.append(wrong(name, "dtype", dtype, tensor.dtype))
    return found


def wrong(name: str, what: str, expected: object, got: object) -> Violation:
    """A result whose shape or dtype (`what`) is not the one expected."""
    message = f"{name} has the wrong {what}: {got}, and should be {expected}"
    return Violation("structure", f"{name}:{what}", message, name, (), str(expected), str(got))


def never_written(left: Mapping[str, torch.Tensor], elements: str = "elements") -> list[Violation]:
    """Of each result, its first element that still holds the poison it had before the call. left: bool, True there."""
    found = []
    for name, mask in left.items():
        if mask.any():
            message = f"{int(mask.sum())} of {mask.numel()} {elements} of {name} were never written"
            found.append(Violation("written", f"{name}:unwritten", message, name, first(mask), "a value", "poison"))
    return found
