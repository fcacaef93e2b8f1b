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
            rank, row, column = first(differs)
            where = (rank + 1, row, column)
            message = f"row {row}, column {column}: {name} of rank {rank + 1} is not that of rank 0"
            return [Violation("ranks", f"{name}:bits", message, name, where, float(got[0, row, column]).hex(),
                              float(got[where]).hex())]  # fmt: skip
    return []


@check("allreduce", "pads")
def pads(seen: AllreduceObservation) -> list[Violation]:
    """Signal pads are zero when all calls have ended: what is left in one, a later wait takes for its own signal."""
    return peers.pads()


@check("allreduce", "tail")
def tail(seen: AllreduceObservation) -> list[Violation]:
    """What lies behind the largest message in the buffers that the ranks read from each other keeps its pattern."""
    return peers.tails()
