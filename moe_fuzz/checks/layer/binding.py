"""Wrong answers of a layer, made from the right one, of which each must be rejected on this very case."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from moe_fuzz.checks import CHECKS, PARITY
from moe_fuzz.checks.layer.observation import LayerObservation, Outputs

_JUDGES = ("ids", "finite")


def wrong_answers(seen: LayerObservation) -> Iterator[tuple[str, Outputs]]:
    """All zero; rows exchanged; two experts swapped; y of weights that are all the same."""
    outputs = seen.outputs
    yield "all zero", Outputs(*map(torch.zeros_like, (outputs.y, outputs.weights, outputs.ids)))
    yield "no experts", replace(outputs, y=torch.zeros_like(outputs.y))
    judged = seen.rows
    if len(judged) > 1:
        y = outputs.y.clone()
        y[judged] = outputs.y[judged.roll(1)]
        yield "rows exchanged", replace(outputs, y=y)
    experts = seen.logits.shape[1]
    if experts > 1:
        one = outputs.ids[:, :1]
        neighbour = torch.where(one == 0, experts - 1, one - 1)
        swapped = torch.where(outputs.ids == one, neighbour, torch.where(outputs.ids == neighbour, one, outputs.ids))
        yield "two experts swapped", replace(outputs, ids=swapped)
        y = outputs.y.clone()
        y[judged] = seen.of_decision(outputs.weights, swapped).y.to(y.dtype)
        yield "the next expert asked", replace(outputs, y=y)


def binding(seen: LayerObservation) -> list[str]:
    """The wrong answers that no check rejected; empty when the case proves parity."""
    if not len(seen.rows):
        return ["no row is defined"]
    return [name for name, outputs in wrong_answers(seen) if not _rejected(seen, outputs)]


def _rejected(seen: LayerObservation, outputs: Outputs) -> bool:
    wrong = seen.with_outputs(outputs)
    return any(CHECKS["layer"][name](wrong) for name in (*_JUDGES, *PARITY["layer"]))
