"""The same input, the same bits: when called again, and in a graph's replay, where the target declares it."""

from __future__ import annotations

import torch

from moe_fuzz.checks import check
from moe_fuzz.checks.coordinates import first
from moe_fuzz.checks.experts.observation import ExpertsObservation, Outputs
from moe_fuzz.checks.relations import REPEATS, differs
from moe_fuzz.ops.inputs import element_bits
from moe_fuzz.verdict import Violation


def other_bits(check_name: str, message: str, one: torch.Tensor, other: torch.Tensor, rows: torch.Tensor,
               expected: str = "") -> list[Violation]:  # fmt: skip
    """Of the first element whose bits differ; `rows` are the tokens of both, int64 [R]."""
    where = first(element_bits(one) != element_bits(other))
    token = int(rows[where[0]])
    return [Violation(check_name, "bits", f"token {token}: {message}", "y", (token, where[1]),
                      expected or float(one[where]).hex(), float(other[where]).hex())]  # fmt: skip


def _same_where_written(seen: ExpertsObservation, other: Outputs) -> bool:
    """Whether no row that was written as a whole has other bits."""
    return not (differs(seen.outputs, other) & ~seen.missing.any(dim=1)).any()


@check("experts", "determinism", relation=True)
def determinism(seen: ExpertsObservation) -> list[Violation]:
    """The same input twice, the same bits, where the target declares it."""
    if not seen.info.contract.deterministic or not seen.tokens:
        return []
    again = seen.call(seen.inputs)
    if _same_where_written(seen, again):
        return []
    rows = (~seen.missing.any(dim=1)).nonzero().flatten()
    one, other = seen.outputs.y[rows], again.y[rows]
    return other_bits("determinism", "the same input gave other bits when run again", one, other, rows)


@check("experts", "replay")
def replay(seen: ExpertsObservation) -> list[Violation]:
    """What a replay gives is what an eager call gives. Nothing to say in the eager mode."""
    if seen.eager is None or not seen.info.contract.deterministic or not seen.tokens:
        return []
    eager = seen.eager(seen.inputs)
    if _same_where_written(seen, eager):
        return []
    rows = (~seen.missing.any(dim=1)).nonzero().flatten()
    one, other = eager.y[rows], seen.outputs.y[rows]
    if any(differs(eager, seen.eager(seen.inputs))[rows].any() for _ in range(REPEATS)):
        return []  # its eager calls do not agree among themselves: that is for `determinism` to say
    return other_bits("replay", "a replay of the graph gave other bits than an eager call", one, other, rows)
