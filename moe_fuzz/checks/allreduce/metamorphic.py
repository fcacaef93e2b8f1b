"""Relations between two calls, bit for bit: bad rows change no other, a replay is an eager call, and
which backend runs is nobody's business."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from moe_fuzz.checks import check
from moe_fuzz.checks.allreduce.observation import AllreduceObservation, Outputs
from moe_fuzz.checks.allreduce.parity import bound, exact, residual
from moe_fuzz.checks.allreduce.structural import ranks, written
from moe_fuzz.checks.coordinates import first
from moe_fuzz.checks.relations import REPEATS
from moe_fuzz.ops.allreduce.inputs import AllreduceInputs
from moe_fuzz.ops.inputs import element_bits
from moe_fuzz.verdict import Violation


def ahead(seen: AllreduceObservation) -> Sequence[AllreduceInputs]:
    """What the relations will call, whatever came back."""
    found = [seen.inputs] if seen.info.contract.deterministic else []
    found += [seen.healed_inputs] if _isolated(seen) else []
    found += [seen.forced[1]] if seen.forced else []
    return [*found, seen.fewer[1]] if _invariant(seen) else found


def _isolated(seen: AllreduceObservation) -> bool:
    contract = seen.info.contract
    some = bool(seen.defined.any()) and not bool(seen.defined.all())
    return contract.deterministic and (contract.isolated or contract.batch_invariant) and some


def changed(one: Outputs, other: Outputs, where: torch.Tensor) -> tuple[str, torch.Tensor] | None:
    """The output that differs first on these elements, bool [R, T, H] or what broadcasts to it, and where it does."""
    for name in ("residual_out", "normed"):
        a, b = getattr(one, name), getattr(other, name)
        differs = (element_bits(a) != element_bits(b)) & ~(a.isnan() & b.isnan()) & where
        if differs.any():
            return name, differs
    return None


def _compared(
    seen: AllreduceObservation, check_name: str, message: str, wanted: Outputs, got: Outputs, where: torch.Tensor
) -> list[Violation]:
    found = changed(wanted, got, where)
    if found is None:
        return []
    name, differs = found
    rank, row, column = at = first(differs)
    return [Violation(check_name, "bits", f"rank {rank}, row {row}, column {column}: {message}", name, at,
                      float(getattr(wanted, name)[at]).hex(), float(getattr(got, name)[at]).hex())]  # fmt: skip


@check("allreduce", "determinism", relation=True)
def determinism(seen: AllreduceObservation) -> list[Violation]:
    """The same input twice, the same bits, where the target declares it."""
    if not seen.info.contract.deterministic:
        return []
    return _compared(seen, "determinism", "the same input gave other bits when run again", seen.outputs,
                     seen.call(seen.inputs), ~seen.missing)  # fmt: skip


@check("allreduce", "isolation", relation=True)
def isolation(seen: AllreduceObservation) -> list[Violation]:
    """A row of finite numbers has the same bits whatever NaN, Inf and overflow stand in other rows of any rank."""
    if not _isolated(seen):
        return []
    other = seen.call(seen.healed_inputs)
    if changed(other, seen.outputs, seen.judged) is None:
        return []
    for _ in range(REPEATS):  # a difference that comes and goes is nondeterminism
        if changed(other, seen.call(seen.healed_inputs), seen.judged) or changed(
            seen.outputs, seen.call(seen.inputs), seen.judged
        ):
            return []
    message = "has other bits when other rows are replaced, in which some rank has no ordinary numbers"
    return _compared(seen, "isolation", message, other, seen.outputs, seen.judged)


@check("allreduce", "batch_invariance", relation=True)
def batch_invariance(seen: AllreduceObservation) -> list[Violation]:
    """Fewer rows in another order, the same bits in each, where the target declares it. What bad rows do, `isolation`
    says."""
    if not _invariant(seen):
        return []
    rows, fewer = seen.fewer
    alone = seen.call(fewer)
    whole = seen.outputs if seen.healed_inputs is seen.inputs else seen.call(seen.healed_inputs)
    one, where = _of_rows(whole, rows), torch.ones((), dtype=torch.bool, device=rows.device)
    if changed(one, alone, where) is None:
        return []
    for _ in range(REPEATS):  # a difference that comes and goes is nondeterminism
        if changed(alone, seen.call(fewer), where) or changed(
            one, _of_rows(seen.call(seen.healed_inputs), rows), where
        ):
            return []
    found = _compared(seen, "batch_invariance", "", one, alone, where)
    rank, row, column = found[0].where
    at = (rank, int(rows[row]), column)
    message = f"rank {rank}, row {at[1]}, column {column}: alone with fewer rows, it has other bits"
    return [replace(found[0], message=message, where=at)]


def _invariant(seen: AllreduceObservation) -> bool:
    """Not in graphs, whose sizes are fixed, nor across processes, where all ranks would have to call as often."""
    plain = seen.eager is None and seen.case.mode == "eager"
    return plain and seen.info.contract.batch_invariant and len(seen.fewer[0]) > 0


@check("allreduce", "backends", relation=True)
def backends(seen: AllreduceObservation) -> list[Violation]:
    """A backend that is forced gives each row the bits that the chosen one gave, where a row has the same bits whatever
    is beside it: sizes choose the backend. Else what it gives is judged like the outputs themselves."""
    if seen.forced is None:
        return []
    name, inputs = seen.forced
    other = seen.call(inputs)
    if not (seen.info.contract.deterministic and seen.info.contract.batch_invariant):
        forced = seen.with_outputs(other)
        found = next(filter(None, (judge(forced) for judge in (written, ranks, exact, residual, bound))), [])
        return [replace(one, check="backends", message=f"with the backend {name!r}: {one.message}") for one in found]
    if changed(seen.outputs, other, seen.judged) is None:
        return []
    for _ in range(REPEATS):  # a difference that comes and goes is nondeterminism
        if changed(seen.outputs, seen.call(seen.inputs), seen.judged) or changed(
            other, seen.call(inputs), seen.judged
        ):
            return []
    return _compared(seen, "backends", f"the backend {name!r} gives other bits", seen.outputs, other, seen.judged)


def _of_rows(outputs: Outputs, rows: torch.Tensor) -> Outputs:
    return Outputs(outputs.normed[:, rows], outputs.residual_out[:, rows])


@check("allreduce", "replay")
def replay(seen: AllreduceObservation) -> list[Violation]:
    """What a replay gives is what an eager call gives. Nothing to say in the eager mode."""
    if seen.eager is None or not seen.info.contract.deterministic or not seen.inputs.tokens:
        return []
    eager = seen.eager(seen.inputs)
    if changed(eager, seen.outputs, ~seen.missing) is None:
        return []
    if any(changed(eager, seen.eager(seen.inputs), ~seen.missing) for _ in range(REPEATS)):
        return []  # its eager calls do not agree among themselves: that is for `determinism` to say
    return _compared(seen, "replay", "a replay of the graph gave other bits than an eager call", eager, seen.outputs,
                     ~seen.missing)  # fmt: skip
