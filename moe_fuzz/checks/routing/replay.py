"""A graph's replay against an eager call at the same token count, on the same inputs: the same bits.

Only where the target declares that it is deterministic. Else each of the two lies within its own bounds, as the other
checks have it.
"""

from __future__ import annotations

from moe_fuzz.checks import check
from moe_fuzz.checks.relations import REPEATS, differs, pick, same
from moe_fuzz.checks.routing.metamorphic import violation
from moe_fuzz.checks.routing.observation import RoutingObservation
from moe_fuzz.verdict import Violation


@check("routing", "replay")
def replay(seen: RoutingObservation) -> list[Violation]:
    """What a replay gives is what an eager call gives, on undefined rows too. Nothing to say in the eager mode."""
    if seen.eager is None or not seen.info.contract.deterministic or not seen.tokens:
        return []
    eager = seen.eager(seen.inputs)
    if same(seen.outputs, eager):
        return []
    rows = (~seen.unwritten & ~(seen.flagged & (seen.dialect == "garbage"))).nonzero().flatten()
    one, other = pick(seen.outputs, rows), pick(eager, rows)
    if not differs(one, other).any():
        return []
    if any(differs(eager, seen.eager(seen.inputs))[rows].any() for _ in range(REPEATS)):
        return []  # its eager calls do not agree among themselves: that is for `determinism` to say
    return violation("replay", "a replay of the graph gave other bits than an eager call", rows, other, one)
