"""All-reduces with a norm as a family of their own."""

from __future__ import annotations

from moe_fuzz.checks.allreduce import metamorphic, parity, structural  # noqa: F401 - they register
from moe_fuzz.checks.allreduce.binding import binding
from moe_fuzz.checks.allreduce.observation import AllreduceObservation, Outputs
from moe_fuzz.checks.family import Family
from moe_fuzz.execute.peers import staged
from moe_fuzz.ops.allreduce.inputs import elements, materialize

FAMILY = Family(
    name="allreduce",
    materialize=materialize,
    outputs=Outputs,
    observe=AllreduceObservation,
    binding=binding,
    ahead=metamorphic.ahead,
    elements=elements,
    staged=staged,
)
