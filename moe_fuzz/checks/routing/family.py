"""The routers as a family."""

from __future__ import annotations

from moe_fuzz.checks.family import Family
from moe_fuzz.checks.routing import metamorphic, parity, replay, structural  # noqa: F401 - they register
from moe_fuzz.checks.routing.binding import binding
from moe_fuzz.checks.routing.observation import Outputs, RoutingObservation
from moe_fuzz.ops.routing.inputs import materialize

FAMILY = Family(
    name="routing",
    materialize=materialize,
    outputs=Outputs,
    observe=RoutingObservation,
    binding=binding,
    ahead=metamorphic.ahead,
    inference=True,
)
