"""Relations between two calls, bit for bit: blocks do not see each other, the same input gives the same bytes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moe_fuzz.checks import check
from moe_fuzz.checks.coordinates import first
from moe_fuzz.checks.nvfp4.observation import Outputs, QuantizeObservation
from moe_fuzz.checks.relations import REPEATS
from moe_fuzz.ops.nvfp4.inputs import QuantizeInputs
from moe_fuzz.verdict import Violation


def ahead(seen: QuantizeObservation) -> Sequence[QuantizeInputs]:
    """What the relations will call, whatever came back."""
    found = []
    if seen.healed_inputs is not seen.inputs:
        found.append(seen.healed_inputs)
    if _invariant(seen):
        found.append(seen.fewer[1])
    if seen.info.contract.deterministic:
        found.append(seen.inputs)
    return found


def _invariant(seen: QuantizeObservation) -> bool:
    # A graph is replayed on the rows that it was captured for.
    return seen.info.contract.batch_invariant and seen.rows > 1 and seen.eager is None


def changed(one: QuantizeObservation, other: QuantizeObservation) -> torch.Tensor:
    """bool [M, B]: blocks whose bytes differ between two calls."""
    return (one.codes != other.codes).any(dim=2) | (one.bytes != other.bytes)


def _rows(seen: QuantizeObservation, inputs: QuantizeInputs, outputs: Outputs) -> QuantizeObservation:
    """Another call, to be looked at block by block."""
    return QuantizeObservation(seen.case, seen.step_index, seen.info, inputs, outputs, seen.call)


def _violation(seen: QuantizeObservation, other: QuantizeObservation, name: str, symptom: str, message: str,
               differs: torch.Tensor, rows: torch.Tensor | None = None) -> list[Violation]:  # fmt: skip
    """rows: which row of `seen` each of `other` is."""
    at, block = first(differs)
    row = at if rows is None else int(rows[at])
    tensor = "scales" if seen.bytes[row, block] != other.bytes[at, block] else "codes"
    mine, theirs = ((f"{int(seen.bytes[row, block]):#04x}", f"{int(other.bytes[at, block]):#04x}")
                    if tensor == "scales" else
                    (str(seen.codes[row, block].tolist()), str(other.codes[at, block].tolist())))  # fmt: skip
    return [Violation(name, symptom, f"block {block} of row {row}: {message}", tensor, (row, block), theirs, mine)]


@check("nvfp4", "isolation", relation=True)
def isolation(seen: QuantizeObservation) -> list[Violation]:
    """A block that is finite has the same bytes whatever NaN or Inf stand in others (aiter#6275)."""
    if seen.healed_inputs is seen.inputs:
        return []
    inputs = seen.healed_inputs
    other = _rows(seen, inputs, seen.call(inputs))
    differs = changed(seen, other) & seen.sound
    if not differs.any():
        return []
    for _ in range(REPEATS):  # a difference that comes and goes is nondeterminism
        if changed(other, _rows(seen, inputs, seen.call(inputs))).any() or (
            changed(seen, _rows(seen, seen.inputs, seen.call(seen.inputs))) & seen.sound
        ).any():
            return []
    row = first(differs)[0]
    symptom = "block" if not bool(seen.sound[row].all()) else "row"
    message = "has other bytes when a block with NaN or Inf is replaced by an ordinary one"
    return _violation(seen, other, "isolation", symptom, message, differs)


@check("nvfp4", "batch_invariance", relation=True)
def batch_invariance(seen: QuantizeObservation) -> list[Violation]:
    """A row alone, or among others in another order, has the same bytes, where the target declares it."""
    if not _invariant(seen):
        return []
    rows, inputs = seen.fewer
    other = _rows(seen, inputs, seen.call(inputs))
    differs = ((other.codes != seen.codes[rows]).any(dim=2) | (other.bytes != seen.bytes[rows])) & seen.promised[rows]
    if not differs.any():
        return []
    message = "has other bytes when other rows are taken away"
    return _violation(seen, other, "batch_invariance", "rows", message, differs, rows)


@check("nvfp4", "determinism", relation=True)
def determinism(seen: QuantizeObservation) -> list[Violation]:
    """The same input twice, the same bytes, where the target declares it."""
    if not seen.info.contract.deterministic:
        return []
    other = _rows(seen, seen.inputs, seen.call(seen.inputs))
    differs = changed(seen, other)
    if not differs.any():
        return []
    return _violation(seen, other, "determinism", "bytes", "the same input gave other bytes", differs)


@check("nvfp4", "replay")
def replay(seen: QuantizeObservation) -> list[Violation]:
    """What a replay gives is what an eager call gives. Nothing to say in the eager mode."""
    if seen.eager is None or not seen.info.contract.deterministic or not seen.rows:
        return []
    eager = _rows(seen, seen.inputs, seen.eager(seen.inputs))
    differs = changed(seen, eager)
    if not differs.any():
        return []
    for _ in range(REPEATS):
        if changed(eager, _rows(seen, seen.inputs, seen.eager(seen.inputs))).any():
            return []  # where its eager calls do not agree among themselves: that is for `determinism` to say
    return _violation(seen, eager, "replay", "bytes", "a replay gave other bytes than an eager call", differs)
