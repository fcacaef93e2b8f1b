"""Wrong answers, made from the right one, of which each must be rejected on this very case."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from moe_fuzz.checks.allreduce.bounds import bounded_norm, bounded_sum
from moe_fuzz.checks.allreduce.observation import AllreduceObservation, Outputs
from moe_fuzz.checks.binding import SAMPLE, rejected


def wrong_answers(seen: AllreduceObservation) -> Iterator[tuple[str, Outputs]]:
    """All zero; the last rank left out; no residual; gamma ignored; the row before; what the ranks held at first."""
    outputs, x, dtype = seen.outputs, seen.x, seen.x.dtype
    yield "all zero", Outputs(torch.zeros_like(outputs.normed), torch.zeros_like(outputs.residual_out))
    if len(x) > 1:
        yield "a rank left out", _of(seen, x[:-1], seen.residual)
    if seen.residual is not None and seen.residual[seen.defined].any():
        yield "no residual", _of(seen, x, None)
    if not (seen.inputs.plain["gamma"] == 1).all():
        bare = seen.with_outputs(outputs)
        weight = torch.ones_like(seen.inputs.plain["gamma"])
        value = bounded_norm(bare.sums[0], weight, float(seen.inputs.options["eps"]), dtype, seen.info.contract).value
        yield "gamma ignored", replace(outputs, normed=value.to(dtype).expand(outputs.normed.shape))
    if seen.inputs.tokens > 1:
        yield "rows exchanged", Outputs(outputs.normed.roll(1, dims=1), outputs.residual_out.roll(1, dims=1))


def _of(seen: AllreduceObservation, x: torch.Tensor, residual: torch.Tensor | None) -> Outputs:
    """What another sum would have given."""
    contract, dtype = seen.info.contract, seen.x.dtype
    total = bounded_sum(x, residual, contract)[0]
    normed = bounded_norm(total, seen.inputs.plain["gamma"], float(seen.inputs.options["eps"]), dtype, contract)
    shape = seen.outputs.normed.shape
    return Outputs(normed.value.to(dtype).expand(shape), total.value.to(dtype).expand(shape))


def binding(seen: AllreduceObservation) -> list[str]:
    """The wrong answers that no check rejected; empty when the case proves parity."""
    rows = (seen.defined & (seen.sums[0].value != 0).any(dim=1)).nonzero().flatten()
    if not len(rows):
        return ["no row is judged"]
    few = _taken(seen, rows[:: -(-len(rows) // SAMPLE)])
    return [name for name, outputs in wrong_answers(few) if not rejected(few.with_outputs(outputs), "allreduce")]


def _taken(seen: AllreduceObservation, rows: torch.Tensor) -> AllreduceObservation:
    """These rows alone, int64 [n]."""
    tensors = {"x": seen.x[:, rows]} | ({} if seen.residual is None else {"residual": seen.residual[rows]})
    outputs = Outputs(seen.outputs.normed[:, rows], seen.outputs.residual_out[:, rows])
    few = replace(seen, inputs=seen.inputs.replace(**tensors), outputs=outputs, budget={})
    return few
