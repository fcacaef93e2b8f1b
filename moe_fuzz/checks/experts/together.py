"""What the observations of several steps compute of their inputs, for all of these steps at once.

The steps that replay a graph share their weights, and most have few tokens: then the time is that of the number of
operations, and all tokens together cost little more than those of one step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moe_fuzz.case import Case
from moe_fuzz.checks.experts.observation import ExpertsObservation, Outputs
from moe_fuzz.contract import TargetInfo
from moe_fuzz.ops.experts.inputs import ExpertsInputs, joined


def together(case: Case, info: TargetInfo, steps: Sequence[ExpertsInputs]) -> list[Mapping[str, Any]]:
    """For each step what its observation would have cached, by name; nothing where a device holds the inputs, or where
    no other step has the same weights."""
    found: list[Mapping[str, Any]] = [{} for _ in steps]
    alike: dict[tuple[int, ...], list[int]] = {}
    for index, inputs in enumerate(steps):
        if inputs.device.type == "cpu":
            fixed = tuple(id(tensor) for name, tensor in inputs.plain.items() if name not in inputs.fluid)
            alike.setdefault(fixed, []).append(index)
    for members in alike.values():
        if len(members) > 1:
            seen = _seen(case, info, joined([steps[index] for index in members]))
            first = 0
            for index in members:
                found[index] = seen.known_of(slice(first, first := first + steps[index].tokens))
    return found


def _seen(case: Case, info: TargetInfo, inputs: ExpertsInputs) -> ExpertsObservation:
    """An observation of inputs alone: there is no output yet, and nobody looks at the one that stands for it."""
    nothing = Outputs(inputs.plain["x"])
    return ExpertsObservation(case, 0, info, inputs, nothing, lambda other: nothing)
