"""Relations between two calls of a layer, bit for bit: padding changes nothing, a replay is an eager call."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moe_fuzz.checks import check
from moe_fuzz.checks.coordinates import first
from moe_fuzz.checks.layer.observation import LayerObservation, Outputs
from moe_fuzz.checks.relations import REPEATS, differs, pick, steady, tensors
from moe_fuzz.ops.inputs import Inputs, element_bits
from moe_fuzz.ops.layer.inputs import LayerInputs
from moe_fuzz.verdict import Violation


@check("layer", "determinism", relation=True)
def determinism(seen: LayerObservation) -> list[Violation]:
    """The same input twice, the same bits, where the target declares it."""
    if not seen.info.contract.deterministic or not len(seen.comparable):
        return []
    return _compared(seen, "determinism", "the same input gave other bits when run again", seen.comparable,
                     seen.outputs, seen.call(seen.inputs))  # fmt: skip


@check("layer", "isolation", relation=True)
def isolation(seen: LayerObservation) -> list[Violation]:
    """Other contents in the padding and undefined rows, of any rank, the same bits in the real ones; so with huge
    numbers in other real rows, which then go to other experts.

    Only where the target declares it: an expert that has fewer rows may be multiplied in another order. What is no
    rounding, `bound` tells anyhow.
    """
    if not _isolated(seen):
        return []
    rows, found = seen.defined.nonzero().flatten(), list[Violation]()
    if len(rows) and not seen.defined.all():
        found = _changed(seen, seen.healed_inputs, rows, "other contents in padding rows changed this real row")
    if seen.neighbours is not None and not found:
        rows, inputs = seen.neighbours
        found = _changed(seen, inputs, rows, "huge numbers in other rows changed this one")
    return found


def _changed(seen: LayerObservation, inputs: LayerInputs, rows: torch.Tensor, message: str) -> list[Violation]:
    """What these inputs change of rows that are in both, int64 [R]."""
    other = seen.call(inputs)
    if not differs(seen.outputs, other)[rows].any() or not steady(seen, seen.inputs, inputs, rows, rows):
        return []
    return _compared(seen, "isolation", message, rows, seen.outputs, other)


@check("layer", "replay")
def replay(seen: LayerObservation) -> list[Violation]:
    """What a replay gives is what an eager call gives. Nothing to say in the eager mode."""
    if seen.eager is None or not seen.info.contract.deterministic or not len(seen.comparable):
        return []
    eager, rows = seen.eager(seen.inputs), seen.comparable
    if not differs(seen.outputs, eager)[rows].any():
        return []
    if any(differs(eager, seen.eager(seen.inputs))[rows].any() for _ in range(REPEATS)):
        return []  # its eager calls do not agree among themselves: that is for `determinism` to say
    return _compared(seen, "replay", "a replay of the graph gave other bits than an eager call", rows, eager,
                     seen.outputs)  # fmt: skip


def _isolated(seen: LayerObservation) -> bool:
    contract = seen.info.contract
    return contract.deterministic and (contract.isolated or contract.batch_invariant)


def _compared(
    seen: LayerObservation, name: str, message: str, rows: torch.Tensor, wanted: Outputs, got: Outputs
) -> list[Violation]:
    """The first difference between two answers on these rows, int64 [R]."""
    one, other = pick(wanted, rows), pick(got, rows)
    if not differs(one, other).any():
        return []
    pairs = {key: (value, tensors(other)[key]) for key, value in tensors(one).items()}
    for result in ("ids", "weights", "y"):  # in the order in which they were made
        a, b = pairs[result]
        wrong = element_bits(a) != element_bits(b)
        if wrong.any():
            at = first(wrong)
            half = "experts'" if result == "y" else "router's"
            row = int(rows[at[0]])
            return [Violation(name, result, f"row {row}: {message}, in the {half} half", result, (row, at[1]),
                              _shown(a[at]), _shown(b[at]))]  # fmt: skip
    return []


def _shown(value: torch.Tensor) -> str:
    return float(value).hex() if value.is_floating_point() else str(int(value))


def ahead(seen: LayerObservation) -> Sequence[Inputs]:
    """What the relations above will call, as far as they can know before there are outputs."""
    if not seen.info.contract.deterministic or not seen.tokens:
        return []
    calls: list[Inputs] = [seen.inputs]
    if _isolated(seen):
        calls += [seen.healed_inputs] if bool(seen.defined.any()) and not bool(seen.defined.all()) else []
        calls += [seen.neighbours[1]] if seen.neighbours is not None else []
    return calls
