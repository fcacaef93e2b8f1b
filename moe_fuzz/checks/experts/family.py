"""The experts as a family."""

from __future__ import annotations

from moe_fuzz.checks.experts import (  # noqa: F401 - they register
    bound,
    determinism,
    exact,
    metamorphic,
    statistical,
    structural,
)
from moe_fuzz.checks.experts.binding import binding
from moe_fuzz.checks.experts.observation import ExpertsObservation, Outputs
from moe_fuzz.checks.family import Family
from moe_fuzz.ops.experts.inputs import elements, materialize

FAMILY = Family(
    name="experts",
    materialize=materialize,
    outputs=Outputs,
    observe=ExpertsObservation,
    binding=binding,
    ahead=metamorphic.ahead,
    elements=elements,
)
