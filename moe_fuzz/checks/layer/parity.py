"""Parity of both halves: the decision within the rounding of its logits, y for that decision within its own."""

from __future__ import annotations

from dataclasses import replace

import torch

from moe_fuzz.checks import check
from moe_fuzz.checks.coordinates import first, row_text
from moe_fuzz.checks.layer.explain import explain
from moe_fuzz.checks.layer.observation import LayerObservation
from moe_fuzz.checks.layer.structural import decided
from moe_fuzz.checks.routing import parity as router
from moe_fuzz.checks.routing import structural
from moe_fuzz.verdict import Violation


@check("layer", "ids")
def ids(seen: LayerObservation) -> list[Violation]:
    """The router's half: k distinct ids in [0, E) on every row that no padding dialect rules (vllm#37758).

    Where the experts' half then went wrong on another row, that is told with it: it is one defect.
    """
    found = structural.ids(seen.decision)
    if not found:
        return []
    row = found[0].where[0]
    first_half = f"the router gave {'padding ' if seen.flagged[row] else ''}row {row} the ids " \
                 f"{row_text(seen.outputs.ids[row])}: {found[0].message}"
    harm = bound(replace(seen, budget={}))
    then = f"; the experts then broke another one: {harm[0].message}" if harm else ""
    return [replace(found[0], message=first_half + then)]


@check("layer", "selection", parity=True)
def selection(seen: LayerObservation) -> list[Violation]:
    """The router's half: no unselected expert beats a selected one, for any logits within their rounding."""
    return router.selection(seen.decision)


@check("layer", "weights", parity=True)
def weights(seen: LayerObservation) -> list[Violation]:
    """The router's half: the weights of its own ids, for any logits within their rounding."""
    return [replace(one, chosen=_chosen(seen, one.where[0])) if one.where else one
            for one in router.weights(seen.decision)]  # fmt: skip


@check("layer", "bound", parity=True)
def bound(seen: LayerObservation) -> list[Violation]:
    """The experts' half: y for the router's own ids and weights, within the rounding bound, elementwise."""
    if not len(seen.rows):
        return []
    expected, limit = seen.expected.y, seen.expected.bound
    got = seen.outputs.y[seen.rows].double()
    used = (got - expected).abs() / limit
    used = torch.where(torch.isinf(limit), torch.zeros_like(used), used)  # an overflow: nothing to say
    wrong = ~(used <= 1)  # NaN is wrong
    if wrong.any():
        at = first(wrong)
        row, column = int(seen.rows[at[0]]), at[1]
        value, worst = float(got[at]), float(used[at[0]].nan_to_num(nan=torch.inf).max())
        symptom = "nan" if value != value else "infinite" if abs(value) == torch.inf else "off"
        zero = not bool(got[at[0]].any())
        what = "is NaN" if symptom == "nan" else "is infinite" if symptom == "infinite" else (
            "is all zero" if zero else f"is off by {worst:.3g} bounds")  # fmt: skip
        hint = explain(seen, at[0]) if symptom == "off" and not zero else ""
        message = f"row {row}: the router chose {decided(seen, row)}; the experts' sum for that {what}{hint}"
        return [Violation("bound", "zero" if zero else symptom, message, "y", (row, column),
                          f"{float(expected[at]):.6g} within {float(limit[at]):.3g}", f"{value:.6g}",
                          float(used[at].nan_to_num(nan=torch.inf)),
                          allowed=(float(expected[at] - limit[at]), float(expected[at] + limit[at])),
                          chosen=_chosen(seen, row))]  # fmt: skip
    if used.numel():
        seen.budget["bound"] = float(used.max())
    return []


@check("layer", "exact", parity=True)
def exact(seen: LayerObservation) -> list[Violation]:
    """The experts' half: y for the router's own ids and weights, bit for bit, where every sum is exact."""
    if seen.case.config["recipe"] == "dense" or not len(seen.rows):
        return []
    expected, sure = seen.exact
    got = seen.outputs.y[seen.rows].double()
    wrong = sure & (got != expected)
    if not wrong.any():
        return []
    at = first(wrong)
    row, column = int(seen.rows[at[0]]), at[1]
    message = f"row {row}: the router chose {decided(seen, row)}; the experts' sum for that is not the exact one"
    message += explain(seen, at[0])
    right = float(expected[at])
    return [Violation("exact", "bits", message, "y", (row, column), f"{right:.9g}", f"{float(got[at]):.9g}",
                      allowed=(right, right), chosen=_chosen(seen, row))]  # fmt: skip


def _chosen(seen: LayerObservation, row: int) -> tuple[int, ...]:
    return tuple(seen.outputs.ids[row].tolist())
