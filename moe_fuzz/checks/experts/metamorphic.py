"""Relations between two calls: padding changes nothing, a row stands alone, names of experts mean nothing, shards sum
to the whole, and a factor of two is one."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moe_fuzz.checks import check
from moe_fuzz.checks.coordinates import first
from moe_fuzz.checks.experts.bounds import evaluate
from moe_fuzz.checks.experts.determinism import other_bits
from moe_fuzz.checks.experts.observation import ExpertsObservation, Outputs
from moe_fuzz.checks.experts.others import RANKS, SCALE
from moe_fuzz.checks.relations import differs, pick, steady
from moe_fuzz.mirror import answers, on_host, uploaded
from moe_fuzz.ops.experts.inputs import ExpertsInputs
from moe_fuzz.ops.inputs import Inputs, element_bits
from moe_fuzz.verdict import Violation


def _off(check_name: str, message: str, other: torch.Tensor, low: torch.Tensor, high: torch.Tensor,
         claimed: torch.Tensor) -> list[Violation]:  # fmt: skip
    """Of the first claimed value outside [low, high]; NaN is outside. All [T, H]."""
    wrong = claimed & ~((low <= other) & (other <= high))
    if not wrong.any():
        return []
    where = first(wrong)
    allowed = float(low[where]), float(high[where])
    return [Violation(check_name, "off", f"token {where[0]}: {message}", "y", where,
                      f"{allowed[0]:.9g} to {allowed[1]:.9g}", f"{float(other[where]):.9g}",
                      allowed=allowed)]  # fmt: skip


@check("experts", "isolation", relation=True)
def isolation(seen: ExpertsObservation) -> list[Violation]:
    """Other contents in padding rows, in undefined rows and in the weights of dropped slots, the same real rows: bit
    for bit where the target is deterministic, else within their bounds. So with huge numbers in other real rows."""
    found: list[Violation] = []
    if seen.healed_inputs is not seen.inputs and on_host(seen.real).any():
        message = "other contents in padding rows or dropped slots changed this real row"
        found = _isolated(seen, seen.healed_inputs, seen.healed[1], seen.real, message)
    if seen.neighbours is not None and not found:
        rows, inputs = seen.neighbours
        found = _isolated(seen, inputs, seen.call(inputs), rows, "huge numbers in other rows changed this one")
    return found


def _isolated(
    seen: ExpertsObservation, inputs: ExpertsInputs, other: Outputs, kept: torch.Tensor, message: str
) -> list[Violation]:
    """What another call changed of the rows that it has in common with this one, bool [T]."""
    (low, high), y = seen.limits, other.y.double()
    off = seen.well & kept[:, None] & ~((low <= y) & (y <= high))
    other_rows = differs(seen.outputs, other) & kept
    outside, changed = answers([off.any(), other_rows.any()])
    if outside:
        return _off("isolation", message, y, low, high, off)
    if not (changed and seen.info.contract.deterministic):
        return []
    rows = kept.nonzero().flatten()
    if not steady(seen, seen.inputs, inputs, rows, rows):
        return []
    return other_bits("isolation", message, seen.outputs.y[rows], other.y[rows], rows)


@check("experts", "batch_invariance", relation=True)
def batch_invariance(seen: ExpertsObservation) -> list[Violation]:
    """Fewer rows in another order, the same bits in each. Padding is healed first: what it does, `isolation` says."""
    if not seen.info.contract.batch_invariant or seen.tokens < 2 or not on_host(seen.real).any():
        return []
    rows, other_inputs = seen.fewer
    base_inputs, base = seen.healed
    one, other = pick(base, rows), seen.call(other_inputs)
    everyone = torch.arange(len(rows), device=rows.device)
    if not differs(one, other).any() or not steady(seen, base_inputs, other_inputs, rows, everyone):
        return []
    return other_bits("batch_invariance", "alone with fewer rows, this row has other bits", one.y, other.y, rows)


@check("experts", "relabel", relation=True)
def relabel(seen: ExpertsObservation) -> list[Violation]:
    """The experts in another order, the ids with them: the same result within its bounds."""
    inputs = seen.relabelled
    if inputs is None:
        return []
    other = seen.call(inputs).y.double()
    return _off("relabel", "with the experts in another order, y is another", other, *seen.limits, seen.well)


@check("experts", "shards", relation=True)
def shards(seen: ExpertsObservation) -> list[Violation]:
    """The experts shared by two ranks, each with a map: the partial results sum to the whole within their bounds."""
    parts = seen.sharded
    if not parts:
        return []
    total, bound = torch.zeros_like(seen.y), torch.zeros_like(seen.y)
    for rank, inputs in enumerate(parts):
        expert = on_host(seen.expert)
        local = uploaded(torch.where(expert % RANKS == rank, expert, -1), seen.expert.device)
        numbers = evaluate(seen.inputs, local, seen.info.contract, free=not seen.info.declared)
        total += (seen.eager or seen.call)(inputs).y.double()  # a graph has the experts of its capture
        bound += torch.where((local >= 0).any(dim=1)[:, None], numbers.bound, 0.0)
    most = torch.finfo(seen.x.dtype).max
    claimed = seen.well & (seen.numbers.value.abs() + bound < most)  # else a part may be infinite
    value = seen.numbers.value
    return _off("shards", "the partial results of two ranks do not sum to what the reference gives",
                total, value - bound, value + bound, claimed)  # fmt: skip


@check("experts", "scaling", relation=True)
def scaling(seen: ExpertsObservation) -> list[Violation]:
    """Twice the routing weights, twice the result: bit for bit in bfloat16 where deterministic, as nothing comes near
    the ends of its exponents; else within the bounds."""
    inputs = seen.scaled
    if inputs is None:
        return []
    message, other = "with twice the weights, y is not twice what it was", seen.call(inputs).y
    low, high = seen.limits
    inside = seen.well & (seen.y.abs() < torch.finfo(seen.x.dtype).max / 4) & low.isfinite() & high.isfinite()
    if not seen.info.contract.deterministic or seen.x.dtype == torch.float16:
        return _off("scaling", message, other.double(), SCALE * low, SCALE * high, inside)
    twice = (seen.outputs.y.double() * SCALE).to(other.dtype)
    moderate = inside & (seen.y.abs() > 2.0**-60)  # nor do its slots, but for what cancels
    wrong = moderate & (element_bits(twice) != element_bits(other))
    rows = torch.arange(seen.tokens, device=wrong.device)
    if not wrong.any() or not steady(seen, seen.inputs, inputs, rows, rows):
        return []
    return other_bits("scaling", message, torch.where(moderate, twice, 0.0), torch.where(moderate, other, 0.0), rows)


@check("experts", "backends", relation=True)
def backends(seen: ExpertsObservation) -> list[Violation]:
    """Each backend that can be forced: within the bounds, and the known bits where every sum is exact."""
    for name, inputs in seen.forced.items():
        other = (seen.eager or seen.call)(inputs).y.double()  # a graph has the backend of its capture
        low, high = seen.limits
        if seen.inputs.exact:
            expected, known = seen.exact
            low, high = torch.where(known, expected, low), torch.where(known, expected, high)
        found = _off("backends", f"with the backend {name!r}, y is another", other, low, high, seen.well)
        if found:
            return found
    return []


def ahead(seen: ExpertsObservation) -> Sequence[Inputs]:
    """What the relations will call, as far as they can know before there are outputs."""
    contract = seen.info.contract
    calls: list[Inputs] = []
    if not seen.tokens:
        return calls
    some = bool(on_host(seen.real).any())
    invariant = contract.batch_invariant and seen.tokens > 1 and some
    if contract.deterministic:
        calls.append(seen.inputs)
    if some and seen.healed_inputs is not seen.inputs:
        calls.append(seen.healed_inputs)
    if seen.neighbours is not None:
        calls.append(seen.neighbours[1])
    if invariant:
        calls.append(seen.fewer[1])
    parts = [*seen.sharded, *seen.forced.values()] if seen.eager is None else []
    calls += [inputs for inputs in (seen.relabelled, *parts, seen.scaled) if inputs is not None]
    return calls

