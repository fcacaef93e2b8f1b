"""Parity without any tolerance: where every sum is exact, the bits of the result are known."""

from __future__ import annotations

from moe_fuzz.checks import check
from moe_fuzz.checks.coordinates import first
from moe_fuzz.checks.experts.explain import explain
from moe_fuzz.checks.experts.flags import wrong
from moe_fuzz.checks.experts.observation import ExpertsObservation
from moe_fuzz.verdict import Violation


@check("experts", "exact", parity=True)
def exact(seen: ExpertsObservation) -> list[Violation]:
    """Bit for bit, after every store that the contract declares, where every sum is exact: see known.py."""
    if not seen.inputs.exact or not seen.flags["exact"]:
        return []
    if seen.brief:
        return [Violation("exact", "bits", "y is not the exact result")]
    expected = seen.exact[0]
    token, column = where = first(wrong(seen)["exact"])
    text = f"token {token}, column {column}: y is not the exact result" + explain(seen, token)
    right, got = float(expected[where]), float(seen.y[where])
    return [Violation("exact", "bits", text, "y", where, f"{right:.9g}", f"{got:.9g}",
                      allowed=(right, right))]  # fmt: skip
