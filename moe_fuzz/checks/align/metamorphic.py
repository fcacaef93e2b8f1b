"""Relations between two calls, bit for bit: the same ids give the same plan, in a graph too."""

from __future__ import annotations

from collections.abc import Sequence

from moe_fuzz.checks import check
from moe_fuzz.checks.align.observation import AlignObservation, Outputs
from moe_fuzz.checks.coordinates import first
from moe_fuzz.checks.relations import REPEATS
from moe_fuzz.ops.align.inputs import AlignInputs
from moe_fuzz.verdict import Violation


def ahead(seen: AlignObservation) -> Sequence[AlignInputs]:
    """What the relations will call, whatever came back."""
    return (seen.inputs,) if seen.info.contract.deterministic else ()


def _difference(seen: AlignObservation, one: Outputs, other: Outputs) -> tuple[str, tuple[int, ...]] | None:
    """The first result that differs in a bit that was written, and where; the end of expert_ids if it is promised."""
    for name, left in seen.unwritten.items():
        a, b = getattr(one, name), getattr(other, name)
        if b is None or a.shape != b.shape:
            return name, ()
        differs = (a != b) & ~left
        if name == "expert_ids" and seen.info.contract.tail != "minus_one":
            differs[seen.blocks :] = False
        if differs.any():
            return name, first(differs)
    return None


def _violation(name: str, message: str, found: tuple[str, tuple[int, ...]], one: Outputs,
               other: Outputs) -> list[Violation]:  # fmt: skip
    result, where = found
    shapes = "a shape", "another shape"
    expected, got = (str(int(getattr(outputs, result)[where])) if where else shape
                     for outputs, shape in zip((one, other), shapes, strict=True))  # fmt: skip
    return [Violation(name, result, f"{result}: {message}", result, where, expected, got)]


@check("align", "determinism", relation=True)
def determinism(seen: AlignObservation) -> list[Violation]:
    """The same input twice, the same bits, where the target declares it."""
    if not seen.info.contract.deterministic:
        return []
    other = seen.call(seen.inputs)
    found = _difference(seen, seen.outputs, other)
    return _violation("determinism", "the same input gave other bits when run again", found, seen.outputs,
                      other) if found else []  # fmt: skip


@check("align", "replay")
def replay(seen: AlignObservation) -> list[Violation]:
    """What a replay gives is what an eager call gives. Nothing to say in the eager mode."""
    if seen.eager is None or not seen.info.contract.deterministic:
        return []
    eager = seen.eager(seen.inputs)
    found = _difference(seen, eager, seen.outputs)
    if not found or any(_difference(seen, eager, seen.eager(seen.inputs)) for _ in range(REPEATS)):
        return []  # where its eager calls do not agree among themselves: that is for `determinism` to say
    return _violation("replay", "a replay of the graph gave other bits than an eager call", found, eager, seen.outputs)
