"""Layers as a family."""

from __future__ import annotations

from moe_fuzz.case import Case
from moe_fuzz.checks.family import Family
from moe_fuzz.checks.layer import metamorphic, parity, structural  # noqa: F401 - they register
from moe_fuzz.checks.layer.binding import binding
from moe_fuzz.checks.layer.observation import LayerObservation, Outputs
from moe_fuzz.checks.layer.padding import statistics
from moe_fuzz.checks.layer.trail import describe
from moe_fuzz.ops.layer.inputs import materialize


def _elements(case: Case, step_index: int) -> int:
    """As in ops/experts/inputs.py, in 0.6 us: each number that a slot holds, and 512 of the products
    that it takes to make them."""
    config = case.config
    hidden, inter = int(config["hidden"]), int(config["intermediate"])
    slots = case.steps[step_index].tokens * int(config["top_k"])
    return slots * (hidden + inter) + slots * hidden * inter // 512


FAMILY = Family(
    name="layer",
    materialize=materialize,
    outputs=Outputs,
    observe=LayerObservation,
    binding=binding,
    ahead=metamorphic.ahead,
    elements=_elements,
    describe=describe,
    statistics=statistics,
)
