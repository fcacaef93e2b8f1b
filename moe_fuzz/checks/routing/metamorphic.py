"""Relations between two calls, bit for bit: padding changes nothing, a row stands alone, the same gives the same."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moe_fuzz.checks import check
from moe_fuzz.checks.coordinates import first
from moe_fuzz.checks.relations import differs, pick, same, steady
from moe_fuzz.checks.routing.observation import Outputs, RoutingObservation
from moe_fuzz.ops.inputs import Inputs, element_bits
from moe_fuzz.verdict import Violation


def violation(check_name: str, message: str, rows: torch.Tensor, one: Outputs, other: Outputs) -> list[Violation]:
    """`one` and `other` hold the same rows; `rows` their positions in the case."""
    at = first(differs(one, other))[0]
    slot = int(
        (element_bits(one.weights[at : at + 1]) != element_bits(other.weights[at : at + 1])).any(0).int().argmax()
    )
    symptom = "ids" if not torch.equal(one.ids[at], other.ids[at]) else "weights"
    row = int(rows[at])

    def shown(outputs: Outputs) -> str:
        return f"expert {int(outputs.ids[at, slot])} weight {float(outputs.weights[at, slot]).hex()}"

    return [Violation(check_name, symptom, f"row {row}: {message}", symptom, (row, slot), shown(one), shown(other))]


@check("routing", "determinism", relation=True)
def determinism(seen: RoutingObservation) -> list[Violation]:
    """The same input twice, the same bits, where the target declares it."""
    if not seen.info.contract.deterministic or not seen.tokens:
        return []
    again = seen.call(seen.inputs)
    if same(seen.outputs, again):
        return []
    rows = (~seen.unwritten & ~(seen.flagged & (seen.dialect == "garbage"))).nonzero().flatten()
    one, other = pick(seen.outputs, rows), pick(again, rows)
    if not differs(one, other).any():
        return []
    return violation("determinism", "the same input gave other bits when run again", rows, one, other)


@check("routing", "isolation", relation=True)
def isolation(seen: RoutingObservation) -> list[Violation]:
    """Other contents in the padding and undefined rows, the same bits in the real ones (P4 of the bug table)."""
    if not seen.info.contract.deterministic or seen.all_defined or not seen.any_defined:
        return []
    other_inputs, other = seen.healed
    one = seen.outputs
    if same(one, other):
        return []
    rows = seen.defined.nonzero().flatten()
    if not differs(one, other)[rows].any() or not steady(seen, seen.inputs, other_inputs, rows, rows):
        return []
    message = "other contents in padding rows changed this real row"
    return violation("isolation", message, rows, pick(one, rows), pick(other, rows))


@check("routing", "batch_invariance", relation=True)
def batch_invariance(seen: RoutingObservation) -> list[Violation]:
    """Fewer rows in another order, the same bits in each. Padding is healed first: what it does, `isolation` says."""
    if not seen.info.contract.batch_invariant or seen.tokens < 2 or not seen.any_defined:
        return []
    rows, other_inputs = seen.fewer
    base_inputs, base = seen.healed
    one, other = pick(base, rows), seen.call(other_inputs)
    if same(one, other):
        return []
    everyone = torch.arange(len(rows), device=rows.device)
    if not differs(one, other).any() or not steady(seen, base_inputs, other_inputs, rows, everyone):
        return []
    return violation("batch_invariance", "alone with fewer rows, this row has other bits", rows, one, other)


def ahead(seen: RoutingObservation) -> Sequence[Inputs]:
    """What the relations above will call, as far as they can know before there are outputs."""
    contract = seen.info.contract
    calls: list[Inputs] = []
    if contract.deterministic and seen.tokens:
        calls.append(seen.inputs)
    some = seen.any_defined
    invariant = contract.batch_invariant and seen.tokens > 1 and some
    if some and not seen.all_defined and (contract.deterministic or invariant):
        calls.append(seen.healed_inputs)
    if invariant:
        calls.append(seen.fewer[1])
    return calls
