"""Quantizing to NVFP4 as a family of its own."""

from __future__ import annotations

from moe_fuzz.checks.family import Family
from moe_fuzz.checks.nvfp4 import bytes, metamorphic  # noqa: F401 - they register
from moe_fuzz.checks.nvfp4.binding import binding
from moe_fuzz.checks.nvfp4.observation import Outputs, QuantizeObservation
from moe_fuzz.ops.nvfp4.inputs import elements, materialize

FAMILY = Family(
    name="nvfp4",
    materialize=materialize,
    outputs=Outputs,
    observe=QuantizeObservation,
    binding=binding,
    ahead=metamorphic.ahead,
    elements=elements,
)
