"""`align` as a family of its own."""

from __future__ import annotations

from moe_fuzz.checks.align import invariants, metamorphic  # noqa: F401 - they register
from moe_fuzz.checks.align.binding import binding
from moe_fuzz.checks.align.observation import AlignObservation, Outputs
from moe_fuzz.checks.family import Family
from moe_fuzz.ops.align.inputs import elements, materialize

FAMILY = Family(
    name="align",
    materialize=materialize,
    outputs=Outputs,
    observe=AlignObservation,
    binding=binding,
    ahead=metamorphic.ahead,
    elements=elements,
)
