"""Rules that need no reference: shapes, elements that were written, the same bits on all ranks, the ranks' memory."""

from __future__ import annotations

from dataclasses import replace

from moe_fuzz.checks import check, outputs
from moe_fuzz.checks.allreduce.observation import AllreduceObservation
from moe_fuzz.checks.coordinates import first
from moe_fuzz.execute import peers
from moe_fuzz.fence import unwritten
from moe_fuzz.ops.inputs import element_bits
from moe_fuzz.verdict import Violation


@check("allreduce", "structure")
def structure(seen: AllreduceObservation) -> list[Violation]:
    """Both outputs have the shape and the dtype of x."""
    return outputs.structure(seen.outputs, seen.inputs.results)


@check("allreduce", "written")
def written(seen: AllreduceObservation) -> list[Violation]:
    """No element still holds the poison that it had before the call."""
    left = {name: unwritten(getattr(seen.outputs, name)) for name in ("normed", "residual_out")}
    found = outputs.never_written(left)
    return [replace(one, message=f"rank {one.where[0]}: {one.message}") for one in found]


@check("allreduce", "ranks")
def ranks(seen: AllreduceObservation) -> list[Violation]:
    """The same bits on all ranks, in rows that are not defined too; a NaN is one whatever its bits."""
    if seen.x.shape[0] == 1:
        return []
    for name in ("residual_out", "normed"):
        got = getattr(seen.outputs, name)
        differs = (element_bits(got[1:]) != element_bits(got[:1])) & ~(got[1:].isnan() & got[:1].isnan())
        differs &= ~seen.missing[1:] & ~seen.missing[:1]
        if differs.any():
            _, row, column = first(differs)
            there = (~seen.missing[:, row, column]).nonzero().flatten().tolist()
            values = {rank: float(got[rank, row, column]) for rank in there}
            common, others = _apart(values)
            what = f"{name} of {_named(others)} is not that of {_named(common)}{_off(seen, name, row, column)}"
            return [Violation("ranks", f"{name}:bits", f"row {row}, column {column}: {what}", name,
                              (others[0], row, column), values[common[0]].hex(), values[others[0]].hex())]  # fmt: skip
    return []


def _apart(values: dict[int, float]) -> tuple[list[int], list[int]]:
    """The ranks with the value that most have, or that the first has where none is commoner; and all others."""
    ranks: dict[str, list[int]] = {}
    for rank, value in values.items():
        ranks.setdefault(value.hex(), []).append(rank)  # which tells -0 from 0, and no NaN from another
    common = max(ranks.values(), key=len)
    return common, [rank for rank in values if rank not in common]


def _named(ranks: list[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


def _off(seen: AllreduceObservation, name: str, row: int, column: int) -> str:
    """Which ranks are wrong, where some are and some are not."""
    if not seen.defined[row]:
        return ""
    of = seen.sums[1] if name == "residual_out" else seen.expected
    got = getattr(seen.outputs, name)[:, row, column].double()
    wanted = of.value[..., row, column].expand_as(got)  # of normed that which follows from the rank's own residual_out
    right = (got - wanted).abs() <= of.bound[..., row, column]
    off = (~right).nonzero().flatten().tolist()
    if not 0 < len(off) < len(got):
        return ""
    return f"; {_named(off)} of {len(got)} off, it should be {float(wanted[right][0]):.9g}"


@check("allreduce", "pads")
def pads(seen: AllreduceObservation) -> list[Violation]:
    """Signal pads are zero when all calls have ended: what is left in one, a later wait takes for its own signal."""
    return peers.pads()


@check("allreduce", "tail")
def tail(seen: AllreduceObservation) -> list[Violation]:
    """What lies behind the largest message in the buffers that the ranks read from each other keeps its pattern."""
    return peers.tails()
