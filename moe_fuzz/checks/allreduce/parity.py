"""The values of both outputs: known to the bit where the contract or the data say so, else within a bound."""

from __future__ import annotations

import torch

from moe_fuzz.checks import check
from moe_fuzz.checks.allreduce.observation import AllreduceObservation
from moe_fuzz.checks.coordinates import first
from moe_fuzz.ops.inputs import element_bits
from moe_fuzz.verdict import Violation


@check("allreduce", "exact", parity=True)
def exact(seen: AllreduceObservation) -> list[Violation]:
    """residual_out where every sum is exact: whole numbers that fit the dtype, in any order of ranks."""
    wanted, known = seen.exact
    got = seen.outputs.residual_out
    return _differ(seen, "exact", "is not the exact sum", wanted, known & seen.judged & (got != wanted))


@check("allreduce", "residual", parity=True)
def residual(seen: AllreduceObservation) -> list[Violation]:
    """residual_out to the bit, where the target declares in which order it sums and what it rounds (aiter#2586)."""
    if seen.info.contract.sum_order != "rank":
        return []
    wanted, known = seen.ordered
    differs = element_bits(seen.outputs.residual_out) != element_bits(wanted)
    return _differ(seen, "residual", "has other bits than float32 sums in the order of ranks", wanted,
                   known & seen.judged & differs)  # fmt: skip


def _differ(
    seen: AllreduceObservation, name: str, what: str, wanted: torch.Tensor, wrong: torch.Tensor
) -> list[Violation]:
    if not wrong.any():
        return []
    rank, row, column = where = first(wrong)
    text = f"rank {rank}, row {row}, column {column}: residual_out {what}" + _explained(seen, where)
    return [Violation(name, "bits", text, "residual_out", where, f"{float(wanted[row, column]):.9g}",
                      f"{float(seen.outputs.residual_out[where]):.9g}")]  # fmt: skip


def _explained(seen: AllreduceObservation, where: tuple[int, ...]) -> str:
    """What a wrong sum would be right for, if it is one rank's part that is missing or counted twice."""
    _, row, column = where
    off = float(seen.outputs.residual_out[where].double() - seen.sums[0].value[row, column])
    parts = [(f"the part of rank {rank}", float(part[row, column])) for rank, part in enumerate(seen.x)]
    if seen.residual is not None:
        parts.append(("the residual", float(seen.residual[row, column])))
    near = float(seen.sums[1].bound[row, column])
    for name, value in parts:
        if abs(value) > 4 * near:
            if abs(off + value) <= 2 * near:
                return f"; {name} is missing"
            if abs(off - value) <= 2 * near:
                return f"; {name} is in it twice"
    return ""


@check("allreduce", "bound", parity=True)
def bound(seen: AllreduceObservation) -> list[Violation]:
    """|output - float64| <= the running error through the sum, the norm and the stores, on every rank."""
    found: list[Violation] = []
    used = 0.0
    sums = seen.sums[1]
    for name, value, limit in (
        ("residual_out", sums.value, sums.bound), ("normed", seen.expected.value, seen.expected.bound),
    ):  # fmt: skip
        got = getattr(seen.outputs, name).double()
        share = torch.where(limit.isinf() | ~seen.judged, 0.0, (got - value).abs() / limit)
        wrong = ~(share <= 1)  # NaN is wrong
        if wrong.any():
            rank, row, column = where = first(wrong)
            at = where[3 - value.dim() :]
            off = float(share[where])
            text = f"rank {rank}, row {row}, column {column}: {name} is off by {off:.3g} bounds"
            text += _explained(seen, where) if name == "residual_out" else ""
            symptom = f"{name}:nan" if off != off else f"{name}:off"
            found.append(Violation("bound", symptom, text, name, where,
                                   f"{float(value[at]):.9g} within {float(limit[at]):.3g}",
                                   f"{float(got[where]):.9g}", off))  # fmt: skip
            break  # the norm of a wrong sum says nothing new
        used = max(used, float(share.max()) if share.numel() else 0.0)
    seen.budget["bound"] = used
    return found
