"""Parity: every value within the rounding error that the declared sums and stores can make. No tolerance is tuned."""

from __future__ import annotations

from moe_fuzz.checks import check
from moe_fuzz.checks.coordinates import first
from moe_fuzz.checks.experts.explain import explain
from moe_fuzz.checks.experts.flags import shares, wrong
from moe_fuzz.checks.experts.observation import ExpertsObservation
from moe_fuzz.verdict import Violation


@check("experts", "bound", parity=True)
def bound(seen: ExpertsObservation) -> list[Violation]:
    """|y - float64 result| <= the running error through both products, the activation, the stores and the sum."""
    if not seen.flags["bound"]:
        seen.budget["bound"] = seen.flags["bound_used"]
        return []
    if seen.brief:
        return [Violation("bound", "off", "y is off")]
    where, share = first(wrong(seen)["bound"]), shares(seen)
    text = f"token {where[0]}, column {where[1]}: y is off by {float(share[where]):.3g} bounds"
    text += explain(seen, where[0])
    value, limit = float(seen.numbers.value[where]), float(seen.numbers.bound[where])
    return [Violation("bound", "off", text, "y", where, f"{value:.9g} ± {limit:.3g}", f"{float(seen.y[where]):.9g}",
                      float(share[where]), allowed=(value - limit, value + limit))]  # fmt: skip
